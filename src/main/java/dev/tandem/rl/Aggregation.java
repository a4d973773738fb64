package dev.tandem.rl;

/**
 * How the terms of all tokens of a step become one number. Every kind is a weighted sum, loss = Σ weight · term, in
 * which all tokens of one sequence weigh the same.
 *
 * <p>The weights are those of the <em>whole step</em>: they are computed once over all sequences, before these are cut
 * into micro-batches and shared out over ranks, so that the losses and gradients of all parts just add up. A mean per
 * micro-batch instead would weigh a token by the company it keeps.
 */
public sealed interface Aggregation {
    /** The mean over all tokens of the step: long sequences count for more. The choice of DAPO. */
    record TokenMean() implements Aggregation {}

    /**
     * The mean over sequences of each one's mean over its tokens: a token of a long sequence counts for less. As in
     * GRPO.
     */
    record SequenceMeanTokenMean() implements Aggregation {}

    /**
     * The mean over sequences of each one's sum over its tokens: the policy gradient of whole sequences, as REINFORCE
     * has it.
     */
    record SequenceMeanTokenSum() implements Aggregation {}

    /**
     * The mean over sequences of each one's sum over its tokens divided by a constant, so that no length is favoured
     * and the size of the loss stays that of a mean. The choice of Dr. GRPO.
     *
     * @param maxTokens the constant, usually the limit on a completion's length; at least 1
     */
    record SequenceMeanTokenSumNorm(int maxTokens) implements Aggregation {
        /** Checks the constant. */
        public SequenceMeanTokenSumNorm {
            if (maxTokens < 1) {
                throw new IllegalArgumentException("maxTokens must be at least 1: " + maxTokens);
            }
        }
    }

    /**
     * Computes the weight that each token of a sequence has in the step's loss. A sequence without trained tokens
     * counts as absent and gets weight zero.
     *
     * @param tokenCounts how many trained tokens each sequence of the step has, over all micro-batches and ranks
     * @return per sequence the weight of every one of its tokens
     * @throws IllegalArgumentException if a count is negative or no sequence has a token
     */
    default float[] weights(int[] tokenCounts) {
        long tokens = 0;
        int sequences = 0;
        for (int i = 0; i < tokenCounts.length; i++) {
            if (tokenCounts[i] < 0) {
                throw new IllegalArgumentException("sequence " + i + " has a negative token count: " + tokenCounts[i]);
            }
            tokens += tokenCounts[i];
            sequences += tokenCounts[i] > 0 ? 1 : 0;
        }
        if (tokens == 0) {
            throw new IllegalArgumentException(
                    "none of the step's " + tokenCounts.length + " sequences has a token to train on");
        }
        float[] weights = new float[tokenCounts.length];
        for (int i = 0; i < weights.length; i++) {
            if (tokenCounts[i] > 0) {
                double inverse = switch (this) {
                    case TokenMean() -> tokens;
                    case SequenceMeanTokenMean() -> (double) sequences * tokenCounts[i];
                    case SequenceMeanTokenSum() -> sequences;
                    case SequenceMeanTokenSumNorm(int maxTokens) -> (double) sequences * maxTokens;
                };
                weights[i] = (float) (1 / inverse);
            }
        }
        return weights;
    }
}
