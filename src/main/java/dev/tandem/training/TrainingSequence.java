package dev.tandem.training;

import org.jspecify.annotations.Nullable;

/**
 * One sequence to train on, with a value for each of its tokens. Arrays are as long as {@code tokens} and are not copied; values at
 * tokens that are not trained are ignored.
 *
 * @param tokens token ids, prompt and response
 * @param trained whether the token's log-probability is part of the loss; the first token has no predecessor and cannot be
 * @param weight the token's weight in the step's loss; over all sequences of a step the weights carry the aggregation
 * @param old log-probabilities under the weights that sampled the tokens, or null
 * @param reference log-probabilities under the frozen reference, or null
 * @param advantage advantages, or null
 */
public record TrainingSequence(int[] tokens, boolean[] trained, float[] weight, float @Nullable [] old,
        float @Nullable [] reference, float @Nullable [] advantage) {

    /** Checks lengths. */
    public TrainingSequence {
        check("trained", trained.length, tokens.length);
        check("weight", weight.length, tokens.length);
        check("old", old == null ? tokens.length : old.length, tokens.length);
        check("reference", reference == null ? tokens.length : reference.length, tokens.length);
        check("advantage", advantage == null ? tokens.length : advantage.length, tokens.length);
        if (tokens.length < 2) {
            throw new IllegalArgumentException("a training sequence needs at least two tokens, found " + tokens.length);
        }
        if (trained[0]) {
            throw new IllegalArgumentException("the first token of a sequence has no predecessor and cannot be trained");
        }
    }

    private static void check(String name, int found, int expected) {
        if (found != expected) {
            throw new IllegalArgumentException(name + " has " + found + " values for " + expected + " tokens");
        }
    }

    /** {@return how many tokens are trained} */
    public int trainedTokens() {
        int n = 0;
        for (boolean b : trained) {
            n += b ? 1 : 0;
        }
        return n;
    }

    /** {@return the tokens that the model must read: all but the last, which is only predicted} */
    int inputTokens() {
        return tokens.length - 1;
    }

    /** {@return a sequence whose every token after the first {@code promptLength} is trained with the same weight} */
    public static TrainingSequence of(int[] tokens, int promptLength, float weight) {
        boolean[] trained = new boolean[tokens.length];
        float[] weights = new float[tokens.length];
        for (int i = Math.max(1, promptLength); i < tokens.length; i++) {
            trained[i] = true;
            weights[i] = weight;
        }
        return new TrainingSequence(tokens, trained, weights, null, null, null);
    }
}
