package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.model.WeightLayout;

/**
 * The bytes that training holds on each rank beside the weights.
 *
 * @param optimizer moments, and masters in a bfloat16 arena: these stay between training phases
 * @param gradients the rank's slice, and the buckets that are being reduced
 * @param activations of one micro-batch
 */
public record MemoryNeeds(long optimizer, long gradients, long activations) {
    /** {@return the needs of a rank} */
    public static MemoryNeeds of(WeightLayout layout, DType dtype, Device device, TrainerOptions options) {
        long slice = layout.length() / layout.shards() * Float.BYTES;
        long buckets = ManualModel.obstacle(layout.config(), dtype, device) == null
                ? ManualModel.bucketBytes(layout)
                : LayerwiseModel.bucketBytes(layout, dtype);
        int tokens = options.microBatchTokens();
        ActivationMemory activations = new ActivationMemory(layout.config(), dtype, device, options);
        return new MemoryNeeds(slice * (dtype == DType.FLOAT32 ? 2 : 3), slice + buckets,
                activations.bytes(tokens, activations.recordedLayers(tokens)));
    }
}
