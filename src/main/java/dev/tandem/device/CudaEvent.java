package dev.tandem.device;

/** A mark in a stream's work that the host, or another stream, can wait for. The owner closes it. */
public final class CudaEvent implements AutoCloseable {
    private final Device device;
    private final long event;
    private boolean closed;

    /** @param timed whether {@link #millisecondsSince} will be asked; other events are cheaper */
    public CudaEvent(Device device, boolean timed) {
        Cuda.use(device);
        this.device = device;
        event = CudaDriver.createEvent(timed);
    }

    /** Marks what the calling thread has launched so far. */
    public void record() {
        CudaDriver.recordEvent(event, Cuda.stream(device));
    }

    /** Waits until everything before the mark is done; an error of the device shows here. */
    public void await() {
        CudaDriver.waitEvent(event);
    }

    /** {@return milliseconds on the device between an earlier mark and this one, both of timed events that have been reached} */
    public float millisecondsSince(CudaEvent start) {
        return CudaDriver.elapsed(start.event, event);
    }

    long handle() {
        return event;
    }

    @Override
    public void close() {
        if (!closed) {
            closed = true;
            CudaDriver.destroyEvent(event);
        }
    }
}
