package dev.tandem.device;

import java.lang.foreign.MemorySegment;

/** Page-locked host memory, which a GPU copies from and to on its own while the host goes on. The owner closes it when no copy runs. */
public final class PinnedMemory implements AutoCloseable {
    private final MemorySegment memory;
    private boolean closed;

    /** Allocates memory, all zero. */
    public PinnedMemory(Device device, long bytes) {
        Cuda.use(device);
        memory = MemorySegment.ofAddress(CudaDriver.allocatePinned(bytes)).reinterpret(bytes);
        memory.fill((byte) 0);
    }

    /** {@return the memory, to read and write} */
    public MemorySegment segment() {
        return memory;
    }

    /** Copies the first {@code bytes} to device memory, in the order of the calling thread's stream. */
    public void copyTo(Device device, long address, long bytes) {
        CudaDriver.copy(address, memory.address(), check(bytes), Cuda.stream(device));
    }

    /** Copies device memory to the first {@code bytes}, in the order of the calling thread's stream. */
    public void copyFrom(Device device, long address, long bytes) {
        CudaDriver.copy(memory.address(), address, check(bytes), Cuda.stream(device));
    }

    private long check(long bytes) {
        if (bytes < 0 || bytes > memory.byteSize()) {
            throw new IllegalArgumentException(bytes + " bytes of " + memory.byteSize());
        }
        return bytes;
    }

    @Override
    public void close() {
        if (!closed) {
            closed = true;
            CudaDriver.freePinned(memory.address());
        }
    }
}
