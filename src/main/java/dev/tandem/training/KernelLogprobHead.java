package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * The log-prob head on a GPU, in Tandem's kernels ({@code logprob.cu}). Logits exist a chunk of rows at a time, in FLOAT32. Where memory
 * allows, the forward pass leaves the probabilities in BFLOAT16, which the backward pass turns into the gradient in place, or multiplies
 * as they are when nobody asks for the entropy's gradient; otherwise it computes the logits of a chunk again.
 */
final class KernelLogprobHead implements LogprobHead {
    private static final int FORWARD_ROWS = 4;
    private static final int COLUMNS = 8192;
    private static final int COLUMNS_FROM_LOGITS = 4096;
    private static final int THREADS = 256;
    /** Of a grid's second dimension, which some kernels count rows by. */
    private static final int MOST_ROWS = 65_535;

    private final TrainingKernels kernels;
    private final Device device;
    private final Tensor matrix;
    private final Tensor hidden;
    private final Tensor targets;
    private final float inverseTemperature;
    private final int rows;
    private final int vocabulary;
    private final long stride;
    private final int chunk;
    private final @Nullable Tensor probabilities;
    private final Tensor logprob;
    private final Tensor logSumExp;
    private Tensor entropy;

    /** {@return bytes that a head holds for so many rows at a time} */
    static long bytes(long rows, int vocabulary, TrainerOptions options) {
        long logits = Math.min(options.logitBytes(), rows * stride(vocabulary) * Float.BYTES);
        long kept = keeps(rows, vocabulary, options) ? rows : chunk(rows, vocabulary, options);
        return logits + kept * stride(vocabulary) * DType.BFLOAT16.bytes();
    }

    KernelLogprobHead(TrainingKernels kernels, Tensor matrix, double temperature, Tensor hidden, Tensor targets, TrainerOptions options) {
        this.kernels = kernels;
        this.matrix = matrix;
        this.hidden = hidden;
        this.targets = targets;
        device = kernels.device;
        inverseTemperature = (float) (1 / temperature);
        rows = Math.toIntExact(hidden.size(0));
        vocabulary = Math.toIntExact(matrix.size(0));
        stride = stride(vocabulary);
        chunk = chunk(rows, vocabulary, options);
        probabilities = keeps(rows, vocabulary, options)
                ? Tensor.empty(device, DType.BFLOAT16, rows, stride)
                : null;
        logprob = Tensor.empty(device, DType.FLOAT32, rows);
        logSumExp = Tensor.empty(device, DType.FLOAT32, rows);
        entropy = logprob;
    }

    private static long stride(int vocabulary) {
        return Math.ceilDiv(vocabulary, 8) * 8L;
    }

    private static boolean keeps(long rows, int vocabulary, TrainerOptions options) {
        return rows <= MOST_ROWS && rows * stride(vocabulary) * DType.BFLOAT16.bytes() <= options.probabilityBytes();
    }

    private static int chunk(long rows, int vocabulary, TrainerOptions options) {
        return (int) Math.clamp(options.logitBytes() / (stride(vocabulary) * Float.BYTES), 1, Math.clamp(rows, 1, MOST_ROWS));
    }

    @Override
    public Tensor forward(Tensor entropy) {
        this.entropy = entropy;
        try (Scope scope = Scope.open()) {
            Tensor logits = Tensor.empty(device, DType.FLOAT32, chunk, stride);
            for (int start = 0; start < rows; start += chunk) {
                int count = Math.min(chunk, rows - start);
                compute(logits, start, count);
                int blocks = kernels.rowBlocks * Math.ceilDiv(count, FORWARD_ROWS);
                kernels.logprobForward.launch(device, new Grid(blocks, 1, THREADS, 1, 16 * kernels.retained), logits.address(), stride,
                        vocabulary, inverseTemperature, targets.address() + 8L * start, logprob.address() + 4L * start,
                        logSumExp.address() + 4L * start, entropy.address() + 4L * start,
                        probabilities == null ? 0L : probabilities.address() + 2L * start * stride, stride, count, kernels.retained);
            }
        }
        return logprob;
    }

