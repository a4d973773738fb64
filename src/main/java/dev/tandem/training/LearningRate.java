package dev.tandem.training;

/**
 * A learning rate over the steps of a run: linear warm-up to the peak, then constant, linear or cosine (Loshchilov and Hutter 2017)
 * decay to a share of the peak.
 *
 * @param decay the shape after the warm-up
 * @param peak the highest rate
 * @param warmupSteps steps until the peak is reached; step 0 has rate peak / warmupSteps
 * @param totalSteps steps after which the floor is reached; ignored by a constant rate
 * @param floor share of the peak that is left at the end, 0 to 1
 */
public record LearningRate(Decay decay, double peak, long warmupSteps, long totalSteps, double floor) {
    /** What the rate does after the warm-up. */
    public enum Decay {
        /** Stays at the peak. */
        CONSTANT,
        /** Falls in a straight line. */
        LINEAR,
        /** Falls along half a cosine. */
        COSINE
    }

    /** Checks the numbers. */
    public LearningRate {
        if (!(peak >= 0) || Double.isInfinite(peak)) {
            throw new IllegalArgumentException("the learning rate must be a number from 0 on: " + peak);
        }
        if (warmupSteps < 0) {
            throw new IllegalArgumentException("warm-up steps must not be negative: " + warmupSteps);
        }
        if (decay != Decay.CONSTANT && totalSteps <= warmupSteps) {
            throw new IllegalArgumentException("a decaying rate needs more steps in total (" + totalSteps + ") than warm-up steps ("
                    + warmupSteps + ")");
        }
        if (!(floor >= 0 && floor <= 1)) {
            throw new IllegalArgumentException("the floor is a share of the peak from 0 to 1: " + floor);
        }
    }

    /** {@return the same rate at every step} */
    public static LearningRate constant(double rate) {
        return new LearningRate(Decay.CONSTANT, rate, 0, 0, 0);
    }

    /** {@return a rate that falls in a straight line to zero} */
    public static LearningRate linear(double peak, long totalSteps) {
        return new LearningRate(Decay.LINEAR, peak, 0, totalSteps, 0);
    }

    /** {@return a rate that falls along half a cosine to zero} */
    public static LearningRate cosine(double peak, long totalSteps) {
        return new LearningRate(Decay.COSINE, peak, 0, totalSteps, 0);
    }

    /** {@return this rate with a linear warm-up} */
    public LearningRate warmup(long steps) {
        return new LearningRate(decay, peak, steps, totalSteps, floor);
    }

    /** {@return this rate with a share of the peak left at the end} */
    public LearningRate floor(double share) {
        return new LearningRate(decay, peak, warmupSteps, totalSteps, share);
    }

    /** {@return the rate of a step, from 0} */
    public double at(long step) {
        if (step < warmupSteps) {
            return peak * (step + 1) / warmupSteps;
        }
        if (decay == Decay.CONSTANT) {
            return peak;
        }
        double done = Math.min(1, (double) (step - warmupSteps) / (totalSteps - warmupSteps));
        double left = decay == Decay.LINEAR ? 1 - done : (1 + Math.cos(Math.PI * done)) / 2;
        return peak * (floor + (1 - floor) * left);
    }
}
