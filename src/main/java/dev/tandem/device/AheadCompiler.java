package dev.tandem.device;

import dev.tandem.device.KernelModule.Source;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * Compiles kernels in the background before they are asked for, so that {@link KernelModule#load} finds their machine code, or only waits
 * for it. What cannot be compiled is not mentioned until it is loaded. The owner closes it: what is being compiled then is waited for, as
 * the compiler must not run when the process ends, and the rest is left out.
 */
public final class AheadCompiler implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(AheadCompiler.class.getName());

    private final ExecutorService compiling =
            Executors.newSingleThreadExecutor(Thread.ofPlatform().name("kernel compiler").daemon().factory());
    private volatile boolean enough;

    /** Begins with the first of the sources, with as many at a time as there are processors. */
    public AheadCompiler(Device device, List<Source> sources) {
        compiling.execute(() -> sources.parallelStream().forEach(source -> {
            try {
                if (!enough) {
                    KernelModule.compile(device, source);
                }
            } catch (TandemException e) {
                LOG.log(System.Logger.Level.DEBUG, "{0} is not compiled ahead: {1}", source, e.getMessage());
            }
        }));
    }

    @Override
    public void close() {
        enough = true;
        compiling.close();
    }
}
