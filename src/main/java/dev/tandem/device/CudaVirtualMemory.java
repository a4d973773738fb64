package dev.tandem.device;

/**
 * Device memory by the driver's virtual-memory calls: addresses are reserved once, physical chunks of one size are created and mapped
 * as they are needed.
 *
 * <p>{@link #commit} is a transaction: chunk by chunk it creates and maps, and what was done is undone when one fails. Before it asks the
 * driver for memory it has libtorch give back what it caches, because that cache is invisible to the driver. {@link #release} waits for
 * the device first: unmapping memory that a kernel still uses is a fault that no exception reports.
 */
final class CudaVirtualMemory implements VirtualMemory {
    /** Large enough that a wake of tens of GiB is a hundred calls, small enough to grow in part. */
    private static final long LARGEST_CHUNK = 1L << 30;

    private static final int CHUNKS_IN_SMALL_RANGE = 64;

    private final Device device;
    private final long address;
    private final long reserved;
    private final long chunk;
    /** The physical memory behind each chunk, 0 where there is none. */
    private final long[] handles;

    private long committed;
    private boolean closed;

    CudaVirtualMemory(Device device, long bytes) {
        if (bytes <= 0) {
            throw new IllegalArgumentException("bytes to reserve must be positive: " + bytes);
        }
        this.device = device;
        Cuda.use(device);
        long unit = CudaDriver.granularity(device.index());
        long size = unit;
        while (size < LARGEST_CHUNK && size * CHUNKS_IN_SMALL_RANGE < bytes) {
            size *= 2;
        }
        chunk = size;
        reserved = Math.multiplyExact(Math.ceilDiv(bytes, chunk), chunk);
        handles = new long[Math.toIntExact(reserved / chunk)];
        address = CudaDriver.reserveAddresses(reserved);
    }

    /** libtorch asks the driver whose address it is given, and the driver knows only addresses that are backed. */
    @Override
    public Tensor tensor(DType dtype, long... shape) {
        boolean backed = handles[0] != 0;
        if (!backed) {
            commit(0, chunk);
        }
        try {
            return Tensor.at(device, address, dtype, shape);
        } finally {
            if (!backed) {
                release(0, chunk);
            }
        }
    }

    @Override
    public long address() {
        return address;
    }

    @Override
    public long reserved() {
        return reserved;
    }

    @Override
    public long committed() {
        return committed;
    }

    @Override
    public long granularity() {
        return chunk;
    }

    @Override
    public void commit(long offset, long bytes) {
        check(offset, bytes);
        if (bytes == 0) {
            return;
        }
        Cuda.releaseCached(device);
        int first = (int) (offset / chunk);
        int end = (int) ((offset + bytes) / chunk);
        int next = first;
        try {
            for (; next < end; next++) {
                handles[next] = CudaDriver.createMemory(device.index(), chunk);
                CudaDriver.map(address + next * chunk, chunk, handles[next]);
            }
            CudaDriver.allowAccess(device.index(), address + offset, bytes);
        } catch (CudaException e) {
            if (next < end && handles[next] != 0) { // created, not mapped
                CudaDriver.releaseMemory(handles[next]);
                handles[next] = 0;
            }
            for (int i = first; i < next; i++) {
                drop(i);
            }
            long mapped = (next - first) * chunk;
            throw new TandemException("%s could back %d of %d bytes; %d are missing, %d are free (%s)".formatted(
                    device, mapped, bytes, bytes - mapped, CudaDriver.memoryInfo()[0], e.getMessage()), e);
        }
        committed += bytes;
    }

    @Override
    public void release(long offset, long bytes) {
        check(offset, bytes);
        if (bytes == 0) {
            return;
        }
        CudaDriver.synchronize();
        for (int i = (int) (offset / chunk); i < (offset + bytes) / chunk; i++) {
            drop(i);
        }
        committed -= bytes;
    }

    private void drop(int index) {
        CudaDriver.unmap(address + index * chunk, chunk);
        CudaDriver.releaseMemory(handles[index]);
        handles[index] = 0;
    }

    private void check(long offset, long bytes) {
        if (closed) {
            throw new IllegalStateException("this virtual memory is closed");
        }
        if (offset < 0 || bytes < 0 || offset % chunk != 0 || bytes % chunk != 0 || offset + bytes > reserved) {
            throw new IllegalArgumentException("range [" + offset + ", +" + bytes + ") does not lie on " + chunk
                    + "-byte units within " + reserved + " reserved bytes");
        }
    }

    @Override
    public void close() {
        if (closed) {
            return;
        }
        closed = true;
        CudaDriver.synchronize();
        for (int i = 0; i < handles.length; i++) {
            if (handles[i] != 0) {
                drop(i);
            }
        }
        committed = 0;
        CudaDriver.freeAddresses(address, reserved);
    }
}
