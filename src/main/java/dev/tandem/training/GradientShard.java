package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.WeightGroup;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Collectives;
import org.jspecify.annotations.Nullable;

/**
 * The gradients that one rank accumulates: its even slice of every group, in FLOAT32 (ZeRO stage 2, Rajbhandari et al. 2020).
 * Micro-batches add to it; whole gradients exist only for the group that is being reduced.
 *
 * <p>The memory exists from the first gradient of a step until {@link #release}.
 */
final class GradientShard implements AutoCloseable {
    private final WeightLayout layout;
    private final Collectives collectives;
    private final DeviceMemory memory;
    private @Nullable Tensor flat;

    GradientShard(WeightLayout layout, Collectives collectives, DeviceMemory memory) {
        this.layout = layout;
        this.collectives = collectives;
        this.memory = memory;
    }

    /** Sums a group's gradients over all ranks and adds this rank's slice. Every rank must call this for the same group. */
    void add(WeightGroup group, Tensor gradients) {
        try (Scope scope = Scope.open(); var off = dev.tandem.device.Gradients.disabled()) {
            Tensor sum = collectives.reduceScatter(gradients.to(DType.FLOAT32));
            slice(group).addInPlace(sum);
        }
    }

    /**
     * {@return where this rank adds a group's gradients, FLOAT32 of the group's length, until {@link #complete}} A single rank adds to what it
     * has accumulated, several each to zeros.
     */
    Tensor open(WeightGroup group) {
        return collectives.size() == 1 ? slice(group) : Tensor.zeros(memory.device(), DType.FLOAT32, group.length());
    }

    /** Sums what all ranks have added since {@link #open} and keeps this rank's slice. Every rank must call this for the same group. */
    void complete(WeightGroup group, Tensor gradients) {
        if (collectives.size() > 1) {
            add(group, gradients);
        }
    }

    /** {@return this rank's slice of a group's gradients, a view} */
    Tensor slice(WeightGroup group) {
        return flat().narrow(0, group.offset() / collectives.size(), group.length() / collectives.size());
    }

    /** {@return all that this rank accumulates, FLOAT32 [slice]} */
    Tensor all() {
        return flat();
    }

    /** {@return the sum of squares of all gradients on all ranks, NaN or infinite if one of them is} */
    double sumOfSquares() {
        try (Scope scope = Scope.open()) {
            Tensor sum = Tensor.of(memory.device(), flat().sumOfSquares());
            collectives.allReduce(sum);
            return sum.item();
        }
    }

    /** Forgets what was accumulated. */
    void clear() {
        flat().fillInPlace(0);
    }

    private Tensor flat() {
        Tensor current = flat;
        if (current == null) {
            try (Scope scope = Scope.open()) {
                current = Tensor.zeros(memory.device(), DType.FLOAT32, length()).keep();
            }
            flat = current;
            memory.add(Use.GRADIENTS, length() * Float.BYTES);
        }
        return current;
    }

    private long length() {
        return layout.length() / collectives.size();
    }

    /** Gives the memory back until the next gradient. */
    void release() {
        if (flat != null) {
            flat.close();
            flat = null;
            memory.add(Use.GRADIENTS, -length() * Float.BYTES);
        }
    }

    @Override
    public void close() {
        release();
    }
}
