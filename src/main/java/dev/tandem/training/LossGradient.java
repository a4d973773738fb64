package dev.tandem.training;

import dev.tandem.device.Gradients;
import dev.tandem.device.Tensor;
import java.util.Arrays;
import org.jspecify.annotations.Nullable;

/**
 * A loss and its gradients by what it was computed from. For the innermost scope.
 *
 * @param value the loss, one number
 * @param byLogprob FLOAT32 [N]
 * @param byEntropy FLOAT32 [N], or null when the loss does not depend on entropies
 */
record LossGradient(Tensor value, Tensor byLogprob, @Nullable Tensor byEntropy) {
    /**
     * Differentiates a loss; gradients must be enabled.
     *
     * @throws IllegalArgumentException when the loss is not one number that depends on the values
     */
    static LossGradient of(TokenLoss loss, PackedBatch batch, Tensor logprob, Tensor entropy) {
        logprob.requireGradient();
        entropy.requireGradient();
        Tensor total = loss.loss(values(batch, logprob, entropy));
        if (total.elements() != 1 || !total.requiresGradient()) {
            throw new IllegalArgumentException("a loss must be one number that depends on the tokens' log-probs or entropies, "
                    + (total.elements() != 1 ? "found shape " + Arrays.toString(total.shape()) : "found a constant"));
        }
        total.backward();
        try (Gradients off = Gradients.disabled()) {
            Tensor byLogprob = logprob.gradient();
            Tensor byEntropy = entropy.gradient();
            return new LossGradient(total.detach(), byLogprob == null ? logprob.detach().mul(0) : byLogprob.contiguous(),
                    byEntropy == null ? null : byEntropy.contiguous());
        }
    }

    /** {@return what a loss sees of a micro-batch} */
    static TokenValues values(PackedBatch batch, Tensor logprob, Tensor entropy) {
        return new TokenValues(logprob, entropy, batch.old(), batch.reference(), batch.advantage(), batch.weight(),
                batch.sequence(), batch.lengths().length);
    }
}
