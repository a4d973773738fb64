package dev.tandem.device;

/**
 * A queue of a device's work. What lies in one stream runs in order, what lies in two at the same time, unless one waits for a mark in the
 * other ({@link CudaEvent}). Used by one thread at a time. The owner closes a stream that it made, which waits for what is in it.
 */
public final class CudaStream implements AutoCloseable {
    private final long stream;
    private boolean owned;

    private CudaStream(long stream, boolean owned) {
        this.stream = stream;
        this.owned = owned;
    }

    /** {@return a new stream beside those of all threads} */
    public static CudaStream create(Device device) {
        Cuda.use(device);
        return new CudaStream(CudaDriver.createStream(), true);
    }

    /** {@return the stream on which all work of the calling thread is; it is never closed} */
    public static CudaStream current(Device device) {
        return new CudaStream(Cuda.stream(device), false);
    }

    /** Marks what this stream has been given so far. */
    public void record(CudaEvent mark) {
        CudaDriver.recordEvent(mark.handle(), stream);
    }

    /** Has this stream wait for the latest record of a mark before it does what it is given from now on; the host does not wait. */
    public void await(CudaEvent mark) {
        CudaDriver.streamWaits(stream, mark.handle());
    }

    long handle() {
        return stream;
    }

    @Override
    public void close() {
        if (owned) {
            owned = false;
            CudaDriver.synchronizeStream(stream);
            CudaDriver.destroyStream(stream);
        }
    }
}
