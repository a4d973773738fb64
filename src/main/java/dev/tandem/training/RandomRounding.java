package dev.tandem.training;

import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/**
 * What is random in the optimizer, on the CPU: the rounding of moments to BFLOAT16, up or down with the probabilities that leave the mean
 * unchanged, and where masters begin. The noise is a function of (seed, step, element), so a run repeats bit for bit however its elements
 * are spread; {@code optimizer.cu} draws the same.
 */
final class RandomRounding {
    private static final long GAMMA = 0x9E3779B97F4A7C15L;
    private static final int INFINITE = 0x7f800000;

    private final long key;

    /** @param step the number of the update, from 1 */
    RandomRounding(long seed, long step) {
        key = mix(mix(seed) ^ step);
    }

    /** SplitMix64 (Steele, Lea and Flood 2014); written out, it takes a third of SplittableRandom's time. */
    private static long mix(long word) {
        long z = word + GAMMA;
        z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
        z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
        return z ^ (z >>> 31);
    }

    /**
     * Rounds the moments of adjacent elements; contiguous CPU tensors of the same length.
     *
     * @param first FLOAT32 first moments
     * @param second FLOAT32 second moments
     * @param roundedFirst BFLOAT16, written
     * @param roundedSecond BFLOAT16, written
     * @param element the number of the first element in the model
     */
    void round(Tensor first, Tensor second, Tensor roundedFirst, Tensor roundedSecond, long element) {
        MemorySegment means = first.memory();
        MemorySegment squares = second.memory();
        MemorySegment roundedMeans = roundedFirst.memory();
        MemorySegment roundedSquares = roundedSecond.memory();
        int count = Math.toIntExact(first.elements());
        for (int i = 0; i < count; i++) {
            int noise = noise(element + i);
            roundedMeans.setAtIndex(ValueLayout.JAVA_SHORT, i, round(means.getAtIndex(ValueLayout.JAVA_INT, i), noise));
            roundedSquares.setAtIndex(ValueLayout.JAVA_SHORT, i, round(squares.getAtIndex(ValueLayout.JAVA_INT, i), noise));
        }
    }

    /** {@return 16 bits for both moments of an element, each of which keeps its mean} Four elements share 64. */
    private int noise(long element) {
        return (int) (mix(key ^ (element >>> 2)) >>> 16 * (int) (element & 3)) & 0xffff;
    }

    /**
     * Draws masters of weights: for each one of the numbers that round to it, all equally likely.
     *
     * @param weights BFLOAT16, contiguous on the CPU
     * @param remainders of {@link SplitMasters}, as many, written
     * @param element the number of the first weight in the model
     */
    static void draw(long seed, Tensor weights, MemorySegment remainders, long element) {
        long key = mix(mix(seed));
        MemorySegment from = weights.memory();
        long count = weights.elements();
        for (long i = 0; i < count; i++) {
            int bits = from.getAtIndex(ValueLayout.JAVA_SHORT, i) << 16;
            boolean drawn = (bits & Integer.MAX_VALUE) != 0 && (bits & INFINITE) != INFINITE;
            int noise = (int) ((mix(key ^ (element + i)) & 0xffff) * 0xffff >>> 16) - 0x7fff;
            remainders.setAtIndex(ValueLayout.JAVA_SHORT, i, (short) (drawn ? noise : 0));
        }
    }

    /** The noise carries into the bits that stay with the probability of the part cut off. */
    private static short round(int bits, int noise) {
        int sum = (bits & INFINITE) == INFINITE ? bits : bits + noise;
        return (short) (sum >>> 16);
    }
}
