package dev.tandem.device;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Matrix products on a GPU with an algorithm that was chosen by timing.
 *
 * <p>cuBLAS picks an algorithm from the sizes by rules of thumb, which are good for large matrices; for the few rows of a decoding step its
 * first choice can take three times as long as its fourth, and even for large ones a tenth longer than the best. Here the candidates are
 * timed once for each size, in the way they are used (one after the other in a graph, over weights that are not in the cache), and the
 * fastest is kept in the {@link TuningCache}. Sums are kept in float32 throughout.
 *
 * <p>Confined to the thread of its device. The owner closes it.
 */
public final class CublasLt implements AutoCloseable {
    /** Bytes of scratch that an instance holds on its device. */
    public static final long WORKSPACE = 32L << 20;

    private static final int COMPUTE_32F = 68;
    private static final int CUDA_R_32F = 0;
    private static final int CUDA_R_16BF = 14;
    private static final int DESC_TRANSA = 3;
    private static final int OP_T = 1;
    private static final int PREFERENCE_WORKSPACE = 1;
    private static final int PREFERENCE_REDUCTION = 3;
    /** Of the first factor; those of the second and of the result follow. */
    private static final int PREFERENCE_ALIGNMENT = 5;
    private static final int ALIGNMENT = 16;
    private static final int LAYOUT_COLUMNS = 3;
    /** In place, or in the type of the sums; not in the type of the result. */
    private static final int FLOAT_REDUCTIONS = 3;

    private static final long RESULT_BYTES = 96;
    private static final long ALGORITHM_BYTES = 64;
    private static final long RESULT_WORKSPACE = 64;
    private static final int CANDIDATES = 8;

    private static final Linker LINKER = Linker.nativeLinker();
    private static final SymbolLookup LIBRARY = library();
    private static final MethodHandle CREATE = function("cublasLtCreate", ADDRESS);
    private static final MethodHandle DESTROY = function("cublasLtDestroy", JAVA_LONG);
    private static final MethodHandle DESC_CREATE = function("cublasLtMatmulDescCreate", ADDRESS, JAVA_INT, JAVA_INT);
    private static final MethodHandle DESC_SET = function("cublasLtMatmulDescSetAttribute", JAVA_LONG, JAVA_INT, ADDRESS, JAVA_LONG);
    private static final MethodHandle DESC_DESTROY = function("cublasLtMatmulDescDestroy", JAVA_LONG);
    private static final MethodHandle LAYOUT_CREATE =
            function("cublasLtMatrixLayoutCreate", ADDRESS, JAVA_INT, JAVA_LONG, JAVA_LONG, JAVA_LONG);
    private static final MethodHandle LAYOUT_SET = function("cublasLtMatrixLayoutSetAttribute", JAVA_LONG, JAVA_INT, ADDRESS, JAVA_LONG);
    private static final MethodHandle LAYOUT_DESTROY = function("cublasLtMatrixLayoutDestroy", JAVA_LONG);
    private static final MethodHandle PREFERENCE_CREATE = function("cublasLtMatmulPreferenceCreate", ADDRESS);
    private static final MethodHandle PREFERENCE_SET =
            function("cublasLtMatmulPreferenceSetAttribute", JAVA_LONG, JAVA_INT, ADDRESS, JAVA_LONG);
    private static final MethodHandle PREFERENCE_DESTROY = function("cublasLtMatmulPreferenceDestroy", JAVA_LONG);
    private static final MethodHandle HEURISTIC = function("cublasLtMatmulAlgoGetHeuristic", JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG,
            JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_INT, ADDRESS, ADDRESS);
    private static final MethodHandle CHECK = function("cublasLtMatmulAlgoCheck", JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG,
            JAVA_LONG, ADDRESS, ADDRESS);
    private static final MethodHandle GET_VERSION =
            LINKER.downcallHandle(LIBRARY.findOrThrow("cublasLtGetVersion"), FunctionDescriptor.of(JAVA_LONG));
    private static final MethodHandle MATMUL = function("cublasLtMatmul", JAVA_LONG, JAVA_LONG, ADDRESS, JAVA_LONG, JAVA_LONG,
            JAVA_LONG, JAVA_LONG, ADDRESS, JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG, ADDRESS, JAVA_LONG, JAVA_LONG, JAVA_LONG);

