package dev.tandem.generation;

/**
 * exp for whole arrays, written so that the JIT compiler vectorises it: no table, no branch, no look at the bits.
 *
 * <p>exp(x) is computed as (exp(x / 1024))<sup>1024</sup>: a Taylor polynomial of degree 8, then ten squarings. For x in
 * [-100, 0] the relative error is below 1e-11; the squarings multiply rounding errors by 1024, the truncated series contributes
 * less. Below {@value #LOWEST} the argument is clamped, where the squarings underflow, so exp(-∞) is exactly 0. Only IEEE
 * additions and multiplications are used, hence the results are the same on every machine.
 */
final class Exponential {
    private static final double LOWEST = -760;
    private static final double SCALE = 1.0 / 1024;

    private Exponential() {}

    /** {@return exp(x) for x ≤ 0} */
    static double exp(double x) {
        double y = Math.max(x, LOWEST) * SCALE;
        double p = 1.0 / 40320;
        p = p * y + 1.0 / 5040;
        p = p * y + 1.0 / 720;
        p = p * y + 1.0 / 120;
        p = p * y + 1.0 / 24;
        p = p * y + 1.0 / 6;
        p = p * y + 0.5;
        p = p * y + 1.0;
        p = p * y + 1.0;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        p *= p;
        return p;
    }

    /** Writes {@code exp((x[from + i] - max) * inverseTemperature)} to {@code out[i]}, for {@code i < count}. */
    static void weights(float[] x, int from, int count, double max, double inverseTemperature, double[] out) {
        for (int i = 0; i < count; i++) {
            out[i] = exp((x[from + i] - max) * inverseTemperature);
        }
    }

    /** {@return the sum of the first {@code count} entries} Eight partial sums, so that additions do not wait for each other. */
    static double sum(double[] values, int count) {
        double a = 0;
        double b = 0;
        double c = 0;
        double d = 0;
        double e = 0;
        double f = 0;
        double g = 0;
        double h = 0;
        int i = 0;
        for (; i + 8 <= count; i += 8) {
            a += values[i];
            b += values[i + 1];
            c += values[i + 2];
            d += values[i + 3];
            e += values[i + 4];
            f += values[i + 5];
            g += values[i + 6];
            h += values[i + 7];
        }
        for (; i < count; i++) {
            a += values[i];
        }
        return ((a + b) + (c + d)) + ((e + f) + (g + h));
    }
}
