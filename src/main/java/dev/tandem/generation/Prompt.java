package dev.tandem.generation;

/**
 * What a rank's generator is asked to continue.
 *
 * @param index of the prompt in the call that asked for it; also keys the random numbers of its samples
 * @param text as the user gave it, or decoded
 * @param tokens its token ids, not copied
 * @param params how to sample
 */
public record Prompt(int index, String text, int[] tokens, SamplingParams params) {}
