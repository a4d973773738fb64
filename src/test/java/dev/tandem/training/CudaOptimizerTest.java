package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Collectives;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.function.DoubleSupplier;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** What the optimizer's kernels compute, and its state on the device, on the host, or on both: the same bits. */
@Gpu
class CudaOptimizerTest {
    private static final Device CUDA = Device.cuda(0);

    /** Embeddings and head are longer than a piece of the host's state. */
    private static final WeightLayout LAYOUT = new WeightLayout(TinyModels.published("qwen2"), 1);

    private static final int STEPS = 7;
    private static final int SKIPPED = 2;
    private static final int PARKED = 3;
    private static final int REPLACED = 4;

    /** Each group's weights after steps with made-up gradients; a last step without a gradient and at a large rate shows the moments. */
    private static List<Tensor> trained(DType weights, DType moments, int hostGroups) {
        TrainerOptions options = TrainerOptions.defaults().weightDecay(0.1, false).moments(moments);
        DeviceMemory memory = new DeviceMemory(CUDA);
        long state = OptimizerLayout.of(LAYOUT.length() - LAYOUT.groupOffset(hostGroups), weights, options).bytes();
        try (WeightArena arena = new WeightArena(LAYOUT, CUDA, weights)) {
            arena.initialize(5, 0.05);
            try (ShardedAdamW optimizer = new ShardedAdamW(arena, Collectives.alone(), memory, options, 9, hostGroups);
                    GradientShard gradients = new GradientShard(LAYOUT, Collectives.alone(), memory)) {
                for (int step = 0; step < STEPS; step++) {
                    try (Scope scope = Scope.open(); Tensor.RandomStream random = new Tensor.RandomStream(step)) {
                        gradients.clear();
                        if (step < STEPS - 1) {
                            gradients.all().normalInPlace(0, 1e-3, random);
                        }
                        if (step == SKIPPED) {
                            gradients.all().narrow(0, 77, 1).fillInPlace(Double.NaN);
                        } else if (step == PARKED && state > 0) {
                            optimizer.park();
                            assertEquals(0, memory.held(Use.OPTIMIZER));
                        } else if (step == REPLACED) {
                            arena.initialize(6, 0.05);
                            optimizer.refreshMaster();
                        }
                        Tensor loss = Tensor.zeros(CUDA, DType.FLOAT64, 1);
                        assertEquals(step != SKIPPED, optimizer.step(gradients, loss, step < STEPS - 1 ? 0.01 : 1).get().applied());
                        assertEquals(state, memory.held(Use.OPTIMIZER));
                    }
                }
            }
            assertEquals(0, memory.held(Use.OPTIMIZER));
            return arena.groups().stream().map(group -> group.flat().on(Device.cpu())).toList();
        }
    }

    @Test
    void mastersAreThoseOfTheCpu() {
        try (OptimizerKernels kernels = new OptimizerKernels(CUDA, DType.BFLOAT16, TrainerOptions.defaults(), 9);
                Scope scope = Scope.open(); Tensor.RandomStream random = new Tensor.RandomStream(1)) {
            long n = 100_003;
            Tensor weights = Tensor.empty(CUDA, DType.BFLOAT16, n).normalInPlace(0, 1, random);
            weights.narrow(0, 0, 2).fillInPlace(0);
            weights.narrow(0, 2, 1).fillInPlace(Double.NaN);
            Tensor drawn = Tensor.empty(CUDA, DType.BFLOAT16, n); // 16 bits each
            kernels.drawRemainders(weights, drawn.address(), 12_345);
            Tensor expected = Tensor.empty(Device.cpu(), DType.BFLOAT16, n);
            RandomRounding.draw(9, weights.on(Device.cpu()), expected.memory(), 12_345);
            assertArrayEquals(expected.memory().toArray(ValueLayout.JAVA_SHORT),
                    drawn.on(Device.cpu()).memory().toArray(ValueLayout.JAVA_SHORT));
        }
    }

