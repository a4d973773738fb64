package dev.tandem.rl;

import dev.tandem.device.DType;
import dev.tandem.device.Tensor;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TokenValues;

/**
 * The clipped policy-gradient loss of PPO (Schulman et al. 2017, arXiv:1707.06347) and of what grew from it. Per token,
 * with ratio r = exp(logprob - old) and advantage A:
 *
 * <pre>max(-A r, -A clamp(r, 1 - clipLow, 1 + clipHigh)) + klCoefficient · KL - entropyCoefficient · entropy</pre>
 *
 * <p>and the sum of these times {@link TokenValues#weight}, which carries the {@link Aggregation}. The maximum makes
 * the bound pessimistic: it binds only where moving on would look better, above 1 + clipHigh for A &gt; 0 and below 1 -
 * clipLow for A &lt; 0. A wider upper bound (DAPO) leaves unlikely tokens room to grow.
 *
 * <p><b>Sequence ratio</b> (GSPO, Zheng et al. 2025, arXiv:2507.18071): all tokens of a sequence have the ratio s =
 * exp(mean(logprob - old)), so a sequence is clipped as a whole. As in verl each token's ratio is written exp(logprob -
 * sg(logprob) + sg(log s)), sg being stop-gradient: its value is s and its gradient flows through the token's own
 * log-prob. Under {@link Aggregation.SequenceMeanTokenMean} that is exactly the gradient of the sequence-level
 * objective.
 *
 * <p><b>Precision.</b> The terms are computed in FLOAT64 from FLOAT32 log-probs: next to 1, FLOAT32 numbers lie 1e-7
 * apart, which is not small beside a bound of 3e-4, and k3 is a small difference of large numbers. A few operations on
 * N numbers cost nothing next to the head that made them. Ratios are not bounded before the exponential: a step whose
 * loss or gradient is not finite is for the trainer to skip.
 *
 * @param clipLow how far below 1 the ratio may fall, from 0 to 1; 1 is no bound
 * @param clipHigh how far above 1 the ratio may rise, at least 0; infinite is no bound
 * @param sequenceRatio whether the ratio is that of the whole sequence
 * @param klEstimator estimator of the divergence from the reference
 * @param klCoefficient weight of the divergence; 0 measures it without penalty
 * @param entropyCoefficient weight of the entropy that is taken off the loss; 0 leaves it out
 */
public record PolicyLoss(
        double clipLow,
        double clipHigh,
        boolean sequenceRatio,
        KlEstimator klEstimator,
        double klCoefficient,
        double entropyCoefficient) implements TokenLoss {

    /** Checks the ranges. */
    public PolicyLoss {
        if (!(clipLow >= 0 && clipLow <= 1)) {
            throw new IllegalArgumentException("clipLow must be from 0 to 1: " + clipLow);
        }
        if (!(clipHigh >= 0)) {
            throw new IllegalArgumentException("clipHigh must be at least 0: " + clipHigh);
        }
        if (!(klCoefficient >= 0 && klCoefficient < Double.POSITIVE_INFINITY)) {
            throw new IllegalArgumentException("klCoefficient must be a finite number of at least 0: " + klCoefficient);
        }
        if (klEstimator == KlEstimator.NONE && klCoefficient != 0) {
            throw new IllegalArgumentException(
                    "klCoefficient is " + klCoefficient + " with KlEstimator.NONE; choose K1, K2 or K3, or 0");
        }
        if (!Double.isFinite(entropyCoefficient)) {
            throw new IllegalArgumentException("entropyCoefficient must be a finite number: " + entropyCoefficient);
        }
    }

    /** {@return PPO's loss with the same bound on both sides, without divergence and entropy terms} */
    public static PolicyLoss clipped(double clip) {
        return new PolicyLoss(clip, clip, false, KlEstimator.NONE, 0, 0);
    }

    /** {@return this loss with the ratio clipped to 1 - low … 1 + high} */
    public PolicyLoss clip(double low, double high) {
        return new PolicyLoss(low, high, sequenceRatio, klEstimator, klCoefficient, entropyCoefficient);
    }

    /** {@return this loss with the ratio of tokens or of whole sequences} */
    public PolicyLoss sequenceRatio(boolean sequence) {
        return new PolicyLoss(clipLow, clipHigh, sequence, klEstimator, klCoefficient, entropyCoefficient);
    }

    /** {@return this loss with another divergence term} */
    public PolicyLoss kl(KlEstimator estimator, double coefficient) {
        return new PolicyLoss(clipLow, clipHigh, sequenceRatio, estimator, coefficient, entropyCoefficient);
    }

    /** {@return this loss with another entropy term} */
    public PolicyLoss entropy(double coefficient) {
        return new PolicyLoss(clipLow, clipHigh, sequenceRatio, klEstimator, klCoefficient, coefficient);
    }

    /** {@return whether {@link TokenValues#reference} is needed} */
    public boolean needsReference() {
        return klEstimator != KlEstimator.NONE;
    }

    /**
     * {@inheritDoc}
     *
     * @return a FLOAT64 scalar
     * @throws IllegalArgumentException if the tokens lack old log-probs, advantages, or a reference that this loss
     *     needs
     */
    @Override
    public Tensor loss(TokenValues tokens) {
        Tensor logprob = logprob(tokens);
        Tensor ratio = ratio(logprob, tokens);
        Tensor terms = objective(ratio, tokens).minimum(clippedObjective(ratio, tokens)).neg();
        if (klCoefficient != 0) {
            terms = terms.add(klEstimator.estimate(logprob, tokens.reference()).mul(klCoefficient));
        }
        if (entropyCoefficient != 0) {
            terms = terms.sub(tokens.entropy().mul(entropyCoefficient));
        }
        return terms.mul(tokens.weight()).sum();
    }

    /** The log-probs in FLOAT64, which everything that is computed from them becomes. */
    static Tensor logprob(TokenValues tokens) {
        return tokens.logprob().to(DType.FLOAT64);
    }

    /** How much likelier each token, or its sequence, is now than when it was sampled [N]. */
    Tensor ratio(Tensor logprob, TokenValues tokens) {
        Tensor logRatio = logprob.sub(tokens.old());
        if (!sequenceRatio) {
            return logRatio.exp();
        }
        return logprob.sub(logprob.detach()).add(tokens.sequenceMean(logRatio.detach())).exp();
    }

    Tensor objective(Tensor ratio, TokenValues tokens) {
        return ratio.mul(tokens.advantage());
    }

    Tensor clippedObjective(Tensor ratio, TokenValues tokens) {
        return ratio.clamp(1 - clipLow, 1 + clipHigh).mul(tokens.advantage());
    }
}
