package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.device.VirtualMemory;

/** Host memory of which no more can be had than a limit, as on a device that others use too. */
final class ScarceMemory implements VirtualMemory {
    private final VirtualMemory range;
    /** Most bytes that may be committed. */
    long limit = Long.MAX_VALUE;
    int commits;
    int failures;

    ScarceMemory(long bytes) {
        range = VirtualMemory.reserve(Device.cpu(), bytes);
    }

    @Override
    public void commit(long offset, long bytes) {
        if (committed() + bytes > limit) {
            failures++;
            throw new TandemException("no " + bytes + " bytes beside " + committed() + " of " + limit);
        }
        range.commit(offset, bytes);
        commits++;
    }

    @Override
    public Tensor tensor(DType dtype, long... shape) {
        return range.tensor(dtype, shape);
    }

    @Override
    public long address() {
        return range.address();
    }

    @Override
    public long reserved() {
        return range.reserved();
    }

    @Override
    public long committed() {
        return range.committed();
    }

    @Override
    public long granularity() {
        return range.granularity();
    }

    @Override
    public void release(long offset, long bytes) {
        range.release(offset, bytes);
    }

    @Override
    public void close() {
        range.close();
    }
}
