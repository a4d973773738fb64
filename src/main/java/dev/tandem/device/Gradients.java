package dev.tandem.device;

import org.bytedeco.pytorch.NoGradGuard;

/**
 * Switches automatic differentiation off on this thread for a block of code. The switch is a native thread-local: use it on
 * platform threads only, and never across a blocking call.
 */
public final class Gradients implements AutoCloseable {
    private final NoGradGuard guard;

    private Gradients() {
        Natives.load();
        guard = new NoGradGuard();
    }

    /** {@return a block in which operations are not recorded for differentiation} */
    public static Gradients disabled() {
        return new Gradients();
    }

    @Override
    public void close() {
        guard.close();
    }
}
