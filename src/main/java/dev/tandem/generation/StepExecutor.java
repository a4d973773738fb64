package dev.tandem.generation;

/**
 * Computes what a {@link StepPlan} asks for: copies pages, runs the decoder, writes keys and values, samples.
 *
 * <p>Confined to its rank's thread; the owner closes it.
 */
interface StepExecutor extends AutoCloseable {
    /**
     * Runs one step.
     *
     * @param plan what to compute
     * @param requests the scheduler's table, which the plan refers to
     * @param seed of requests that bring none
     * @param tokens receives the sampled token of each of the plan's pairs, or {@link Sampler#NON_FINITE}
     * @param logprobs receives their log-probs
     */
    void run(StepPlan plan, RequestTable requests, long seed, int[] tokens, float[] logprobs);

    @Override
    void close();
}
