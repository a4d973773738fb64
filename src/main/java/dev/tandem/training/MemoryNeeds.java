package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.model.WeightLayout;

/**
 * The bytes that training holds on each rank beside the weights.
 *
 * <p>Where not all fits on a GPU, activations give way first: they are computed again. Then optimizer state does, group by group from the
 * arena's first: it stays in host memory, and every step copies it to the device and back.
 *
 * @param optimizer moments, and remainders of masters in a bfloat16 arena, that are on the device: these stay between training phases
 * @param hostGroups of how many groups the optimizer state stays in host memory
 * @param hostOptimizer bytes of that
 * @param gradients the rank's slice, and the buckets that are being reduced
 * @param activations of one micro-batch; or, if these are more, the buffers through which the host's optimizer state passes
 */
public record MemoryNeeds(long optimizer, int hostGroups, long hostOptimizer, long gradients, long activations) {
    /**
     * {@return the needs of a rank}
     *
     * @param room bytes that it may hold beside its weights and the generator's buffers
     */
    public static MemoryNeeds of(WeightLayout layout, DType dtype, Device device, TrainerOptions options, long room) {
        long slice = layout.length() / layout.shards();
        long buckets = ManualModel.obstacle(layout.config(), dtype, device) == null
                ? ManualModel.bucketBytes(layout)
                : LayerwiseModel.bucketBytes(layout, dtype);
        int tokens = options.microBatchTokens();
        long gradients = slice * Float.BYTES + buckets;
        ActivationMemory frugal = new ActivationMemory(layout.config(), dtype, device, options, 0);
        long least = frugal.bytes(tokens, frugal.recordedLayers(tokens));
        int hostGroups = 0;
        OptimizerLayout onHost = OptimizerLayout.of(0, dtype, options);
        OptimizerLayout onDevice = OptimizerLayout.of(slice, dtype, options);
        while (onDevice.bytes() + gradients + Math.max(least, HostState.bufferBytes(onHost)) > room
                && hostGroups < layout.groupCount() && !device.isCpu()) {
            hostGroups++;
            long elements = layout.groupOffset(hostGroups) / layout.shards();
            onHost = OptimizerLayout.of(elements, dtype, options);
            onDevice = OptimizerLayout.of(slice - elements, dtype, options);
        }
        ActivationMemory memory =
                new ActivationMemory(layout.config(), dtype, device, options, room - onDevice.bytes() - gradients);
        long activations = Math.max(memory.bytes(tokens, memory.recordedLayers(tokens)), HostState.bufferBytes(onHost));
        return new MemoryNeeds(onDevice.bytes(), hostGroups, onHost.bytes(), gradients, activations);
    }
}
