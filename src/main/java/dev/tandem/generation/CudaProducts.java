package dev.tandem.generation;

import dev.tandem.device.CublasLt;
import dev.tandem.device.CublasLt.Shape;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.LargeProducts;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.generation.HopperProducts.Kind;
import dev.tandem.generation.HopperProducts.Size;
import dev.tandem.model.Activation;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.WeightArena;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.IntStream;
import java.util.stream.Stream;
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

    /** Products are timed over weights of so many bytes, more than twice what an H200's cache holds, and over at least so many. */
    private static final long TIMED_BYTES = 128L << 20;
    private static final int LEAST_TIMED = 4;

    private final Device device;
    private final WeightArena arena;
    private final ModelConfig config;
    private final Buffers buffers;
    private final Rotation rotation;
    private final CublasLt cublas;
    /** Of steps with prompts. */
    private final LargeProducts large;
    private final Operands qkv;
    private final Operands output;
    private final Operands widen;
    private final Operands narrow;
    private final Operands head;
    /** Of the widening product with the activation. */
    private final Operands gated;
    private final @Nullable HopperProducts hopper;
    private final Map<Integer, List<Way>> ways = new HashMap<>();
    private final Deque<Runnable> owned = new ArrayDeque<>();

    /** out = x times the transpose of a weight, with what belongs to the layer besides. */
    interface Product {
        void run(int layer, Tensor x, Tensor weight, Tensor out);

        private static Product of(CublasLt.Product by) {
            return (layer, x, weight, out) -> by.run(x.address(), weight.address(), out.address());
        }

        private static Product of(HopperProducts.Product by) {
            return (layer, x, weight, out) -> by.run(x.address(), weight.address(), out.address());
        }
    }

    /**
     * The products of a step.
     *
     * @param qkv of queries, keys and values; when {@code rotates} it leaves them where attention reads them and writes no {@code out}
     * @param widen to the feed-forward block's width; with the activation when {@code activates}
     * @param adds whether {@code output} and {@code narrow} add to the residual stream and prepare the norm that follows, which the next
     *     product completes; they write no {@code out}, and the only norm that is left before a product is the first layer's first
     */
    record Way(Product qkv, boolean rotates, Product output, Product widen, boolean activates, Product narrow, Product head,
            boolean adds) {}

    /** A product's sizes, what it reads and writes, and enough of its weights that no cache holds them. */
    private record Operands(Size size, Tensor x, long[] weights, Tensor out) {}

    /** What the products read and write. */
    record Buffers(Tensor residual, Tensor squares, Tensor normed, Tensor qkv, Tensor attended, Tensor projected, Tensor widened,
            Tensor activated, Tensor hidden, Tensor logits) {}

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
        int width = config.hiddenSize();
        int inner = config.intermediateSize();
        qkv = operands(Kind.PLAIN, allHeads(), width, buffers.normed, ParameterRole.Q_WEIGHT, buffers.qkv);
        output = operands(Kind.PLAIN, width, attended(), buffers.attended, ParameterRole.O_WEIGHT, buffers.projected);
        widen = operands(Kind.PLAIN, widened(), width, buffers.normed, widenRole(config), buffers.widened);
        gated = operands(Kind.GATED, inner, width, buffers.normed, widenRole(config), buffers.activated);
        narrow = operands(Kind.PLAIN, width, inner, buffers.activated, ParameterRole.DOWN_WEIGHT, buffers.projected);
        head = new Operands(new Size(Kind.FLOAT, config.vocabSize(), width), buffers.hidden, new long[] {arena.logitMatrix().address()},
                buffers.logits);
        HopperProducts own = HopperProducts.runsOn(device) ? new HopperProducts(device, config, options) : null;
        if (own != null) {
            owned.push(own::close);
            boolean rotates = HopperProducts.rotates(config.headDim());
            List<Size> sizes = new ArrayList<>(List.of(rotates ? rotated().size : qkv.size, output.size,
                    activates() ? gated.size : widen.size, narrow.size, head.size));
            if (rotates && addsNorms()) {
                sizes.addAll(List.of(added(output).size, added(narrow).size));
            }
            owned.push(own.compileAhead(sizes, options.maxRunning())::close);
        }
        hopper = own;
    }

    private Operands operands(Kind kind, int n, int k, Tensor x, ParameterRole role, Tensor out) {
        long bytes = (long) DType.BFLOAT16.bytes() * n * k;
        int layers = (int) Math.min(config.layers(), Math.max(LEAST_TIMED, Math.ceilDiv(TIMED_BYTES, bytes)));
        long[] weights = IntStream.range(0, layers).mapToLong(layer -> arena.layer(layer).weight(role).address()).toArray();
        return new Operands(new Size(kind, n, k), x, weights, out);
    }

    /** {@return the number of rows, at least these, whose fastest way is taken for theirs} */
    static int like(int rows) {
        return FewRows.computes(rows) ? rows : HopperProducts.like(rows);
    }

    /** {@return the way for many rows, of a step with prompts, and for the rows that logits are wanted of} */
    Way large(int rows, int wanted) {
        Product product = (layer, x, weight, out) -> large.forward(x.narrow(0, 0, rows), weight, out.narrow(0, 0, rows));
        Product head = (layer, x, weight, out) ->
                out.narrow(0, 0, wanted).narrow(1, 0, config.vocabSize()).setLinear(x.narrow(0, 0, wanted), weight);
        return new Way(product, false, product, product, false, product, head, false);
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
                fewRows(rows, true, found);
                fewRows(rows, false, found);
            } else if (hopper != null) {
                hopper(hopper, rows, byCublas, found);
            }
        } catch (TandemException e) {
            LOG.log(System.Logger.Level.WARNING, "multiplying {0} rows by cuBLAS alone: {1}", rows, e.getMessage());
        }
        return found;
    }

    private void fewRows(int rows, boolean early, List<Way> found) {
        FewRows by = new FewRows(device, rows, early);
        owned.push(by::close);
        int width = config.hiddenSize();
        int inner = config.intermediateSize();
        Product byHead = (layer, x, weight, out) -> by.multiplyToFloat(x.address(), weight.address(), out.address(), width,
                config.vocabSize(), buffers.logits.size(1));
        found.add(new Way(
                plain(by, width, allHeads(), RowSquares.NONE),
                false,
                plain(by, attended(), width, RowSquares.NONE),
                activates() ? gated(by, RowSquares.NONE) : plain(by, width, widened(), RowSquares.NONE),
                activates(),
                plain(by, inner, width, RowSquares.NONE),
                byHead,
                false));
        if (addsNorms() && FewRows.completesNorm(width)) {
            found.add(new Way(
                    plain(by, width, allHeads(), squares()),
                    false,
                    adding(by, attended(), ParameterRole.MLP_NORM_WEIGHT, 0),
                    gated(by, squares()),
                    true,
                    adding(by, inner, ParameterRole.ATTENTION_NORM_WEIGHT, 1),
                    byHead,
                    true));
        }
    }

    /** @param squares of the rows of all layers but the first, whose norm is no part of a product */
    private static Product plain(FewRows by, int k, int n, RowSquares squares) {
        return (layer, x, weight, out) ->
                by.multiply(x.address(), weight.address(), out.address(), k, n, layer == 0 ? RowSquares.NONE : squares);
    }

    private Product gated(FewRows by, RowSquares squares) {
        return (layer, x, weight, out) -> by.multiplyGated(x.address(), weight.address(), buffers.activated.address(),
                config.hiddenSize(), config.intermediateSize(), squares);
    }

    /** @param distance to the layer whose norm follows */
    private Product adding(FewRows by, int k, ParameterRole norm, int distance) {
        return (layer, x, weight, out) -> by.multiplyAdded(x.address(), weight.address(), buffers.residual.address(), k,
                config.hiddenSize(), norm(layer + distance, norm), buffers.normed.address(), squares());
    }

    /** cuBLAS's products, in the order of {@link Way}. */
    private record Timed(CublasLt.Product qkv, CublasLt.Product output, CublasLt.Product widen, CublasLt.Product narrow,
            CublasLt.Product head) {
        Way way() {
            return new Way(Product.of(qkv), false, Product.of(output), Product.of(widen), false, Product.of(narrow), Product.of(head),
                    false);
        }
    }

    private Timed timed(int rows) {
        return new Timed(timed(rows, qkv), timed(rows, output), timed(rows, widen), timed(rows, narrow), timed(rows, head));
    }

    private CublasLt.Product timed(int rows, Operands of) {
        Shape shape = Shape.forward(of.size.n(), of.size.k(), of.out.size(1), of.out.dtype());
        CublasLt.Product product = cublas.tune(rows, HopperProducts.like(rows), shape, of.x.address(), of.weights, of.out.address());
        owned.push(product::close);
        return product;
    }

    /**
     * Product by product the faster of Tandem's and cuBLAS's, and in both forms the widening one, which may apply the activation; that of
     * queries, keys and values rotates where it can. Then Tandem's alone, with the norms.
     */
    private void hopper(HopperProducts own, int rows, Timed byCublas, List<Way> found) {
        HopperProducts.Product rotated = HopperProducts.rotates(config.headDim()) ? tune(own, rows, rotated()) : null;
        boolean rotates = rotated != null;
        Product byQkv = rotated == null ? faster(own, rows, qkv, byCublas.qkv) : rotating(rotated, RowSquares.NONE);
        Product byOutput = faster(own, rows, output, byCublas.output);
        Product byNarrow = faster(own, rows, narrow, byCublas.narrow);
        Product byHead = faster(own, rows, head, byCublas.head);
        if (activates()) {
            // Its result goes where the activation's would.
            Product byGated = gated(tune(own, rows, gated), RowSquares.NONE);
            found.add(new Way(byQkv, rotates, byOutput, byGated, true, byNarrow, byHead, false));
            found.add(new Way(byQkv, rotates, byOutput, Product.of(byCublas.widen), false, byNarrow, byHead, false));
        } else {
            Product byWiden = faster(own, rows, widen, byCublas.widen);
            found.add(new Way(byQkv, rotates, byOutput, byWiden, false, byNarrow, byHead, false));
        }
        if (rotated != null && addsNorms()) {
            found.add(withNorms(own, rows, rotated, byHead));
        }
    }

    private Way withNorms(HopperProducts own, int rows, HopperProducts.Product rotated, Product byHead) {
        return new Way(
                rotating(rotated, squares()),
                true,
                adding(tune(own, rows, added(output)), ParameterRole.MLP_NORM_WEIGHT, 0),
                gated(tune(own, rows, gated), squares()),
                true,
                adding(tune(own, rows, added(narrow)), ParameterRole.ATTENTION_NORM_WEIGHT, 1),
                byHead,
                true);
    }

    /** @param squares of the rows of all layers but the first, whose norm is no part of a product */
    private Product rotating(HopperProducts.Product by, RowSquares squares) {
        return (layer, x, weight, out) ->
                by.rotate(x.address(), weight.address(), layer == 0 ? RowSquares.NONE : squares, rotation.arguments(layer));
    }

    private Product gated(HopperProducts.Product by, RowSquares squares) {
        return (layer, x, weight, out) -> by.activate(x.address(), weight.address(), buffers.activated.address(), squares);
    }

    /** @param distance to the layer whose norm follows */
    private Product adding(HopperProducts.Product by, ParameterRole norm, int distance) {
        return (layer, x, weight, out) -> by.add(x.address(), weight.address(), buffers.residual.address(),
                norm(layer + distance, norm), buffers.normed.address(), squares());
    }

    /** {@return the address of a norm's weight, or 0 behind the last layer, where the norm is no part of a product} */
    private long norm(int layer, ParameterRole role) {
        return layer == config.layers() ? 0 : arena.layer(layer).weight(role).address();
    }

    private RowSquares squares() {
        return new RowSquares(buffers.squares.address(), Math.toIntExact(buffers.squares.size(1)), (float) config.normEps());
    }

    private Product faster(HopperProducts own, int rows, Operands of, CublasLt.Product byCublas) {
        HopperProducts.Product product = tune(own, rows, of);
        return product.milliseconds() < byCublas.milliseconds() ? Product.of(product) : Product.of(byCublas);
    }

    private HopperProducts.Product tune(HopperProducts own, int rows, Operands of) {
        long x = of.x.address();
        long out = of.out.address();
        return own.tune(of.size, rows, of.out.size(1), of.weights.length, switch (of.size.kind()) {
            case PLAIN, FLOAT -> (by, i) -> by.run(x, of.weights[i], out);
            case GATED -> (by, i) -> by.activate(x, of.weights[i], out, RowSquares.NONE);
            case ROTATED -> (by, i) -> by.rotate(x, of.weights[i], RowSquares.NONE, rotation.arguments(i));
            case ADDED -> (by, i) ->
                    by.add(x, of.weights[i], out, norm(0, ParameterRole.MLP_NORM_WEIGHT), buffers.normed.address(), squares());
        });
    }

    private Operands rotated() {
        return new Operands(new Size(Kind.ROTATED, qkv.size.n(), qkv.size.k()), qkv.x, qkv.weights, qkv.out);
    }

    private static Operands added(Operands plain) {
        return new Operands(new Size(Kind.ADDED, plain.size.n(), plain.size.k()), plain.x, plain.weights, plain.out);
    }

    /** {@return whether norms can be parts of the products around them} */
    private boolean addsNorms() {
        return activates() && config.norm() == Norm.RMS && config.hiddenSize() % 64 == 0 && Stream.of(ParameterRole.O_BIAS,
                ParameterRole.DOWN_BIAS, ParameterRole.MLP_NORM_BIAS, ParameterRole.ATTENTION_NORM_BIAS)
                .allMatch(role -> arena.layer(0).find(role) == null);
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
