package dev.tandem.device;

/**
 * A sequence of launches that was recorded once and is launched again as a whole (a CUDA graph). Every address in it is fixed, so what it
 * reads and writes must stay where it was; contents may change. The owner closes it when it does not run.
 */
public final class CudaGraph implements AutoCloseable {
    private static final int TIMINGS = 3;

    private final long executable;
    private boolean closed;

    private CudaGraph(long executable) {
        this.executable = executable;
    }

    /**
     * Records what {@code work} launches on the calling thread's stream, without running it. It must not wait for the device nor allocate
     * with libtorch, so everything it does must have been done before once.
     */
    public static CudaGraph capture(Device device, Runnable work) {
        long stream = Cuda.stream(device);
        CudaDriver.beginCapture(stream);
        long graph;
        try {
            work.run();
        } catch (RuntimeException | Error e) {
            try {
                CudaDriver.destroyGraph(CudaDriver.endCapture(stream));
            } catch (CudaException invalid) {
                e.addSuppressed(invalid);
            }
            throw e;
        }
        graph = CudaDriver.endCapture(stream);
        try {
            return new CudaGraph(CudaDriver.instantiate(graph));
        } finally {
            CudaDriver.destroyGraph(graph);
        }
    }

    /** Launches the sequence on the calling thread's stream. */
    public void launch(Device device) {
        CudaDriver.launchGraph(executable, Cuda.stream(device));
    }

    /** {@return milliseconds of a launch, the mean of several after a first one} Waits for them. */
    public float milliseconds(Device device) {
        try (CudaEvent start = new CudaEvent(device, true); CudaEvent end = new CudaEvent(device, true)) {
            launch(device);
            start.record();
            for (int i = 0; i < TIMINGS; i++) {
                launch(device);
            }
            end.record();
            end.await();
            return end.millisecondsSince(start) / TIMINGS;
        }
    }

    @Override
    public void close() {
        if (!closed) {
            closed = true;
            CudaDriver.destroyExecutable(executable);
        }
    }
}
