package dev.tandem.device;

import java.lang.System.Logger.Level;
import org.bytedeco.javacpp.Loader;
import org.bytedeco.pytorch.global.torch;

/** Loads libtorch once, with the settings that must be in place before the first native object exists. */
final class Natives {
    private static final System.Logger LOG = System.getLogger(Natives.class.getName());

    static {
        // JavaCPP would read the process's memory on every new pointer and refuse to go past four times the heap.
        setIfAbsent("org.bytedeco.javacpp.maxPhysicalBytes", "0");
        // OpenMP's and the BLAS's threads spin after each operation, by default for many milliseconds, and so take the cores from
        // each other and from whoever else needs them. Not at all is as bad: waking a thread takes longer than a small operation.
        // About 0.1 ms bridges the gaps of a decoding step.
        Environment.setIfAbsent("OMP_WAIT_POLICY", "passive");
        Environment.setIfAbsent("GOMP_SPINCOUNT", "10000");
        Environment.setIfAbsent("OPENBLAS_THREAD_TIMEOUT", "12");
        try {
            Loader.load(torch.class);
        } catch (LinkageError e) {
            throw new TandemException("libtorch could not be loaded: put exactly one of the CPU and the GPU natives of "
                    + "org.bytedeco:pytorch for " + Loader.getPlatform() + " on the class path", e);
        }
        LOG.log(Level.DEBUG, () -> "libtorch loaded, " + torch.get_num_threads() + " threads");
    }

    private Natives() {}

    /** Does nothing but make sure that the natives are loaded. */
    static void load() {}

    private static void setIfAbsent(String key, String value) {
        if (System.getProperty(key) == null) {
            System.setProperty(key, value);
        }
    }
}
