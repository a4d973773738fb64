package dev.tandem.model;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import org.jspecify.annotations.Nullable;

/**
 * Rotary position embedding (Su et al. 2021) in the layout of Hugging Face: element i is paired with element i + size/2.
 *
 * <p>Cosines and sines are computed once per position, angles in single precision as transformers computes them. The table grows
 * with the positions that are asked for.
 */
final class Rotary implements AutoCloseable {
    /**
     * Cosines and sines of a step's tokens, each [tokens, 1, size/2] in the weights' type.
     *
     * @param cosine per token
     * @param sine per token
     */
    record Rotation(Tensor cosine, Tensor sine) {
        /** {@return x [tokens, heads, size], rotated} */
        Tensor rotate(Tensor x) {
            long half = x.size(2) / 2;
            Tensor first = x.narrow(2, 0, half);
            Tensor second = x.narrow(2, half, half);
            return Tensor.concatenate(2,
                    first.mul(cosine).sub(second.mul(sine)),
                    second.mul(cosine).add(first.mul(sine)));
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
     */
    Rotation at(Tensor positions, int limit) {
        if (limit > rows) {
            grow(Math.max(limit, Math.min(maxPositions, Math.max(1024, 2 * rows))));
        }
        return new Rotation(
                java.util.Objects.requireNonNull(cosines).indexSelect(0, positions).unsqueeze(1),
                java.util.Objects.requireNonNull(sines).indexSelect(0, positions).unsqueeze(1));
    }

    private void grow(int newRows) {
        close();
        int half = inverseFrequencies.length;
        try (Scope scope = Scope.open()) {
            Tensor cosine = Tensor.empty(Device.cpu(), DType.FLOAT32, newRows, half);
            Tensor sine = Tensor.empty(Device.cpu(), DType.FLOAT32, newRows, half);
            MemorySegment c = cosine.memory();
            MemorySegment s = sine.memory();
            for (int position = 0; position < newRows; position++) {
                for (int i = 0; i < half; i++) {
                    float angle = position * (float) inverseFrequencies[i];
                    long at = (long) position * half + i;
                    c.setAtIndex(ValueLayout.JAVA_FLOAT, at, (float) (Math.cos(angle) * scale));
                    s.setAtIndex(ValueLayout.JAVA_FLOAT, at, (float) (Math.sin(angle) * scale));
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
