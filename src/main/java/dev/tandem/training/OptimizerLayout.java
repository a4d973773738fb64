package dev.tandem.training;

import dev.tandem.device.DType;

/**
 * Where AdamW's state of so many elements lies in one piece of memory: remainders of masters if there are any, first moments, second
 * moments. All results are bytes.
 *
 * @param elements a multiple of 64, so that each part begins on a boundary
 * @param splits whether weights are rounded and keep remainders, as {@link SplitMasters} says
 * @param moments type of the moments
 */
record OptimizerLayout(long elements, boolean splits, DType moments) {
    /** {@return the layout for so many weights of a type} */
    static OptimizerLayout of(long elements, DType weights, TrainerOptions options) {
        return new OptimizerLayout(elements, SplitMasters.needed(weights), options.moments());
    }

    /** {@return where the remainder of an element's master lies} */
    long remainder(long element) {
        return element * SplitMasters.BYTES;
    }

    /** {@return where the first moment of an element lies} */
    long first(long element) {
        return (splits ? remainder(elements) : 0) + element * moments.bytes();
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
