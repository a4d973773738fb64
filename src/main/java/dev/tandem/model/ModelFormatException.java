package dev.tandem.model;

import dev.tandem.device.TandemException;

/**
 * A file of a model folder is missing, damaged, or asks for something Tandem does not have. The message names the
 * file and the field, tensor or line, what was expected and what was found.
 */
public final class ModelFormatException extends TandemException {
    private static final long serialVersionUID = 1L;

    /** @param message file, field, expected, found */
    public ModelFormatException(String message) {
        super(message);
    }

    /**
     * @param message file, field, expected, found
     * @param cause what stopped the reading
     */
    public ModelFormatException(String message, Throwable cause) {
        super(message, cause);
    }
}
