package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.SymbolLookup;
import java.util.ArrayDeque;
import java.util.Arrays;
import java.util.Deque;
import java.util.HashMap;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * Causal attention within each of several sequences that lie one after the other without padding, with its gradients, by cuDNN.
 *
 * <p>The algorithm is FlashAttention-2's (Dao 2023): scores are computed tile by tile and never stored, and the backward pass computes them
 * again from the log-sum-exp of each row. cuDNN 9 has kernels for it that use Hopper's asynchronous matrix products, which libtorch's own
 * kernels do not: for two sequences of 4,096 tokens with 16 and 8 heads of 128, forward and backward take 1.14 ms against 1.94 ms on an
 * H200. libtorch can call cuDNN, but for packed sequences it builds a new plan for every set of lengths, which takes 40 ms. Here the graph
 * is given to cuDNN directly, and lengths and offsets are tensors that its kernels read: a plan serves every micro-batch whose number of
 * sequences and longest sequence do not exceed its own. As a plan for much more than there is costs time (15 % for 256 sequences of 32,768
 * in the place of two of 4,096), there is one for each power of two of sequences and each half power of two of tokens ({@link Bucket}). The
 * first takes about a second, others a tenth of it. The graphs and the way to describe packed tensors follow cuDNN's documentation ("Fused
 * Flash Attention", "Ragged Tensors").
 *
 * <p>T tokens, H query heads, K KV heads, D head size. Results belong to the innermost scope. Gradients of queries are sums in no fixed
 * order, so that two runs differ in their last bits. Confined to the thread that made it. The owner closes it when its work is done.
 */
public final class CudnnAttention implements AutoCloseable {
    private static final int FEWEST_SEQUENCES = 4;
    private static final int SHORTEST = 256;

    private final Device device;
    private final Shape shape;
    private final long handle;
    private final Map<Bucket, Plans> plans = new HashMap<>();
    private final Deque<Runnable> owned = new ArrayDeque<>();
    /** Elements of a token's queries, keys, log-sum-exps. */
    private final Tensor rowSizes;

    /** What does not change from one micro-batch to the next. */
    record Shape(int heads, int kvHeads, int headDim, double scale) {
        /** Whether several query heads share a KV head. */
        boolean grouped() {
            return heads != kvHeads;
        }
    }

    /**
     * What a plan is made for.
     *
     * @param batch the most sequences: a power of two
     * @param longest the most tokens of a sequence: a power of two, or one and a half
     */
    record Bucket(int batch, int longest) {
        /** {@return the smallest bucket for sequences of these lengths} */
        static Bucket of(long... lengths) {
            int longest = Math.toIntExact(Math.max(SHORTEST, Arrays.stream(lengths).max().orElse(0)));
            int power = powerFrom(longest);
            return new Bucket(powerFrom(Math.max(FEWEST_SEQUENCES, lengths.length)), longest <= power / 4 * 3 ? power / 4 * 3 : power);
        }

        private static int powerFrom(int least) {
            return Integer.highestOneBit(least - 1) << 1;
        }
    }

    private record Plans(CudnnAttentionGraph.Forward forward, CudnnAttentionGraph.Backward backward) {
        void close() {
            forward.close();
            backward.close();
        }
    }

    /** The sequences of a micro-batch on the device, for all layers. Its tensors belong to the scope in which it was made. */
    public static final class Sequences {
        private final Device device;
        private final Plans plans;
        private final long tokens;
        private final int entries;
        /** Rows: first elements of queries, of keys, of log-sum-exps. */
        private final Tensor offsets;
        private final Tensor lengths;

        private Sequences(Device device, Plans plans, long tokens, Tensor starts, Tensor rowSizes) {
            this.device = device;
            this.plans = plans;
            this.tokens = tokens;
            entries = Math.toIntExact(starts.elements());
            offsets = starts.unsqueeze(0).mul(rowSizes);
            lengths = starts.narrow(0, 1, entries - 1L).sub(starts.narrow(0, 0, entries - 1L)).to(DType.INT32);
        }

        /** {@return the tokens of all sequences} */
        public long tokens() {
            return tokens;
        }

        long lengths() {
            return lengths.address();
        }

        long queryOffsets() {
            return offsets.address();
        }

        long keyOffsets() {
            return offsets.address() + (long) Long.BYTES * entries;
        }

        long statisticsOffsets() {
            return offsets.address() + 2L * Long.BYTES * entries;
        }

        Tensor empty(DType type, long... sizes) {
            return Tensor.empty(device, type, sizes);
        }
    }

    /**
     * What the forward pass returns.
     *
     * @param output BFLOAT16 [T, H, D]
     * @param logSumExp FLOAT32 [T, H], of the scaled scores of each row; the backward pass needs it
     */
    public record Result(Tensor output, Tensor logSumExp) {}

    /** Gradients, BFLOAT16: of queries [T, H, D], of keys and values [T, K, D]. */
    public record Gradient(Tensor query, Tensor key, Tensor value) {}

    /**
     * Opens cuDNN on the calling thread's device and makes the plans of the smallest bucket.
     *
     * @param heads query heads, a multiple of {@code kvHeads}
     * @param scale factor of the scores
     * @throws TandemException if cuDNN 9 is not there, or cannot compute attention with such heads on this device; nothing is held then
     */
    public CudnnAttention(Device device, int heads, int kvHeads, int headDim, double scale) {
        library();
        Cuda.use(device);
        this.device = device;
        shape = new Shape(heads, kvHeads, headDim, scale);
        handle = Cudnn.createHandle();
        owned.push(() -> Cudnn.destroyHandle(handle));
        try (Scope scope = Scope.open()) {
            Tensor sizes = Tensor.of(device, (long) heads * headDim, (long) kvHeads * headDim, heads).unsqueeze(1).keep();
            owned.push(sizes::close);
            rowSizes = sizes;
            plans(Bucket.of());
        } catch (RuntimeException e) {
            close();
            throw e;
        }
    }

