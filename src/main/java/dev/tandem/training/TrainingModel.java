package dev.tandem.training;

import dev.tandem.device.Tensor;
import dev.tandem.model.WeightArena;
import org.jspecify.annotations.Nullable;

/** The training-side forward and backward pass of one rank. Confined to the rank's thread; the owner closes it. */
interface TrainingModel extends AutoCloseable {
    /** {@return the log-probability and entropy of every trained token, without gradients, for the innermost scope} */
    TokenValues forward(PackedBatch batch, WeightArena weights, double temperature);

    /**
     * Runs a micro-batch forward and backward and hands each group's gradients on.
     *
     * @param batch what to train on, or null when this rank has none left and only takes part in the reductions
     * @param total FLOAT64 [1], to which the micro-batch's part of the loss is added
     */
    void forwardBackward(@Nullable PackedBatch batch, TokenLoss loss, double temperature, GradientShard gradients, Tensor total);

    /** Gives back what only backward passes need, until the next one. */
    void releaseBuckets();

    @Override
    void close();
}
