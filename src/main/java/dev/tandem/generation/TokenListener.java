package dev.tandem.generation;

/** Follows a sample while it is generated. Called on the rank's thread; must return quickly and not call the generator. */
@FunctionalInterface
public interface TokenListener {
    /**
     * Takes the next token.
     *
     * @param id token id
     * @param logprob of the kind that the parameters asked for
     * @param text the text that became certain with it, possibly empty; a stop string and what follows it never show
     */
    void accept(int id, float logprob, String text);
}
