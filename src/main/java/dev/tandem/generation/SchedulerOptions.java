package dev.tandem.generation;

import java.util.List;

/**
 * What bounds a step and a request.
 *
 * @param tokenBudget most tokens computed in one step; at least {@code maxRunning}, so that every running request can advance
 * @param maxRunning most requests (samples) that hold KV blocks at the same time
 * @param prefillThreshold most tokens one request may be granted in one step
 * @param contextLength most tokens (prompt and completion) the model can attend to
 * @param vocabularySize token ids are below this
 * @param watermarkBlocks KV blocks an admission must leave free while other requests run, so that they can grow
 * @param reserveFull whether an admission reserves blocks for prompt and {@code maxTokens}; then nothing is ever preempted
 * @param prefixCaching whether full blocks are found again by later requests with the same prefix
 * @param eosTokenIds the model's end-of-sequence tokens
 */
record SchedulerOptions(
        int tokenBudget,
        int maxRunning,
        int prefillThreshold,
        int contextLength,
        int vocabularySize,
        int watermarkBlocks,
        boolean reserveFull,
        boolean prefixCaching,
        List<Integer> eosTokenIds) {

    /** @throws IllegalArgumentException if a bound is out of range; the message names it */
    SchedulerOptions {
        requireAtLeast(1, maxRunning, "maxRunning");
        requireAtLeast(maxRunning, tokenBudget, "tokenBudget (maxRunning is " + maxRunning + ")");
        requireAtLeast(1, prefillThreshold, "prefillThreshold");
        requireAtLeast(2, contextLength, "contextLength");
        requireAtLeast(1, vocabularySize, "vocabularySize");
        requireAtLeast(0, watermarkBlocks, "watermarkBlocks");
        eosTokenIds = List.copyOf(eosTokenIds);
        for (int id : eosTokenIds) {
            if (id < 0 || id >= vocabularySize) {
                throw new IllegalArgumentException("scheduler option eosTokenIds holds " + id
                        + ", which is outside the vocabulary of " + vocabularySize + " tokens");
            }
        }
    }

    private static void requireAtLeast(int least, int found, String name) {
        if (found < least) {
            throw new IllegalArgumentException("scheduler option " + name + " is " + found + " but must be at least " + least);
        }
    }
}
