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
 * @param activationBudget bytes of activations that are kept rather than computed again
 */
public record MemoryNeeds(long optimizer, long gradients, long activations, long activationBudget) {
    /**
     * {@return the needs of a rank}
     *
     * @param room bytes that it may hold beside its weights and the generator's buffers
     */
    public static MemoryNeeds of(WeightLayout layout, DType dtype, Device device, TrainerOptions options, long room) {
        long slice = layout.length() / layout.shards() * Float.BYTES;
        long buckets = ManualModel.obstacle(layout.config(), dtype, device) == null
                ? ManualModel.bucketBytes(layout)
                : LayerwiseModel.bucketBytes(layout, dtype);
        int tokens = options.microBatchTokens();
        long optimizer = OptimizerLayout.of(layout.length() / layout.shards(), dtype, options).bytes();
        long gradients = slice + buckets;
        ActivationMemory memory = new ActivationMemory(layout.config(), dtype, device, options);
        long budget = options.activationBudget() == TrainerOptions.ALL_THAT_FITS
                ? memory.budgetWithin(room - optimizer - gradients, tokens)
                : options.activationBudget();
        int recorded = new ActivationMemory(layout.config(), dtype, device, options.memory(budget, options.logitBytes()))
                .recordedLayers(tokens);
        return new MemoryNeeds(optimizer, gradients, memory.bytes(tokens, recorded), budget);
    }
}
