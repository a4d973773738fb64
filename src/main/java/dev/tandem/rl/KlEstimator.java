package dev.tandem.rl;

import dev.tandem.device.Tensor;

/**
 * Estimates of the divergence KL(policy ‖ reference) from one token that the policy sampled, with d = log policy - log
 * reference. Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
 *
 * <p>What estimates the value well need not be a good loss. In the loss, {@link #K1} has a gradient whose expectation
 * under the policy is zero: it only adds noise. The gradient of {@link #K2} is that of the divergence; {@link #K3}
 * pulls towards the reference too, and hardest where the policy has become much less likely than the reference.
 */
public enum KlEstimator {
    /** No divergence is computed, and no reference is needed. */
    NONE,
    /** d: unbiased, may be negative, high variance. */
    K1,
    /** d² / 2: biased, never negative, low variance. */
    K2,
    /** exp(-d) - 1 + d: unbiased, never negative, low variance. The one GRPO was published with. */
    K3;

    /**
     * Estimates the divergence per token, differentiable.
     *
     * @param logprob log-probabilities under the policy [N]
     * @param reference log-probabilities under the reference [N]
     * @return estimates [N]
     * @throws IllegalStateException if this is {@link #NONE}
     */
    public Tensor estimate(Tensor logprob, Tensor reference) {
        Tensor difference = logprob.sub(reference);
        return switch (this) {
            case NONE -> throw new IllegalStateException("KlEstimator.NONE estimates nothing; choose K1, K2 or K3");
            case K1 -> difference;
            case K2 -> difference.square().mul(0.5);
            case K3 -> difference.neg().exp().add(-1).add(difference);
        };
    }
}
