package dev.tandem.generation;

/**
 * Computes what a {@link StepPlan} asks for: copies pages, runs the decoder, writes keys and values, samples.
 *
 * <p>A step is begun, and its results are asked for later, so that the next one can be planned while it runs. Steps end in the order in
 * which they were begun. Confined to its rank's thread; the owner closes it.
 */
interface StepExecutor extends AutoCloseable {
    /**
     * Checks that requests with these parameters can be computed.
     *
     * @param stopTokens how many tokens end the request
     * @throws IllegalArgumentException when they cannot
     */
    default void validate(SamplingParams params, int stopTokens) {}

    /** {@return how many steps may have begun and not ended: 1, or 2 when the device runs beside the host} */
    int depth();

    /**
     * Begins a step. Everything that the plan and the table hold is read before this returns.
     *
     * @param plan what to compute
     * @param requests the scheduler's table, which the plan refers to
     * @param seed of requests that bring none
     */
    void begin(StepPlan plan, RequestTable requests, long seed);

    /**
     * Waits for the oldest step that has begun.
     *
     * @param count the plan's number of samples
     * @param tokens receives the sampled token of each of the plan's pairs, or {@link Sampler#NON_FINITE}
     * @param logprobs receives their log-probs
     */
    void end(int count, int[] tokens, float[] logprobs);

    /**
     * Measures, or no longer measures, where the device's time goes; no step runs.
     *
     * @return seconds of each {@link StepTimeline.Part} until now since measuring began; zeros where the host computes
     */
    default double[] measure(boolean on) {
        return new double[StepTimeline.Part.values().length];
    }

    /** Waits for everything that runs and forgets its results, after a failure. */
    void abandon();

    @Override
    void close();
}
