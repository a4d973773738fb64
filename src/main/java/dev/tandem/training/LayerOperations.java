package dev.tandem.training;

import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * What a decoder layer computes, each with its backward pass, for one micro-batch. T tokens, E hidden size, H query heads, K KV heads, D
 * head size, I inner size. Results belong to the innermost scope. Gradients of weights are FLOAT32 and are added to.
 */
interface LayerOperations {
    /** {@return rows x [T, k] times the transpose of a weight [n, k]} */
    Tensor multiply(Tensor x, Tensor weight);

    /** {@return the gradient of the rows, from that of the product [T, n]} */
    Tensor multiplyBackward(Tensor byProduct, Tensor weight);

    /**
     * A residual sum and its norm.
     *
     * @param sum [T, E]
     * @param normed [T, E]
     * @param statistics what the backward pass needs beside the sum
     */
    record Normed(Tensor sum, Tensor normed, Tensor statistics) {}

    /** {@return the norm of x + addend, or of x} */
    Normed norm(Tensor x, @Nullable Tensor addend, @Nullable Tensor weight, @Nullable Tensor bias);

    /**
     * What a backward pass returns beside gradients of weights.
     *
     * @param gradient of the input
     * @param again the forward pass's result, computed again: the gradient of the weight that it is multiplied with needs it
     */
    record Backward(Tensor gradient, Tensor again) {}

    /**
     * {@return the gradient of the sum [T, E]: the norm's and what comes to it by other ways}
     *
     * @param byOthers [T, E] or null
     */
    Backward normBackward(Tensor byNormed, Tensor sum, Tensor statistics, @Nullable Tensor weight, @Nullable Tensor bias,
            @Nullable Tensor byOthers, @Nullable Tensor weightGradient, @Nullable Tensor biasGradient);

    /**
     * Queries [T, H, D], keys and values [T, K, D].
     */
    record Heads(Tensor query, Tensor key, Tensor value) {}

    /**
     * {@return queries, keys, values with bias, head norms and positions}
     *
     * @param qkv [T, (H + 2 K) D]
     */
    Heads heads(Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm);

    /** {@return the gradient of qkv} The bias has the same, summed over tokens. */
    Tensor headsBackward(Heads gradients, Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm,
            @Nullable Tensor queryNormGradient, @Nullable Tensor keyNormGradient);

    /**
     * Attention's result.
     *
     * @param result [T, H D]
     * @param kept what the backward pass needs beside the result
     */
    record Attended(Tensor result, Tensor... kept) {}

    /** {@return causal attention within each sequence} */
    Attended attend(Heads heads);

    /** {@return the gradients of queries, keys, values} */
    Heads attendBackward(Tensor byResult, Heads heads, Attended attended);

    /**
     * {@return the activation of a feed-forward block [T, I]}
     *
     * @param widened [T, I], or [T, 2 I] with the gate first
     */
    Tensor activate(Tensor widened, @Nullable Tensor bias);

    /** {@return the gradient of {@code widened}} The bias has the same, summed over tokens. */
    Backward activateBackward(Tensor widened, @Nullable Tensor bias, Tensor byActivated);

    /** Adds the sum over the rows of x [T, N] to a vector [N]. */
    void addColumnSums(Tensor x, Tensor into);
}
