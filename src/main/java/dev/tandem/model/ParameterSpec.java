package dev.tandem.model;

import java.util.Arrays;

/**
 * A tensor that a decoder needs.
 *
 * @param name its full name in a Hugging Face checkpoint, such as {@code model.layers.0.self_attn.q_proj.weight}
 * @param role what it does
 * @param layer the layer it belongs to, or -1
 * @param shape its sizes; not to be changed
 */
@SuppressWarnings("ArrayRecordComponent")
public record ParameterSpec(String name, ParameterRole role, int layer, long[] shape) {

    /** {@return how many elements it has} */
    public long elements() {
        return Arrays.stream(shape).reduce(1, Math::multiplyExact);
    }

    @Override
    public boolean equals(Object other) {
        return other instanceof ParameterSpec that && name.equals(that.name) && role == that.role && layer == that.layer
                && Arrays.equals(shape, that.shape);
    }

    @Override
    public int hashCode() {
        return 31 * name.hashCode() + Arrays.hashCode(shape);
    }

    @Override
    public String toString() {
        return name + Arrays.toString(shape);
    }
}
