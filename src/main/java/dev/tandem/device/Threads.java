package dev.tandem.device;

import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import org.bytedeco.javacpp.Loader;
import org.bytedeco.javacpp.Pointer;
import org.bytedeco.openblas.global.openblas_nolapack;
import org.bytedeco.pytorch.global.torch;
import org.jspecify.annotations.Nullable;

/** The number of cores that one libtorch operation on the CPU uses. */
public final class Threads {
    /** void(int) of the BLAS. Looked up once: finding it takes a thousand times as long as calling it, and lanes call it in each step. */
    private static final @Nullable MethodHandle BLAS = blas();

    private Threads() {}

    private static @Nullable MethodHandle blas() {
        Natives.load();
        Loader.load(openblas_nolapack.class);
        try (Pointer function = Loader.addressof("openblas_set_num_threads")) {
            return function == null || function.isNull()
                    ? null
                    : Linker.nativeLinker().downcallHandle(MemorySegment.ofAddress(function.address()),
                            FunctionDescriptor.ofVoid(ValueLayout.JAVA_INT));
        }
    }

    /** {@return how many threads an operation started from this thread uses} */
    public static int perOperation() {
        Natives.load();
        return torch.get_num_threads();
    }

    /**
     * Sets how many threads an operation started from the calling thread uses. Products of matrices are computed by a BLAS that knows
     * only one number for the whole process: the last one set.
     *
     * @param threads at least 1
     */
    public static void perOperation(int threads) {
        if (threads < 1) {
            throw new IllegalArgumentException("threads must be at least 1: " + threads);
        }
        Natives.load();
        torch.set_num_threads(threads);
        if (BLAS == null) {
            try (Scope _ = Scope.open()) { // another BLAS: the call wraps the function's address in a new native object each time
                openblas_nolapack.blas_set_num_threads(threads);
            }
            return;
        }
        try {
            BLAS.invokeExact(threads);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Lets operations started from the calling thread use this thread alone, and leaves the BLAS as it is. */
    static void onlyOnePerOperation() {
        Natives.load();
        torch.set_num_threads(1);
    }
}