    private final Device device;
    private final Arena arena = Arena.ofShared();
    private final long handle;
    private final Tensor workspace;
    private final TuningCache choices;
    private final MemorySegment one;
    private final MemorySegment zero;

    /** Makes a handle on the calling thread's device. */
    public CublasLt(Device device) {
        this.device = device;
        Cuda.use(device);
        choices = TuningCache.of(device);
        handle = create("cublasLtCreate", out -> (int) CREATE.invokeExact(out));
        try (Scope scope = Scope.open()) {
            workspace = Tensor.empty(device, DType.FLOAT32, WORKSPACE / 4).keep();
        }
        one = arena.allocateFrom(JAVA_FLOAT, 1f);
        zero = arena.allocateFrom(JAVA_FLOAT, 0f);
    }

    /**
     * A product with a weight [n, k], all of BFLOAT16 but the result.
     *
     * @param backward whether rows [m, n] are multiplied by the weight, which gives [m, k]; otherwise rows [m, k] by its transpose, which
     *     gives [m, n]
     * @param rowStride elements from one row to the next
     * @param outStride elements from one row of the result to the next
     * @param outType BFLOAT16 or FLOAT32
     */
    public record Shape(boolean backward, int n, int k, long rowStride, long outStride, DType outType) {
        /** {@return rows that lie one after the other times the transpose of a weight} */
        public static Shape forward(int n, int k, long outStride, DType outType) {
            return new Shape(false, n, k, k, outStride, outType);
        }
    }

    /** A product with its algorithm. */
    public final class Product implements AutoCloseable {
        private final long description;
        private final long weightLayout;
        private final long rowLayout;
        private final long outLayout;
        private final MemorySegment rowCount = arena.allocate(JAVA_LONG);
        private final List<MemorySegment> candidates = new ArrayList<>();
        private MemorySegment chosen;
        private float milliseconds;

        private Product(int rows, Shape shape) {
            description = create("cublasLtMatmulDescCreate",
                    out -> (int) DESC_CREATE.invokeExact(out, COMPUTE_32F, CUDA_R_32F));
            if (!shape.backward) {
                try (Arena local = Arena.ofConfined()) {
                    MemorySegment transposed = local.allocateFrom(JAVA_INT, OP_T);
                    call("cublasLtMatmulDescSetAttribute", () -> (int) DESC_SET.invokeExact(description, DESC_TRANSA, transposed, 4L));
                }
            }
            int type = shape.outType == DType.FLOAT32 ? CUDA_R_32F : CUDA_R_16BF;
            // The library counts columns first: its result is the transpose, weights on the left.
            weightLayout = layout(CUDA_R_16BF, shape.k, shape.n, shape.k);
            rowLayout = layout(CUDA_R_16BF, shape.backward ? shape.n : shape.k, rows, shape.rowStride);
            outLayout = layout(type, shape.backward ? shape.k : shape.n, rows, shape.outStride);
            rowCount.set(JAVA_LONG, 0, rows);
            try {
                find();
                if (candidates.isEmpty()) {
                    throw new TandemException("cuBLAS has no algorithm for " + rows + " rows and " + shape);
                }
            } catch (RuntimeException | Error e) {
                close();
                throw e;
            }
            chosen = candidates.getFirst();
        }

        /** Has the product multiply another number of rows from now on, by the same algorithm. */
        void rows(long rows) {
            if (rows != rowCount.get(JAVA_LONG, 0)) {
                rowCount.set(JAVA_LONG, 0, rows);
                for (long layout : new long[] {rowLayout, outLayout}) {
                    call("cublasLtMatrixLayoutSetAttribute", () -> (int) LAYOUT_SET.invokeExact(layout, LAYOUT_COLUMNS, rowCount, 8L));
                }
            }
        }

