package dev.tandem.generation;

import dev.tandem.device.Cuda;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.KernelModule.Source;
import java.util.Map;

/**
 * Products of one, two or four rows with a weight matrix on a GPU: {@code few_rows.cu}, which reads the weights once at the memory's
 * speed where cuBLAS takes up to four times as long. The owner closes it.
 */
final class FewRows implements AutoCloseable {
    /** Elements of a weight row that a warp takes in a step; half as many where it takes two rows. */
    private static final int STEP = 256;

    /** Most rows. */
    static final int MOST = 4;

    private static final int MOST_WARPS = 12;
    private static final int RESIDENT_WARPS = 24;
    private static final int TILE_ROWS = 8;

    private final Device device;
    private final int multiprocessors;
    private final KernelModule module;
    private final Kernel multiply;
    private final Kernel multiplyToFloat;
    private final Kernel multiplyGated;
    private final Kernel multiplyAdded;

    /** {@return whether the kernels compute that many rows} */
    static boolean computes(int rows) {
        return rows == 1 || rows == 2 || rows == MOST;
    }

    /**
     * @param rows 1, 2 or 4
     * @param early whether weights are asked for while the kernel before still runs; it pays for small matrices and costs for large ones,
     *     whose blocks are then spread unevenly
     */
    FewRows(Device device, int rows, boolean early) {
        this.device = device;
        multiprocessors = Cuda.multiprocessors(device);
        module = KernelModule.load(device, new Source("few_rows.cu", Map.of("ROWS", "" + rows, "DEPENDENT_LAUNCH", early ? "1" : "0")));
        multiply = kernel("multiply", early);
        multiplyToFloat = kernel("multiplyToFloat", early);
        multiplyGated = kernel("multiplyGated", early);
        multiplyAdded = kernel("multiplyAdded", early);
    }

    private Kernel kernel(String name, boolean early) {
        Kernel kernel = module.kernel(name);
        return early ? kernel : kernel.afterPredecessor();
    }

    /** {@return whether products can complete the norm of rows of that width} */
    static boolean completesNorm(int width) {
        return width % 8 == 0 && width / 8 <= 2 * threads(width, STEP) && width / 8 <= 2 * threads(width, STEP / 2);
    }

    /**
     * out [rows, n] = x [rows, k] times the transpose of weight [n, k], all bfloat16 at these addresses.
     *
     * @param squares of the rows, as {@link #multiplyAdded} leaves them, or {@link RowSquares#NONE}
     */
    void multiply(long x, long weight, long out, int k, int n, RowSquares squares) {
        multiply.launch(device, grid(k, n, STEP), x, weight, out, k, n, n, squares.address(), squares.epsilon());
    }

    /** As {@link #multiply}, to float32. */
    void multiplyToFloat(long x, long weight, long out, int k, int n, long outStride) {
        multiplyToFloat.launch(device, grid(k, n, STEP), x, weight, out, k, n, outStride);
    }

    /** out [rows, n] = silu(gate) · up, where weight [2 n, k] holds the gate's rows and then those of up; {@link #multiply} otherwise. */
    void multiplyGated(long x, long weight, long out, int k, int n, RowSquares squares) {
        multiplyGated.launch(device, grid(k, n, STEP / 2), x, weight, out, k, n, squares.address(), squares.epsilon());
    }

    /**
     * Adds a product to the residual stream.
     *
     * @param residual address of [rows, n]
     * @param norm address of the next norm's weight [n], or 0 and nothing else is written
     * @param scaled address of [rows, n] for the new residual times that weight
     * @param squares where sums of its squares are written, [rows, n / 8]
     */
    void multiplyAdded(long x, long weight, long residual, int k, int n, long norm, long scaled, RowSquares squares) {
        multiplyAdded.launch(device, grid(k, n, STEP), x, weight, residual, k, n, norm, scaled, squares.address());
    }

    /** The warps of a block share k; as many blocks as are resident share n evenly. */
    private Grid grid(int k, int n, int step) {
        int threads = threads(k, step);
        int tiles = Math.ceilDiv(n, TILE_ROWS);
        int resident = multiprocessors * (32 * RESIDENT_WARPS / threads);
        return Grid.of(Math.ceilDiv(tiles, Math.ceilDiv(tiles, resident)), threads);
    }

    private static int threads(int k, int step) {
        int steps = Math.ceilDiv(k, step);
        return 32 * Math.ceilDiv(steps, Math.ceilDiv(steps, MOST_WARPS));
    }

    @Override
    public void close() {
        module.close();
    }
}