    /** The library, which libtorch has loaded. */
    static SymbolLookup library() {
        try {
            return SymbolLookup.libraryLookup("libcudnn.so.9", Arena.global());
        } catch (IllegalArgumentException e) {
            throw new TandemException("libcudnn.so.9 was not found: install cuDNN 9 for CUDA 13 and put it on LD_LIBRARY_PATH", e);
        }
    }

    /** {@return the version of the library, such as 9.19} */
    public String version() {
        return Cudnn.version();
    }

    /** {@return why sequences of that many tokens together cannot be attended here, or null if they can} */
    public static @Nullable String obstacle(long tokens, int heads, int headDim) {
        long elements = tokens * heads * headDim;
        return elements <= Integer.MAX_VALUE ? null
                : "queries of " + tokens + " tokens have " + elements + " elements, and cuDNN's kernels count to " + Integer.MAX_VALUE;
    }

    /** {@return where each of some sequences starts, and then their end as often as it takes: as many numbers as {@link #sequences} needs} */
    public static long[] starts(long... lengths) {
        long[] starts = new long[Bucket.of(lengths).batch + 1];
        for (int i = 1; i < starts.length; i++) {
            starts[i] = starts[i - 1] + (i <= lengths.length ? lengths[i - 1] : 0);
        }
        return starts;
    }

    /**
     * Prepares a micro-batch, without waiting for the device; makes plans if there are none for so many sequences or such long ones.
     *
     * @param starts INT64, {@link #starts(long...)} on the device
     * @param lengths tokens of each sequence
     * @throws IllegalArgumentException if there is an {@link #obstacle}
     * @throws TandemException if cuDNN has no plan
     */
    public Sequences sequences(Tensor starts, long... lengths) {
        long tokens = Arrays.stream(lengths).sum();
        String obstacle = obstacle(tokens, shape.heads, shape.headDim);
        if (obstacle != null) {
            throw new IllegalArgumentException(obstacle);
        }
        return new Sequences(device, plans(Bucket.of(lengths)), tokens, starts, rowSizes);
    }

    private Plans plans(Bucket bucket) {
        return plans.computeIfAbsent(bucket, missing -> {
            CudnnGraph forward = new CudnnGraph(handle, "forward attention of " + missing);
            CudnnGraph backward = new CudnnGraph(handle, "backward attention of " + missing);
            try {
                return new Plans(new CudnnAttentionGraph.Forward(forward, shape, missing),
                        new CudnnAttentionGraph.Backward(backward, shape, missing));
            } catch (RuntimeException e) {
                forward.close();
                backward.close();
                throw e;
            }
        });
    }

    /**
     * Computes attention on the calling thread's stream.
     *
     * @param query BFLOAT16 [T, H, D], contiguous as all
     * @param key BFLOAT16 [T, K, D]
     * @param value BFLOAT16 [T, K, D]
     * @throws IllegalArgumentException if a tensor has another shape or layout
     */
    public Result forward(Sequences sequences, Tensor query, Tensor key, Tensor value) {
        check(sequences, query, key, value);
        Cudnn.setStream(handle, Cuda.stream(device));
        Result result = new Result(sequences.empty(DType.BFLOAT16, query.shape()),
                sequences.empty(DType.FLOAT32, sequences.tokens, shape.heads));
        sequences.plans.forward.run(sequences, query, key, value, result);
        return result;
    }

    /**
     * Computes the gradients of {@link #forward} on the calling thread's stream.
     *
     * @param result what {@code forward} returned for these sequences, queries, keys, values
     * @param byOutput the gradient of the output, BFLOAT16 [T, H, D]
     * @throws IllegalArgumentException if a tensor has another shape or layout
     */
    public Gradient backward(Sequences sequences, Tensor query, Tensor key, Tensor value, Result result, Tensor byOutput) {
        check(sequences, query, key, value);
        check(sequences, shape.heads, result.output);
        check(sequences, shape.heads, byOutput);
        Cudnn.setStream(handle, Cuda.stream(device));
        Gradient gradient = new Gradient(sequences.empty(DType.BFLOAT16, query.shape()), sequences.empty(DType.BFLOAT16, key.shape()),
                sequences.empty(DType.BFLOAT16, key.shape()));
        sequences.plans.backward.run(sequences, query, key, value, result, byOutput, gradient);
        return gradient;
    }

    private void check(Sequences sequences, Tensor query, Tensor key, Tensor value) {
        check(sequences, shape.heads, query);
        check(sequences, shape.kvHeads, key);
        check(sequences, shape.kvHeads, value);
    }

    private void check(Sequences sequences, int heads, Tensor tensor) {
        long[] sizes = {sequences.tokens, heads, shape.headDim};
        if (!Arrays.equals(tensor.shape(), sizes) || tensor.dtype() != DType.BFLOAT16 || !tensor.nativeTensor().is_contiguous()) {
            throw new IllegalArgumentException("attention needs contiguous BFLOAT16 " + Arrays.toString(sizes) + ", got " + tensor);
        }
    }

    /** Destroys plans and handle. */
    @Override
    public void close() {
        plans.values().forEach(Plans::close);
        plans.clear();
        owned.forEach(Runnable::run);
        owned.clear();
    }
}
