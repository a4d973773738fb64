package dev.tandem.generation;

/**
 * Turns a growing sequence of tokens into a growing text.
 *
 * <p>Tokens cannot be decoded one by one: a tokenizer may put a space before a token only if something precedes it, and one
 * character may be spread over several byte tokens. So a short window is decoded twice, without and with the new tokens, and the
 * text that the new ones add is the difference (the prefix and read offsets of Hugging Face's text-generation-inference and
 * vLLM). As long as the longer text ends in U+FFFD, a character may be incomplete and nothing is handed out.
 *
 * <p>A model that emits bytes which never form characters would let the window grow without bound. After
 * {@value #MOST_HELD_TOKENS} tokens, more than any character has bytes, all but the last U+FFFD is known to be final and is
 * handed out; the window moves on and remembers that its last character is still owed.
 *
 * <p>One instance serves one sample and sees its tokens in order.
 */
final class IncrementalDetokenizer {
    private static final char REPLACEMENT = '\uFFFD';
    private static final int MOST_HELD_TOKENS = 8;
    /** Tokens of the prompt that give the first generated token its context. */
    private static final int CONTEXT_TOKENS = 5;

    private final TokenDecoder decoder;
    private int windowStart;
    /** The text of {@code windowStart … read} has been handed out, but for its last {@code owed} characters. */
    private int read;

    private int owed;

    /** @param promptLength number of leading tokens whose text is not wanted */
    IncrementalDetokenizer(TokenDecoder decoder, int promptLength) {
        this.decoder = decoder;
        this.windowStart = Math.max(0, promptLength - CONTEXT_TOKENS);
        this.read = promptLength;
    }

    /**
     * {@return the text that became certain with the tokens up to {@code count}, often one word, possibly empty}
     *
     * @param tokens prompt and completion
     * @param count number of tokens that are there by now
     */
    String append(int[] tokens, int count) {
        return advance(tokens, count, false);
    }

    /** {@return the text that was held back, when no token will follow} An incomplete character shows as U+FFFD. */
    String flush(int[] tokens, int count) {
        return advance(tokens, count, true);
    }

    private String advance(int[] tokens, int count, boolean end) {
        if (count == read && owed == 0) {
            return "";
        }
        String text = decoder.decode(tokens, windowStart, count);
        int length = text.length();
        boolean incomplete = length > 0 && text.charAt(length - 1) == REPLACEMENT && !end;
        if (incomplete && count - read <= MOST_HELD_TOKENS) {
            return "";
        }
        int known = knownLength(text, decoder.decode(tokens, windowStart, read));
        int certain = Math.max(known, incomplete ? length - 1 : length);
        if (certain == known && !end && count - read <= MOST_HELD_TOKENS) {
            return ""; // the new tokens have no text yet
        }
        windowStart = read;
        read = count;
        owed = incomplete ? 1 : 0;
        return text.substring(known, certain);
    }

    /**
     * How much of the window's text was handed out. A prompt that ends amid a character shows U+FFFD at its end that its first
     * continuation replaces.
     */
    private int knownLength(String text, String before) {
        int known = Math.min(before.length() - Math.min(owed, before.length()), text.length());
        while (known > 0 && before.charAt(known - 1) == REPLACEMENT && text.charAt(known - 1) != REPLACEMENT) {
            known--;
        }
        return known;
    }
}
