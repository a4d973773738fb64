package dev.tandem.device;

import static java.lang.foreign.ValueLayout.JAVA_BYTE;
import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import dev.tandem.device.Cudnn.Attribute;
import dev.tandem.device.Cudnn.Kind;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Stream;
import org.jspecify.annotations.Nullable;

/**
 * Operations that cuDNN runs as one plan of few kernels.
 *
 * <p>The graph is described operation by operation over {@link Operand}s, then {@link #plan} asks cuDNN's heuristics for an engine, then
 * {@link #execute} runs it with the addresses that were bound last. A {@link TandemException} names the descriptor that cuDNN refused.
 *
 * <p>Confined to the thread of its handle. The owner closes it before the handle.
 */
final class CudnnGraph implements AutoCloseable {
    /** What combines elements. */
    enum Pointwise {
        ADD(0), MUL(1), DIV(6), SUB(9), EXP(13), LOG(15), IDENTITY(21), CMP_GE(303), CMP_LT(304), LOGICAL_AND(400), GEN_INDEX(501),
        BINARY_SELECT(601);

        private final int number;

        Pointwise(int number) {
            this.number = number;
        }
    }

    /** What combines the elements of the dimensions in which a result has size one. */
    enum Reduction {
        ADD(0), MAX(3);

        private final int number;

        Reduction(int number) {
            this.number = number;
        }
    }

    private enum Heuristics {
        MODE_A(3), MODE_B(1), FALLBACK(2);

        private final int number;

        Heuristics(int number) {
            this.number = number;
        }
    }

    /** Operands of a graph that have an address. */
    private static final int MAX_BOUND = 32;
    private static final long[] SCALAR = {1, 1, 1, 1};
    private static final long ONE = Float.floatToRawIntBits(1);

    private final long handle;
    private final String name;
    private final Arena arena = Arena.ofShared();
    private final List<Long> owned = new ArrayList<>();
    private final List<Descriptor> operations = new ArrayList<>();
    private final MemorySegment ids = arena.allocate(JAVA_LONG, MAX_BOUND);
    private final MemorySegment addresses = arena.allocate(JAVA_LONG, MAX_BOUND);
    private final MemorySegment scratch = arena.allocate(JAVA_LONG);
    private int operands;
    private int bound;
    private long plan;
    private long workspaceBytes;

    /**
     * Begins an empty graph.
     *
     * @param handle of {@link Cudnn#createHandle}
     * @param name what the graph computes, for messages
     */
    CudnnGraph(long handle, String name) {
        this.handle = handle;
        this.name = name;
    }

    // ---- operands -------------------------------------------------------------------------------------------------------

    /** A value that operations read and write: a tensor in memory, one that exists inside of the plan alone, or a number. */
    static final class Operand {
        private final Descriptor descriptor;
        private final long[] sizes;
        private final long[] strides;
        private final @Nullable Operand offsets;
        private final int slot;

        private Operand(Descriptor descriptor, long[] sizes, long[] strides, @Nullable Operand offsets, int slot) {
            this.descriptor = descriptor;
            this.sizes = sizes;
            this.strides = strides;
            this.offsets = offsets;
            this.slot = slot;
        }
    }

    /**
     * {@return a tensor whose address is bound before each execution}
     *
     * @param offsets where each index of the first dimension begins, in elements; null where the strides say it
     */
    Operand tensor(String of, DType type, long[] sizes, long[] strides, @Nullable Operand offsets) {
        int alignment = type == DType.INT32 || type == DType.INT64 ? type.bytes() : 16;
        return operand(describe(of, type, sizes, strides, offsets, alignment), sizes, strides, offsets, true);
    }

    /** {@return a tensor that has no address} */
    Operand intermediate(String of, DType type, long[] sizes, long[] strides) {
        Descriptor descriptor = describe(of, type, sizes, strides, null, 16).set(Attribute.TENSOR_IS_VIRTUAL, 1);
        return operand(descriptor, sizes, strides, null, false);
    }

