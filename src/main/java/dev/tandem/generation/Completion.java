package dev.tandem.generation;

/**
 * One sample of a prompt. Arrays are not copied: treat them as read-only.
 *
 * @param prompt index of its prompt in the call that asked for it
 * @param sample index among the samples of the prompt
 * @param promptText the prompt as it was given, or decoded when it was given as tokens
 * @param promptTokens token ids of the prompt
 * @param tokens generated token ids, the one that ended it included
 * @param logprobs of the generated tokens, of the kind that the parameters asked for
 * @param text the generated text without special tokens, cut before a stop string
 * @param finish why it ended
 * @param cachedTokens prompt tokens whose keys and values were found in the prefix cache
 * @param weightVersions versions of the weights that sampled it, first and last; equal unless they changed in between
 */
public record Completion(int prompt, int sample, String promptText, int[] promptTokens, int[] tokens,
        float[] logprobs, String text, Finish finish, int cachedTokens, WeightVersions weightVersions) {
    /**
     * The first and the last weight version of a completion.
     *
     * @param first version of the first token
     * @param last version of the last token
     */
    public record WeightVersions(long first, long last) {}

    @Override
    public String toString() {
        return text + " [" + finish.label() + ", " + tokens.length + " tokens]";
    }
}
