package dev.tandem.generation;

import dev.tandem.device.CublasLt;
import dev.tandem.device.CublasLt.Shape;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.LargeProducts;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.generation.HopperProducts.Kind;
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
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/**
 * The matrix products of a step: of one with prompts, {@link #large}, and the ways to compute those of a decoding step, which are most of
 * its time, for a number of rows.
 *
 * <p>Which way is fastest depends on sizes and on the kernels around a product, which it may overlap with, so {@link CudaExecutor} times
 * whole steps to choose. Confined to its rank's thread. The owner closes it.
 */
final class CudaProducts implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(CudaProducts.class.getName());

    private final Device device;
    private final WeightArena arena;
    private final ModelConfig config;
    private final Buffers buffers;
    private final Rotation rotation;
    private final CublasLt cublas;
    /** Of steps with prompts. */
    final LargeProducts large;
    private final @Nullable HopperProducts hopper;
    private final Map<Integer, List<Way>> ways = new HashMap<>();
    private final Deque<Runnable> owned = new ArrayDeque<>();

    /** out = x times the transpose of a weight, all at these addresses. */
    interface Product {
        void run(long x, long weight, long out);
    }

    /** The product of a layer's queries, keys and values. */
    interface QkvProduct {
        void run(int layer, long x, long weight, long out);

        /** {@return what computes the same for all layers} */
        static QkvProduct of(Product product) {
            return (layer, x, weight, out) -> product.run(x, weight, out);
        }
    }

    /**
     * The products of a step.
     *
     * @param qkv of queries, keys and values; when {@code rotates} it leaves them where attention reads them and writes no {@code out}
     * @param widen to the feed-forward block's width; with the activation when {@code activates}
     */
    record Way(QkvProduct qkv, boolean rotates, Product output, Product widen, boolean activates, Product narrow, Product head) {
        private Way rotating(QkvProduct by) {
            return new Way(by, true, output, widen, activates, narrow, head);
        }
    }

    /** What the products read and write. */
    record Buffers(Tensor normed, Tensor qkv, Tensor attended, Tensor projected, Tensor widened, Tensor activated, Tensor hidden,
            Tensor logits) {}

    /**
     * @param rotation of the tokens of a decoding step
     * @param options that say how pages are cut
     */
    CudaProducts(Device device, WeightArena arena, Buffers buffers, Rotation rotation, GeneratorOptions options) {
        this.device = device;
        this.arena = arena;
        this.buffers = buffers;
        this.rotation = rotation;
        config = arena.layout().config();
        cublas = new CublasLt(device);
        owned.push(cublas::close);
        large = new LargeProducts(device, cublas);
        owned.push(large::close);
        HopperProducts own = HopperProducts.runsOn(device) ? new HopperProducts(device, config, options) : null;
        if (own != null) {
            owned.push(own::close);
        }
        hopper = own;
    }

    /**
     * {@return the ways for a number of rows, the best guess first} When they are not known yet, buffers are overwritten, and the newest
     * keys and values of the step whose input lies on the device, which therefore is yet to be computed.
     */
    List<Way> ways(int rows) {
        return ways.computeIfAbsent(rows, this::find);
    }

    private List<Way> find(int rows) {
        List<Way> found = new ArrayList<>();
        Timed byCublas = timed(rows);
        found.add(byCublas.way());
        try {
            if (FewRows.computes(rows)) {
                found.add(fewRows(rows, true));
                found.add(fewRows(rows, false));
            } else if (hopper != null) {
                hopper(rows, byCublas, found);
            }
        } catch (TandemException e) {
            LOG.log(System.Logger.Level.WARNING, "multiplying {0} rows by cuBLAS alone: {1}", rows, e.getMessage());
        }
        return found;
    }

    private Way fewRows(int rows, boolean early) {
        FewRows by = new FewRows(device, rows, early);
        owned.push(by::close);
        int width = config.hiddenSize();
        int inner = config.intermediateSize();
        boolean activates = activates();
        return new Way(
                QkvProduct.of((x, weight, out) -> by.multiply(x, weight, out, width, allHeads())),
                false,
                (x, weight, out) -> by.multiply(x, weight, out, attended(), width),
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

    /** cuBLAS's products, in the order of {@link Way}. */
    private record Timed(CublasLt.Product qkv, CublasLt.Product output, CublasLt.Product widen, CublasLt.Product narrow,
            CublasLt.Product head) {
        Way way() {
            return new Way(QkvProduct.of(qkv::run), false, output::run, widen::run, false, narrow::run, head::run);
        }
    }

    private Timed timed(int rows) {
        int width = config.hiddenSize();
        return new Timed(
                timed(rows, allHeads(), width, buffers.normed, weights(ParameterRole.Q_WEIGHT), buffers.qkv, DType.BFLOAT16),
                timed(rows, width, attended(), buffers.attended, weights(ParameterRole.O_WEIGHT), buffers.projected, DType.BFLOAT16),
                timed(rows, widened(), width, buffers.normed, weights(widenRole(config)), buffers.widened, DType.BFLOAT16),
                timed(rows, width, config.intermediateSize(), buffers.activated, weights(ParameterRole.DOWN_WEIGHT), buffers.projected,
                        DType.BFLOAT16),
                timed(rows, config.vocabSize(), width, buffers.hidden, logitMatrix(), buffers.logits, DType.FLOAT32));
    }

    private CublasLt.Product timed(int rows, int n, int k, Tensor x, long[] weights, Tensor out, DType type) {
        CublasLt.Product product = cublas.tune(rows, rows, Shape.forward(n, k, out.size(1), type), x.address(), weights, out.address());
        owned.push(product::close);
        return product;
    }

    /**
     * Product by product the faster of Tandem's and cuBLAS's; in both forms the widening one, which may apply the activation, and that of
     * queries, keys and values, which may rotate.
     */
    private void hopper(int rows, Timed byCublas, List<Way> found) {
        int width = config.hiddenSize();
        QkvProduct qkv = QkvProduct.of(
                faster(rows, allHeads(), width, buffers.normed, weights(ParameterRole.Q_WEIGHT), buffers.qkv, byCublas.qkv));
        Product output =
                faster(rows, width, attended(), buffers.attended, weights(ParameterRole.O_WEIGHT), buffers.projected, byCublas.output);
        Product narrow = faster(rows, width, config.intermediateSize(), buffers.activated, weights(ParameterRole.DOWN_WEIGHT),
                buffers.projected, byCublas.narrow);
        Product head = faster(rows, config.vocabSize(), width, buffers.hidden, logitMatrix(), buffers.logits, byCublas.head);
        if (activates()) {
            HopperProducts.Product gated = tune(Kind.GATED, rows, config.intermediateSize(), width, buffers.normed,
                    weights(ParameterRole.GATE_WEIGHT), buffers.activated);
            // Its result goes where the activation's would.
            found.add(new Way(qkv, false, output, (x, weight, out) -> gated.run(x, weight, buffers.activated.address()), true, narrow,
                    head));
            found.add(new Way(qkv, false, output, byCublas.widen::run, false, narrow, head));
        } else {
            Product widen = faster(rows, widened(), width, buffers.normed, weights(widenRole(config)), buffers.widened, byCublas.widen);
            found.add(new Way(qkv, false, output, widen, false, narrow, head));
        }
        if (HopperProducts.rotates(config.headDim())) {
            HopperProducts.Product rotated = Objects.requireNonNull(hopper)
                    .tune(rows, allHeads(), width, buffers.normed.address(), weights(ParameterRole.Q_WEIGHT), rotation::arguments);
            List<Way> others = List.copyOf(found.subList(1, found.size()));
            others.forEach(way -> found.add(way.rotating((layer, x, weight, out) -> rotated.rotate(x, weight, rotation.arguments(layer)))));
        }
    }

    private Product faster(int rows, int n, int k, Tensor x, long[] weights, Tensor out, CublasLt.Product byCublas) {
        HopperProducts.Product own = tune(out.dtype() == DType.FLOAT32 ? Kind.FLOAT : Kind.PLAIN, rows, n, k, x, weights, out);
        return own.milliseconds() < byCublas.milliseconds() ? own : byCublas::run;
    }

    private HopperProducts.Product tune(Kind kind, int rows, int n, int k, Tensor x, long[] weights, Tensor out) {
        return Objects.requireNonNull(hopper).tune(kind, rows, n, k, x.address(), weights, out.address(), out.size(1));
    }

    private long[] weights(ParameterRole role) {
        long[] addresses = new long[config.layers()];
        for (int layer = 0; layer < addresses.length; layer++) {
            addresses[layer] = arena.layer(layer).weight(role).address();
        }
        return addresses;
    }

    private long[] logitMatrix() {
        return new long[] {arena.logitMatrix().address()};
    }

    private boolean activates() {
        return config.gatedMlp() && config.activation() == Activation.SILU && !config.mlpBias();
    }

    private int attended() {
        return config.heads() * config.headDim();
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
