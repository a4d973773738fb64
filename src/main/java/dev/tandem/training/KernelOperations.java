package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import org.jspecify.annotations.Nullable;

/**
 * The operations of a layer on a GPU, in Tandem's kernels ({@code train_*.cu}, which say how they are launched), and attention as
 * {@link AttentionChoice} has chosen it.
 */
final class KernelOperations implements LayerOperations {
    private final TrainingKernels kernels;
    private final ModelConfig config;
    private final Device device;
    private final Tensor positions;
    private final TrainingAttention attention;
    private final int tokens;

    /** @param positions INT64 [T], from 0 in each sequence */
    KernelOperations(TrainingKernels kernels, Tensor positions, TrainingAttention attention) {
        this.kernels = kernels;
        this.positions = positions;
        this.attention = attention;
        config = kernels.config;
        device = kernels.device;
        tokens = Math.toIntExact(positions.size(0));
    }

    private Tensor bf16(long... shape) {
        return Tensor.empty(device, DType.BFLOAT16, shape);
    }

    private Tensor floats(long... shape) {
        return Tensor.empty(device, DType.FLOAT32, shape);
    }

    private static long address(@Nullable Tensor tensor) {
        return tensor == null ? 0 : tensor.address();
    }

    // ---- products -------------------------------------------------------------------------------------------------------

    @Override
    public Tensor multiply(Tensor x, Tensor weight) {
        return kernels.products.forward(x, weight, bf16(tokens, weight.size(0)));
    }

    @Override
    public Tensor multiplyBackward(Tensor byProduct, Tensor weight) {
        return kernels.products.backward(byProduct, weight, bf16(tokens, weight.size(1)));
    }

    // ---- norms ----------------------------------------------------------------------------------------------------------

    @Override
    public Normed norm(Tensor x, @Nullable Tensor addend, @Nullable Tensor weight, @Nullable Tensor bias) {
        int width = config.hiddenSize();
        Tensor sum = addend == null ? x : bf16(tokens, width);
        Tensor normed = bf16(tokens, width);
        Tensor statistics = floats(tokens, config.norm() == Norm.LAYER ? 2 : 1);
        int lanes = 32 * Math.ceilDiv(width, 1024);
        int rows = Math.max(1, 128 / lanes);
        kernels.normForward.launch(device, new Grid(Math.ceilDiv(tokens, rows), 1, lanes, rows, 0), x.address(), address(addend),
                addend == null ? 0L : sum.address(), address(weight), address(bias), normed.address(), statistics.address(), width,
                (float) config.normEps(), tokens);
        return new Normed(sum, normed, statistics);
    }

    @Override
    public Backward normBackward(Tensor byNormed, Tensor sum, Tensor statistics, @Nullable Tensor weight, @Nullable Tensor bias,
            @Nullable Tensor byOthers, @Nullable Tensor weightGradient, @Nullable Tensor biasGradient) {
        int width = config.hiddenSize();
        boolean layerNorm = config.norm() == Norm.LAYER;
        int lanes = 32 * Math.ceilDiv(width, layerNorm ? 512 : 1024);
        int rows = (layerNorm ? 640 : 512) / lanes;
        int blocks = Math.min(kernels.multiprocessors, tokens);
        int stride = layerNorm ? 2 * width : width;
        Tensor bySum = bf16(tokens, width);
        Tensor again = bf16(tokens, width);
        Tensor partial = floats(blocks, stride);
        kernels.normBackward.launch(device, new Grid(blocks, 1, lanes, rows, 0), byNormed.address(), sum.address(), address(weight),
                address(bias), statistics.address(), address(byOthers), bySum.address(), again.address(), partial.address(), width, tokens);
        sumPartials(partial, 0, blocks, stride, weightGradient);
        sumPartials(partial, width, blocks, stride, biasGradient);
        return new Backward(bySum, again);
    }

    /** Adds the sums of some columns of rows of partial sums to a vector. */
    private void sumPartials(Tensor partial, int firstColumn, int rows, int stride, @Nullable Tensor into) {
        if (into != null) {
            int columns = Math.toIntExact(into.elements());
            kernels.sumPartials.launch(device, new Grid(Math.ceilDiv(columns, 32), 1, 8, 32, 0),
                    partial.address() + 4L * firstColumn, rows, stride, into.address(), columns, 1);
        }
    }

