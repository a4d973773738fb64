package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Timeline;
import dev.tandem.generation.Completion;
import dev.tandem.generation.LogprobKind;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.rl.Algorithm;
import dev.tandem.rl.PolicyUpdate;
import dev.tandem.rl.Rollout;
import dev.tandem.rl.StepMetrics;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Random;
import java.util.concurrent.atomic.LongAdder;
import jdk.jfr.consumer.RecordingStream;

/**
 * Whole GRPO steps on a GPU, random weights: 64 prompts of 64 to 480 tokens, 8 samples of each, every one with a length of its own, uniform
 * up to 1,024 tokens, as the peers' {@code trl_grpo.py}. Seconds by part.
 *
 * <pre>
 * GpuGrpo SHAPE[:PROMPTS]…
 * </pre>
 */
final class GpuGrpo {
    private static final Device CUDA = Device.cuda(0);
    private static final int PROMPTS = 64;
    private static final int SAMPLES = 8;
    private static final int LONGEST = 1024;
    private static final int STEPS = 4;

    /** Bytes a second that a copy of 2 GiB reads and writes, measured. */
    private static final double COPY = 4.28e12;

    private GpuGrpo() {}

    public static void main(String[] args) throws InterruptedException {
        for (String arg : args) {
            String shape = arg.split(":")[0];
            int prompts = arg.contains(":") ? Integer.parseInt(arg.split(":")[1]) : PROMPTS;
            LongAdder switching = new LongAdder();
            try (RecordingStream events = new RecordingStream();
                    HybridEngine engine = HybridEngine.create(Shapes.config(shape).withMaxPositions(2048), null,
                            EngineOptions.defaults().devices(CUDA).dtype(DType.BFLOAT16))) {
                events.enable("dev.tandem.PhaseChange").withThreshold(Duration.ZERO);
                events.onEvent("dev.tandem.PhaseChange", event -> switching.add(event.getDuration().toNanos()));
                events.startAsync();
                Random random = new Random(0);
                for (int i = 0; i < STEPS; i++) {
                    if (i == STEPS - 1) {
                        engine.recordTimeline();
                    }
                    step(engine, shape, i, random, prompts);
                }
                Timeline timeline = engine.timeline();
                events.stop();
                System.out.printf(Locale.ROOT, "%s: phase changes %.3f s a step; of the last step %.1f %% not computing%n%s%n%s%n", shape,
                        switching.sum() / 1e9 / STEPS, 100 * (1 - timeline.busy() / timeline.end()), timeline, engine.memory());
            }
        }
    }

    /**
     * The least seconds of generating: keys and values of the context once for each token, all weights once for each step of the longest
     * answer, at the rate of a copy; and the operations of the prompts, each prompt once, at the peak.
     *
     * @param lengths of each sample, prompt and answer
     */
    static double generating(ModelConfig config, long parameters, int[][] lengths) {
        double context = 0;
        double prompts = 0;
        int longest = 0;
        for (int i = 0; i < lengths.length; i++) {
            double answer = lengths[i][1];
            context += answer * lengths[i][0] + answer * (answer - 1) / 2;
            prompts += i % SAMPLES == 0 ? lengths[i][0] : 0;
            longest = Math.max(longest, lengths[i][1]);
        }
        double tokenBytes = 2.0 * config.layers() * config.kvHeads() * config.headDim() * DType.BFLOAT16.bytes();
        return (context * tokenBytes + (double) longest * parameters * DType.BFLOAT16.bytes()) / COPY + 2.0 * parameters * prompts / GpuTraining.PEAK;
    }

    /** The least seconds of an update: the operations of forward and backward passes, attention's below the diagonal, at the peak. */
    static double updating(ModelConfig config, long parameters, int[][] lengths) {
        double tokens = Arrays.stream(lengths).mapToDouble(n -> n[0] + n[1]).sum();
        double squares = Arrays.stream(lengths).mapToDouble(n -> Math.pow(n[0] + n[1], 2)).sum();
        return (6.0 * parameters * tokens + 6.0 * config.layers() * config.heads() * config.headDim() * squares) / GpuTraining.PEAK;
    }

    private static void step(HybridEngine engine, String shape, int number, Random random, int groupCount) {
        List<Prompt> prompts = new ArrayList<>();
        for (int p = 0; p < groupCount; p++) {
            int[] tokens = random.ints(random.nextInt(64, 481), 300, 500).toArray();
            for (int s = 0; s < SAMPLES; s++) {
                prompts.add(new Prompt(prompts.size(), "", tokens, SamplingParams.defaults().ignoreEos(true)
                        .logprobKind(LogprobKind.TEMPERATURE).maxTokens(random.nextInt(1, LONGEST + 1))));
            }
        }
        Cuda.resetPeak(CUDA);
        long start = System.nanoTime();
        List<Completion> completions = engine.rollout(prompts, completion -> {});
        long generated = System.nanoTime();
        List<List<Completion>> groups = new ArrayList<>();
        double[][] rewards = new double[groupCount][SAMPLES];
        for (int p = 0; p < groupCount; p++) {
            groups.add(completions.subList(p * SAMPLES, (p + 1) * SAMPLES));
            Arrays.setAll(rewards[p], s -> random.nextDouble());
        }
        long responses = completions.stream().mapToLong(c -> c.tokens().length).sum();
        var nothing = new StepMetrics.Phase(0, 0, 0);
        Rollout rollout = new Rollout(groups, rewards, 1, new StepMetrics.Phase((generated - start) / 1e9, responses, 0), nothing);
        Algorithm algorithm = Algorithm.grpo();
        PolicyUpdate update = PolicyUpdate.apply(engine, algorithm, rollout, algorithm.advantageEstimator().advantages(rewards));
        long end = System.nanoTime();
        long parameters = engine.onEachRank(rank -> rank.arena().layout().parameters()).getFirst();
        int[][] lengths = completions.stream().map(c -> new int[] {prompts.get(c.prompt()).tokens().length, c.tokens().length})
                .toArray(int[][]::new);
        double generating = generating(engine.config(), parameters, lengths);
        double updating = updating(engine.config(), parameters, lengths);
        System.out.printf(Locale.ROOT, "%s step %d: %.2f s, %.2f times its floors (%.2f and %.2f s): generating %.2f s (%d tokens, %.0f a second), updating %.2f s (%d tokens, %.0f a "
                + "second); log-prob gap %.4f, mean %.5f; tensors at most %.1f GiB%n", shape, number, (end - start) / 1e9,
                (end - start) / 1e9 / (generating + updating), generating, updating,
                (generated - start) / 1e9, responses, responses / ((generated - start) / 1e9), (end - generated) / 1e9,
                update.step().tokens(), update.step().tokens() / ((end - generated) / 1e9), update.statistics().logprobGapMax(),
                update.statistics().logprobGapMean(), Cuda.allocator(CUDA).peakAllocated() / 0x1p30);
    }
}
