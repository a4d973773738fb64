package dev.tandem.training;

import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * What a loss sees: one value per trained token of a micro-batch, FLOAT32 vectors of length N on the rank's device. Tokens of
 * one sequence lie next to each other; a sequence is never cut in two.
 */
public final class TokenValues {
    private final Tensor logprob;
    private final Tensor entropy;
    private final @Nullable Tensor old;
    private final @Nullable Tensor reference;
    private final @Nullable Tensor advantage;
    private final Tensor weight;
    private final Tensor sequence;
    private final int sequences;

    /**
     * @param logprob log-probability of each token under the current weights, differentiable
     * @param entropy entropy in nats of each token's distribution, differentiable
     * @param old log-probabilities under the weights that sampled the tokens, or null
     * @param reference log-probabilities under the frozen reference, or null
     * @param advantage advantages, or null
     * @param weight weights of the tokens in the step's loss
     * @param sequence INT64: which sequence of the micro-batch, from 0, each token belongs to
     * @param sequences how many sequences there are
     */
    public TokenValues(Tensor logprob, Tensor entropy, @Nullable Tensor old, @Nullable Tensor reference,
            @Nullable Tensor advantage, Tensor weight, Tensor sequence, int sequences) {
        this.logprob = logprob;
        this.entropy = entropy;
        this.old = old;
        this.reference = reference;
        this.advantage = advantage;
        this.weight = weight;
        this.sequence = sequence;
        this.sequences = sequences;
    }

    /** {@return log-probabilities under the current weights [N]} */
    public Tensor logprob() {
        return logprob;
    }

    /** {@return entropies in nats under the current weights [N]} */
    public Tensor entropy() {
        return entropy;
    }

    /** {@return log-probabilities under the weights that sampled the tokens [N]} */
    public Tensor old() {
        return present(old, "old log-probs");
    }

    /** {@return log-probabilities under the frozen reference [N]} */
    public Tensor reference() {
        return present(reference, "reference log-probs");
    }

    /** {@return advantages [N]} */
    public Tensor advantage() {
        return present(advantage, "advantages");
    }

    /** {@return the weight of each token in the step's loss [N], which carries the aggregation over tokens and sequences} */
    public Tensor weight() {
        return weight;
    }

    /** {@return each token's value replaced by the mean over its sequence [N], differentiable} */
    public Tensor sequenceMean(Tensor values) {
        Device device = values.device();
        Tensor sums = Tensor.zeros(device, values.dtype(), sequences);
        Tensor counts = Tensor.zeros(device, values.dtype(), sequences);
        counts.indexAddInPlace(0, sequence, Tensor.full(device, values.dtype(), 1, values.size(0)));
        sums.indexAddInPlace(0, sequence, values);
        return sums.div(counts).indexSelect(0, sequence);
    }

    private static Tensor present(@Nullable Tensor values, String name) {
        if (values == null) {
            throw new IllegalArgumentException("this loss needs " + name + ", and the batch has none");
        }
        return values;
    }
}
