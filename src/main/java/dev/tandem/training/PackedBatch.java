package dev.tandem.training;

import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * A micro-batch on its device: sequences one after the other without padding, and for every trained token the row that predicts
 * it. Tensors belong to the scope in which the batch was made.
 *
 * @param lengths tokens of each sequence that the model reads
 * @param longest the greatest of them
 * @param starts INT64: the row where each sequence starts, as {@link dev.tandem.device.CudnnAttention#starts} has them
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
record PackedBatch(long[] lengths, int longest, Tensor starts, Tensor tokens, Tensor positions, Tensor rows, Tensor targets, Tensor sequence,
        Tensor weight, @Nullable Tensor old, @Nullable Tensor reference, @Nullable Tensor advantage) {}
