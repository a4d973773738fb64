package dev.tandem.device;

import org.bytedeco.pytorch.AutoGradMode;
import org.bytedeco.pytorch.GradMode;

/**
 * Switches automatic differentiation off or on, on this thread and for a block of code. The switch is a native thread-local: use it on
 * platform threads only, and never across a blocking call.
 */
public final class Gradients implements AutoCloseable {
    private final AutoGradMode guard;

    private Gradients(boolean enabled) {
        Natives.load();
        guard = new AutoGradMode(enabled);
    }

    /** {@return a block in which operations are not recorded for differentiation} */
    public static Gradients disabled() {
        return new Gradients(false);
    }

    /** {@return a block in which operations are recorded, within one in which they are not} */
    public static Gradients enabled() {
        return new Gradients(true);
    }

    /** {@return whether operations of this thread are recorded} */
    public static boolean areEnabled() {
        return GradMode.is_enabled();
    }

    @Override
    public void close() {
        guard.close();
    }
}
