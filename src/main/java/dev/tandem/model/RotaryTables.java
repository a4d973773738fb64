package dev.tandem.model;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * Cosines and sines of all positions, FLOAT32 [positions, half a head], as Tandem's kernels read them. The owner closes it.
 *
 * @param cosines of the angle of each pair, scaled
 * @param sines of the same
 */
public record RotaryTables(Tensor cosines, Tensor sines) implements AutoCloseable {
    /** {@return the tables of a model, or null where positions do not enter by rotation} */
    public static @Nullable RotaryTables of(ModelConfig config, Device device) {
        if (!(config.positions() instanceof Positions.Rope rope)) {
            return null;
        }
        int half = config.headDim() / 2;
        double[] frequencies = rope.inverseFrequencies(config.headDim());
        float[] single = new float[half];
        for (int i = 0; i < half; i++) {
            single[i] = (float) frequencies[i];
        }
        try (Scope scope = Scope.open()) {
            // The angle is rounded to float32, as in transformers.
            Tensor angles = Tensor.range(device, config.maxPositions()).to(DType.FLOAT32).unsqueeze(1)
                    .mul(Tensor.of(device, single).unsqueeze(0)).to(DType.FLOAT64);
            return new RotaryTables(angles.cos().mul(rope.attentionScale()).to(DType.FLOAT32).keep(),
                    angles.sin().mul(rope.attentionScale()).to(DType.FLOAT32).keep());
        }
    }

    @Override
    public void close() {
        cosines.close();
        sines.close();
    }
}
