package dev.tandem.device;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.invoke.MethodHandle;

/**
 * The backend API of cuDNN 9, with the names and numbers of {@code cudnn_graph.h}.
 *
 * <p>Handles and descriptors are plain addresses. A status other than success is a {@link TandemException} that says what was refused and
 * what cuDNN gives as its reason. Loading this class needs the library: ask {@link CudnnAttention#library} first.
 */
final class Cudnn {
    /** Kinds of descriptors. */
    enum Kind {
        POINTWISE(0), ENGINECFG(3), ENGINEHEUR(4), EXECUTION_PLAN(5), OPERATION_POINTWISE(13), OPERATIONGRAPH(15), VARIANT_PACK(16),
        TENSOR(17), MATMUL(18), OPERATION_MATMUL(19), REDUCTION(21), OPERATION_REDUCTION(22), OPERATION_RESHAPE(31);

        private final int number;

        Kind(int number) {
            this.number = number;
        }
    }

    /** Types of attributes, and the bytes of one value. */
    private enum Type {
        HANDLE(0, 8), DATA_TYPE(1, 4), BOOLEAN(2, 1), INT64(3, 8), FLOAT(4, 4), VOID_PTR(6, 8), HEUR_MODE(8, 4), POINTWISE_MODE(14, 4),
        DESCRIPTOR(15, 8), REDUCTION_OPERATOR(18, 4);

        private final int number;
        private final int bytes;

        Type(int number, int bytes) {
            this.number = number;
            this.bytes = bytes;
        }
    }

    /** Attributes of descriptors. */
    enum Attribute {
        POINTWISE_MODE(0, Type.POINTWISE_MODE), POINTWISE_MATH_PREC(1, Type.DATA_TYPE), POINTWISE_AXIS(9, Type.INT64),
        ENGINEHEUR_MODE(200, Type.HEUR_MODE), ENGINEHEUR_OPERATION_GRAPH(201, Type.DESCRIPTOR), ENGINEHEUR_RESULTS(202, Type.DESCRIPTOR),
        EXECUTION_PLAN_HANDLE(400, Type.HANDLE), EXECUTION_PLAN_ENGINE_CONFIG(401, Type.DESCRIPTOR),
        EXECUTION_PLAN_WORKSPACE_SIZE(402, Type.INT64),
        OPERATION_POINTWISE_PW_DESCRIPTOR(750, Type.DESCRIPTOR), OPERATION_POINTWISE_XDESC(751, Type.DESCRIPTOR),
        OPERATION_POINTWISE_BDESC(752, Type.DESCRIPTOR), OPERATION_POINTWISE_YDESC(753, Type.DESCRIPTOR),
        OPERATION_POINTWISE_ALPHA1(754, Type.FLOAT), OPERATION_POINTWISE_ALPHA2(755, Type.FLOAT),
        OPERATION_POINTWISE_TDESC(758, Type.DESCRIPTOR),
        OPERATIONGRAPH_HANDLE(800, Type.HANDLE), OPERATIONGRAPH_OPS(801, Type.DESCRIPTOR),
        TENSOR_BYTE_ALIGNMENT(900, Type.INT64), TENSOR_DATA_TYPE(901, Type.DATA_TYPE), TENSOR_DIMENSIONS(902, Type.INT64),
        TENSOR_STRIDES(903, Type.INT64), TENSOR_UNIQUE_ID(906, Type.INT64), TENSOR_IS_VIRTUAL(907, Type.BOOLEAN),
        TENSOR_IS_BY_VALUE(908, Type.BOOLEAN), TENSOR_RAGGED_OFFSET_DESC(913, Type.DESCRIPTOR),
        VARIANT_PACK_UNIQUE_IDS(1000, Type.INT64), VARIANT_PACK_DATA_POINTERS(1001, Type.VOID_PTR),
        VARIANT_PACK_WORKSPACE(1003, Type.VOID_PTR),
        MATMUL_COMP_TYPE(1500, Type.DATA_TYPE), OPERATION_MATMUL_ADESC(1520, Type.DESCRIPTOR),
        OPERATION_MATMUL_BDESC(1521, Type.DESCRIPTOR), OPERATION_MATMUL_CDESC(1522, Type.DESCRIPTOR),
        OPERATION_MATMUL_DESC(1523, Type.DESCRIPTOR), OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC(1525, Type.DESCRIPTOR),
        OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC(1526, Type.DESCRIPTOR), OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC(1527, Type.DESCRIPTOR),
        REDUCTION_OPERATOR(1600, Type.REDUCTION_OPERATOR), REDUCTION_COMP_TYPE(1601, Type.DATA_TYPE),
        OPERATION_REDUCTION_XDESC(1610, Type.DESCRIPTOR), OPERATION_REDUCTION_YDESC(1611, Type.DESCRIPTOR),
        OPERATION_REDUCTION_DESC(1612, Type.DESCRIPTOR),
        OPERATION_RESHAPE_XDESC(2200, Type.DESCRIPTOR), OPERATION_RESHAPE_YDESC(2201, Type.DESCRIPTOR);

        private final int number;
        private final Type type;

        Attribute(int number, Type type) {
            this.number = number;
            this.type = type;
        }

        /** {@return the bytes of one value} */
        int bytes() {
            return type.bytes;
        }
    }

    private static final int MESSAGE_BYTES = 1024;

