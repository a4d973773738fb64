package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Positions;

/**
 * The bytes of activations of a micro-batch, counted from the sizes alone: what a {@link TrainingModel} keeps between its forward and its
 * backward pass.
 *
 * <p>For {@link ManualModel} the count is that of its tensors. For {@link LayerwiseModel} on a GPU it follows automatic differentiation
 * tensor by tensor and is held against measured peaks ({@code benchmarks/RESULTS.md}); on the CPU, where norms are composed of several
 * operations, it is an upper bound.
 *
 * @param dtype of the weights and of the activations
 */
record ActivationMemory(ModelConfig config, DType dtype, Device device, TrainerOptions options) {
    /** What libtorch holds for cuBLAS. */
    private static final long CUBLAS_WORKSPACE = 32L << 20;

    /** {@return how many layers' graphs fit into the activation budget} */
    int recordedLayers(long tokens) {
        return (int) Math.min(config.layers(), options.activationBudget() / (tokens * layerBytes()));
    }

    /** {@return the largest activation budget with which a micro-batch of that many tokens stays within {@code room} bytes} */
    long budgetWithin(long room, long tokens) {
        int layers = config.layers();
        while (layers > 0 && bytes(tokens, layers) > room) {
            layers--;
        }
        return layers * tokens * layerBytes();
    }

    /** {@return the most bytes at a time: inputs of all layers, what some or at least one keep, one chunk of logits} */
    long bytes(long tokens, int recordedLayers) {
        if (manual()) {
            long inputs = (config.layers() - recordedLayers) * tokens * config.hiddenSize() * dtype.bytes();
            long head = device.isCpu()
                    ? 2 * Math.min(options.logitBytes(), tokens * config.vocabSize() * Float.BYTES)
                    : KernelLogprobHead.bytes(tokens, config.vocabSize(), options) + CUBLAS_WORKSPACE;
            // A layer's backward pass makes about as much as the layer keeps, on a GPU twice that (of it attention, with sums of gradients in
            // FLOAT32, nearly half), and a layer that runs again keeps that too; the head has gone then.
            long layer = tokens * layerBytes();
            int made = device.isCpu() ? 1 : 2;
            return inputs + recordedLayers * layer + Math.max(head, (recordedLayers < config.layers() ? made + 1 : made) * layer);
        }
        long inputs = (config.layers() + 1L) * tokens * config.hiddenSize() * dtype.bytes();
        long graphs = Math.max(1, recordedLayers) * tokens * layerBytes();
        long logits = 2 * Math.min(options.logitBytes(), tokens * config.vocabSize() * Float.BYTES);
        if (device.isCpu()) {
            return inputs + graphs + logits;
        }
        long factors = config.positions() instanceof Positions.Rope ? 2 * tokens * (width() + kvWidth()) * dtype.bytes() : 0;
        long hidden = 3 * tokens * config.hiddenSize() * dtype.bytes();
        return inputs + graphs + factors + hidden + logits + CUBLAS_WORKSPACE;
    }

    private boolean manual() {
        return ManualModel.obstacle(config, dtype, device) == null;
    }

    /** What is kept of one layer for each token. */
    private long layerBytes() {
        if (manual()) {
            long widened = (config.gatedMlp() ? 2L : 1L) * config.intermediateSize();
            long attention = device.isCpu() ? 4 * width() + 3 * kvWidth() : 3 * width() + 4 * kvWidth();
            return (2L * config.hiddenSize() + attention + widened) * dtype.bytes() + 8L * config.heads();
        }
        long wide = (config.gatedMlp() ? 4L : 2L) * config.intermediateSize();
        if (device.isCpu()) {
            return (8L * config.hiddenSize() + 5 * width() + 3 * kvWidth() + wide) * dtype.bytes();
        }
        boolean grouped = config.heads() != config.kvHeads();
        boolean rotated = config.positions() instanceof Positions.Rope;
        long elements = 3L * config.hiddenSize() + wide; // both norms' results, the sum between the blocks, the feed-forward block
        if (config.qkNorm() || !grouped || !rotated) {
            elements += width() + 2 * kvWidth(); // q, k, v as the product wrote them
        }
        elements += rotated ? width() + kvWidth() : 0;
        elements += grouped ? 2 * width() : 0; // keys and values repeated for every query head
        elements += 2 * width(); // each sequence's result, and all of them one after the other
        long statistics = 2L + config.heads() + (config.qkNorm() ? config.heads() + config.kvHeads() : 0);
        return elements * dtype.bytes() + statistics * Float.BYTES;
    }

    private long width() {
        return (long) config.heads() * config.headDim();
    }

    private long kvWidth() {
        return (long) config.kvHeads() * config.headDim();
    }
}