    private void compute(Tensor logits, int start, int count) {
        try (Scope scope = Scope.open()) {
            kernels.products.forward(hidden.narrow(0, start, count), matrix, logits.narrow(0, 0, count).narrow(1, 0, vocabulary));
        }
    }

    @Override
    public Tensor backward(Tensor byLogprob, @Nullable Tensor byEntropy, Tensor byMatrix) {
        Tensor byHidden = Tensor.empty(device, DType.BFLOAT16, rows, hidden.size(1));
        Tensor p = probabilities;
        try (Scope scope = Scope.open()) {
            if (p == null) {
                fromLogits(byLogprob, byEntropy, byHidden, byMatrix);
            } else if (byEntropy == null) {
                ofLogprobs(p, byLogprob, byHidden, byMatrix);
            } else {
                kernels.logprobBackward.launch(device, new Grid(Math.ceilDiv(vocabulary, COLUMNS), rows, THREADS, 1, 0), p.address(),
                        p.address(), stride, vocabulary, targets.address(), logprob.address(), byLogprob.address(), byEntropy.address(),
                        entropy.address(), inverseTemperature);
                multiply(p, 0, rows, hidden, byHidden, byMatrix);
            }
        }
        return byHidden;
    }

    private void fromLogits(Tensor byLogprob, @Nullable Tensor byEntropy, Tensor byHidden, Tensor byMatrix) {
        long entropies = byEntropy == null ? 0L : byEntropy.address();
        Tensor logits = Tensor.empty(device, DType.FLOAT32, chunk, stride);
        Tensor gradient = Tensor.empty(device, DType.BFLOAT16, chunk, stride);
        for (int start = 0; start < rows; start += chunk) {
            int count = Math.min(chunk, rows - start);
            compute(logits, start, count);
            kernels.logprobBackwardFromLogits.launch(device, new Grid(Math.ceilDiv(vocabulary, COLUMNS_FROM_LOGITS), count, THREADS, 1, 0),
                    logits.address(), stride, logSumExp.address() + 4L * start, gradient.address(), stride, vocabulary,
                    targets.address() + 8L * start, logprob.address() + 4L * start, byLogprob.address() + 4L * start,
                    entropies == 0 ? 0L : entropies + 4L * start, entropy.address() + 4L * start, inverseTemperature);
            multiply(gradient, start, count, hidden, byHidden, byMatrix);
        }
    }

    /** When entropies have no gradient, a row's factor goes to what its probabilities are multiplied with. */
    private void ofLogprobs(Tensor p, Tensor byLogprob, Tensor byHidden, Tensor byMatrix) {
        kernels.subtractTargets.launch(device, Grid.of(Math.ceilDiv(rows, THREADS), THREADS), p.address(), stride, vocabulary,
                targets.address(), logprob.address(), rows);
        Tensor scaled = Tensor.empty(device, DType.BFLOAT16, hidden.shape());
        scaleRows(hidden, byLogprob, scaled);
        multiply(p, 0, rows, scaled, byHidden, byMatrix);
        scaleRows(byHidden, byLogprob, byHidden);
    }

    private void scaleRows(Tensor x, Tensor by, Tensor out) {
        int width = Math.toIntExact(x.size(1));
        int blocks = Math.toIntExact(Math.ceilDiv((long) rows * width, 8L * THREADS));
        kernels.scaleRows.launch(device, Grid.of(blocks, THREADS), x.address(), by.address(), -inverseTemperature, out.address(), width,
                rows);
    }

    /** From the gradient of logits to those of hidden states and of the matrix; {@code x} are the hidden states, times what it lacks. */
    private void multiply(Tensor gradient, int start, int count, Tensor x, Tensor byHidden, Tensor byMatrix) {
        try (Scope scope = Scope.open()) {
            Tensor byLogits = gradient.narrow(0, 0, count).narrow(1, 0, vocabulary);
            kernels.products.backward(byLogits, matrix, byHidden.narrow(0, start, count));
            byMatrix.addMatmulInPlace(byLogits.transpose(0, 1), x.narrow(0, start, count));
        }
    }
}
