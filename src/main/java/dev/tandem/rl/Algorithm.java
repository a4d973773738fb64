package dev.tandem.rl;

/**
 * A policy-gradient algorithm as a value: how rewards become advantages, the loss of a token, and how the terms of all
 * tokens become the step's loss. The named ones are presets; change a part with the methods that take it:
 *
 * <pre>{@code Algorithm.grpo().clip(0.2, 0.28).kl(KlEstimator.K3, 0.04)}</pre>
 *
 * <p>No preset has a divergence term, so none needs a second model's log-probs: with verifiable rewards most practice
 * leaves it out. Where the paper has one, the preset says which.
 *
 * @param advantageEstimator advantages from the rewards of a prompt's samples
 * @param loss ratio, bounds, divergence and entropy
 * @param aggregation weights of the tokens
 */
public record Algorithm(AdvantageEstimator advantageEstimator, PolicyLoss loss, Aggregation aggregation) {
    private static final double CLIP = 0.2;

    /**
     * {@return group relative policy optimisation: Shao et al. 2024, DeepSeekMath, arXiv:2402.03300} The paper adds
     * {@code kl(KlEstimator.K3, 0.04)}.
     */
    public static Algorithm grpo() {
        return new Algorithm(
                AdvantageEstimator.GRPO, PolicyLoss.clipped(CLIP), new Aggregation.SequenceMeanTokenMean());
    }

    /**
     * {@return GRPO done right, without its biases towards length and difficulty: Liu et al. 2025, arXiv:2503.20783}
     *
     * @param maxTokens the constant that token sums are divided by, usually the limit on a completion's length
     */
    public static Algorithm drGrpo(int maxTokens) {
        return new Algorithm(AdvantageEstimator.DR_GRPO, PolicyLoss.clipped(CLIP),
                new Aggregation.SequenceMeanTokenSumNorm(maxTokens));
    }

    /**
     * {@return the loss of DAPO, with the wider upper bound and the mean over tokens: Yu et al. 2025, arXiv:2503.14476}
     * The paper's dynamic sampling and overlong penalty concern the rollout and the reward, not the loss.
     */
    public static Algorithm dapo() {
        return new Algorithm(AdvantageEstimator.GRPO, PolicyLoss.clipped(CLIP).clip(CLIP, 0.28),
                new Aggregation.TokenMean());
    }

    /**
     * {@return REINFORCE with a leave-one-out baseline: Ahmadian et al. 2024, arXiv:2402.14740} The sum over a
     * sequence's tokens makes it the gradient of whole completions; the paper has no bound, and while each rollout is
     * used for one update none binds. The paper's divergence is part of the reward.
     */
    public static Algorithm rloo() {
        return new Algorithm(
                AdvantageEstimator.RLOO, PolicyLoss.clipped(CLIP), new Aggregation.SequenceMeanTokenSum());
    }

    /**
     * {@return REINFORCE++ with a group baseline, normalised over the step: Hu et al. 2025, arXiv:2501.03262} The paper
     * adds a small {@code kl(KlEstimator.K2, …)}.
     */
    public static Algorithm reinforcePlusPlusBaseline() {
        return new Algorithm(AdvantageEstimator.REINFORCE_PLUS_PLUS_BASELINE, PolicyLoss.clipped(CLIP),
                new Aggregation.TokenMean());
    }

    /**
     * {@return group sequence policy optimisation: Zheng et al. 2025, arXiv:2507.18071} Ratios of whole sequences move
     * little, so the bounds are the paper's 3e-4 and 4e-4.
     */
    public static Algorithm gspo() {
        return new Algorithm(AdvantageEstimator.GRPO, PolicyLoss.clipped(CLIP).clip(3e-4, 4e-4).sequenceRatio(true),
                new Aggregation.SequenceMeanTokenMean());
    }

    /** {@return this algorithm with other advantages} */
    public Algorithm advantageEstimator(AdvantageEstimator estimator) {
        return new Algorithm(estimator, loss, aggregation);
    }

    /** {@return this algorithm with another loss} */
    public Algorithm loss(PolicyLoss other) {
        return new Algorithm(advantageEstimator, other, aggregation);
    }

    /** {@return this algorithm with other token weights} */
    public Algorithm aggregation(Aggregation other) {
        return new Algorithm(advantageEstimator, loss, other);
    }

    /** {@return this algorithm with the ratio clipped to 1 - low … 1 + high} */
    public Algorithm clip(double low, double high) {
        return loss(loss.clip(low, high));
    }

    /** {@return this algorithm with a term for the divergence from a reference, in the loss} */
    public Algorithm kl(KlEstimator estimator, double coefficient) {
        return loss(loss.kl(estimator, coefficient));
    }

    /** {@return this algorithm with the entropy, times the coefficient, taken off the loss} */
    public Algorithm entropy(double coefficient) {
        return loss(loss.entropy(coefficient));
    }
}
