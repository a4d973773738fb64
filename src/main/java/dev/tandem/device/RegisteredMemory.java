package dev.tandem.device;

import java.lang.foreign.MemorySegment;

/**
 * Ordinary memory of the process, page-locked after its pages are there: many cores clear them, where memory that the driver allocates is
 * cleared on one. Used by one thread at a time. The owner closes it when no copy runs.
 */
final class RegisteredMemory implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(RegisteredMemory.class.getName());

    private static final int THREADS = Math.min(16, Runtime.getRuntime().availableProcessors());

    /** What is left to the system: touching the last page that it has ends a process, not this allocation. */
    private static final long SPARE = 1L << 30;

    /** Held while pages are taken, so that the next one sees what is left of the machine's memory. */
    private static final Object POPULATING = new Object();

    private final HostVirtualMemory pages;
    private boolean registered;

    /**
     * Takes memory, all zero, and registers it with the calling thread's context.
     *
     * @throws TandemException when the machine does not have that much, or the driver refuses; nothing is held then
     */
    RegisteredMemory(long bytes) {
        pages = new HostVirtualMemory(bytes);
        try (Lanes lanes = new Lanes(THREADS)) {
            long start = System.nanoTime();
            synchronized (POPULATING) {
                long available = ProcessMemory.touchable();
                if (available - SPARE < pages.reserved()) {
                    throw new TandemException("%d MiB are available, %d are to be left".formatted(available >> 20, SPARE >> 20));
                }
                pages.populate(lanes);
            }
            long populated = System.nanoTime();
            CudaDriver.registerHost(pages.address(), pages.reserved());
            registered = true;
            LOG.log(System.Logger.Level.DEBUG, "{0} MiB: pages in {1} ms on {2} threads, registered in {3} ms", bytes >> 20,
                    (populated - start) / 1_000_000, THREADS, (System.nanoTime() - populated) / 1_000_000);
        } catch (RuntimeException | Error e) {
            close();
            throw e;
        }
    }

    /** {@return the memory, rounded up to whole pages} */
    MemorySegment segment() {
        return MemorySegment.ofAddress(pages.address()).reinterpret(pages.reserved());
    }

    /** Memory that the driver does not let go of stays mapped: it would copy from and to whatever came to lie at the same addresses. */
    @Override
    public void close() {
        if (registered) {
            CudaDriver.unregisterHost(pages.address());
            registered = false;
        }
        pages.close();
    }
}
