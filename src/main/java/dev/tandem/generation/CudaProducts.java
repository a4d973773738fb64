package dev.tandem.generation;

import dev.tandem.device.CublasLt;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import dev.tandem.model.Activation;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.WeightArena;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * The matrix products of decoding steps, which are most of a step's time: the ways to compute them for a number of rows.
 *
 * <p>Which way is fastest depends on sizes and on the kernels around a product, which it may overlap with, so {@link CudaExecutor} times
 * whole steps to choose. Confined to its rank's thread. The owner closes it.
 */
final class CudaProducts implements AutoCloseable {
    private final Device device;
    private final WeightArena arena;
    private final ModelConfig config;
    private final Buffers buffers;
    private final CublasLt cublas;
    private final Map<Integer, List<Way>> ways = new HashMap<>();
    private final Deque<Runnable> owned = new ArrayDeque<>();

    /** out = x times the transpose of a weight, all at these addresses. */
    interface Product {
        void run(long x, long weight, long out);
    }

    /**
     * The products of a step.
     *
     * @param widen to the feed-forward block's width; with the activation when {@code activates}
     */
    record Way(Product qkv, Product output, Product widen, boolean activates, Product narrow, Product head) {}

    /** What the products read and write. */
    record Buffers(Tensor normed, Tensor qkv, Tensor attended, Tensor projected, Tensor widened, Tensor activated, Tensor hidden,
            Tensor logits) {}

    CudaProducts(Device device, WeightArena arena, Buffers buffers) {
        this.device = device;
        this.arena = arena;
        this.buffers = buffers;
        config = arena.layout().config();
        cublas = new CublasLt(device);
        owned.push(cublas::close);
    }

    /** {@return the ways for a number of rows, the best guess first} Buffers are overwritten when they are not known yet. */
    List<Way> ways(int rows) {
        return ways.computeIfAbsent(rows, this::find);
    }

    private List<Way> find(int rows) {
        List<Way> found = new ArrayList<>();
        found.add(timed(rows));
        if (FewRows.computes(rows)) {
            found.add(fewRows(rows, true));
            found.add(fewRows(rows, false));
        }
        return found;
    }

    private Way fewRows(int rows, boolean early) {
        FewRows by = new FewRows(device, rows, early);
        owned.push(by::close);
        int width = config.hiddenSize();
        int inner = config.intermediateSize();
        boolean activates = config.gatedMlp() && config.activation() == Activation.SILU && !config.mlpBias();
        return new Way(
                (x, weight, out) -> by.multiply(x, weight, out, width, allHeads()),
                (x, weight, out) -> by.multiply(x, weight, out, config.heads() * config.headDim(), width),
                (x, weight, out) -> {
                    if (activates) {
                        by.multiplyGated(x, weight, buffers.activated.address(), width, inner);
                    } else {
                        by.multiply(x, weight, out, width, widened());
                    }
                },
                activates,
                (x, weight, out) -> by.multiply(x, weight, out, inner, width),
                (x, weight, out) -> by.multiplyToFloat(x, weight, out, width, config.vocabSize(), buffers.logits.size(1)));
    }

    /** By cuBLAS. */
    private Way timed(int rows) {
        int width = config.hiddenSize();
        CublasLt.Product head = cublas.tune(rows, config.vocabSize(), width, buffers.hidden.address(),
                new long[] {arena.logitMatrix().address()}, buffers.logits.address(), buffers.logits.size(1), DType.FLOAT32);
        owned.push(head::close);
        return new Way(
                timed(rows, allHeads(), width, buffers.normed, ParameterRole.Q_WEIGHT, buffers.qkv),
                timed(rows, width, config.heads() * config.headDim(), buffers.attended, ParameterRole.O_WEIGHT, buffers.projected),
                timed(rows, widened(), width, buffers.normed, widenRole(config), buffers.widened),
                false,
                timed(rows, width, config.intermediateSize(), buffers.activated, ParameterRole.DOWN_WEIGHT, buffers.projected),
                head::run);
    }

    private Product timed(int rows, int n, int k, Tensor x, ParameterRole role, Tensor out) {
        long[] weights = new long[config.layers()];
        for (int layer = 0; layer < weights.length; layer++) {
            weights[layer] = arena.layer(layer).weight(role).address();
        }
        CublasLt.Product product = cublas.tune(rows, n, k, x.address(), weights, out.address(), n, DType.BFLOAT16);
        owned.push(product::close);
        return product::run;
    }

    private int allHeads() {
        return (config.heads() + 2 * config.kvHeads()) * config.headDim();
    }

    private int widened() {
        return config.intermediateSize() * (config.gatedMlp() ? 2 : 1);
    }

    /** {@return the weights that widen to the feed-forward block's width: gate and up together where it is gated} */
    static ParameterRole widenRole(ModelConfig config) {
        return config.gatedMlp() ? ParameterRole.GATE_WEIGHT : ParameterRole.UP_WEIGHT;
    }

    @Override
    public void close() {
        owned.forEach(Runnable::run);
    }
}
