package dev.tandem.device;

/**
 * A range of addresses that is reserved once and backed by memory only in part.
 *
 * <p>Addresses never change: views and captured graphs that point into the range stay right across
 * {@link #release release} and {@link #commit commit}. What was in memory that is released is gone; what newly committed memory
 * holds is zeros on the CPU and not defined on a GPU. Touching addresses that are not committed is an access violation, so
 * whoever owns the range guards it with a state of its own. Offsets and lengths are bytes and multiples of {@link #granularity}.
 * Not thread-safe.
 */
public interface VirtualMemory extends AutoCloseable {
    /**
     * Reserves addresses on a device without backing them.
     *
     * @throws TandemException when the addresses cannot be had, or virtual memory is not supported for the device
     */
    static VirtualMemory reserve(Device device, long bytes) {
        return device.isCpu() ? new HostVirtualMemory(bytes) : new CudaVirtualMemory(device, bytes);
    }

    /**
     * {@return a tensor over the whole range, valid as long as the range; only what is committed may be touched}
     *
     * @param shape of at most {@link #reserved} bytes
     */
    Tensor tensor(DType dtype, long... shape);

    /** {@return the first address} */
    long address();

    /** {@return the reserved length in bytes} */
    long reserved();

    /** {@return how many bytes are committed} */
    long committed();

    /** {@return the unit of committing and releasing, in bytes} */
    long granularity();

    /**
     * Backs part of the range with memory. All or nothing.
     *
     * @throws TandemException when there is not enough memory; nothing has changed then
     */
    void commit(long offset, long bytes);

    /** Gives the memory of part of the range back; the addresses stay reserved. */
    void release(long offset, long bytes);

    /** Gives memory and addresses back. */
    @Override
    void close();
}
