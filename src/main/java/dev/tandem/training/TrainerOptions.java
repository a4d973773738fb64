package dev.tandem.training;

import dev.tandem.device.DType;

/**
 * How to train.
 *
 * @param lr learning rate over the steps
 * @param beta1 decay of AdamW's first moment
 * @param beta2 decay of AdamW's second moment
 * @param epsilon added to the root of the second moment
 * @param weightDecay decoupled weight decay
 * @param decayAll whether norms and biases decay too
 * @param moments type of AdamW's moments: FLOAT32, or BFLOAT16 for half the memory; these are rounded up or down at random, so that slow
 *     averages still move
 * @param clip largest global norm of the gradient; infinite for no clipping
 * @param microBatchTokens most tokens that one rank runs through the model at once; fewer where a GPU's memory then holds more activations
 * @param activationBudget bytes of activations that may be kept from the forward to the backward pass; what does not fit is computed
 *     again. {@link #ALL_THAT_FITS} leaves it to the memory plan
 * @param logitBytes most bytes of FLOAT32 logits at a time
 */
public record TrainerOptions(LearningRate lr, double beta1, double beta2, double epsilon, double weightDecay, boolean decayAll,
        DType moments, double clip, int microBatchTokens, long activationBudget, long logitBytes) {

    /** An activation budget of all the memory that the plan has left. */
    public static final long ALL_THAT_FITS = Long.MAX_VALUE;

    /** Checks the numbers. */
    public TrainerOptions {
        check("beta1", beta1 >= 0 && beta1 < 1, beta1);
        check("beta2", beta2 >= 0 && beta2 < 1, beta2);
        check("epsilon", epsilon > 0, epsilon);
        check("weightDecay", weightDecay >= 0, weightDecay);
        if (moments != DType.FLOAT32 && moments != DType.BFLOAT16) {
            throw new IllegalArgumentException("TrainerOptions.moments must be FLOAT32 or BFLOAT16, not " + moments);
        }
        check("clip", clip > 0, clip);
        check("microBatchTokens", microBatchTokens > 0, microBatchTokens);
        check("activationBudget", activationBudget >= 0, activationBudget);
        check("logitBytes", logitBytes > 0, logitBytes);
    }

    private static void check(String name, boolean good, double value) {
        if (!good) {
            throw new IllegalArgumentException("TrainerOptions." + name + " is out of range: " + value);
        }
    }

    /** {@return AdamW(0.9, 0.95, 1e-8), no weight decay, moments in FLOAT32, clipping at 1, constant rate 1e-5, 512 tokens
     * at once} */
    public static TrainerOptions defaults() {
        return new TrainerOptions(
                LearningRate.constant(1e-5), 0.9, 0.95, 1e-8, 0, false, DType.FLOAT32, 1, 512, 768L << 20, 256L << 20);
    }

    /** {@return these options with another learning rate} */
    public TrainerOptions lr(LearningRate value) {
        return new TrainerOptions(value, beta1, beta2, epsilon, weightDecay, decayAll, moments, clip, microBatchTokens,
                activationBudget, logitBytes);
    }

    /** {@return these options with a constant learning rate} */
    public TrainerOptions lr(double value) {
        return lr(LearningRate.constant(value));
    }

    /** {@return these options with other decays of AdamW's moments} */
    public TrainerOptions betas(double first, double second) {
        return new TrainerOptions(lr, first, second, epsilon, weightDecay, decayAll, moments, clip, microBatchTokens,
                activationBudget, logitBytes);
    }

    /** {@return these options with weight decay, of matrices only or of everything} */
    public TrainerOptions weightDecay(double value, boolean everything) {
        return new TrainerOptions(lr, beta1, beta2, epsilon, value, everything, moments, clip, microBatchTokens,
                activationBudget, logitBytes);
    }

    /** {@return these options with AdamW's moments in FLOAT32 or BFLOAT16} */
    public TrainerOptions moments(DType value) {
        return new TrainerOptions(lr, beta1, beta2, epsilon, weightDecay, decayAll, value, clip, microBatchTokens,
                activationBudget, logitBytes);
    }

    /** {@return these options with another bound of the gradient norm} */
    public TrainerOptions clip(double value) {
        return new TrainerOptions(lr, beta1, beta2, epsilon, weightDecay, decayAll, moments, value, microBatchTokens,
                activationBudget, logitBytes);
    }

    /** {@return these options with another micro-batch size} */
    public TrainerOptions microBatchTokens(int value) {
        return new TrainerOptions(lr, beta1, beta2, epsilon, weightDecay, decayAll, moments, clip, value, activationBudget, logitBytes);
    }

    /** {@return these options with other bounds of what is kept in memory} */
    public TrainerOptions memory(long activations, long logits) {
        return new TrainerOptions(lr, beta1, beta2, epsilon, weightDecay, decayAll, moments, clip, microBatchTokens, activations, logits);
    }

    boolean decays(boolean matrix) {
        return weightDecay > 0 && (matrix || decayAll);
    }

    /** {@return the most bytes of probabilities that a GPU's log-prob head keeps from its forward to its backward pass} */
    long probabilityBytes() {
        return 4 * logitBytes;
    }
}