        private void find() {
            long preference = create("cublasLtMatmulPreferenceCreate", out -> (int) PREFERENCE_CREATE.invokeExact(out));
            try (Arena local = Arena.ofConfined()) {
                MemorySegment most = local.allocateFrom(JAVA_LONG, WORKSPACE);
                call("cublasLtMatmulPreferenceSetAttribute",
                        () -> (int) PREFERENCE_SET.invokeExact(preference, PREFERENCE_WORKSPACE, most, 8L));
                MemorySegment reductions = local.allocateFrom(JAVA_INT, FLOAT_REDUCTIONS);
                call("cublasLtMatmulPreferenceSetAttribute",
                        () -> (int) PREFERENCE_SET.invokeExact(preference, PREFERENCE_REDUCTION, reductions, 4L));
                MemorySegment alignment = local.allocateFrom(JAVA_INT, ALIGNMENT);
                for (int operand = 0; operand < 4; operand++) {
                    int attribute = PREFERENCE_ALIGNMENT + operand;
                    call("cublasLtMatmulPreferenceSetAttribute",
                            () -> (int) PREFERENCE_SET.invokeExact(preference, attribute, alignment, 4L));
                }
                MemorySegment results = arena.allocate(CANDIDATES * RESULT_BYTES, 16);
                MemorySegment count = local.allocate(JAVA_INT);
                call("cublasLtMatmulAlgoGetHeuristic", () -> (int) HEURISTIC.invokeExact(handle, description, weightLayout, rowLayout,
                        outLayout, outLayout, preference, CANDIDATES, results, count));
                for (int i = 0; i < count.get(JAVA_INT, 0); i++) {
                    MemorySegment result = results.asSlice(i * RESULT_BYTES, RESULT_BYTES);
                    if (result.get(JAVA_INT, RESULT_WORKSPACE + 8) == 0) {
                        candidates.add(result.asSlice(0, ALGORITHM_BYTES));
                    }
                }
            } finally {
                call("cublasLtMatmulPreferenceDestroy", () -> (int) PREFERENCE_DESTROY.invokeExact(preference));
            }
        }

        /** Computes on the calling thread's stream; may be captured. */
        public void run(long x, long weight, long out) {
            run(chosen, x, weight, out);
        }

        private void run(MemorySegment algorithm, long x, long weight, long out) {
            long stream = Cuda.stream(device);
            call("cublasLtMatmul", () -> (int) MATMUL.invokeExact(handle, description, one, weight, weightLayout, x, rowLayout, zero, out,
                    outLayout, out, outLayout, algorithm, workspace.address(), WORKSPACE, stream));
        }

        /** Takes an algorithm that was chosen before. {@return whether there is one, and the library accepts it} */
        private boolean restore(@Nullable String known) {
            if (known == null) {
                return false;
            }
            try (Arena local = Arena.ofConfined()) {
                int space = known.indexOf(' ');
                float time = Float.parseFloat(known.substring(0, space));
                byte[] bytes = HexFormat.of().parseHex(known.substring(space + 1));
                if (bytes.length != ALGORITHM_BYTES) {
                    return false;
                }
                MemorySegment algorithm = arena.allocate(ALGORITHM_BYTES, 16).copyFrom(MemorySegment.ofArray(bytes));
                MemorySegment result = local.allocate(RESULT_BYTES, 16);
                call("cublasLtMatmulAlgoCheck", () -> (int) CHECK.invokeExact(handle, description, weightLayout, rowLayout, outLayout,
                        outLayout, algorithm, result));
                if (result.get(JAVA_LONG, RESULT_WORKSPACE) > WORKSPACE) {
                    return false;
                }
                chosen = algorithm;
                milliseconds = time;
                return true;
            } catch (IllegalArgumentException | IndexOutOfBoundsException | CudaException e) {
                return false; // something else is written there, or the library has changed
            }
        }

