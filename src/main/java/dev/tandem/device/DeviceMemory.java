package dev.tandem.device;

import java.util.EnumMap;
import java.util.Map;

/**
 * The ledger of one device's memory: every long-lived reservation by what it is for.
 *
 * <p>Owners enter what they hold and strike it out when they give it back, so the ledger says at any moment who holds what. It
 * does not allocate. Thread-safe.
 */
public final class DeviceMemory {
    /** What memory is held for. */
    public enum Use {
        /** The one copy of the weights. */
        WEIGHTS,
        /** Frozen weights of a reference model. */
        REFERENCE,
        /** Adam's moments and, in a bfloat16 arena, what its weights lack of their float32 masters. */
        OPTIMIZER,
        /** Accumulated gradients of this rank's shard, and the buckets that are being reduced. */
        GRADIENTS,
        /** Layer inputs and whatever else the backward pass keeps. */
        ACTIVATIONS,
        /** Mapped KV pages. */
        KV,
        /** Step inputs, logits and other scratch. */
        WORKSPACE
    }

    private final Device device;
    private final Map<Use, Long> held = new EnumMap<>(Use.class);
    private final Map<Use, Long> peaks = new EnumMap<>(Use.class);
    private long peak;

    /** @param device whose memory this is */
    public DeviceMemory(Device device) {
        this.device = device;
    }

    /**
     * {@return bytes of a device that could still be had: on the CPU what the machine, or a container's limit, leaves, on a GPU what is
     * free and what libtorch caches; {@link Long#MAX_VALUE} when that is not known}
     */
    public static long available(Device device) {
        if (device.isCpu()) {
            return ProcessMemory.touchable();
        }
        Cuda.Allocator libtorch = Cuda.allocator(device);
        return Cuda.free(device) + libtorch.reserved() - libtorch.allocated();
    }

    /** {@return whose memory this is} */
    public Device device() {
        return device;
    }

    /** Enters {@code bytes} more (or, if negative, less) held for a use. */
    public synchronized void add(Use use, long bytes) {
        long now = held.merge(use, bytes, Long::sum);
        if (now < 0) {
            throw new IllegalStateException(device + " ledger: " + use + " would become " + now + " bytes");
        }
        peaks.merge(use, now, Math::max);
        peak = Math.max(peak, total());
    }

    /** {@return the bytes held for a use} */
    public synchronized long held(Use use) {
        return held.getOrDefault(use, 0L);
    }

    /** {@return the most bytes held for a use since the last {@link #resetPeaks}} */
    public synchronized long peak(Use use) {
        return peaks.getOrDefault(use, 0L);
    }

    /** {@return the bytes held in all} */
    public synchronized long total() {
        return held.values().stream().mapToLong(Long::longValue).sum();
    }

    /** {@return the most bytes held in all since the last {@link #resetPeaks}} */
    public synchronized long peak() {
        return peak;
    }

    /** Begins to measure peaks anew, from what is held now. */
    public synchronized void resetPeaks() {
        peaks.clear();
        peaks.putAll(held);
        peak = total();
    }

    /**
     * {@return what to throw for a failure: when libtorch or the driver ran out of memory, an exception that says who holds how much, else
     * the failure itself}
     *
     * @param doing what was being done
     */
    public RuntimeException explained(String doing, RuntimeException failure) {
        String message = failure.getMessage();
        if (failure instanceof TandemException || message == null
                || !(message.contains("out of memory") || message.contains("not enough memory"))) {
            return failure;
        }
        return new TandemException("out of memory in %s on %s: %s%nheld by this rank:%n%s".formatted(
                doing, device, message.lines().findFirst().orElse(""), table()), failure);
    }

    /** {@return a table of uses, one a line, with held and peak MiB} */
    public synchronized String table() {
        StringBuilder text = new StringBuilder("%-12s %12s %12s%n".formatted(device, "held MiB", "peak MiB"));
        for (Use use : Use.values()) {
            if (peak(use) > 0) {
                text.append("%-12s %12.1f %12.1f%n".formatted(use, held(use) / 0x1p20, peak(use) / 0x1p20));
            }
        }
        text.append("%-12s %12.1f %12.1f".formatted("total", total() / 0x1p20, peak / 0x1p20));
        if (!device.isCpu()) {
            Cuda.Allocator libtorch = Cuda.allocator(device);
            text.append("%n%-12s %12.1f %12.1f".formatted("in tensors", libtorch.allocated() / 0x1p20, libtorch.peakAllocated() / 0x1p20));
            text.append("%n%-12s %12.1f %12.1f".formatted("and cached", libtorch.reserved() / 0x1p20, libtorch.peakReserved() / 0x1p20));
            text.append("%n%-12s %12.1f".formatted("device free", Cuda.free(device) / 0x1p20));
        }
        return text.toString();
    }
}
