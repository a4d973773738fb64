package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Collectives;
import dev.tandem.testing.TinyModels;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The gradients that are written out against those of automatic differentiation. */
class ManualModelTest {
    private static final Device CPU = Device.cpu();

    private static List<TrainingSequence> batch(ModelConfig config, Random random) {
        List<TrainingSequence> batch = new ArrayList<>();
        for (int length : new int[] {2, 9, 17}) {
            batch.add(TrainingSequence.of(random.ints(length, 0, config.vocabSize()).toArray(), 1, 1));
        }
        return batch;
    }

    /** Depends on log-probs and entropies, differently for each token. */
    private static Tensor loss(TokenValues t) {
        return t.logprob().mul(t.logprob()).sum().mul(0.05).add(t.entropy().mul(t.logprob()).sum().mul(0.1));
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void gradientsAreThoseOfAutomaticDifferentiation(String family) {
        Random random = new Random(family.hashCode());
        double worst = 0;
        int compared = 0;
        for (int i = 0; i < 12; i++) {
            ModelConfig config = TinyModels.random(family, random);
            if (ManualModel.obstacle(config, DType.FLOAT32, CPU) != null) {
                continue;
            }
            compared++;
            TrainerOptions options = TrainerOptions.defaults().memory(i % 3 == 0 ? 0 : i % 3 == 1 ? 20_000 : 1L << 30, i % 2 == 0 ? 2000 : 1 << 20);
            try (Scope scope = Scope.open();
                    WeightArena arena = new WeightArena(new WeightLayout(config, 1), CPU, DType.FLOAT32);
                    Decoder decoder = new Decoder(config, CPU, DType.FLOAT32)) {
                arena.initialize(i, 0.3);
                DeviceMemory memory = new DeviceMemory(CPU);
                PackedBatch batch = RankModel.packed(batch(config, random), CPU);
                ActivationMemory activations = RankModel.activations(arena, options);
                try (TrainingModel byHand = new ManualModel(arena, decoder, memory, activations);
                        TrainingModel recorded = new LayerwiseModel(arena, decoder, memory, activations);
                        GradientShard found = new GradientShard(arena.layout(), Collectives.alone(), memory);
                        GradientShard expected = new GradientShard(arena.layout(), Collectives.alone(), memory)) {
                    found.clear();
                    expected.clear();
                    Tensor lossFound = Tensor.zeros(CPU, DType.FLOAT64, 1);
                    Tensor lossExpected = Tensor.zeros(CPU, DType.FLOAT64, 1);
                    for (int micro = 0; micro < 2; micro++) {
                        recorded.forwardBackward(batch, ManualModelTest::loss, 0.7, expected, lossExpected);
                        byHand.forwardBackward(batch, ManualModelTest::loss, 0.7, found, lossFound);
                    }
                    assertEquals(lossExpected.item(), lossFound.item(), 1e-3);
                    for (WeightGroup group : arena.groups()) {
                        for (ParameterRole role : ParameterRole.values()) {
                            if (group.find(role) != null) {
                                worst = Math.max(worst, difference(group.part(found.slice(group), role), group.part(expected.slice(group), role),
                                        config + " " + role));
                            }
                        }
                    }
                    TokenValues a = byHand.forward(batch, arena, 0.7);
                    TokenValues b = recorded.forward(batch, arena, 0.7);
                    assertTrue(a.logprob().sub(b.logprob()).abs().max().item() < 1e-4);
                }
            }
        }
        System.out.printf("%s: %d models, gradients of all parameters within %.2e of automatic differentiation%n", family, compared, worst);
        assertTrue(compared > 2);
    }

    /** Relative to the largest element; the gradients are float32 sums in different orders. */
    private static double difference(Tensor found, Tensor expected, String what) {
        double scale = expected.abs().max().item();
        double difference = found.sub(expected).abs().max().item();
        assertTrue(difference <= 2e-5 * scale + 1e-7, what + ": " + difference + " of " + scale);
        return scale == 0 ? 0 : difference / scale;
    }

    @ParameterizedTest
    @ValueSource(longs = {0, 1 << 30})
    void nothingStays(long budget) {
        ModelConfig config = TinyModels.llama();
        try (WeightArena arena = new WeightArena(new WeightLayout(config, 1), CPU, DType.FLOAT32);
                Decoder decoder = new Decoder(config, CPU, DType.FLOAT32)) {
            arena.initialize(1, 0.1);
            DeviceMemory memory = new DeviceMemory(CPU);
            TrainerOptions options = TrainerOptions.defaults().memory(budget, 1 << 20);
            try (TrainingModel model = new ManualModel(arena, decoder, memory, RankModel.activations(arena, options));
                    GradientShard gradients = new GradientShard(arena.layout(), Collectives.alone(), memory)) {
                long objects = 0;
                for (int i = 0; i < 20; i++) {
                    try (Scope scope = Scope.open()) {
                        model.forwardBackward(RankModel.packed(batch(config, new Random(i)), CPU), ManualModelTest::loss, 1, gradients,
                                Tensor.zeros(CPU, DType.FLOAT64, 1));
                    }
                    objects = i == 4 ? Pointer.totalCount() : objects;
                }
                assertEquals(objects, Pointer.totalCount());
            }
        }
    }
}
