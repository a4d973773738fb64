package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.device.ProcessMemory;
import dev.tandem.device.Threads;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Random;
import java.util.stream.IntStream;

/**
 * Whole workloads, one in each process so that peaks of memory are its own:
 *
 * <pre>
 * EndToEnd generate REQUESTS PROMPT NEW   tokens/s of the engine
 * EndToEnd naive    REQUESTS PROMPT NEW   tokens/s of one request after the other without a KV cache
 * EndToEnd train    SEQUENCES LENGTH      tokens/s and peak of the engine's packed, layer-wise step
 * EndToEnd plain    SEQUENCES LENGTH      the same of a plain libtorch autograd loop
 * </pre>
 *
 * then {@code [MODEL_DIR | random] [float32|bfloat16] [MICRO_BATCH_TOKENS]}. Each figure is the median of several warm runs.
 */
final class EndToEnd {
    private static final int RUNS = 3;

    private EndToEnd() {}

    public static void main(String[] args) {
        String workload = args[0];
        boolean training = workload.equals("train") || workload.equals("plain");
        int[] sizes = Arrays.stream(args, 1, training ? 3 : 4).mapToInt(Integer::parseInt).toArray();
        int next = 1 + sizes.length;
        String model = args.length > next ? args[next] : "random";
        DType dtype = args.length > next + 1 ? DType.valueOf(args[next + 1].toUpperCase(Locale.ROOT)) : DType.FLOAT32;
        TrainerOptions options = TrainerOptions.defaults().lr(1e-6);
        if (args.length > next + 2) {
            options = options.microBatchTokens(Integer.parseInt(args[next + 2]));
        }
        EngineOptions engineOptions = EngineOptions.defaults().dtype(dtype).training(options);
        try (HybridEngine engine = model.equals("random")
                ? HybridEngine.create(ModelConfig.llama(8192, 256, 8, 8, 4, 768, 1024), null, engineOptions)
                : HybridEngine.open(Path.of(model), engineOptions)) {
            double speed = switch (workload) {
                case "generate" -> generate(engine, sizes[0], sizes[1], sizes[2]);
                case "naive" -> naive(engine, sizes[0], sizes[1], sizes[2]);
                case "train" -> train(engine, sizes[0], sizes[1]);
                case "plain" -> plain(engine, sizes[0], sizes[1]);
                default -> throw new IllegalArgumentException("unknown workload " + workload);
            };
            System.out.printf(Locale.ROOT, "%s %s %s %s: %.1f tokens/s, peak %.2f GiB, %d threads%n", workload, Arrays.toString(sizes),
                    model.equals("random") ? "random" : Path.of(model).getFileName(), dtype, speed,
                    ProcessMemory.peak() / 0x1p30, Threads.perOperation());
        }
    }

    private static double generate(HybridEngine engine, int requests, int prompt, int tokens) {
        SamplingParams params = SamplingParams.defaults().maxTokens(tokens).ignoreEos(true).seed(1);
        engine.generateTokens(prompts(engine, 1, 16, 0), params.maxTokens(4));
        double[] speeds = new double[RUNS];
        for (int run = 0; run < RUNS; run++) {
            List<int[]> prompts = prompts(engine, requests, prompt, run + 1);
            long start = System.nanoTime();
            engine.generateTokens(prompts, params);
            speeds[run] = requests * tokens / seconds(start);
        }
        return median(speeds);
    }

    /** The whole sequence goes through the model for every token: what generation costs without a KV cache and batching. */
    private static double naive(HybridEngine engine, int requests, int prompt, int tokens) {
        List<int[]> prompts = prompts(engine, requests, prompt, 1);
        long start = System.nanoTime();
        engine.onEachRank(rank -> {
            for (int[] sequence : prompts) {
                int[] all = Arrays.copyOf(sequence, prompt + tokens);
                for (int length = prompt; length < prompt + tokens; length++) {
                    all[length] = PlainModel.greedy(rank, Arrays.copyOf(all, length));
                }
            }
            return true;
        });
        return requests * tokens / seconds(start);
    }

    private static double train(HybridEngine engine, int sequences, int length) {
        List<TrainingSequence> batch = prompts(engine, sequences, length, 1).stream()
                .map(tokens -> TrainingSequence.of(tokens, 1, 1))
                .toList();
        double[] speeds = new double[RUNS + 1];
        for (int run = 0; run < speeds.length; run++) {
            TrainStep step = engine.train(batch);
            speeds[run] = sequences * length / step.seconds();
        }
        return median(Arrays.copyOfRange(speeds, 1, speeds.length));
    }

    private static double plain(HybridEngine engine, int sequences, int length) {
        engine.sleep();
        List<int[]> batch = prompts(engine, sequences, length, 1);
        return engine.onEachRank(rank -> {
            double[] speeds = new double[RUNS + 1];
            try (PlainModel.Training training = new PlainModel.Training(rank)) {
                for (int run = 0; run < speeds.length; run++) {
                    long start = System.nanoTime();
                    training.step(batch);
                    speeds[run] = sequences * length / seconds(start);
                }
            }
            return median(Arrays.copyOfRange(speeds, 1, speeds.length));
        }).getFirst();
    }

    private static List<int[]> prompts(HybridEngine engine, int count, int length, int seed) {
        Random random = new Random(seed);
        List<int[]> prompts = new ArrayList<>();
        IntStream.range(0, count).forEach(i -> prompts.add(random.ints(length, 5, engine.config().vocabSize()).toArray()));
        return prompts;
    }

    private static double seconds(long start) {
        return (System.nanoTime() - start) / 1e9;
    }

    private static double median(double[] values) {
        double[] sorted = values.clone();
        Arrays.sort(sorted);
        return sorted[sorted.length / 2];
    }
}
