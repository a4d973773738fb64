package dev.tandem.training;

import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/**
 * An optimizer step that a GPU may still compute. Whoever asks for the result of a step when the next one has been begun waits for nothing.
 * Used from one thread at a time, as the trainer.
 */
public final class PendingStep {
    private @Nullable Supplier<TrainStep> pending;
    private @Nullable TrainStep done;

    PendingStep(Supplier<TrainStep> pending) {
        this.pending = pending;
    }

    /** {@return what the step did; waits until it is computed} */
    public TrainStep await() {
        Supplier<TrainStep> waiting = pending;
        TrainStep found = done;
        if (found == null) {
            if (waiting == null) {
                throw new IllegalStateException("the step's result was lost when reading it failed");
            }
            pending = null;
            found = waiting.get();
            done = found;
        }
        return found;
    }
}
