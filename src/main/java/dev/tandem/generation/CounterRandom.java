package dev.tandem.generation;

/**
 * Uniform numbers that are a pure function of (seed, sample key, position): no state, so a sample draws the same numbers
 * whatever it shares a batch with, however often it is preempted, and in whatever order rows are sampled.
 *
 * <p>The three words are absorbed one after another, each followed by the 64-bit finaliser of SplitMix64 (Steele, Lea and
 * Flood, 2014; constants of Stafford's variant 13), a bijection in which each input bit changes each output bit with
 * probability close to one half.
 */
final class CounterRandom {
    private static final long GOLDEN_GAMMA = 0x9E3779B97F4A7C15L;

    private CounterRandom() {}

    /** {@return a multiple of 2<sup>-53</sup> in [0, 1)} */
    static double uniform(long seed, long sampleKey, long position) {
        return (bits(seed, sampleKey, position) >>> 11) * 0x1p-53;
    }

    /** {@return 64 random bits} Also derives the sample keys of a request. */
    static long bits(long seed, long sampleKey, long position) {
        long h = mix(seed + GOLDEN_GAMMA);
        h = mix((h ^ sampleKey) + GOLDEN_GAMMA);
        return mix((h ^ position) + GOLDEN_GAMMA);
    }

    private static long mix(long z) {
        z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
        z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
        return z ^ (z >>> 31);
    }
}
