package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;

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
import java.lang.foreign.ValueLayout;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** The optimizer's state on the device, on the host, or on both: the same bits. */
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
