package dev.tandem.model;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/**
 * Rotary position embedding (Su et al. 2021) in the layout of Hugging Face: element i is paired with element i + size/2.
 *
 * <p>Cosines and sines are computed once per position, angles in single precision as transformers computes them. The table grows
 * with the positions that are asked for.
 */
final class Rotary implements AutoCloseable {
    /**
     * Factors of a step's tokens, each [tokens, heads, size] in the weights' type, the same for every head: repeated so that the
     * products below run over whole rows.
     *
     * @param cosine of the angle of each pair, for both of its elements
     * @param sine of the same, negative for the first element
     */
    record Rotation(Tensor cosine, Tensor sine) {
        /** {@return x [tokens, heads, size], rotated} */
        Tensor rotate(Tensor x) {
            long[] shape = x.shape();
            Tensor partner = x.reshape(shape[0], shape[1], 2, shape[2] / 2).flip(2).reshape(shape);
            return x.mul(cosine).add(partner.mul(sine));
        }

        /** {@return the gradient of x, from that of {@link #rotate}'s result} The rotation's transpose. */
        Tensor rotateBack(Tensor gradient) {
            long[] shape = gradient.shape();
            Tensor partner = gradient.mul(sine).reshape(shape[0], shape[1], 2, shape[2] / 2).flip(2).reshape(shape);
            return gradient.mul(cosine).add(partner);
        }
    }

    private final Device device;
    private final DType dtype;
    private final double[] inverseFrequencies;
    private final double scale;
    private final int maxPositions;
    private @Nullable Tensor cosines;
    private @Nullable Tensor sines;
    private int rows;

    Rotary(Positions.Rope rope, ModelConfig config, Device device, DType dtype) {
        this.device = device;
        this.dtype = dtype;
        inverseFrequencies = rope.inverseFrequencies(config.headDim());
        scale = rope.attentionScale();
        maxPositions = config.maxPositions();
    }

    /**
     * Looks positions up.
     *
     * @param positions INT64 [tokens]
     * @param limit greater than every position
     * @param heads how many heads are rotated
     */
    Rotation at(Tensor positions, int limit, int heads) {
        if (limit > rows) {
            grow(Math.max(limit, Math.min(maxPositions, Math.max(1024, 2 * rows))));
        }
        return new Rotation(rows(cosines, positions, heads), rows(sines, positions, heads));
    }

    private static Tensor rows(@Nullable Tensor table, Tensor positions, int heads) {
        Tensor rows = Objects.requireNonNull(table).indexSelect(0, positions).unsqueeze(1);
        return rows.expand(-1, heads, -1).contiguous();
    }

    private void grow(int newRows) {
        close();
        int half = inverseFrequencies.length;
        int size = 2 * half;
        try (Scope scope = Scope.open()) {
            Tensor cosine = Tensor.empty(Device.cpu(), DType.FLOAT32, newRows, size);
            Tensor sine = Tensor.empty(Device.cpu(), DType.FLOAT32, newRows, size);
            MemorySegment c = cosine.memory();
            MemorySegment s = sine.memory();
            for (int position = 0; position < newRows; position++) {
                for (int i = 0; i < half; i++) {
                    float angle = position * (float) inverseFrequencies[i];
                    long at = (long) position * size + i;
                    float cos = (float) (Math.cos(angle) * scale);
                    float sin = (float) (Math.sin(angle) * scale);
                    c.setAtIndex(ValueLayout.JAVA_FLOAT, at, cos);
                    c.setAtIndex(ValueLayout.JAVA_FLOAT, at + half, cos);
                    s.setAtIndex(ValueLayout.JAVA_FLOAT, at, -sin);
                    s.setAtIndex(ValueLayout.JAVA_FLOAT, at + half, sin);
                }
            }
            cosines = cosine.to(dtype).on(device).keep();
            sines = sine.to(dtype).on(device).keep();
        }
        rows = newRows;
    }

    @Override
    public void close() {
        if (cosines != null) {
            cosines.close();
            cosines = null;
        }
        if (sines != null) {
            sines.close();
            sines = null;
        }
        rows = 0;
    }
}