    /** {@return a FLOAT32 number} */
    Operand constant(String of, float value) {
        Descriptor descriptor = describe(of, DType.FLOAT32, SCALAR, SCALAR, null, 16).set(Attribute.TENSOR_IS_BY_VALUE, 1);
        Operand constant = operand(descriptor, SCALAR, SCALAR, null, true);
        bind(constant, arena.allocateFrom(JAVA_FLOAT, value).address());
        return constant;
    }

    /** {@return sizes or strides with the last two exchanged} */
    static long[] exchanged(long... of) {
        return new long[] {of[0], of[1], of[3], of[2]};
    }

    private Descriptor describe(String of, DType type, long[] sizes, long[] strides, @Nullable Operand offsets, int alignment) {
        Descriptor tensor = new Descriptor(Kind.TENSOR, of).set(Attribute.TENSOR_DATA_TYPE, Cudnn.number(type))
                .set(Attribute.TENSOR_DIMENSIONS, sizes).set(Attribute.TENSOR_STRIDES, strides)
                .set(Attribute.TENSOR_UNIQUE_ID, ++operands).set(Attribute.TENSOR_BYTE_ALIGNMENT, alignment);
        return offsets == null ? tensor : tensor.set(Attribute.TENSOR_RAGGED_OFFSET_DESC, offsets.descriptor);
    }

    private Operand operand(Descriptor tensor, long[] sizes, long[] strides, @Nullable Operand offsets, boolean hasAddress) {
        if (hasAddress) {
            ids.setAtIndex(JAVA_LONG, bound, operands);
        }
        return new Operand(tensor.complete(), sizes, strides, offsets, hasAddress ? bound++ : -1);
    }

    /** Says where a tensor is from the next execution on. */
    void bind(Operand tensor, long address) {
        addresses.setAtIndex(JAVA_LONG, tensor.slot, address);
    }

    // ---- operations -----------------------------------------------------------------------------------------------------

    /**
     * Adds c = a b, with sums in FLOAT32.
     *
     * @param m of each index of the first dimension, how many rows of a there are; n of b's columns, k of the sums' terms; null: all
     * @return c
     */
    Operand matmul(String of, Operand a, Operand b, Operand c, @Nullable Operand m, @Nullable Operand n, @Nullable Operand k) {
        Descriptor matmul = new Descriptor(Kind.MATMUL, of).set(Attribute.MATMUL_COMP_TYPE, Cudnn.number(DType.FLOAT32)).complete();
        Descriptor operation = new Descriptor(Kind.OPERATION_MATMUL, of).set(Attribute.OPERATION_MATMUL_ADESC, a.descriptor)
                .set(Attribute.OPERATION_MATMUL_BDESC, b.descriptor).set(Attribute.OPERATION_MATMUL_CDESC, c.descriptor)
                .set(Attribute.OPERATION_MATMUL_DESC, matmul);
        if (m != null) {
            operation.set(Attribute.OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, m.descriptor);
        }
        if (n != null) {
            operation.set(Attribute.OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, n.descriptor);
        }
        if (k != null) {
            operation.set(Attribute.OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, k.descriptor);
        }
        operations.add(operation.complete());
        return c;
    }

    /** {@return an intermediate tensor of x's layout: an operation on the elements of x and, where it has more operands, of b and t} */
    Operand pointwise(String of, Pointwise mode, DType type, Operand x, Operand... others) {
        Operand out = intermediate(of, type, x.sizes, x.strides);
        return pointwise(of, mode, type == DType.BOOL ? type : DType.FLOAT32, -1, out, x, others);
    }

    /** {@return of x's layout, INT32: each element's index in a dimension} */
    Operand index(String of, int dimension, DType compute, Operand x) {
        return pointwise(of, Pointwise.GEN_INDEX, compute, dimension, intermediate(of, DType.INT32, x.sizes, x.strides), x);
    }

    /** Adds an operation on elements in FLOAT32, and returns its result, out. */
    Operand pointwiseInto(Operand out, String of, Pointwise mode, Operand x, Operand... others) {
        return pointwise(of, mode, DType.FLOAT32, -1, out, x, others);
    }

