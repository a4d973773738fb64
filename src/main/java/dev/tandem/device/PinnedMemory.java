package dev.tandem.device;

import java.lang.foreign.MemorySegment;
import org.jspecify.annotations.Nullable;

/**
 * Page-locked host memory, which a GPU copies from and to on its own while the host goes on. Used by one thread at a time. The owner closes
 * it when no copy runs.
 */
public final class PinnedMemory implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(PinnedMemory.class.getName());

    /** From how many bytes on memory is registered after several threads have cleared it: the driver takes 0.4 to 0.8 s for a GiB. */
    private static final long LEAST_REGISTERED = 256L << 20;

    private final MemorySegment memory;
    /** What holds the memory; null when it is the driver's. */
    private final @Nullable RegisteredMemory registered;

    private boolean closed;

    /**
     * Allocates memory, all zero.
     *
     * @throws TandemException when the machine does not have that much
     */
    public PinnedMemory(Device device, long bytes) {
        if (bytes < 0) {
            throw new IllegalArgumentException("bytes to allocate must not be negative: " + bytes);
        }
        Cuda.use(device);
        registered = bytes < LEAST_REGISTERED ? null : registeredIfPossible(bytes);
        memory = registered == null ? allocate(bytes).fill((byte) 0) : registered.segment().asSlice(0, bytes);
    }

    /** An old kernel, a limit on locked memory or a container's limit keeps ordinary memory from being registered, not the driver's own. */
    private static @Nullable RegisteredMemory registeredIfPossible(long bytes) {
        try {
            return new RegisteredMemory(bytes);
        } catch (TandemException e) {
            LOG.log(System.Logger.Level.INFO, "{0} MiB of host memory cannot be registered ({1}): the driver allocates them, "
                    + "which takes longer", bytes >> 20, e.getMessage());
            return null;
        }
    }

    private static MemorySegment allocate(long bytes) {
        try {
            return MemorySegment.ofAddress(CudaDriver.allocatePinned(bytes)).reinterpret(bytes);
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
        copy(Cuda.stream(device), address + offset, offset, bytes, true);
    }

    /** Copies device memory to the first {@code bytes}, in the order of the calling thread's stream. */
    public void copyFrom(Device device, long address, long bytes) {
        copy(Cuda.stream(device), address, 0, bytes, false);
    }

    /**
     * Copies {@code bytes} from {@code offset} on to an address of the device, in the stream's order.
     *
     * @throws IllegalArgumentException when they do not lie within this memory
     */
    public void copyTo(CudaStream stream, long address, long offset, long bytes) {
        copy(stream.handle(), address, offset, bytes, true);
    }

    /**
     * Copies from an address of the device to {@code bytes} from {@code offset} on, in the stream's order.
     *
     * @throws IllegalArgumentException when they do not lie within this memory
     */
    public void copyFrom(CudaStream stream, long address, long offset, long bytes) {
        copy(stream.handle(), address, offset, bytes, false);
    }

    private void copy(long stream, long address, long offset, long bytes, boolean toDevice) {
        if (offset < 0 || bytes < 0 || offset > memory.byteSize() - bytes) {
            throw new IllegalArgumentException("bytes " + offset + " to " + (offset + bytes) + " of " + memory.byteSize());
        }
        long host = memory.address() + offset;
        CudaDriver.copy(toDevice ? address : host, toDevice ? host : address, bytes, stream);
    }

    @Override
    public void close() {
        if (closed) {
            return;
        }
        closed = true;
        if (registered == null) {
            CudaDriver.freePinned(memory.address());
        } else {
            registered.close();
        }
    }
}
