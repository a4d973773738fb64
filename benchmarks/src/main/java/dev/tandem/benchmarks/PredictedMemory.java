package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Cuda;
import dev.tandem.device.Cuda.Allocator;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Random;

/**
 * The plan's bytes of each phase against the peaks on a GPU: optimizer steps of full micro-batches, then 256 requests.
 *
 * <pre>
 * PredictedMemory SHAPE…
 * </pre>
 */
final class PredictedMemory {
    private static final Device CUDA = Device.cuda(0);

    private PredictedMemory() {}

    public static void main(String[] args) {
        for (String shape : args) {
            EngineOptions options = EngineOptions.defaults().devices(CUDA).dtype(DType.BFLOAT16);
            try (HybridEngine engine = HybridEngine.create(Shapes.config(shape).withMaxPositions(4096), null, options)) {
                Random random = new Random(1);
                for (boolean even : new boolean[] {true, false}) {
                    List<TrainingSequence> batch = new ArrayList<>();
                    for (int tokens : even ? new int[] {4096, 4096, 4096, 4096} : new int[] {4000, 3000, 1192, 4096, 2048, 2047, 1}) {
                        batch.add(TrainingSequence.of(random.ints(Math.max(tokens, 2), 0, 10_000).toArray(), 1, 1));
                    }
                    engine.train(batch); // the optimizer's state is made at the end of the first step
                    Cuda.resetPeak(CUDA);
                    engine.train(batch);
                    report(shape, "training, " + (even ? "equal" : "unequal") + " lengths", engine.plan().training(), 0, peak());
                }
                engine.sleep();
                engine.resizeKv(engine.plan().generation().get(Use.KV)); // maps all of it, as the plan expects at most
                engine.wake();
                Cuda.resetPeak(CUDA);
                List<Prompt> prompts = new ArrayList<>();
                for (int i = 0; i < 256; i++) {
                    prompts.add(new Prompt(i, "", random.ints(512, 0, 10_000).toArray(),
                            SamplingParams.defaults().ignoreEos(true).maxTokens(64)));
                }
                engine.rollout(prompts, completion -> {});
                long kv = engine.onEachRank(rank -> rank.memory().held(Use.KV)).getFirst();
                report(shape, "generation", engine.plan().generation(), kv, peak());
                System.out.println(engine.plan());
                System.out.println(engine.memory());
            }
        }
    }

    private static Allocator peak() {
        Cuda.synchronize(CUDA);
        return Cuda.allocator(CUDA);
    }

    private static void report(String shape, String phase, Map<Use, Long> plan, long kv, Allocator peak) {
        double predicted = plan.values().stream().mapToLong(Long::longValue).sum() / 0x1p20;
        double measured = (kv + peak.peakAllocated()) / 0x1p20;
        System.out.printf(Locale.ROOT, "%s, %s: predicted %.0f MiB, measured %.0f MiB (%+.1f %%), with libtorch's cache %.0f MiB%n", shape, phase,
                predicted, measured, 100 * (predicted / measured - 1), (kv + peak.peakReserved()) / 0x1p20);
    }
}
