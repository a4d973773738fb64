package dev.tandem.device;

/**
 * Something that Tandem was doing could not be done. The message says what was being done, on which file, field, request or
 * rank, what was expected and what was found. Misuse at the border (a bad argument, a closed engine, a wrong phase) is an
 * {@link IllegalArgumentException} or {@link IllegalStateException} instead.
 */
public class TandemException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    /** @param message what was being done, expected, found */
    public TandemException(String message) {
        super(message);
    }

    /**
     * @param message what was being done, expected, found
     * @param cause what stopped it
     */
    public TandemException(String message, Throwable cause) {
        super(message, cause);
    }
}
