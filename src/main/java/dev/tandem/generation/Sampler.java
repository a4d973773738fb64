package dev.tandem.generation;

import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import org.jspecify.annotations.Nullable;

/**
 * Draws a token from one row of logits.
 *
 * <p>A draw is the inverse of the cumulative distribution at one uniform number, which the caller keys by (seed, sample,
 * position): see {@link CounterRandom}. So the token is a function of the row and the number alone. The order of operations is
 * that of vLLM: repetition penalty, mask, temperature, min-p, top-k, top-p.
 *
 * <p>The row is copied to the heap once. Greedy decoding needs one pass for the maximum and one that stops at it; drawing without
 * truncation one more, in which exponentials are summed up in chunks ({@link Exponential}), so that the cumulative sum is then
 * searched chunk by chunk and only one chunk is computed again. Nothing is allocated after construction. One instance serves one
 * thread.
 */
final class Sampler {
    /** Returned instead of a token: the row holds NaN or positive infinity, or nothing that can be sampled. */
    static final int NON_FINITE = Scheduler.NON_FINITE;

    private static final int CHUNK = 512;
    private static final ValueLayout.OfFloat FLOAT = ValueLayout.JAVA_FLOAT_UNALIGNED;

    private final int vocabularySize;
    private final float[] row;
    private final double[] chunk = new double[CHUNK];
    private final double[] chunkSums;
    private final long[] seen;
    private @Nullable Truncation truncation;
    private double logprob;

    /** @param vocabularySize the number of logits in a row */
    Sampler(int vocabularySize) {
        this.vocabularySize = vocabularySize;
        row = new float[vocabularySize];
        chunkSums = new double[Math.ceilDiv(vocabularySize, CHUNK)];
        seen = new long[Math.ceilDiv(vocabularySize, Long.SIZE)];
    }

    /**
     * Draws a token, and makes {@link #logprob()} that of the token.
     *
     * @param logits memory that holds the row, as 32-bit floats in native order; only read
     * @param offset byte offset of the row in it
     * @param tokens prompt and output so far, for the repetition penalty
     * @param tokenCount number of valid entries of {@code tokens}
     * @param masked tokens that must not be drawn, such as the stop tokens before {@link SamplingParams#minTokens()} are out
     * @param uniform the random number, in [0, 1); unused if greedy
     * @param rawLogSumExp log-sum-exp of the row if the caller has computed it, else NaN
     * @return the token, or {@link #NON_FINITE}
     */
    int sample(MemorySegment logits, long offset, SamplingParams params, int[] tokens, int tokenCount, int[] masked,
            double uniform, double rawLogSumExp) {
        MemorySegment.copy(logits, FLOAT, offset, row, 0, vocabularySize);
        float max = max(row);
        if (!Float.isFinite(max)) {
            logprob = Double.NaN;
            return NON_FINITE;
        }
        double rawSum = rawLogSumExp; // log-sum-exp of the untouched row
        if (Double.isNaN(rawSum) && params.logprobKind() == LogprobKind.RAW) {
            rawSum = max + Math.log(sumWeights(max, 1));
        }
        boolean edited = masked.length > 0 || params.repetitionPenalty() != 1;
        if (edited) {
            penalise(tokens, tokenCount, (float) params.repetitionPenalty());
            for (int id : masked) {
                row[id] = Float.NEGATIVE_INFINITY;
            }
            max = max(row);
            if (!Float.isFinite(max)) {
                logprob = Double.NaN;
                return NON_FINITE;
            }
        }
        double inverse = params.isGreedy() ? 1 : Math.min(1 / params.temperature(), Double.MAX_VALUE);
        int token;
        double logSum = Double.NaN; // log of the sum of weights that the token was drawn from
        if (params.isGreedy()) {
            token = indexOf(max);
        } else if (params.truncates()) {
            Truncation kept = truncation();
            kept.apply(row, max, inverse, params);
            double total = Exponential.sum(kept.weights, kept.count);
            token = kept.ids[search(kept.weights, kept.count, uniform * total)];
            logSum = Math.log(total);
        } else {
            double total = sumWeights(max, inverse);
            token = draw(max, inverse, uniform * total);
            logSum = Math.log(total);
        }
        double scaled = ((double) row[token] - max) * inverse;
        logprob = switch (params.logprobKind()) {
            case RAW -> logits.get(FLOAT, offset + (long) token * Float.BYTES) - rawSum;
            case TRUNCATED -> params.isGreedy() ? 0 : scaled - logSum;
            case TEMPERATURE -> {
                if (inverse == 1 && !edited && !Double.isNaN(rawSum)) {
                    yield row[token] - rawSum;
                }
                boolean whole = !params.isGreedy() && !params.truncates();
                yield scaled - (whole ? logSum : Math.log(sumWeights(max, inverse)));
            }
        };
        return token;
    }

    /** {@return the log-probability of the last token drawn} Of the kind the request asked for; NaN after {@link #NON_FINITE}. */
    double logprob() {
        return logprob;
    }

    /** NaN if any entry is. */
    private static float max(float[] row) {
        float max = Float.NEGATIVE_INFINITY;
        for (float x : row) {
            max = Math.max(max, x);
        }
        return max;
    }

    private int indexOf(float value) {
        int i = 0;
        while (row[i] != value) {
            i++;
        }
        return i;
    }

    /** Changes each token's logit once, however often the token occurs. */
    private void penalise(int[] tokens, int tokenCount, float penalty) {
        if (penalty == 1) {
            return;
        }
        for (int i = 0; i < tokenCount; i++) {
            int id = tokens[i];
            long bit = 1L << id;
            if ((seen[id >> 6] & bit) == 0) {
                seen[id >> 6] |= bit;
                row[id] = row[id] > 0 ? row[id] / penalty : row[id] * penalty;
            }
        }
        for (int i = 0; i < tokenCount; i++) {
            seen[tokens[i] >> 6] = 0;
        }
    }

    /** The sum of {@code exp((x - max) * inverse)} over the row; the sums of its chunks stay in {@code chunkSums}. */
    private double sumWeights(float max, double inverse) {
        double total = 0;
        for (int c = 0, from = 0; from < vocabularySize; c++, from += CHUNK) {
            int size = Math.min(CHUNK, vocabularySize - from);
            Exponential.weights(row, from, size, max, inverse, chunk);
            chunkSums[c] = Exponential.sum(chunk, size);
            total += chunkSums[c];
        }
        return total;
    }

    private int draw(float max, double inverse, double target) {
        int last = search(chunkSums, chunkSums.length, target);
        for (int c = 0; c < last; c++) {
            target -= chunkSums[c];
        }
        int from = last * CHUNK;
        int size = Math.min(CHUNK, vocabularySize - from);
        Exponential.weights(row, from, size, max, inverse, chunk);
        return from + search(chunk, size, target);
    }

    /**
     * The first index at which the running sum of weights exceeds {@code target}. Should rounding keep it from doing so, the last
     * index with a positive weight: an impossible token is never drawn.
     */
    private static int search(double[] weights, int count, double target) {
        double sum = 0;
        int last = 0;
        for (int i = 0; i < count; i++) {
            if (weights[i] > 0) {
                last = i;
                sum += weights[i];
                if (sum > target) {
                    return i;
                }
            }
        }
        return last;
    }

    private Truncation truncation() {
        if (truncation == null) {
            truncation = new Truncation(vocabularySize);
        }
        return truncation;
    }
}