    private Operand pointwise(String of, Pointwise mode, DType compute, int axis, Operand out, Operand x, Operand... others) {
        Descriptor pointwise = new Descriptor(Kind.POINTWISE, of).set(Attribute.POINTWISE_MODE, mode.number)
                .set(Attribute.POINTWISE_MATH_PREC, Cudnn.number(compute));
        if (axis >= 0) {
            pointwise.set(Attribute.POINTWISE_AXIS, axis);
        }
        Descriptor operation = new Descriptor(Kind.OPERATION_POINTWISE, of)
                .set(Attribute.OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise.complete())
                .set(Attribute.OPERATION_POINTWISE_XDESC, x.descriptor).set(Attribute.OPERATION_POINTWISE_YDESC, out.descriptor);
        if (others.length > 0) {
            operation.set(Attribute.OPERATION_POINTWISE_BDESC, others[0].descriptor);
        }
        if (others.length > 1) {
            operation.set(Attribute.OPERATION_POINTWISE_TDESC, others[1].descriptor);
        }
        operations.add(operation.set(Attribute.OPERATION_POINTWISE_ALPHA1, ONE).set(Attribute.OPERATION_POINTWISE_ALPHA2, ONE).complete());
        return out;
    }

    /** Combines the elements of x in FLOAT32 along the dimensions in which out is smaller, and returns out. */
    Operand reduce(String of, Reduction operator, Operand x, Operand out) {
        Descriptor reduction = new Descriptor(Kind.REDUCTION, of).set(Attribute.REDUCTION_COMP_TYPE, Cudnn.number(DType.FLOAT32))
                .set(Attribute.REDUCTION_OPERATOR, operator.number).complete();
        operations.add(new Descriptor(Kind.OPERATION_REDUCTION, of).set(Attribute.OPERATION_REDUCTION_DESC, reduction)
                .set(Attribute.OPERATION_REDUCTION_XDESC, x.descriptor).set(Attribute.OPERATION_REDUCTION_YDESC, out.descriptor)
                .complete());
        return out;
    }

    /** {@return an intermediate tensor: the operand with its last two dimensions exchanged} */
    Operand transpose(String of, DType type, Operand x) {
        long[] sizes = exchanged(x.sizes);
        long[] strides = exchanged(x.strides);
        Descriptor descriptor = describe(of, type, sizes, strides, x.offsets, 16).set(Attribute.TENSOR_IS_VIRTUAL, 1);
        Operand out = operand(descriptor, sizes, strides, x.offsets, false);
        operations.add(new Descriptor(Kind.OPERATION_RESHAPE, of).set(Attribute.OPERATION_RESHAPE_XDESC, x.descriptor)
                .set(Attribute.OPERATION_RESHAPE_YDESC, out.descriptor).complete());
        return out;
    }

    // ---- plans ----------------------------------------------------------------------------------------------------------

    /**
     * Chooses an engine for the complete graph, the first that its heuristics propose and that can be planned.
     *
     * @throws TandemException if there is none, with cuDNN's reasons
     */
    void plan() {
        Descriptor graph = new Descriptor(Kind.OPERATIONGRAPH, name)
                .set(Attribute.OPERATIONGRAPH_OPS, operations.toArray(Descriptor[]::new))
                .set(Attribute.OPERATIONGRAPH_HANDLE, handle).complete();
        List<String> refusals = new ArrayList<>();
        for (Heuristics mode : Heuristics.values()) {
            try {
                for (Descriptor configuration : configurations(graph, mode)) {
                    if (plan(configuration, refusals)) {
                        return;
                    }
                }
            } catch (TandemException e) { // the next mode may propose what this one does not
                refusals.add(String.valueOf(e.getMessage()));
            }
        }
        throw new TandemException("cuDNN " + Cudnn.version() + " has no plan for " + name + ": " + String.join("; ", refusals));
    }

