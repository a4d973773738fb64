package dev.tandem.model;

import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.util.EnumMap;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * The weights of one layer, of the embeddings, or of the head, as the matrices that the {@link Decoder} multiplies with. Views of
 * the arena: no bytes of its own. q, k, v are one matrix under {@link ParameterRole#Q_WEIGHT}, gate and up one under
 * {@link ParameterRole#GATE_WEIGHT}.
 */
public final class WeightGroup implements AutoCloseable {
    private final WeightLayout.Group group;
    private final Tensor flat;
    private final Map<ParameterRole, Tensor> views = new EnumMap<>(ParameterRole.class);

    WeightGroup(WeightLayout.Group group, Tensor arena) {
        this.group = group;
        try (Scope scope = Scope.open()) {
            this.flat = arena.narrow(0, group.offset(), group.length()).keep();
            for (WeightLayout.Fused fused : group.fused()) {
                views.put(fused.role(), view(flat, fused).keep());
            }
        }
    }

    private WeightGroup(WeightGroup of) {
        this.group = of.group;
        this.flat = of.flat;
        of.views.forEach((role, weight) -> views.put(role, weight.detach().requireGradient()));
    }

    private Tensor view(Tensor of, WeightLayout.Fused fused) {
        return of.narrow(0, fused.offset() - group.offset(), fused.elements()).reshape(fused.shape());
    }

    /** {@return the same weights as leaves of differentiation, which belong to the innermost scope} */
    public WeightGroup differentiable() {
        return new WeightGroup(this);
    }

    /**
     * Makes the gradients of {@link #differentiable} weights add to a vector.
     *
     * @param gradients of this group's length and the weights' type
     */
    public void accumulateInto(Tensor gradients) {
        for (WeightLayout.Fused fused : group.fused()) {
            weight(fused.role()).accumulateInto(view(gradients, fused));
        }
    }

    /** {@return the weight of this role} */
    public Tensor weight(ParameterRole role) {
        Tensor found = views.get(role);
        if (found == null) {
            throw new IllegalArgumentException("group " + group.layer() + " has no " + role);
        }
        return found;
    }

    /** {@return the weight of this role, or null where the model has none} */
    public @Nullable Tensor find(ParameterRole role) {
        return views.get(role);
    }

    /** {@return all weights of the group in one vector, padding included} */
    public Tensor flat() {
        return flat;
    }

    /** {@return where the group begins in the arena, in elements} */
    public long offset() {
        return group.offset();
    }

    /** {@return the group's length in elements, padding included} */
    public long length() {
        return group.length();
    }

    /** {@return this group's part of a vector of its length, as the gradient or state of the weight of a role} */
    public Tensor part(Tensor of, ParameterRole role) {
        for (WeightLayout.Fused fused : group.fused()) {
            if (fused.role() == role) {
                return view(of, fused);
            }
        }
        throw new IllegalArgumentException("group " + group.layer() + " has no " + role);
    }

    /**
     * Cuts {@code [from, to)} of the group into runs of elements that decay and runs that do not.
     *
     * @param runs called with the bounds, relative to the group, and whether weight decay applies
     */
    public void runs(long from, long to, RunConsumer runs) {
        for (WeightLayout.Fused fused : group.fused()) {
            long start = Math.max(from, fused.offset() - group.offset());
            long end = Math.min(to, fused.offset() - group.offset() + fused.elements());
            if (start < end) {
                runs.accept(start, end, fused.decays());
            }
        }
    }

    /** Releases the views; the arena's memory is not theirs. */
    @Override
    public void close() {
        views.values().forEach(Tensor::close);
        flat.close();
    }

    /** Receives a run of elements. */
    @FunctionalInterface
    public interface RunConsumer {
        /** Takes the elements {@code [from, to)} of a group. */
        void accept(long from, long to, boolean decays);
    }
}
