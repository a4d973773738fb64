package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/**
 * FLOAT32 masters of BFLOAT16 weights that take two bytes each instead of four, and lose nothing.
 *
 * <p>A weight is its master rounded to the upper 16 bits, to the nearest and halves away from zero; what is kept beside the weight are the
 * lower 16 bits, the remainder. Taken as a signed number it is how far the master lies above the weight, so the bits of the master are
 * {@code (weight << 16) + remainder}. Rounding halves to even would leave two masters with the same weight and remainder. The idea is that
 * of Split-SGD (Kalamkar et al. 2020, on recommender systems on CPU clusters), whose weights are cut off instead of rounded.
 *
 * <p>A weight of zero has no remainder, or a weight that somebody sets to zero would become NaN. {@code optimizer.cu} does the same on a
 * GPU. All tensors here are contiguous, on the CPU, and equally long.
 */
final class SplitMasters {
    /** Of a remainder. */
    static final int BYTES = Short.BYTES;

    private static final int MAGNITUDE = Integer.MAX_VALUE;
    private static final int INFINITE = 0x7f800000;

    private SplitMasters() {}

    /** Puts {@code weights} (BFLOAT16) and their {@code remainders} together to {@code masters} (FLOAT32). */
    static void join(Tensor weights, MemorySegment remainders, Tensor masters) {
        MemorySegment from = weights.memory();
        MemorySegment to = masters.memory();
        for (int i = 0, count = Math.toIntExact(weights.elements()); i < count; i++) {
            int bits = from.getAtIndex(ValueLayout.JAVA_SHORT, i) << 16;
            int remainder = remainders.getAtIndex(ValueLayout.JAVA_SHORT, i);
            to.setAtIndex(ValueLayout.JAVA_INT, i, (bits & MAGNITUDE) == 0 ? bits : bits + remainder);
        }
    }

    /** Rounds {@code masters} (FLOAT32) to {@code weights} (BFLOAT16) and keeps their {@code remainders}. */
    static void split(Tensor masters, Tensor weights, MemorySegment remainders) {
        MemorySegment from = masters.memory();
        MemorySegment to = weights.memory();
        for (int i = 0, count = Math.toIntExact(masters.elements()); i < count; i++) {
            int bits = from.getAtIndex(ValueLayout.JAVA_INT, i);
            boolean isNaN = (bits & MAGNITUDE) > INFINITE; // must not be rounded to a number
            to.setAtIndex(ValueLayout.JAVA_SHORT, i, (short) ((isNaN ? bits | 0x400000 : bits + 0x8000) >>> 16));
            remainders.setAtIndex(ValueLayout.JAVA_SHORT, i, (short) bits);
        }
    }

    /** {@return whether weights of a type have masters beside them} */
    static boolean needed(DType weights) {
        return weights != DType.FLOAT32;
    }
}
