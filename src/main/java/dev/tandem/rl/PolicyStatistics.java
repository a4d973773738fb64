package dev.tandem.rl;

import dev.tandem.device.DType;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.training.TokenValues;
import java.util.Arrays;

/**
 * What a policy update looked like, over tokens: sums and counts, so that the statistics of micro-batches and ranks add
 * up to those of the step. Means are over tokens, each counted once whatever its weight in the loss.
 *
 * @param tokens how many tokens
 * @param clippedTokens how many tokens had their gradient cut off by the bound on the ratio
 * @param ratioMax the largest ratio of new to old probability, of the kind that the loss uses; 0 if there are no tokens
 * @param logprobGapMax the largest |logprob - old|; on the first update after a rollout, when the weights are still
 *     those that sampled, the largest gap between generation's and training's log-probs
 * @param logprobGapSum sum of |logprob - old|
 * @param oldKlK1Sum sum of old - logprob, the k1 estimate of KL(old ‖ policy)
 * @param oldKlK3Sum sum of exp(logprob - old) - 1 - (logprob - old), the k3 estimate of KL(old ‖ policy)
 * @param referenceTokens how many of the tokens were compared with a reference
 * @param referenceKlSum sum of the loss's estimate of KL(policy ‖ reference)
 * @param entropySum sum of the entropies in nats
 */
public record PolicyStatistics(
        long tokens,
        long clippedTokens,
        double ratioMax,
        double logprobGapMax,
        double logprobGapSum,
        double oldKlK1Sum,
        double oldKlK3Sum,
        long referenceTokens,
        double referenceKlSum,
        double entropySum) {

    /** Statistics of no tokens, where adding begins. */
    public static final PolicyStatistics NONE = new PolicyStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0, 0);

    /**
     * Computes the statistics of a micro-batch, without recording for differentiation, and waits for the device once.
     * Call it on the rank's thread.
     *
     * @param loss whose ratio, bounds and divergence are meant
     * @param tokens the micro-batch, at least one token
     * @return its statistics
     */
    public static PolicyStatistics of(PolicyLoss loss, TokenValues tokens) {
        try (Scope _ = Scope.open(); Pending pending = measured(loss, tokens)) {
            return pending.read();
        }
    }

    /**
     * Statistics of a micro-batch that the device is still to compute. The owner closes them.
     *
     * @param tokens how many tokens
     * @param compared whether there is a reference
     * @param values FLOAT64, in the order of the components
     */
    record Pending(long tokens, boolean compared, Tensor values) implements AutoCloseable {
        /** {@return the statistics; waits for the device} */
        PolicyStatistics read() {
            double[] v = values.toDoubles();
            return new PolicyStatistics(tokens, (long) v[0], v[1], v[2], v[3], v[4], v[5], compared ? tokens : 0, v[6], v[7]);
        }

        @Override
        public void close() {
            values.close();
        }
    }

    /** {@return what {@link #of} returns, without waiting for the device} */
    static Pending measured(PolicyLoss loss, TokenValues tokens) {
        try (Scope _ = Scope.open(); Gradients _ = Gradients.disabled()) {
            Tensor logprob = PolicyLoss.logprob(tokens);
            Tensor ratio = loss.ratio(logprob, tokens);
            Tensor lost = loss.clippedObjective(ratio, tokens).sub(loss.objective(ratio, tokens));
            Tensor gap = logprob.sub(tokens.old());
            boolean compared = loss.needsReference();
            Tensor referenceKl = compared
                    ? loss.klEstimator().estimate(logprob, tokens.reference())
                    : Tensor.zeros(gap.device(), DType.FLOAT64, 1);
            return new Pending(tokens.logprob().elements(), compared, together(
                    lost.lessThan(0).to(DType.FLOAT64).sum(),
                    ratio.max(),
                    gap.abs().max(),
                    gap.abs().sum(),
                    gap.neg().sum(),
                    KlEstimator.K3.estimate(tokens.old(), logprob).sum(),
                    referenceKl.sum(),
                    tokens.entropy().to(DType.FLOAT64).sum()).keep());
        }
    }

    /** {@return the statistics of both sets of tokens together} */
    public PolicyStatistics add(PolicyStatistics other) {
        return new PolicyStatistics(
                tokens + other.tokens,
                clippedTokens + other.clippedTokens,
                Math.max(ratioMax, other.ratioMax),
                Math.max(logprobGapMax, other.logprobGapMax),
                logprobGapSum + other.logprobGapSum,
                oldKlK1Sum + other.oldKlK1Sum,
                oldKlK3Sum + other.oldKlK3Sum,
                referenceTokens + other.referenceTokens,
                referenceKlSum + other.referenceKlSum,
                entropySum + other.entropySum);
    }

    /** {@return the fraction of tokens whose gradient was cut off by the bound; NaN if there are no tokens} */
    public double clipFraction() {
        return (double) clippedTokens / tokens;
    }

    /** {@return the mean |logprob - old|; NaN if there are no tokens} */
    public double logprobGapMean() {
        return logprobGapSum / tokens;
    }

    /** {@return the k1 estimate of the mean KL(old ‖ policy) per token, in nats; NaN if there are no tokens} */
    public double oldKlK1() {
        return oldKlK1Sum / tokens;
    }

    /** {@return the k3 estimate of the mean KL(old ‖ policy) per token, in nats; NaN if there are no tokens} */
    public double oldKlK3() {
        return oldKlK3Sum / tokens;
    }

    /** {@return the mean KL(policy ‖ reference) per token, in nats; NaN if there was no reference} */
    public double referenceKl() {
        return referenceKlSum / referenceTokens;
    }

    /** {@return the mean entropy per token, in nats; NaN if there are no tokens} */
    public double entropy() {
        return entropySum / tokens;
    }

    /** For one transfer: each scalar by itself would wait for the device again. */
    private static Tensor together(Tensor... scalars) {
        return Tensor.concatenate(0, Arrays.stream(scalars).map(scalar -> scalar.to(DType.FLOAT64).reshape(1)).toList());
    }
}
