package dev.tandem.parallel;

import dev.tandem.device.TandemException;

/** A rank failed or did not arrive where the others waited for it. The message names the rank and the operation. */
public final class RankException extends TandemException {
    private static final long serialVersionUID = 1L;

    private final int rank;

    RankException(int rank, String message, Throwable cause) {
        super(message, cause);
        this.rank = rank;
    }

    RankException(int rank, String message) {
        super(message);
        this.rank = rank;
    }

    /** {@return the number of the rank that is to blame} */
    public int rank() {
        return rank;
    }
}
