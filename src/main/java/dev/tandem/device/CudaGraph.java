package dev.tandem.device;

/**
 * A sequence of launches that was recorded once and is launched again as a whole (a CUDA graph). Every address in it is fixed, so what it
 * reads and writes must stay where it was; contents may change. The owner closes it when it does not run.
 *
 * <p>With {@code -Ddev.tandem.graphs=false} nothing is recorded and a launch does the work again, one kernel after the other, for tools that
 * look at single kernels.
 */
public final class CudaGraph implements AutoCloseable {
    private static final int TIMINGS = 3;
    private static final boolean RECORDS = Boolean.parseBoolean(System.getProperty("dev.tandem.graphs", "true"));

    /** Does the work: the graph's launch, or what was to be recorded. */
    private final Runnable work;
    private final Runnable destruction;
    private boolean closed;

    private CudaGraph(Runnable work, Runnable destruction) {
        this.work = work;
        this.destruction = destruction;
    }

    /**
     * Records what {@code work} launches on the calling thread's stream, without running it. It must not wait for the device nor allocate
     * with libtorch, so everything it does must have been done before once.
     */
    public static CudaGraph capture(Device device, Runnable work) {
        if (!RECORDS) {
            return new CudaGraph(work, () -> {});
        }
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
            long executable = CudaDriver.instantiate(graph);
            return new CudaGraph(() -> CudaDriver.launchGraph(executable, Cuda.stream(device)),
                    () -> CudaDriver.destroyExecutable(executable));
        } finally {
            CudaDriver.destroyGraph(graph);
        }
    }

    /** Launches the sequence on the calling thread's stream. */
    public void launch() {
        work.run();
    }

    /** {@return milliseconds of a launch, the mean of several after a first one} Waits for them. */
    public float milliseconds(Device device) {
        try (CudaEvent start = new CudaEvent(device, true); CudaEvent end = new CudaEvent(device, true)) {
            launch();
            start.record();
            for (int i = 0; i < TIMINGS; i++) {
                launch();
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
            destruction.run();
        }
    }
}
