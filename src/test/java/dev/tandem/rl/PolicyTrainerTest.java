package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.generation.SamplingParams;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;

@ExtendWith(NativeObjects.class)
class PolicyTrainerTest {
    private static final List<String> PROMPTS = List.of("one", "two and three", "four");

    /** In bfloat16 generation and training round differently, so their log-probs differ. */
    private static double[] gaps(double limit) {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).dtype(DType.BFLOAT16);
        try (HybridEngine engine = HybridEngine.open(Fixture.of("llama").folder(), options)) {
            PolicyTrainer trainer = new PolicyTrainer(engine, Algorithm.grpo(), SamplingParams.defaults().n(4).maxTokens(12),
                    completion -> completion.tokens().length).logprobGapLimit(limit);
            return trainer.steps(() -> PROMPTS).limit(3).mapToDouble(StepMetrics::logprobGapMean).toArray();
        }
    }

    @Test
    void trainingComputesOldLogprobsWhenGenerationsAreTooFarAway() {
        double[] kept = gaps(1);
        double[] always = gaps(0);
        double[] second = gaps(kept[0] / 2);
        for (int i = 0; i < 3; i++) {
            assertTrue(kept[i] > 1e-5, "step " + i + " differs by " + kept[i]);
            assertTrue(always[i] < 1e-7, "step " + i + " differs by " + always[i]);
            assertTrue(i == 0 ? second[i] > 1e-5 : second[i] < 1e-7, "step " + i + " differs by " + second[i]);
        }
        assertThrows(IllegalArgumentException.class, () -> gaps(Double.NaN));
    }
}
