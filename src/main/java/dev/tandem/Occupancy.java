package dev.tandem;

import java.util.concurrent.atomic.AtomicReference;
import org.jspecify.annotations.Nullable;

/** Who uses the engine. One call at a time: a second one is told who is first instead of waiting for it or breaking it. */
final class Occupancy {
    private record Use(String operation, String thread) {}

    /** Ends a use. Closing twice is harmless. */
    interface Hold extends AutoCloseable {
        @Override
        void close();
    }

    private final AtomicReference<@Nullable Use> current = new AtomicReference<>();

    /**
     * Begins a use.
     *
     * @throws IllegalStateException when another one has not ended
     */
    Hold enter(String operation) {
        Use use = new Use(operation, Thread.currentThread().getName());
        Use other = current.compareAndExchange(null, use);
        if (other != null) {
            throw new IllegalStateException("engine." + operation + " was called while engine." + other.operation + ", begun by thread \""
                    + other.thread + "\", has not ended: the engine serves one call at a time");
        }
        return () -> current.compareAndSet(use, null);
    }
}
