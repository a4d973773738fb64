package dev.tandem.generation;

import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * How the completions of one prompt are sampled and when they end. Truncation is applied in the order temperature, min-p, top-k,
 * top-p (the order of vLLM).
 *
 * @param temperature divides the logits; 0 is greedy decoding (arg max, the lowest token id wins ties)
 * @param topK keep the {@code topK} most likely tokens; 0 keeps all
 * @param topP keep the smallest set of most likely tokens whose probability reaches {@code topP}; 1 keeps all
 * @param minP keep tokens at least {@code minP} times as likely as the likeliest; 0 keeps all
 * @param repetitionPenalty divides positive and multiplies negative logits of tokens that occur in the prompt or the output
 *     (Keskar et al., CTRL, 2019); 1 is off
 * @param seed makes the result reproducible; {@code null} lets the generator choose
 * @param n completions per prompt; they share the prompt's KV blocks
 * @param maxTokens most tokens to generate, the stop token included
 * @param minTokens end-of-sequence and stop tokens cannot be sampled before this many tokens are out
 * @param stopTokenIds tokens that end a completion, besides the model's end-of-sequence tokens
 * @param stopStrings texts that end a completion; the completion's text is cut before them
 * @param ignoreEos whether the model's end-of-sequence tokens are ordinary tokens
 * @param logprobKind which log-probability is reported for sampled tokens
 */
public record SamplingParams(
        double temperature,
        int topK,
        double topP,
        double minP,
        double repetitionPenalty,
        @Nullable Long seed,
        int n,
        int maxTokens,
        int minTokens,
        List<Integer> stopTokenIds,
        List<String> stopStrings,
        boolean ignoreEos,
        LogprobKind logprobKind) {

    private static final SamplingParams DEFAULTS =
            new SamplingParams(1, 0, 1, 0, 1, null, 1, 256, 0, List.of(), List.of(), false, LogprobKind.RAW);

    /** @throws IllegalArgumentException if a value is outside its range; the message names it */
    public SamplingParams {
        require(temperature >= 0 && temperature <= Double.MAX_VALUE, "temperature", temperature, "finite and at least 0");
        require(topK >= 0, "topK", topK, "at least 0 (0 keeps all tokens)");
        require(topP > 0 && topP <= 1, "topP", topP, "above 0 and at most 1 (1 keeps all tokens)");
        require(minP >= 0 && minP <= 1, "minP", minP, "between 0 and 1 (0 keeps all tokens)");
        require(repetitionPenalty > 0 && repetitionPenalty <= Double.MAX_VALUE,
                "repetitionPenalty", repetitionPenalty, "finite and above 0 (1 is off)");
        require(n >= 1, "n", n, "at least 1");
        require(maxTokens >= 1, "maxTokens", maxTokens, "at least 1");
        require(minTokens >= 0 && minTokens <= maxTokens, "minTokens", minTokens, "between 0 and maxTokens (" + maxTokens + ")");
        stopTokenIds = List.copyOf(stopTokenIds);
        stopStrings = List.copyOf(stopStrings);
        for (int id : stopTokenIds) {
            require(id >= 0, "stopTokenIds", id, "a list of token ids, each at least 0");
        }
        for (String stop : stopStrings) {
            require(!stop.isEmpty(), "stopStrings", "\"\"", "a list of non-empty strings");
        }
    }

    private static void require(boolean valid, String name, Object found, String expected) {
        if (!valid) {
            throw new IllegalArgumentException("sampling parameter " + name + " is " + found + " but must be " + expected);
        }
    }

    /** {@return temperature 1, no truncation, one completion of at most 256 tokens, raw log-probabilities} */
    public static SamplingParams defaults() {
        return DEFAULTS;
    }

    /** {@return the defaults at temperature 0} */
    public static SamplingParams greedy() {
        return DEFAULTS.temperature(0);
    }

    /** {@return whether decoding takes the arg max instead of drawing} */
    public boolean isGreedy() {
        return temperature == 0;
    }

    /** {@return whether min-p, top-k or top-p can remove a token} */
    boolean truncates() {
        return minP > 0 || topK > 0 || topP < 1;
    }

    /** {@return a copy with this temperature} @param value see {@link #temperature()} */
    public SamplingParams temperature(double value) {
        return new SamplingParams(value, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this top-k} @param value see {@link #topK()} */
    public SamplingParams topK(int value) {
        return new SamplingParams(temperature, value, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this top-p} @param value see {@link #topP()} */
    public SamplingParams topP(double value) {
        return new SamplingParams(temperature, topK, value, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this min-p} @param value see {@link #minP()} */
    public SamplingParams minP(double value) {
        return new SamplingParams(temperature, topK, topP, value, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this repetition penalty} @param value see {@link #repetitionPenalty()} */
    public SamplingParams repetitionPenalty(double value) {
        return new SamplingParams(temperature, topK, topP, minP, value, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this seed} @param value see {@link #seed()} */
    public SamplingParams seed(long value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, value, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this many completions per prompt} @param value see {@link #n()} */
    public SamplingParams n(int value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, value, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this token budget} @param value see {@link #maxTokens()} */
    public SamplingParams maxTokens(int value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, value, minTokens,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with this least number of tokens} @param value see {@link #minTokens()} */
    public SamplingParams minTokens(int value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, value,
                stopTokenIds, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with these stop tokens} @param value see {@link #stopTokenIds()} */
    public SamplingParams stopTokenIds(List<Integer> value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                value, stopStrings, ignoreEos, logprobKind);
    }

    /** {@return a copy with these stop strings} @param value see {@link #stopStrings()} */
    public SamplingParams stopStrings(List<String> value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, value, ignoreEos, logprobKind);
    }

    /** {@return a copy that does or does not ignore end-of-sequence tokens} @param value see {@link #ignoreEos()} */
    public SamplingParams ignoreEos(boolean value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, value, logprobKind);
    }

    /** {@return a copy with this kind of log-probability} @param value see {@link #logprobKind()} */
    public SamplingParams logprobKind(LogprobKind value) {
        return new SamplingParams(temperature, topK, topP, minP, repetitionPenalty, seed, n, maxTokens, minTokens,
                stopTokenIds, stopStrings, ignoreEos, value);
    }
}
