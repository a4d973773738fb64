package dev.tandem.rl;

import dev.tandem.device.TandemException;
import org.jspecify.annotations.Nullable;

/** A reward function failed, gave no finite number, or did not end in time. The message names the completion. */
public final class RewardException extends TandemException {
    private static final long serialVersionUID = 1L;

    private final int index;

    RewardException(int index, String message, @Nullable Throwable cause) {
        super(message);
        this.index = index;
        if (cause != null) {
            initCause(cause);
        }
    }

    /** {@return the index of the completion, or of the first of several, in the list that was scored} */
    public int index() {
        return index;
    }
}
