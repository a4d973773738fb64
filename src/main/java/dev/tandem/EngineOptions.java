package dev.tandem;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.training.TrainerOptions;
import java.time.Duration;
import java.util.List;

/**
 * How to open an engine.
 *
 * @param devices one rank for each
 * @param dtype of the weights in memory: FLOAT32 or BFLOAT16
 * @param memoryLimit most bytes that one rank may hold, or 0 to take an even share of what the machine has available
 * @param kvBytes bytes of the KV cache of each rank, or 0 to let the plan choose
 * @param seed of random weights, of sampling where a request brings none, and of the rounding of BFLOAT16 moments
 * @param timeLimit how long a rank waits for the others
 * @param generation how ranks generate
 * @param training how ranks train
 */
public record EngineOptions(List<Device> devices, DType dtype, long memoryLimit, long kvBytes, long seed, Duration timeLimit,
        GeneratorOptions generation, TrainerOptions training) {

    /** Checks the numbers. */
    public EngineOptions {
        devices = List.copyOf(devices);
        if (devices.isEmpty()) {
            throw new IllegalArgumentException("EngineOptions.devices: at least one device is needed");
        }
        if (memoryLimit < 0 || kvBytes < 0) {
            throw new IllegalArgumentException("EngineOptions: memory sizes must not be negative");
        }
        if (timeLimit.isNegative() || timeLimit.isZero()) {
            throw new IllegalArgumentException("EngineOptions.timeLimit must be positive: " + timeLimit);
        }
    }

    /** Tokens of a micro-batch, and bytes of logits, that keep a GPU busy. */
    private static final int GPU_MICRO_BATCH_TOKENS = 16_384;

    private static final long GPU_LOGITS = 2L << 30;

    /**
     * {@return one rank on {@link Device#best}, with sizes that suit it: on the CPU FLOAT32 weights, on a GPU BFLOAT16; sizes of caches
     * from the plan, 10 minutes' patience}
     */
    public static EngineOptions defaults() {
        Device device = Device.best();
        return new EngineOptions(List.of(device), device.isCpu() ? DType.FLOAT32 : DType.BFLOAT16, 0, 0, 0, Duration.ofMinutes(10),
                device.isCpu() ? GeneratorOptions.defaults() : GeneratorOptions.forGpu(),
                device.isCpu()
                        ? TrainerOptions.defaults()
                        : TrainerOptions.defaults().microBatchTokens(GPU_MICRO_BATCH_TOKENS).memory(TrainerOptions.ALL_THAT_FITS, GPU_LOGITS));
    }

    /** {@return these options on other devices} */
    public EngineOptions devices(Device... value) {
        return new EngineOptions(List.of(value), dtype, memoryLimit, kvBytes, seed, timeLimit, generation, training);
    }

    /** {@return these options with weights of another type} */
    public EngineOptions dtype(DType value) {
        return new EngineOptions(devices, value, memoryLimit, kvBytes, seed, timeLimit, generation, training);
    }

    /** {@return these options with a bound of each rank's memory, in bytes} */
    public EngineOptions memoryLimit(long value) {
        return new EngineOptions(devices, dtype, value, kvBytes, seed, timeLimit, generation, training);
    }

    /** {@return these options with a KV cache of that many bytes on each rank} */
    public EngineOptions kvBytes(long value) {
        return new EngineOptions(devices, dtype, memoryLimit, value, seed, timeLimit, generation, training);
    }

    /** {@return these options with another seed} */
    public EngineOptions seed(long value) {
        return new EngineOptions(devices, dtype, memoryLimit, kvBytes, value, timeLimit, generation, training);
    }

    /** {@return these options with another time limit} */
    public EngineOptions timeLimit(Duration value) {
        return new EngineOptions(devices, dtype, memoryLimit, kvBytes, seed, value, generation, training);
    }

    /** {@return these options with other generation options} */
    public EngineOptions generation(GeneratorOptions value) {
        return new EngineOptions(devices, dtype, memoryLimit, kvBytes, seed, timeLimit, value, training);
    }

    /** {@return these options with other training options} */
    public EngineOptions training(TrainerOptions value) {
        return new EngineOptions(devices, dtype, memoryLimit, kvBytes, seed, timeLimit, generation, value);
    }
}
