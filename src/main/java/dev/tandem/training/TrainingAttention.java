package dev.tandem.training;

import dev.tandem.device.Tensor;
import dev.tandem.training.LayerOperations.Attended;
import dev.tandem.training.LayerOperations.Heads;

/** Causal attention within each sequence of one micro-batch, on a GPU in BFLOAT16. Results belong to the innermost scope. */
interface TrainingAttention {
    /** {@return attention's result [T, H D], and what {@link #backward} needs} */
    Attended forward(Heads heads);

    /** {@return the contiguous gradients of queries, keys, values} */
    Heads backward(Tensor byResult, Heads heads, Attended attended);
}