        /** Times all candidates, over each of {@code weights} in turn, and keeps the fastest. {@code out} is overwritten. */
        private void tune(long x, long[] weights, long out) {
            milliseconds = Float.POSITIVE_INFINITY;
            for (MemorySegment candidate : candidates) {
                try {
                    run(candidate, x, weights[0], out);
                } catch (CudaException e) {
                    continue; // some are offered and then refused
                }
                try (CudaGraph graph = CudaGraph.capture(device, () -> {
                    for (long weight : weights) {
                        run(candidate, x, weight, out);
                    }
                })) {
                    float time = graph.milliseconds(device) / weights.length;
                    if (time < milliseconds) {
                        milliseconds = time;
                        chosen = candidate;
                    }
                }
            }
        }

        /** {@return what the product took when it was timed} */
        public float milliseconds() {
            return milliseconds;
        }

        @Override
        public void close() {
            call("cublasLtMatrixLayoutDestroy", () -> (int) LAYOUT_DESTROY.invokeExact(weightLayout));
            call("cublasLtMatrixLayoutDestroy", () -> (int) LAYOUT_DESTROY.invokeExact(rowLayout));
            call("cublasLtMatrixLayoutDestroy", () -> (int) LAYOUT_DESTROY.invokeExact(outLayout));
            call("cublasLtMatmulDescDestroy", () -> (int) DESC_DESTROY.invokeExact(description));
        }
    }

    /**
     * Chooses an algorithm for a product by timing.
     *
     * @param rows to time it with
     * @param like the number of rows that what is found is kept for
     * @param weights addresses of weights of this shape that are used in turn, such as those of all layers
     * @param x address of the rows
     * @param out address of a result to overwrite
     */
    public Product tune(int rows, int like, Shape shape, long x, long[] weights, long out) {
        Product product = new Product(rows, shape);
        String question = "cuBLAS " + like + " " + shape;
        try {
            if (!product.restore(choices.find(question))) {
                product.tune(x, weights, out);
                choices.keep(question,
                        product.milliseconds + " " + HexFormat.of().formatHex(product.chosen.toArray(ValueLayout.JAVA_BYTE)));
            }
            return product;
        } catch (RuntimeException | Error e) {
            product.close();
            throw e;
        }
    }

    /** {@return the library's version} */
    static long version() {
        try {
            return (long) GET_VERSION.invokeExact();
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private long layout(int type, long rows, long columns, long stride) {
        return create("cublasLtMatrixLayoutCreate", out -> (int) LAYOUT_CREATE.invokeExact(out, type, rows, columns, stride));
    }

    private interface Creation {
        int into(MemorySegment out) throws Throwable;
    }

    private interface Call {
        int run() throws Throwable;
    }

    private static long create(String name, Creation creation) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            call(name, () -> creation.into(out));
            return out.get(JAVA_LONG, 0);
        }
    }

    private static void call(String name, Call call) {
        int result;
        try {
            result = call.run();
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
        if (result != 0) {
            throw new CudaException(result, name + " failed: cuBLAS status " + result);
        }
    }

    private static SymbolLookup library() {
        for (String name : List.of("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so")) {
            try {
                return SymbolLookup.libraryLookup(name, Arena.global());
            } catch (IllegalArgumentException e) {
                System.getLogger(CublasLt.class.getName()).log(System.Logger.Level.DEBUG, "no {0}", name);
            }
        }
        throw new TandemException("libcublasLt.so was not found: install CUDA 13 and put its libraries on LD_LIBRARY_PATH");
    }

    private static MethodHandle function(String name, MemoryLayout... parameters) {
        return LINKER.downcallHandle(LIBRARY.findOrThrow(name), FunctionDescriptor.of(JAVA_INT, parameters));
    }

    @Override
    public void close() {
        call("cublasLtDestroy", () -> (int) DESTROY.invokeExact(handle));
        workspace.close();
        arena.close();
    }
}