    private List<Descriptor> configurations(Descriptor graph, Heuristics mode) {
        Descriptor heuristics = new Descriptor(Kind.ENGINEHEUR, mode.name()).set(Attribute.ENGINEHEUR_OPERATION_GRAPH, graph)
                .set(Attribute.ENGINEHEUR_MODE, mode.number).complete();
        int count = Math.toIntExact(heuristics.get(Attribute.ENGINEHEUR_RESULTS, MemorySegment.NULL));
        if (count == 0) {
            throw new TandemException("its heuristics (" + mode + ") propose no engine");
        }
        List<Descriptor> found = Stream.generate(() -> new Descriptor(Kind.ENGINECFG, mode.name())).limit(count).toList();
        try (Arena local = Arena.ofConfined()) {
            MemorySegment pointers = local.allocateFrom(JAVA_LONG, found.stream().mapToLong(each -> each.pointer).toArray());
            return found.subList(0, Math.toIntExact(heuristics.get(Attribute.ENGINEHEUR_RESULTS, pointers)));
        }
    }

    private boolean plan(Descriptor configuration, List<String> refusals) {
        try {
            Descriptor made = new Descriptor(Kind.EXECUTION_PLAN, name).set(Attribute.EXECUTION_PLAN_ENGINE_CONFIG, configuration)
                    .set(Attribute.EXECUTION_PLAN_HANDLE, handle).complete();
            made.get(Attribute.EXECUTION_PLAN_WORKSPACE_SIZE, scratch);
            workspaceBytes = scratch.get(JAVA_LONG, 0);
            plan = made.pointer;
            return true;
        } catch (TandemException e) {
            refusals.add(String.valueOf(e.getMessage()));
            return false;
        }
    }

    /** {@return bytes of device memory that an execution needs beside its tensors} */
    long workspaceBytes() {
        return workspaceBytes;
    }

    /**
     * Runs the plan on the handle's stream, over what is bound.
     *
     * @param workspace address of {@link #workspaceBytes} that the stream may overwrite
     */
    void execute(long workspace) {
        long pack = Cudnn.create(Kind.VARIANT_PACK, name);
        try {
            Cudnn.set(pack, name, Attribute.VARIANT_PACK_UNIQUE_IDS, bound, ids);
            Cudnn.set(pack, name, Attribute.VARIANT_PACK_DATA_POINTERS, bound, addresses);
            scratch.set(JAVA_LONG, 0, workspace);
            Cudnn.set(pack, name, Attribute.VARIANT_PACK_WORKSPACE, 1, scratch);
            Cudnn.complete(pack, Kind.VARIANT_PACK, name);
            Cudnn.execute(handle, plan, pack, name);
        } finally {
            Cudnn.destroy(pack);
        }
    }

    @Override
    public void close() {
        for (long descriptor : owned.reversed()) {
            Cudnn.destroy(descriptor);
        }
        owned.clear();
        arena.close();
    }

    // ---- descriptors ----------------------------------------------------------------------------------------------------

    /** An object of the backend API: it gets its attributes one by one and is complete then. The graph destroys it. */
    private final class Descriptor {
        private final Kind kind;
        private final String of;
        private final long pointer;

        Descriptor(Kind kind, String of) {
            this.kind = kind;
            this.of = of;
            pointer = Cudnn.create(kind, of);
            owned.add(pointer);
        }

        /** @param values in the width of the attribute's type; a FLOAT by its bits */
        Descriptor set(Attribute attribute, long... values) {
            try (Arena local = Arena.ofConfined()) {
                MemorySegment array = local.allocate(8L * values.length, 8);
                for (int i = 0; i < values.length; i++) {
                    switch (attribute.bytes()) {
                        case 1 -> array.setAtIndex(JAVA_BYTE, i, (byte) values[i]);
                        case 4 -> array.setAtIndex(JAVA_INT, i, (int) values[i]);
                        default -> array.setAtIndex(JAVA_LONG, i, values[i]);
                    }
                }
                Cudnn.set(pointer, of, attribute, values.length, array);
            }
            return this;
        }

        Descriptor set(Attribute attribute, Descriptor... values) {
            return set(attribute, Arrays.stream(values).mapToLong(value -> value.pointer).toArray());
        }

        /** {@return how many values there are} As many as fit into {@code values} are written there, or to descriptors it names. */
        long get(Attribute attribute, MemorySegment values) {
            return Cudnn.get(pointer, of, attribute, values);
        }

        Descriptor complete() {
            Cudnn.complete(pointer, kind, of);
            return this;
        }
    }
}
