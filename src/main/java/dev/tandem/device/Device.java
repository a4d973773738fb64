package dev.tandem.device;

/**
 * A place where a rank keeps its copy of the weights and computes: the CPU, or a CUDA device.
 *
 * <p>Several CPU devices may be named on one machine; each becomes a rank with its own arena, and they share the cores.
 *
 * @param kind CPU or CUDA
 * @param index the number among devices of that kind, from 0
 */
public record Device(Kind kind, int index) {
    /** The kinds of devices. */
    public enum Kind {
        /** Host memory and cores. */
        CPU,
        /** A CUDA device. */
        CUDA
    }

    /** Checks that the index is not negative. */
    public Device {
        if (index < 0) {
            throw new IllegalArgumentException("device index must not be negative: " + index);
        }
    }

    /** {@return the first CUDA device where there is one, its driver and libtorch's GPU build; else the CPU} */
    public static Device best() {
        return Cuda.available() ? cuda(0) : cpu();
    }

    /** {@return the first CPU device} */
    public static Device cpu() {
        return new Device(Kind.CPU, 0);
    }

    /** {@return the CPU as the device of rank {@code index}} */
    public static Device cpu(int index) {
        return new Device(Kind.CPU, index);
    }

    /** {@return the CUDA device {@code index}} */
    public static Device cuda(int index) {
        return new Device(Kind.CUDA, index);
    }

    /** {@return whether this is a CPU device} */
    public boolean isCpu() {
        return kind == Kind.CPU;
    }

    @Override
    public String toString() {
        return kind.name().toLowerCase(java.util.Locale.ROOT) + ":" + index;
    }
}
