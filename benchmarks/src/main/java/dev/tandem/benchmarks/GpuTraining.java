package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Timeline;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.PendingStep;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.Random;

/**
 * An optimizer step on a GPU: random weights in bfloat16, float32 masters, moments in float32 or bfloat16, every token trained.
 *
 * <pre>
 * GpuTraining [bf16-moments] SHAPE…
 *     sequences of 4,096 tokens, and as many tokens in sequences of 1,024 and of 200 to 1,500: tokens/s, model FLOPs utilisation, memory,
 *     milliseconds in which the optimizer updates the weights
 * </pre>
 *
 * <p>FLOPs are counted as {@code hf_train.py} of the peers counts them: 6 for each parameter and token, and attention without its mask.
 */
final class GpuTraining {
    private static final Device CUDA = Device.cuda(0);
    private static final int LENGTH = 4096;
    private static final int SEQUENCES = 8;
    private static final int WARM_UP = 2;
    private static final int STEPS = 4;

    /** Of bfloat16 products without sparsity, by the datasheet. */
    static final double PEAK = 989e12;

    private GpuTraining() {}

    public static void main(String[] args) {
        boolean rounds = args[0].equals("bf16-moments");
        for (String shape : List.of(args).subList(rounds ? 1 : 0, args.length)) {
            try (HybridEngine engine = engine(shape, rounds ? DType.BFLOAT16 : DType.FLOAT32)) {
                Random random = new Random(0);
                for (int length : new int[] {LENGTH, LENGTH / 4}) {
                    int count = SEQUENCES * LENGTH / length;
                    report(engine, "%s, %d sequences of %,d".formatted(shape, count, length), batch(random, count, length));
                }
                List<Integer> ragged = new ArrayList<>();
                for (int left = SEQUENCES * LENGTH; left > 200; left -= ragged.getLast()) {
                    ragged.add(Math.min(left, random.nextInt(200, 1501)));
                }
                int[] lengths = ragged.stream().mapToInt(Integer::intValue).toArray();
                report(engine, shape + ", " + lengths.length + " sequences of 200 to 1,500", batch(random, lengths));
                System.out.println(engine.memory());
            }
        }
    }

    static HybridEngine engine(String shape, DType moments) {
        return HybridEngine.create(Shapes.config(shape).withMaxPositions(LENGTH), null, options(moments));
    }

    /** {@return options that leave room for training: the KV cache is small} */
    static EngineOptions options(DType moments) {
        EngineOptions options = EngineOptions.defaults().devices(CUDA).dtype(DType.BFLOAT16)
                .generation(GeneratorOptions.forGpu().step(256, 16, 256)).kvBytes(1L << 30);
        return options.training(options.training().moments(moments));
    }

    /** {@return 8 sequences of 4,096 tokens} */
    static List<TrainingSequence> batch() {
        return batch(new Random(0), SEQUENCES, LENGTH);
    }

    private static List<TrainingSequence> batch(Random random, int count, int length) {
        int[] lengths = new int[count];
        Arrays.fill(lengths, length);
        return batch(random, lengths);
    }

    private static List<TrainingSequence> batch(Random random, int[] lengths) {
        List<TrainingSequence> batch = new ArrayList<>();
        for (int length : lengths) {
            batch.add(TrainingSequence.of(random.ints(length, 0, 150_000).toArray(), 1, 1));
        }
        return batch;
    }

    private static void report(HybridEngine engine, String name, List<TrainingSequence> batch) {
        for (int i = 0; i < WARM_UP; i++) {
            engine.train(batch);
        }
        Cuda.resetPeak(CUDA);
        // A loop of training: each result is read when the next step has been begun.
        double[] seconds = new double[STEPS];
        engine.train(batch);
        long last = System.nanoTime();
        PendingStep before = engine.beginTraining(batch);
        for (int i = 0; i < STEPS; i++) {
            PendingStep next = engine.beginTraining(batch);
            before.await();
            before = next;
            seconds[i] = (System.nanoTime() - last) / 1e9;
            last = System.nanoTime();
        }
        before.await();
        engine.recordTimeline();
        engine.train(batch);
        double optimizer = engine.timeline().device().stream().filter(i -> i.name().equals("optimizer"))
                .mapToDouble(Timeline.Interval::milliseconds).sum();
        Arrays.sort(seconds);
        double median = (seconds[STEPS / 2 - 1] + seconds[STEPS / 2]) / 2;
        ModelConfig config = engine.config();
        long parameters = engine.onEachRank(rank -> rank.arena().layout().parameters()).getFirst();
        long tokens = batch.stream().mapToLong(s -> s.tokens().length).sum();
        double squares = batch.stream().mapToDouble(s -> (double) s.tokens().length * s.tokens().length).sum();
        double flops = 6.0 * parameters * tokens + 6.0 * config.layers() * config.heads() * config.headDim() * squares;
        System.out.printf(Locale.ROOT, "%s: %.0f tokens/s, %.3f s a step (%.3f to %.3f), %.1f %% of the peak, %.1f GiB, optimizer %.1f ms%n",
                name, tokens / median, median, seconds[0], seconds[STEPS - 1], 100 * flops / median / PEAK,
                Cuda.allocator(CUDA).peakAllocated() / 0x1p30, optimizer);
    }
}
