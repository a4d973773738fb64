package dev.tandem.training;

import dev.tandem.device.DType;

/**
 * Where AdamW's state of so many elements lies in one piece of memory: FLOAT32 masters if there are any, first moments, second moments.
 * All results are bytes.
 *
 * @param elements a multiple of 64, so that each part begins on a boundary
 * @param masters whether there are masters: where the weights are rounded
 * @param moments type of the moments
 */
record OptimizerLayout(long elements, boolean masters, DType moments) {
    /** {@return the layout for so many weights of a type} */
    static OptimizerLayout of(long elements, DType weights, TrainerOptions options) {
        return new OptimizerLayout(elements, weights != DType.FLOAT32, options.moments());
    }

    /** {@return where the master of an element lies} */
    long master(long element) {
        return element * Float.BYTES;
    }

    /** {@return where the first moment of an element lies} */
    long first(long element) {
        return (masters ? master(elements) : 0) + element * moments.bytes();
    }

    /** {@return where the second moment of an element lies} */
    long second(long element) {
        return first(elements) + element * moments.bytes();
    }

    /** {@return the length of all} */
    long bytes() {
        return second(elements);
    }
}
