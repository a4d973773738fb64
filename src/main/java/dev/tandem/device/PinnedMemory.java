package dev.tandem.device;

import java.lang.foreign.MemorySegment;

/** Page-locked host memory, which a GPU copies from and to on its own while the host goes on. The owner closes it when no copy runs. */
public final class PinnedMemory implements AutoCloseable {
    private final MemorySegment memory;
    private boolean closed;

    /**
     * Allocates memory; what it holds at first is not defined.
     *
     * @throws TandemException when the machine does not have that much
     */
    public PinnedMemory(Device device, long bytes) {
        Cuda.use(device);
        try {
            memory = MemorySegment.ofAddress(CudaDriver.allocatePinned(bytes)).reinterpret(bytes);
        } catch (CudaException e) {
            throw new TandemException("%.1f MiB of page-locked host memory cannot be had: %s".formatted(bytes / 0x1p20, e.getMessage()), e);
        }
    }

    /** {@return the memory, to read and write} */
    public MemorySegment segment() {
        return memory;
    }

    /** Copies {@code bytes} from {@code offset} on to the same offset of device memory, in the order of the calling thread's stream. */
    public void copyTo(Device device, long address, long offset, long bytes) {
        check(offset + bytes);
        CudaDriver.copy(address + offset, memory.address() + offset, bytes, Cuda.stream(device));
    }

    /** Copies device memory to the first {@code bytes}, in the order of the calling thread's stream. */
    public void copyFrom(Device device, long address, long bytes) {
        check(bytes);
        CudaDriver.copy(memory.address(), address, bytes, Cuda.stream(device));
    }

    private void check(long end) {
        if (end < 0 || end > memory.byteSize()) {
            throw new IllegalArgumentException("byte " + end + " of " + memory.byteSize());
        }
    }

    @Override
    public void close() {
        if (!closed) {
            closed = true;
            CudaDriver.freePinned(memory.address());
        }
    }
}