    // ---- queries, keys, values ------------------------------------------------------------------------------------------

    @Override
    public Heads heads(Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm) {
        int dim = config.headDim();
        Tensor query = bf16(tokens, config.heads(), dim);
        Tensor key = bf16(tokens, config.kvHeads(), dim);
        Tensor value = bf16(tokens, config.kvHeads(), dim);
        long threads = (long) tokens * Math.ceilDiv(allHeads(), 4) * lanes();
        kernels.rotateForward.launch(device, Grid.of(Math.toIntExact(Math.ceilDiv(threads, 256)), 256), qkv.address(), address(bias),
                address(queryNorm), address(keyNorm), (float) config.normEps(), cosines(), sines(), positions.address(), query.address(),
                key.address(), value.address(), config.heads(), config.kvHeads(), tokens);
        return new Heads(query, key, value);
    }

    @Override
    public Tensor headsBackward(Heads gradients, Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm,
            @Nullable Tensor queryNormGradient, @Nullable Tensor keyNormGradient) {
        int dim = config.headDim();
        long threads = (long) tokens * Math.ceilDiv(allHeads(), 2) * lanes();
        int blocks = (int) Math.min(4L * kernels.multiprocessors, Math.ceilDiv(threads, 128));
        Tensor byQkv = bf16(tokens, (long) allHeads() * dim);
        Tensor partial = queryNorm == null ? null : floats(blocks, 2L * dim);
        kernels.rotateBackward.launch(device, Grid.of(blocks, 128), gradients.query().address(), gradients.key().address(),
                gradients.value().address(), qkv.address(), address(bias), address(queryNorm), address(keyNorm), (float) config.normEps(),
                cosines(), sines(), positions.address(), byQkv.address(), address(partial), config.heads(), config.kvHeads(), tokens);
        if (partial != null) {
            sumPartials(partial, 0, blocks, 2 * dim, queryNormGradient);
            sumPartials(partial, dim, blocks, 2 * dim, keyNormGradient);
        }
        return byQkv;
    }

    private int allHeads() {
        return config.heads() + 2 * config.kvHeads();
    }

    /** Threads of a head. */
    private int lanes() {
        return config.headDim() == 64 ? 4 : config.headDim() <= 128 ? 8 : 16;
    }

    private long cosines() {
        return kernels.rotary == null ? 0 : kernels.rotary.cosines().address();
    }

    private long sines() {
        return kernels.rotary == null ? 0 : kernels.rotary.sines().address();
    }

    // ---- attention ------------------------------------------------------------------------------------------------------

    @Override
    public Attended attend(Heads heads) {
        return attention.forward(heads);
    }

    @Override
    public Heads attendBackward(Tensor byResult, Heads heads, Attended attended) {
        return attention.backward(byResult, heads, attended);
    }

    // ---- feed-forward block ---------------------------------------------------------------------------------------------

    @Override
    public Tensor activate(Tensor widened, @Nullable Tensor bias) {
        int width = config.intermediateSize();
        Tensor activated = bf16(tokens, width);
        kernels.gatedForward.launch(device, activationGrid(), widened.address(), address(bias), activated.address(), width, tokens);
        return activated;
    }

    @Override
    public Backward activateBackward(Tensor widened, @Nullable Tensor bias, Tensor byActivated) {
        int width = config.intermediateSize();
        Tensor byWidened = bf16(tokens, widened.size(1));
        Tensor activated = bf16(tokens, width);
        kernels.gatedBackward.launch(device, activationGrid(), widened.address(), address(bias), byActivated.address(),
                byWidened.address(), activated.address(), width, tokens);
        return new Backward(byWidened, activated);
    }

    private Grid activationGrid() {
        return Grid.of(Math.toIntExact(Math.ceilDiv((long) tokens * config.intermediateSize(), 4096)), 256);
    }

    @Override
    public void addColumnSums(Tensor x, Tensor into) {
        int width = Math.toIntExact(x.size(1));
        int strips = Math.ceilDiv(width, 256);
        int parts = Math.min(Math.ceilDiv(tokens, 32), Math.ceilDiv(4 * kernels.multiprocessors, strips));
        Tensor partial = floats(parts, width);
        kernels.columnSums.launch(device, new Grid(strips, parts, 32, 8, 0), x.address(), partial.address(), width, tokens);
        sumPartials(partial, 0, parts, width, into);
    }
}
