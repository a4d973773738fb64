package dev.tandem;

/**
 * One token of a stream.
 *
 * @param id token id
 * @param logprob of the kind that the sampling parameters asked for
 * @param text the text that became certain with it, possibly empty
 */
public record Token(int id, float logprob, String text) {
    @Override
    public String toString() {
        return text;
    }
}
