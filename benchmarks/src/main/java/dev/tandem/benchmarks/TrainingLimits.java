package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.MemoryPlan;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.TandemException;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.TrainingSequence;
import java.util.List;
import java.util.Locale;
import java.util.Random;

/**
 * The longest sequence with which a model trains on a GPU by the memory plan, and what a step with one of that length really takes. A shape
 * that does not train is told with the plan's reason.
 *
 * <pre>
 * TrainingLimits [bf16-moments] SHAPE[:TOKENS]…
 *     with TOKENS: the step has one sequence of that length, for the time of attention grows with the square
 * </pre>
 */
final class TrainingLimits {
    private static final Device CUDA = Device.cuda(0);
    private static final int UNIT = 1024;
    private static final int MOST = 1 << 20;

    /** Of the device's memory; the rest is for the driver's context, libraries, fragments. */
    private static final double SHARE = 0.95;

    private TrainingLimits() {}

    public static void main(String[] args) {
        boolean rounds = args[0].equals("bf16-moments");
        for (String argument : List.of(args).subList(rounds ? 1 : 0, args.length)) {
            String[] parts = argument.split(":");
            String shape = parts[0];
            int longest = longest(shape, rounds);
            if (longest < UNIT) {
                System.out.printf("%s does not train:%n%s%n", shape, plan(shape, UNIT, rounds));
                continue;
            }
            int tokens = parts.length > 1 ? Math.min(longest, Integer.parseInt(parts[1])) : longest;
            System.out.printf("%s: by the plan one sequence may have %,d tokens%n", shape, longest);
            try (HybridEngine engine = HybridEngine.create(config(shape, tokens), null, options(tokens, rounds))) {
                List<TrainingSequence> batch =
                        List.of(TrainingSequence.of(new Random(0).ints(tokens, 0, 150_000).toArray(), 1, 1f / tokens));
                engine.train(batch);
                Cuda.resetPeak(CUDA);
                double seconds = engine.train(batch).seconds();
                double predicted = engine.plan().trainingBytes() / 0x1p20;
                double measured = Cuda.allocator(CUDA).peakAllocated() / 0x1p20;
                System.out.printf(Locale.ROOT, "%s: one sequence of %,d tokens, %.1f s a step; predicted %.0f MiB, measured %.0f (%+.1f %%); "
                        + "optimizer state of %d groups on the host, %.0f MiB%n", shape, tokens, seconds, predicted, measured,
                        100 * (predicted / measured - 1), engine.plan().hostGroups(), engine.plan().hostOptimizer() / 0x1p20);
            }
        }
    }

    /** A multiple of {@link #UNIT}, 0 if not even one fits. */
    private static int longest(String shape, boolean rounds) {
        int fits = 0;
        int fails = MOST / UNIT + 1;
        while (fails - fits > 1) {
            int middle = (fits + fails) / 2;
            if (trains(shape, middle * UNIT, rounds)) {
                fits = middle;
            } else {
                fails = middle;
            }
        }
        return fits * UNIT;
    }

    private static boolean trains(String shape, int tokens, boolean rounds) {
        try {
            return plan(shape, tokens, rounds).trains();
        } catch (TandemException e) {
            return false;
        }
    }

    private static MemoryPlan plan(String shape, int tokens, boolean rounds) {
        return MemoryPlan.of(config(shape, tokens), options(tokens, rounds));
    }

    private static ModelConfig config(String shape, int tokens) {
        return Shapes.config(shape).withMaxPositions(tokens);
    }

    private static EngineOptions options(int tokens, boolean rounds) {
        EngineOptions options = GpuTraining.options(rounds ? DType.BFLOAT16 : DType.FLOAT32)
                .memoryLimit((long) (SHARE * DeviceMemory.available(CUDA)));
        return options.training(options.training().microBatchTokens(tokens));
    }
}
