package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.List;
import org.junit.jupiter.api.Test;

class AlgorithmTest {
    @Test
    void presetsDifferWhereThePapersDo() {
        assertEquals(AdvantageEstimator.GRPO, Algorithm.grpo().advantageEstimator());
        assertEquals(AdvantageEstimator.DR_GRPO, Algorithm.drGrpo(64).advantageEstimator());
        assertEquals(AdvantageEstimator.GRPO, Algorithm.dapo().advantageEstimator());
        assertEquals(AdvantageEstimator.RLOO, Algorithm.rloo().advantageEstimator());
        assertEquals(AdvantageEstimator.REINFORCE_PLUS_PLUS_BASELINE,
                Algorithm.reinforcePlusPlusBaseline().advantageEstimator());
        assertEquals(AdvantageEstimator.GRPO, Algorithm.gspo().advantageEstimator());
        for (Algorithm preset : List.of(Algorithm.grpo(), Algorithm.drGrpo(1), Algorithm.dapo(), Algorithm.rloo(),
                Algorithm.reinforcePlusPlusBaseline(), Algorithm.gspo())) {
            assertFalse(preset.loss().needsReference(), preset.toString());
        }
    }

    @Test
    void withersChangeOnePart() {
        Algorithm changed = Algorithm.gspo()
                .clip(0.1, 0.3)
                .kl(KlEstimator.K2, 0.01)
                .entropy(0.002)
                .aggregation(new Aggregation.TokenMean())
                .advantageEstimator(AdvantageEstimator.RLOO);
        assertEquals(
                new Algorithm(AdvantageEstimator.RLOO, new PolicyLoss(0.1, 0.3, true, KlEstimator.K2, 0.01, 0.002),
                        new Aggregation.TokenMean()),
                changed);
        assertTrue(changed.loss().needsReference());
        assertEquals(Algorithm.gspo().loss(), Algorithm.grpo().loss(PolicyLoss.clipped(0).clip(3e-4, 4e-4)
                .sequenceRatio(true)).loss());
    }
}
