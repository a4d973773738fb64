package dev.tandem.device;

/** An element type of tensors, in memory and in safetensors files. */
public enum DType {
    /** IEEE single precision. */
    FLOAT32("F32", 4),
    /** The upper half of a single-precision number: 8 exponent bits, 7 fraction bits. */
    BFLOAT16("BF16", 2),
    /** IEEE half precision. */
    FLOAT16("F16", 2),
    /** IEEE double precision. */
    FLOAT64("F64", 8),
    /** Signed 64-bit integers. */
    INT64("I64", 8),
    /** Signed 32-bit integers. */
    INT32("I32", 4),
    /** Truth values, one byte each. */
    BOOL("BOOL", 1);

    private final String safetensorsName;
    private final int bytes;

    DType(String safetensorsName, int bytes) {
        this.safetensorsName = safetensorsName;
        this.bytes = bytes;
    }

    /** {@return the name of this type in a safetensors header, such as {@code BF16}} */
    public String safetensorsName() {
        return safetensorsName;
    }

    /** {@return the size of one element in bytes} */
    public int bytes() {
        return bytes;
    }

    /** {@return whether this is a floating-point type} */
    public boolean floating() {
        return this == FLOAT32 || this == BFLOAT16 || this == FLOAT16 || this == FLOAT64;
    }
}