    /**
     * The paper's formula in float64, for a run of elements that begins anywhere; those around it stay as they are. For the last run no
     * element has all its numbers at addresses that are multiples of 16.
     */
    @ParameterizedTest
    @CsvSource({"FLOAT32, FLOAT32", "FLOAT32, BFLOAT16", "BFLOAT16, FLOAT32", "BFLOAT16, BFLOAT16"})
    void updatesAsThePaper(DType weightType, DType momentType) {
        int n = 20_032;
        double lr = 1e-3;
        TrainerOptions options = TrainerOptions.defaults().weightDecay(0.1, true).moments(momentType).clip(0.5);
        OptimizerLayout layout = OptimizerLayout.of(n, weightType, options);
        Random random = new Random(3);
        for (int start : new int[] {0, 1, 6}) {
            int end = n - 3;
            try (OptimizerKernels kernels = new OptimizerKernels(CUDA, weightType, options, 9); Scope scope = Scope.open()) {
                Tensor gradients = Tensor.of(Device.cpu(), floats(n, () -> 0.01 * random.nextGaussian()));
                gradients.narrow(0, 500, 70).fillInPlace(0);
                Tensor gradient = Tensor.empty(CUDA, DType.FLOAT32, n + 1).narrow(0, start == 6 ? 1 : 0, n).copyInPlace(gradients);
                double norm = Math.sqrt(gradients.to(DType.FLOAT64).square().sum().item());
                Adam before = new Adam(
                        Tensor.of(Device.cpu(), floats(n, random::nextGaussian)).to(weightType),
                        MemorySegment.ofArray(new short[n]),
                        Tensor.of(Device.cpu(), floats(n, () -> 0.01 * random.nextGaussian())).to(momentType),
                        Tensor.of(Device.cpu(), floats(n, () -> 1e-4 * random.nextDouble())).to(momentType));
                if (layout.splits()) {
                    RandomRounding.draw(4, before.weights, before.remainders, 0);
                }
                Tensor weights = before.weights.on(CUDA);
                Tensor state = before.onDevice(layout);
                kernels.begin(gradient, Tensor.zeros(CUDA, DType.FLOAT32, 1), Collectives.alone());
                kernels.update(gradient.address() + 4L * start, state.address(), layout, start, false,
                        weights.address() + (long) start * weightType.bytes(), end - start, 7 + start, lr, true);
                Adam after = Adam.of(layout, weights, state, weightType, momentType);

                double scale = 0.5 / (norm + 1e-6);
                double[] master = before.masters();
                double[] first = doubles(before.first);
                double[] second = doubles(before.second);
                for (int i = start; i < end; i++) {
                    double g = scale * gradients.memory().getAtIndex(ValueLayout.JAVA_FLOAT, i);
                    first[i] += (1 - options.beta1()) * (g - first[i]);
                    second[i] = options.beta2() * second[i] + (1 - options.beta2()) * g * g;
                    double root = Math.sqrt(second[i]) / Math.sqrt(1 - options.beta2());
                    master[i] -= lr * 0.1 * master[i] + lr / (1 - options.beta1()) * first[i] / (root + options.epsilon());
                }
                String what = weightType + " weights, " + momentType + " moments from element " + start + " on";
                assertClose(what + ": masters", master, after.masters(), 1e-6);
                if (momentType == DType.FLOAT32) {
                    assertClose(what + ": first moments", first, doubles(after.first), 1e-8);
                    assertClose(what + ": second moments", second, doubles(after.second), 1e-10);
                } else {
                    Adam rounded = before.withMoments(new RandomRounding(9, 1), first, second, 7, start, end);
                    assertNearlyAllEqual(what + ": first moments", rounded.first, after.first);
                    assertNearlyAllEqual(what + ": second moments", rounded.second, after.second);
                }
            }
        }
    }

