package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Scope;
import java.util.Arrays;
import java.util.SplittableRandom;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;

class PolicyStatisticsTest {
    private static final PolicyLoss LOSS = PolicyLoss.clipped(0.2).clip(0.2, 0.28).kl(KlEstimator.K2, 0.1);

    private static PolicyStatistics of(PolicyBatch batch, PolicyLoss loss) {
        try (Scope scope = Scope.open()) {
            return PolicyStatistics.of(loss, batch.values(new float[batch.logprob().length]));
        }
    }

    @Test
    void equalsTheFormulas() {
        PolicyBatch batch = PolicyBatch.random(new SplittableRandom(1), 20);
        long clipped = 0;
        double ratioMax = 0;
        double gapMax = 0;
        double[] sums = new double[5];
        for (int s = 0; s < 20; s++) {
            for (int t = 0; t < batch.counts()[s]; t++) {
                double gap = batch.logprob()[s][t] - batch.old()[s][t];
                double ratio = Math.exp(gap);
                double a = batch.advantage()[s][t];
                clipped += (a > 0 && ratio > 1.28) || (a < 0 && ratio < 0.8) ? 1 : 0;
                ratioMax = Math.max(ratioMax, ratio);
                gapMax = Math.max(gapMax, Math.abs(gap));
                sums[0] += Math.abs(gap);
                sums[1] -= gap;
                sums[2] += ratio - 1 - gap;
                sums[3] += Math.pow(batch.logprob()[s][t] - batch.reference()[s][t], 2) / 2;
                sums[4] += batch.entropy()[s][t];
            }
        }
        int n = batch.tokens();
        PolicyStatistics found = of(batch, LOSS);
        assertTrue(clipped > 0 && clipped < n / 2, "the batch must have both kinds: " + clipped);
        assertEquals(n, found.tokens());
        assertEquals(clipped, found.clippedTokens());
        assertEquals((double) clipped / n, found.clipFraction());
        assertEquals(ratioMax, found.ratioMax(), 1e-5);
        assertEquals(gapMax, found.logprobGapMax(), 1e-6);
        assertEquals(sums[0] / n, found.logprobGapMean(), 1e-6);
        assertEquals(sums[1] / n, found.oldKlK1(), 1e-6);
        assertEquals(sums[2] / n, found.oldKlK3(), 1e-6);
        assertEquals(n, found.referenceTokens());
        assertEquals(sums[3] / n, found.referenceKl(), 1e-6);
        assertEquals(sums[4] / n, found.entropy(), 1e-6);
    }

    @Test
    void partsAddUp() {
        PolicyBatch batch = PolicyBatch.random(new SplittableRandom(2), 11);
        PolicyLoss loss = LOSS.sequenceRatio(true).clip(0.02, 0.02);
        PolicyStatistics whole = of(batch, loss);
        PolicyStatistics parts = PolicyStatistics.NONE.add(of(batch.sequences(0, 4), loss))
                .add(of(batch.sequences(4, 11), loss));
        assertTrue(whole.clippedTokens() > 0);
        assertEquals(whole.clippedTokens(), parts.clippedTokens());
        assertEquals(whole.tokens(), parts.tokens());
        assertEquals(whole.ratioMax(), parts.ratioMax(), 1e-6);
        assertEquals(whole.logprobGapMax(), parts.logprobGapMax());
        assertEquals(whole.logprobGapMean(), parts.logprobGapMean(), 1e-12);
        assertEquals(whole.oldKlK1(), parts.oldKlK1(), 1e-12);
        assertEquals(whole.oldKlK3(), parts.oldKlK3(), 1e-12);
        assertEquals(whole.referenceKl(), parts.referenceKl(), 1e-12);
        assertEquals(whole.entropy(), parts.entropy(), 1e-12);
    }

    @Test
    void unchangedPolicyHasNothingToReport() {
        PolicyBatch random = PolicyBatch.random(new SplittableRandom(3), 4);
        PolicyStatistics found = of(random.logprob(random.old()), LOSS.kl(KlEstimator.NONE, 0));
        assertEquals(0, found.clippedTokens());
        assertEquals(1, found.ratioMax());
        assertEquals(0, found.logprobGapMax());
        assertEquals(0, found.oldKlK1());
        assertEquals(0, found.oldKlK3());
        assertTrue(Double.isNaN(found.referenceKl()), "there was no reference");
        assertTrue(Double.isNaN(PolicyStatistics.NONE.clipFraction()));
    }

    /** In single precision the k3 estimate of so small a change would be rounding noise, and could be negative. */
    @Test
    void smallChangesAreResolved() {
        double[][] zeros = {new double[100]};
        double[][] old = {new double[100]};
        Arrays.fill(old[0], -1e-4);
        PolicyStatistics found = of(new PolicyBatch(zeros, old, zeros, zeros, zeros), LOSS);
        assertEquals(5e-9, found.oldKlK3(), 1e-12);
    }

    @Test
    void releasesItsTensors() {
        PolicyBatch batch = PolicyBatch.random(new SplittableRandom(4), 4);
        of(batch, LOSS);
        long before = Pointer.totalCount();
        try (Scope scope = Scope.open()) {
            var values = batch.values(new float[4]);
            long held = Pointer.totalCount();
            PolicyStatistics.of(LOSS, values);
            assertEquals(held, Pointer.totalCount());
        }
        assertEquals(before, Pointer.totalCount());
    }
}
