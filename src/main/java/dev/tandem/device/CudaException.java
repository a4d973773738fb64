package dev.tandem.device;

/** A call of the CUDA driver or of NVRTC failed. */
public final class CudaException extends TandemException {
    private static final long serialVersionUID = 1;

    /** CUDA_ERROR_OUT_OF_MEMORY. */
    static final int OUT_OF_MEMORY = 2;

    private final int code;

    CudaException(int code, String message) {
        super(message);
        this.code = code;
    }

    /** {@return the driver's number of the error} */
    public int code() {
        return code;
    }
}
