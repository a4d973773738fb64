package dev.tandem.training;

import dev.tandem.device.CublasLt;
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
 * @param room the most bytes in all, where {@link TrainerOptions#activationBudget} leaves it to the memory plan
 */
record ActivationMemory(ModelConfig config, DType dtype, Device device, TrainerOptions options, long room) {
    /** What libtorch holds for cuBLAS. */
    private static final long CUBLAS_WORKSPACE = 32L << 20;

    /** Of a layer's forward pass: a layer that runs again leaves out its last product. */
    private static final double RUN_AGAIN = 0.75;

    /**
     * Of how many tokens the forward pass takes as long as adding a micro-batch's gradients to their sums: 8 bytes of each weight at 4 TB/s
     * are worth 2 operations for each weight and token at 600 TFLOP/s. Other GPUs' proportions are alike.
     */
    private static final double GRADIENT_TOKENS = 600;

    /** {@return of how many layers a micro-batch of that many tokens keeps what its backward pass needs; the others run again} */
    int recordedLayers(long tokens) {
        int layers = config.layers();
        if (!flexible()) {
            return (int) Math.min(layers, options.activationBudget() / (tokens * layerBytes()));
        }
        while (layers > 0 && bytes(tokens, layers) > room) {
            layers--;
        }
        return layers;
    }

    private boolean flexible() {
        return options.activationBudget() == TrainerOptions.ALL_THAT_FITS;
    }

    /**
     * {@return of how many tokens micro-batches should be} Those of fewer than the options allow leave room to keep more layers, each of
     * which saves most of its forward pass; but each micro-batch adds its gradients to their sums.
     *
     * @param longest tokens of the longest sequence
     */
    int microBatchTokens(int longest) {
        int best = options.microBatchTokens();
        if (device.isCpu() || !flexible()) {
            return best;
        }
        for (int tokens = best / 2; tokens >= longest; tokens /= 2) {
            best = cost(tokens) < cost(best) ? tokens : best;
        }
        return best;
    }

    /** What a token costs beside its forward and backward pass, in forward passes. */
    private double cost(int tokens) {
        double again = 1 - (double) recordedLayers(tokens) / config.layers();
        return RUN_AGAIN * again + GRADIENT_TOKENS / tokens;
    }

    /** {@return the most bytes at a time: inputs of all layers, what some or at least one keep, one chunk of logits} */
    long bytes(long tokens, int recordedLayers) {
        if (manual()) {
            long inputs = (config.layers() - recordedLayers) * tokens * config.hiddenSize() * dtype.bytes();
            long head = device.isCpu()
                    ? 2 * Math.min(options.logitBytes(), tokens * config.vocabSize() * Float.BYTES)
                    : KernelLogprobHead.bytes(tokens, config.vocabSize(), options) + CUBLAS_WORKSPACE + CublasLt.WORKSPACE;
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