    /** Weights and what the optimizer keeps of them, on the CPU. */
    private record Adam(Tensor weights, MemorySegment remainders, Tensor first, Tensor second) {
        static Adam of(OptimizerLayout layout, Tensor weights, Tensor state, DType weightType, DType momentType) {
            MemorySegment bytes = state.on(Device.cpu()).memory();
            long n = layout.elements();
            return new Adam(weights.on(Device.cpu()), bytes,
                    Tensor.wrap(bytes.asSlice(layout.first(0)), momentType, n), Tensor.wrap(bytes.asSlice(layout.second(0)), momentType, n));
        }

        Tensor onDevice(OptimizerLayout layout) {
            Tensor state = Tensor.empty(Device.cpu(), DType.FLOAT32, layout.bytes() / Float.BYTES);
            if (layout.splits()) {
                state.memory().copyFrom(remainders);
            }
            state.memory().asSlice(layout.first(0)).copyFrom(first.memory());
            state.memory().asSlice(layout.second(0)).copyFrom(second.memory());
            return state.on(CUDA);
        }

        double[] masters() {
            if (weights.dtype() == DType.FLOAT32) {
                return doubles(weights);
            }
            Tensor masters = Tensor.empty(Device.cpu(), DType.FLOAT32, weights.elements());
            SplitMasters.join(weights, remainders, masters);
            return doubles(masters);
        }

        /** Those of elements from {@code start} to {@code end} rounded, the others as they are. */
        Adam withMoments(RandomRounding rounding, double[] means, double[] squares, long element, int start, int end) {
            Adam made = new Adam(weights, remainders, first.copy(), second.copy());
            int n = end - start;
            rounding.round(
                    Tensor.of(Device.cpu(), floats(n, Arrays.stream(means, start, end).iterator()::next)),
                    Tensor.of(Device.cpu(), floats(n, Arrays.stream(squares, start, end).iterator()::next)),
                    made.first.narrow(0, start, n), made.second.narrow(0, start, n), element + start);
            return made;
        }
    }

    private static float[] floats(int n, DoubleSupplier numbers) {
        float[] made = new float[n];
        for (int i = 0; i < n; i++) {
            made[i] = (float) numbers.getAsDouble();
        }
        return made;
    }

    private static double[] doubles(Tensor tensor) {
        return tensor.to(DType.FLOAT64).memory().toArray(ValueLayout.JAVA_DOUBLE);
    }

    private static void assertClose(String what, double[] expected, double[] found, double tolerance) {
        double largest = 0;
        for (int i = 0; i < expected.length; i++) {
            largest = Math.max(largest, Math.abs(expected[i] - found[i]));
        }
        System.out.printf("%s: largest difference %.1e%n", what, largest);
        assertTrue(largest <= tolerance, what + ": largest difference " + largest);
    }

    /** What is rounded differs in the last bits of float32, which seldom decide. */
    private static void assertNearlyAllEqual(String what, Tensor expected, Tensor found) {
        short[] left = expected.memory().toArray(ValueLayout.JAVA_SHORT);
        short[] right = found.memory().toArray(ValueLayout.JAVA_SHORT);
        int differing = 0;
        for (int i = 0; i < left.length; i++) {
            differing += left[i] == right[i] ? 0 : 1;
        }
        System.out.printf("%s: %d of %d differ%n", what, differing, left.length);
        assertTrue(differing <= left.length / 1000, what + ": " + differing + " of " + left.length + " differ");
    }

    @ParameterizedTest
    @CsvSource({"FLOAT32, FLOAT32", "FLOAT32, BFLOAT16", "BFLOAT16, FLOAT32", "BFLOAT16, BFLOAT16"})
    void hostStateTrainsTheSame(DType weights, DType moments) {
        Cuda.use(CUDA);
        try (Scope scope = Scope.open()) {
            List<Tensor> resident = trained(weights, moments, 0);
            for (int hostGroups : new int[] {1, 2, LAYOUT.groupCount()}) {
                List<Tensor> found = trained(weights, moments, hostGroups);
                for (int i = 0; i < found.size(); i++) {
                    assertEquals(-1, resident.get(i).memory().mismatch(found.get(i).memory()),
                            hostGroups + " groups on the host: group " + i);
                }
            }
        }
    }
}
