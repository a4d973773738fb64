package dev.tandem.generation;

/** Turns token ids into text, as a tokenizer does. */
@FunctionalInterface
public interface TokenDecoder {
    /**
     * {@return the text of the tokens {@code tokens[from] … tokens[to - 1]}} Bytes that form no complete UTF-8 sequence are
     * shown as U+FFFD.
     *
     * @param tokens token ids; must not be kept
     * @param from first index
     * @param to index after the last
     */
    String decode(int[] tokens, int from, int to);
}
