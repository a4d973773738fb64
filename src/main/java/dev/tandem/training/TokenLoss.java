package dev.tandem.training;

import dev.tandem.device.Tensor;

/**
 * A loss as a function of per-token values. The log-prob head gives the values, automatic differentiation runs over these
 * vectors only, and the head turns the result into the model's gradient.
 */
@FunctionalInterface
public interface TokenLoss {
    /**
     * The part of the step's loss that the tokens of one micro-batch contribute; the parts of all micro-batches on all ranks add
     * up to the loss of the step. Multiply per-token terms by {@link TokenValues#weight} and sum them.
     *
     * @param tokens the values of the micro-batch's tokens
     * @return a scalar, computed from {@link TokenValues#logprob} and perhaps {@link TokenValues#entropy}
     */
    Tensor loss(TokenValues tokens);
}
