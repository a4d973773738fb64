package dev.tandem.training;

import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * From hidden states to the log-probability and entropy of each trained token, and back, without ever making the whole matrix of
 * logits (as in Liger Kernel's fused linear cross entropy, Hsu et al. 2024, here with an arbitrary loss in between). N trained tokens,
 * E hidden size, V vocabulary.
 *
 * <p>Used with gradients disabled; temporaries belong to the scope around it.
 */
interface LogprobHead {
    /**
     * The forward pass.
     *
     * @param entropy FLOAT32 [N], filled with each row's entropy
     * @return FLOAT32 [N], the targets' log-probabilities
     */
    Tensor forward(Tensor entropy);

    /**
     * The backward pass.
     *
     * @param byLogprob FLOAT32 [N], gradient of the loss by each log-probability
     * @param byEntropy FLOAT32 [N], gradient of the loss by each entropy, or null if it has none
     * @param byMatrix [V, E], to which the gradient of the loss by the matrix is added
     * @return gradient of the loss by the hidden states, [N, E]
     */
    Tensor backward(Tensor byLogprob, @Nullable Tensor byEntropy, Tensor byMatrix);
}
