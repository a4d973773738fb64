package dev.tandem.device;

import java.lang.foreign.MemorySegment;

/**
 * Ordinary memory of the process, page-locked after its pages are there: many cores clear them, where memory that the driver allocates is
 * cleared on one.
 *
 * <p>It is registered as one range or in parts, side by side. A single copy must not cross from one part to the next: the driver refuses
 * memory that is not of one registration. Used by one thread at a time. The owner closes it when no copy runs.
 */
final class RegisteredMemory implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(RegisteredMemory.class.getName());

    /** What is left to the system: touching the last page that it has ends a process, not this allocation. */
    private static final long SPARE = 1L << 30;

    /** Held while pages are taken, so that the next one sees what is left of the machine's memory. */
    private static final Object POPULATING = new Object();

    private final HostVirtualMemory pages;
    private final long part;
    /** Of each part. */
    private final boolean[] registered;

    /**
     * Takes memory, all zero, and registers it with the calling thread's context.
     *
     * @param threads how many clear pages, and register parts, at a time
     * @param part bytes of a part, a multiple of 64 KiB; all is one part if it is no longer
     * @throws TandemException when the machine does not have that much, or the driver refuses; nothing is held then
     */
    RegisteredMemory(long bytes, int threads, long part) {
        pages = new HostVirtualMemory(bytes);
        long reserved = pages.reserved();
        this.part = Math.min(part, reserved);
        if (this.part <= 0 || this.part % pages.granularity() != 0) {
            pages.close();
            throw new IllegalArgumentException("a part must be a multiple of " + pages.granularity() + " bytes: " + part);
        }
        registered = new boolean[Math.toIntExact(Math.ceilDiv(reserved, this.part))];
        try (Lanes lanes = new Lanes(threads)) {
            long start = System.nanoTime();
            synchronized (POPULATING) {
                long available = ProcessMemory.touchable();
                if (available - SPARE < reserved) {
                    throw new TandemException("%d MiB are available, %d are to be left".formatted(available >> 20, SPARE >> 20));
                }
                pages.populate(lanes);
            }
            long populated = System.nanoTime();
            register(lanes);
            LOG.log(System.Logger.Level.DEBUG, "{0} MiB: pages in {1} ms on {2} threads, registered in {3} ms as {4} parts", bytes >> 20,
                    (populated - start) / 1_000_000, threads, (System.nanoTime() - populated) / 1_000_000, registered.length);
        } catch (RuntimeException | Error e) {
            try {
                close();
            } catch (TandemException second) {
                e.addSuppressed(second);
            }
            throw e;
        }
    }

    private void register(Lanes lanes) {
        long context = CudaDriver.currentContext();
        lanes.share(registered.length, i -> {
            CudaDriver.useContext(context);
            CudaDriver.registerHost(pages.address() + i * part, Math.min(part, pages.reserved() - i * part));
            registered[i] = true;
        });
    }

    /** {@return the memory, rounded up to whole pages} */
    MemorySegment segment() {
        return MemorySegment.ofAddress(pages.address()).reinterpret(pages.reserved());
    }

    /** {@return bytes of each part but the last, which may be shorter} */
    long part() {
        return part;
    }

    /** Memory that the driver does not let go of stays mapped: it would copy from and to whatever came to lie at the same addresses. */
    @Override
    public void close() {
        for (int i = 0; i < registered.length; i++) {
            if (registered[i]) {
                CudaDriver.unregisterHost(pages.address() + i * part);
                registered[i] = false;
            }
        }
        pages.close();
    }
}