    private static final Linker LINKER = Linker.nativeLinker();
    private static final SymbolLookup LIBRARY = CudnnAttention.library();
    private static final MethodHandle GET_VERSION = handle("cudnnGetVersion", FunctionDescriptor.of(JAVA_LONG));
    private static final MethodHandle GET_ERROR_STRING = handle("cudnnGetErrorString", FunctionDescriptor.of(ADDRESS, JAVA_INT));
    private static final MethodHandle GET_LAST_ERROR = handle("cudnnGetLastErrorString", FunctionDescriptor.ofVoid(ADDRESS, JAVA_LONG));
    private static final MethodHandle CREATE_HANDLE = function("cudnnCreate", ADDRESS);
    private static final MethodHandle DESTROY_HANDLE = function("cudnnDestroy", JAVA_LONG);
    private static final MethodHandle SET_STREAM = function("cudnnSetStream", JAVA_LONG, JAVA_LONG);
    private static final MethodHandle CREATE = function("cudnnBackendCreateDescriptor", JAVA_INT, ADDRESS);
    private static final MethodHandle DESTROY = function("cudnnBackendDestroyDescriptor", JAVA_LONG);
    private static final MethodHandle SET = function("cudnnBackendSetAttribute", JAVA_LONG, JAVA_INT, JAVA_INT, JAVA_LONG, ADDRESS);
    private static final MethodHandle GET =
            function("cudnnBackendGetAttribute", JAVA_LONG, JAVA_INT, JAVA_INT, JAVA_LONG, ADDRESS, ADDRESS);
    private static final MethodHandle FINALIZE = function("cudnnBackendFinalize", JAVA_LONG);
    private static final MethodHandle EXECUTE = function("cudnnBackendExecute", JAVA_LONG, JAVA_LONG, JAVA_LONG);

    private Cudnn() {}

    // ---- library and handles --------------------------------------------------------------------------------------------

    /** {@return the library's version, such as 9.19} */
    static String version() {
        try {
            long version = (long) GET_VERSION.invokeExact();
            return version / 10_000 + "." + version / 100 % 100;
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return a new handle on the calling thread's device} */
    static long createHandle() {
        try (Arena local = Arena.ofConfined()) {
            MemorySegment out = local.allocate(JAVA_LONG);
            check((int) CREATE_HANDLE.invokeExact(out), "make", "handle", "");
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Makes the handle's graphs run on a stream. */
    static void setStream(long handle, long stream) {
        try {
            check((int) SET_STREAM.invokeExact(handle, stream), "set stream of", "handle", "");
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroyHandle(long handle) {
        try {
            check((int) DESTROY_HANDLE.invokeExact(handle), "destroy", "handle", "");
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    // ---- descriptors ----------------------------------------------------------------------------------------------------

    /** {@return a new descriptor} */
    static long create(Kind kind, String of) {
        try (Arena local = Arena.ofConfined()) {
            MemorySegment out = local.allocate(JAVA_LONG);
            check((int) CREATE.invokeExact(kind.number, out), "make", kind, of);
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Sets an attribute to {@code count} values. */
    static void set(long descriptor, String of, Attribute attribute, long count, MemorySegment values) {
        try {
            check((int) SET.invokeExact(descriptor, attribute.number, attribute.type.number, count, values), "set", attribute, of);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return how many values an attribute has} As many as fit into {@code values} are written there, or to the descriptors it names. */
    static long get(long descriptor, String of, Attribute attribute, MemorySegment values) {
        try (Arena local = Arena.ofConfined()) {
            MemorySegment count = local.allocate(JAVA_LONG);
            long most = values.byteSize() / attribute.bytes();
            check((int) GET.invokeExact(descriptor, attribute.number, attribute.type.number, most, count, values), "get", attribute, of);
            return count.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Finalizes a descriptor: its attributes do not change any more. */
    static void complete(long descriptor, Kind kind, String of) {
        try {
            check((int) FINALIZE.invokeExact(descriptor), "complete", kind, of);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void execute(long handle, long plan, long variantPack, String of) {
        try {
            check((int) EXECUTE.invokeExact(handle, plan, variantPack), "run", "plan", of);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroy(long descriptor) {
        try {
            check((int) DESTROY.invokeExact(descriptor), "destroy", "descriptor", "");
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return a cudnnDataType_t} */
    static int number(DType type) {
        return switch (type) {
            case FLOAT32 -> 0;
            case FLOAT64 -> 1;
            case FLOAT16 -> 2;
            case INT32 -> 4;
            case BFLOAT16 -> 9;
            case INT64 -> 10;
            case BOOL -> 11;
        };
    }

    // ---- calling --------------------------------------------------------------------------------------------------------

    private static void check(int status, String action, Object what, String of) {
        if (status != 0) {
            throw new TandemException("cuDNN could not " + action + " " + what + (of.isEmpty() ? "" : " of " + of) + ": " + reason(status));
        }
    }

    private static String reason(int status) {
        try (Arena local = Arena.ofConfined()) {
            MemorySegment message = local.allocate(MESSAGE_BYTES);
            GET_LAST_ERROR.invokeExact(message, (long) MESSAGE_BYTES);
            MemorySegment text = (MemorySegment) GET_ERROR_STRING.invokeExact(status);
            return text.reinterpret(MESSAGE_BYTES).getString(0) + " " + message.getString(0).strip();
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private static MethodHandle function(String name, MemoryLayout... parameters) {
        return handle(name, FunctionDescriptor.of(JAVA_INT, parameters));
    }

    private static MethodHandle handle(String name, FunctionDescriptor function) {
        return LINKER.downcallHandle(LIBRARY.findOrThrow(name), function);
    }
}
