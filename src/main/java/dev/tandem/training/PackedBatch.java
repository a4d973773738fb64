package dev.tandem.training;

import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * A micro-batch on its device: sequences one after the other without padding, and for every trained token the row that predicts
 * it. Tensors belong to the scope in which the batch was made.
 *
 * @param lengths tokens of each sequence that the model reads
 * @param longest the greatest of them
 * @param tokens INT64 [T]
 * @param positions INT64 [T], from 0 in each sequence
 * @param rows INT64 [N]: the row whose hidden state predicts the trained token
 * @param targets INT64 [N]: the trained tokens
 * @param sequence INT64 [N]: which sequence of this batch each belongs to
 * @param weight FLOAT32 [N]
 * @param old FLOAT32 [N] or null
 * @param reference FLOAT32 [N] or null
 * @param advantage FLOAT32 [N] or null
 */
record PackedBatch(long[] lengths, int longest, Tensor tokens, Tensor positions, Tensor rows, Tensor targets, Tensor sequence,
        Tensor weight, @Nullable Tensor old, @Nullable Tensor reference, @Nullable Tensor advantage) {

    static PackedBatch of(List<TrainingSequence> sequences, Device device) {
        int total = sequences.stream().mapToInt(TrainingSequence::inputTokens).sum();
        int trained = sequences.stream().mapToInt(TrainingSequence::trainedTokens).sum();
        long[] lengths = new long[sequences.size()];
        long[] tokens = new long[total];
        long[] positions = new long[total];
        long[] rows = new long[trained];
        long[] targets = new long[trained];
        long[] owner = new long[trained];
        float[] weight = new float[trained];
        float[] old = sequences.getFirst().old() == null ? null : new float[trained];
        float[] reference = sequences.getFirst().reference() == null ? null : new float[trained];
        float[] advantage = sequences.getFirst().advantage() == null ? null : new float[trained];
        int row = 0;
        int n = 0;
        int longest = 0;
        for (int s = 0; s < sequences.size(); s++) {
            TrainingSequence sequence = sequences.get(s);
            int length = sequence.inputTokens();
            lengths[s] = length;
            longest = Math.max(longest, length);
            for (int i = 0; i < length; i++, row++) {
                tokens[row] = sequence.tokens()[i];
                positions[row] = i;
                if (sequence.trained()[i + 1]) {
                    rows[n] = row;
                    targets[n] = sequence.tokens()[i + 1];
                    owner[n] = s;
                    weight[n] = sequence.weight()[i + 1];
                    put(old, n, sequence.old(), i + 1, "old log-probs");
                    put(reference, n, sequence.reference(), i + 1, "reference log-probs");
                    put(advantage, n, sequence.advantage(), i + 1, "advantages");
                    n++;
                }
            }
        }
        return new PackedBatch(lengths, longest, Tensor.of(device, tokens), Tensor.of(device, positions),
                Tensor.of(device, rows), Tensor.of(device, targets), Tensor.of(device, owner), Tensor.of(device, weight),
                old == null ? null : Tensor.of(device, old), reference == null ? null : Tensor.of(device, reference),
                advantage == null ? null : Tensor.of(device, advantage));
    }

    private static void put(float @Nullable [] into, int at, float @Nullable [] from, int i, String name) {
        if ((into == null) != (from == null)) {
            throw new IllegalArgumentException("some sequences of the batch have " + name + " and some have none");
        }
        if (into != null && from != null) {
            into[at] = from[i];
        }
    }
}
