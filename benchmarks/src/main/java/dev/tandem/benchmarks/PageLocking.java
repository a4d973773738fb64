package dev.tandem.benchmarks;

import dev.tandem.device.Cuda;
import dev.tandem.device.CudaEvent;
import dev.tandem.device.CudaStream;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import java.util.Locale;
import java.util.function.Supplier;
import java.util.logging.ConsoleHandler;
import java.util.logging.Level;
import java.util.logging.Logger;

/**
 * How long page-locked host memory takes, and how fast a GPU copies to and from it: the driver's own, and memory of the process that is
 * registered as one range or in parts.
 *
 * <pre>
 * PageLocking GIB…
 *     for each size, at least 3: seconds to have and to close the memory, GB/s of copies of 1 GiB that lie within a part and that cross
 *     from one part to the next (as two copies); on the error stream, how long pages and registering took each
 * </pre>
 */
final class PageLocking {
    private static final Device CUDA = Device.cuda(0);
    private static final long WHOLE = Long.MAX_VALUE;
    private static final long PART = 2L << 30;
    private static final long TRANSFER = 1L << 30;
    private static final int COPIES = 5;

    /** Held, so that its level stays. */
    private static final Logger LOG = Logger.getLogger("dev.tandem.device.RegisteredMemory");

    private PageLocking() {}

    public static void main(String[] args) {
        ConsoleHandler console = new ConsoleHandler();
        console.setLevel(Level.FINE);
        LOG.addHandler(console);
        LOG.setLevel(Level.FINE);
        LOG.setUseParentHandlers(false);
        Cuda.use(CUDA);
        for (String size : args) {
            long bytes = Long.parseLong(size) << 30;
            if (bytes < PART + TRANSFER) {
                throw new IllegalArgumentException("at least 3 GiB are needed: " + size);
            }
            measure(size + " GiB, cuMemHostAlloc", () -> PinnedMemory.allocated(CUDA, bytes));
            for (int threads : new int[] {1, 4, 8, 16}) {
                String name = size + " GiB, " + threads + " threads, registered ";
                measure(name + "as one", () -> PinnedMemory.registered(CUDA, bytes, threads, WHOLE));
                measure(name + "in parts of 2 GiB", () -> PinnedMemory.registered(CUDA, bytes, threads, PART));
            }
        }
    }

    private static void measure(String name, Supplier<PinnedMemory> supplier) {
        long start = System.nanoTime();
        double had;
        String rates;
        try (PinnedMemory memory = supplier.get()) {
            had = (System.nanoTime() - start) / 1e9;
            rates = "within a part " + rates(memory, 0) + ", across parts " + rates(memory, PART - TRANSFER / 2);
            start = System.nanoTime();
        } catch (TandemException e) {
            System.out.printf("%s: %s%n", name, e.getMessage());
            return;
        }
        double closed = (System.nanoTime() - start) / 1e9;
        System.out.printf(Locale.ROOT, "%s: %.2f s, closed in %.2f s; GB/s to and from the GPU %s%n", name, had, closed, rates);
    }

    private static String rates(PinnedMemory memory, long offset) {
        CudaStream stream = CudaStream.current(CUDA);
        try (Scope scope = Scope.open()) {
            long buffer = Tensor.empty(CUDA, DType.FLOAT32, TRANSFER / Float.BYTES).address();
            double to = rate(() -> memory.copyTo(stream, buffer, offset, TRANSFER));
            double from = rate(() -> memory.copyFrom(stream, buffer, offset, TRANSFER));
            return String.format(Locale.ROOT, "%.1f and %.1f", to, from);
        }
    }

    private static double rate(Runnable copy) {
        copy.run();
        try (CudaEvent start = new CudaEvent(CUDA, true); CudaEvent end = new CudaEvent(CUDA, true)) {
            start.record();
            for (int i = 0; i < COPIES; i++) {
                copy.run();
            }
            end.record();
            end.await();
            return COPIES * TRANSFER / 1e6 / end.millisecondsSince(start);
        }
    }
}
