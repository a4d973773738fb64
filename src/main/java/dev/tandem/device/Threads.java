package dev.tandem.device;

import org.bytedeco.openblas.global.openblas_nolapack;
import org.bytedeco.pytorch.global.torch;

/** The number of cores that one libtorch operation on the CPU uses. */
public final class Threads {
    private Threads() {}

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
        try (Scope _ = Scope.open()) { // the call wraps the function's address in a new native object each time
            openblas_nolapack.blas_set_num_threads(threads);
        }
    }

    /** Lets operations started from the calling thread use this thread alone, and leaves the BLAS as it is. */
    static void onlyOnePerOperation() {
        Natives.load();
        torch.set_num_threads(1);
    }
}
