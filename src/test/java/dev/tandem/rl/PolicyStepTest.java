package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.Gson;
import com.google.gson.JsonObject;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Device;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Policy losses and their gradients through the whole model, against transformers in float64, on one rank and on two. */
@ExtendWith(NativeObjects.class)
class PolicyStepTest {
    private static final double BETWEEN_RANKS = 1e-5;

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void goldenLossesAndGradientNorms(String family) {
        Map<String, PolicyLossTest.Variant> variants = PolicyLossTest.variants(family);
        assertEquals(8, variants.size());
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20);
        TrainerOptions training = TrainerOptions.defaults().lr(0);
        Map<String, TrainStep> one = steps(family, variants, options.training(training));
        Map<String, TrainStep> cut = steps(family, variants, options.training(training.microBatchTokens(40).memory(0, 1 << 14)));
        Map<String, TrainStep> two =
                steps(family, variants, options.training(training.microBatchTokens(40)).devices(Device.cpu(0), Device.cpu(1)));
        double worst = 0;
        double apart = 0;
        for (var entry : variants.entrySet()) {
            String name = family + " " + entry.getKey();
            TrainStep reference = one.get(entry.getKey());
            for (TrainStep step : List.of(reference, cut.get(entry.getKey()), two.get(entry.getKey()))) {
                double loss = Math.abs(step.loss() / entry.getValue().expected() - 1);
                double norm = Math.abs(step.gradientNorm() / entry.getValue().gradientNorm() - 1);
                worst = Math.max(worst, Math.max(loss, norm));
                assertTrue(loss < 1e-4 && norm < 1e-4, name + ": " + step + ", expected " + entry.getValue());
                assertTrue(!step.skipped());
            }
            apart = Math.max(apart, Math.abs(two.get(entry.getKey()).loss() / reference.loss() - 1));
            apart = Math.max(apart, Math.abs(two.get(entry.getKey()).gradientNorm() / reference.gradientNorm() - 1));
        }
        System.out.printf("%s: policy steps within %.2e of float64, two ranks within %.2e of one%n", family, worst, apart);
        assertTrue(apart < BETWEEN_RANKS, family + ": two ranks differ by " + apart);
    }

    private static Map<String, TrainStep> steps(String family, Map<String, PolicyLossTest.Variant> variants, EngineOptions options) {
        Map<String, TrainStep> steps = new TreeMap<>();
        try (HybridEngine engine = HybridEngine.open(Fixture.of(family).folder(), options)) {
            variants.forEach((name, v) -> steps.put(name, engine.train(batch(family, v.aggregation()), v.loss(), 1)));
        }
        return steps;
    }

    private static List<TrainingSequence> batch(String family, Aggregation aggregation) {
        JsonObject policy = PolicyBatch.policy(family);
        int[][] tokens = new Gson().fromJson(policy.get("sequences"), int[][].class);
        int[] promptLengths = Fixture.ints(policy.getAsJsonArray("prompt_lengths"));
        PolicyBatch values = PolicyBatch.golden(family);
        float[] weights = aggregation.weights(values.counts());
        List<TrainingSequence> batch = new ArrayList<>();
        for (int s = 0; s < tokens.length; s++) {
            int length = tokens[s].length;
            assertEquals(length - promptLengths[s], values.counts()[s]);
            float[] old = new float[length];
            float[] reference = new float[length];
            float[] advantage = new float[length];
            for (int t = promptLengths[s]; t < length; t++) {
                old[t] = (float) values.old()[s][t - promptLengths[s]];
                reference[t] = (float) values.reference()[s][t - promptLengths[s]];
                advantage[t] = (float) values.advantage()[s][t - promptLengths[s]];
            }
            TrainingSequence plain = TrainingSequence.of(tokens[s], promptLengths[s], weights[s]);
            batch.add(new TrainingSequence(plain.tokens(), plain.trained(), plain.weight(), old, reference, advantage));
        }
        return batch;
    }
}
