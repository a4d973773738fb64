package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Collectives;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import java.util.Random;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/**
 * Log-probs and gradients of training on a GPU, in kernels and by automatic differentiation, both in bfloat16, against the CPU in float32
 * with the same weights: the kernels may not be farther from it.
 */
@Gpu
class CudaTrainingTest {
    private static final Device CUDA = Device.cuda(0);

    private static Tensor loss(TokenValues t) {
        return t.logprob().sum().mul(-0.01).add(t.entropy().mul(t.logprob()).sum().mul(0.001));
    }

    /** What a model of one kind gives. */
    private record Result(double loss, Tensor logprob, List<Tensor> gradients) {}

    @FunctionalInterface
    private interface Maker {
        TrainingModel make(WeightArena arena, Decoder decoder, DeviceMemory memory);
    }

    private static Result run(WeightArena arena, List<TrainingSequence> sequences, Maker maker) {
        Device device = arena.groups().getFirst().flat().device();
        ModelConfig config = arena.layout().config();
        try (Decoder decoder = new Decoder(config, device, arena.dtype()); Scope scope = Scope.open()) {
            DeviceMemory memory = new DeviceMemory(device);
            try (TrainingModel model = maker.make(arena, decoder, memory);
                    GradientShard gradients = new GradientShard(arena.layout(), Collectives.alone(), memory)) {
                PackedBatch batch = RankModel.packed(sequences, device);
                gradients.clear();
                Tensor loss = Tensor.zeros(device, DType.FLOAT64, 1);
                for (int i = 0; i < 2; i++) {
                    model.forwardBackward(batch, CudaTrainingTest::loss, 0.8, gradients, loss);
                }
                List<Tensor> all = new ArrayList<>();
                for (WeightGroup group : arena.groups()) {
                    for (ParameterRole role : ParameterRole.values()) {
                        if (group.find(role) != null) {
                            all.add(scope.escape(group.part(gradients.slice(group), role).on(Device.cpu()).copy()));
                        }
                    }
                }
                Tensor logprob = model.forward(batch, arena, 0.8).logprob().on(Device.cpu()).copy();
                return new Result(loss.item(), scope.escape(logprob), all);
            }
        }
    }

    /** The norm of the difference relative to the norm, the largest over parameters. */
    private static double farthest(Result found, Result exact) {
        double worst = 0;
        for (int i = 0; i < exact.gradients.size(); i++) {
            double norm = Math.sqrt(exact.gradients.get(i).square().sum().item());
            double difference = Math.sqrt(found.gradients.get(i).sub(exact.gradients.get(i)).square().sum().item());
            worst = Math.max(worst, difference / (norm + 1e-6));
        }
        return worst;
    }

    @ParameterizedTest
    @CsvSource({"llama, 0", "llama, 1000000000", "qwen2, 1000000000", "qwen3, 30000000", "qwen3, 1000000000", "opt, 1000000000"})
    void kernelsAreAsCloseAsAutomaticDifferentiation(String family, long budget) {
        ModelConfig config = TinyModels.published(family);
        Random random = new Random(3);
        List<TrainingSequence> batch = new ArrayList<>();
        for (int length : new int[] {2, 65, 300, 130}) {
            batch.add(TrainingSequence.of(random.ints(length, 0, config.vocabSize()).toArray(), 1, 1));
        }
        // Chunks of logits of 100 rows.
        TrainerOptions options = TrainerOptions.defaults().memory(budget, 400L * config.vocabSize());
        Cuda.use(CUDA);
        WeightLayout layout = new WeightLayout(config, 1);
        try (Scope scope = Scope.open();
                WeightArena rounded = new WeightArena(layout, Device.cpu(), DType.BFLOAT16);
                WeightArena single = new WeightArena(layout, Device.cpu(), DType.FLOAT32);
                WeightArena onDevice = new WeightArena(layout, CUDA, DType.BFLOAT16)) {
            rounded.initialize(5, 0.05);
            single.copyFrom(rounded);
            onDevice.copyFrom(rounded);
            Result exact = run(single, batch, (a, d, m) -> new ManualModel(a, d, m, RankModel.activations(a, options)));
            Result recorded = run(onDevice, batch, (a, d, m) -> new LayerwiseModel(a, d, m, RankModel.activations(a, options)));
            Result kernels = run(onDevice, batch, (a, d, m) -> new ManualModel(a, d, m, RankModel.activations(a, options)));
            double byKernels = farthest(kernels, exact);
            double byRecording = farthest(recorded, exact);
            double logprobs = kernels.logprob.sub(exact.logprob).abs().max().item();
            double logprobsRecorded = recorded.logprob.sub(exact.logprob).abs().max().item();
            System.out.printf("%s, budget %d: gradients within %.4f (recorded %.4f), log-probs within %.4f (recorded %.4f), loss %.5f and %.5f%n",
                    family, budget, byKernels, byRecording, logprobs, logprobsRecorded, kernels.loss, exact.loss);
            assertTrue(byKernels < 1.25 * byRecording + 0.005, "gradients: " + byKernels + ", recorded " + byRecording);
            assertTrue(logprobs < 1.25 * logprobsRecorded + 0.01, "log-probs: " + logprobs + ", recorded " + logprobsRecorded);
            assertEquals(exact.loss, kernels.loss, 0.01 * Math.abs(exact.loss));
        }
    }

    /** Of unequal batches, so that every size of a micro-batch comes up; read one step late, some of them skipped. */
    @Test
    void twoThousandStepsHoldNoMoreThanAFew() {
        EngineOptions options = EngineOptions.defaults().devices(CUDA).dtype(DType.BFLOAT16).kvBytes(16 << 20)
                .generation(GeneratorOptions.defaults().step(256, 16, 256));
        Random random = new Random(5);
        try (HybridEngine engine = HybridEngine.create(TinyModels.llama(), null,
                options.training(options.training().microBatchTokens(512)))) {
            int vocabulary = engine.config().vocabSize();
            long free = 0;
            long objects = 0;
            int skipped = 0;
            PendingStep before = null;
            for (int step = 0; step < 2000; step++) {
                List<TrainingSequence> batch = new ArrayList<>();
                for (int i = random.nextInt(1, 6); i > 0; i--) {
                    batch.add(TrainingSequence.of(random.ints(random.nextInt(2, 120), 0, vocabulary).toArray(), 1, 1));
                }
                double factor = step % 100 == 7 ? Double.NaN : -1e-3;
                PendingStep next = engine.beginTraining(batch, t -> t.logprob().sum().mul(factor), 1);
                if (before != null) {
                    skipped += before.await().skipped() ? 1 : 0;
                }
                before = next;
                if (step == 199) {
                    before.await();
                    free = Cuda.free(CUDA);
                    objects = Pointer.totalCount();
                }
            }
            assertFalse(Objects.requireNonNull(before).await().skipped());
            assertEquals(20, skipped);
            assertEquals(1980, engine.weightVersion());
            assertEquals(objects, Pointer.totalCount(), "native objects");
            // libtorch may keep a few more segments for sizes that came up late.
            assertTrue(free - Cuda.free(CUDA) <= 64 << 20, "the device has " + (free - Cuda.free(CUDA)) + " bytes less free");
        }
    }
}
