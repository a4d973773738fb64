package dev.tandem.generation;

/**
 * Which distribution the log-probability of a sampled token is taken from. With {@code z} the model's logits, {@code z'} the
 * logits after repetition penalty and masking of stop tokens (before {@link SamplingParams#minTokens()} are out), and {@code T}
 * the temperature:
 *
 * <ul>
 *   <li>{@link #RAW}: {@code log_softmax(z)}, untouched by any sampling parameter.
 *   <li>{@link #TEMPERATURE}: {@code log_softmax(z' / T)}. Greedy decoding has no temperature of its own and takes {@code T = 1}
 *       here, so without penalties and masks it equals {@link #RAW}.
 *   <li>{@link #TRUNCATED}: {@code log_softmax(z' / T)} renormalised over the tokens that min-p, top-k and top-p keep: the
 *       distribution that was sampled from. Under greedy decoding that is a point mass, hence 0.
 * </ul>
 *
 * <p>A trainer that computes importance ratios must use the same kind: with top-p 0.8 the ratio between the first and the last is
 * about 0.9 on average.
 */
public enum LogprobKind {
    /** Log-softmax of the model's own logits. */
    RAW,
    /** Log-softmax after penalties, masks and temperature. */
    TEMPERATURE,
    /** Log-probability in the renormalised distribution that is left after truncation. */
    TRUNCATED
}
