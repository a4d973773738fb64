package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.TandemException;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightLayout;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TrainerOptions;
import java.util.List;
import java.util.NavigableMap;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;

class MemoryPlanTest {
    private static final ModelConfig CONFIG = ModelConfig.llama(8192, 256, 8, 8, 4, 768, 1024);

    private static MemoryPlan plan(long limit, long budget) {
        EngineOptions options = EngineOptions.defaults().memoryLimit(limit).kvBytes(1 << 20)
                .generation(GeneratorOptions.defaults().step(64, 4, 64));
        return MemoryPlan.of(CONFIG, options.training(TrainerOptions.defaults().memory(budget, 4 << 20)));
    }

    /** Memory that is free saves computing again, layer by layer; where nothing is free, one layer at a time exists. */
    @Test
    void activationsTakeWhatIsLeft() {
        MemoryPlan least = plan(1L << 40, 0);
        MemoryPlan most = plan(1L << 40, TrainerOptions.ALL_THAT_FITS);
        NavigableMap<Long, MemoryPlan> plans = new TreeMap<>();
        long step = (most.trainingBytes() - least.trainingBytes()) / (8 * CONFIG.layers());
        for (long limit = least.trainingBytes(); limit < most.trainingBytes() + step; limit += step) {
            plans.put(limit, plan(limit, TrainerOptions.ALL_THAT_FITS));
        }
        // As many sizes as numbers of layers that are kept.
        TreeSet<Long> sizes = plans.values().stream().map(MemoryPlan::trainingBytes).collect(Collectors.toCollection(TreeSet::new));
        assertEquals(CONFIG.layers() + 1, sizes.size());
        assertEquals(List.of(least.trainingBytes(), most.trainingBytes()), List.of(sizes.first(), sizes.last()));
        plans.forEach((limit, plan) -> assertEquals(sizes.floor(limit), plan.trainingBytes(), plan.toString()));
    }

    /** For each weight FLOAT32 moments and, where it is rounded, half a FLOAT32 master; BFLOAT16 moments take half of theirs. */
    @Test
    void roundedMomentsAreCounted() {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).memoryLimit(1L << 40);
        TrainerOptions rounded = TrainerOptions.defaults().moments(DType.BFLOAT16);
        for (DType dtype : List.of(DType.FLOAT32, DType.BFLOAT16)) {
            long weights = new WeightLayout(CONFIG, 1).length();
            long masters = dtype == DType.FLOAT32 ? 0 : 2 * weights;
            assertEquals(masters + 8 * weights, MemoryPlan.of(CONFIG, options.dtype(dtype)).training().get(Use.OPTIMIZER));
            assertEquals(masters + 4 * weights,
                    MemoryPlan.of(CONFIG, options.dtype(dtype).training(rounded)).training().get(Use.OPTIMIZER));
        }
    }

    private static final long GIB = 1L << 30;

    /** As Qwen3-0.6B and Qwen3-8B are published. */
    private static ModelConfig qwen3(boolean large) {
        return TinyModels.of("""
                {"model_type":"qwen3","hidden_size":%d,"num_hidden_layers":%d,"num_attention_heads":%d,"num_key_value_heads":8,
                 "head_dim":128,"intermediate_size":%d,"vocab_size":151936,"tie_word_embeddings":%b,"max_position_embeddings":4096,
                 "rope_theta":1000000.0,"rms_norm_eps":1e-6}""".formatted(
                large ? 4096 : 1024, large ? 36 : 28, large ? 32 : 16, large ? 12288 : 3072, !large));
    }

    /** The plan for a GPU of 139 GiB, of which a limit of 0 leaves it to the plan to take a share. */
    private static MemoryPlan onGpu(ModelConfig config, long limit, long host, long kvBytes, TrainerOptions training) {
        EngineOptions options = EngineOptions.defaults().devices(Device.cuda(0)).dtype(DType.BFLOAT16).memoryLimit(limit).kvBytes(kvBytes)
                .generation(GeneratorOptions.forGpu()).training(training);
        return MemoryPlan.of(config, options, 139 * GIB, host);
    }

    private static TrainerOptions gpuTraining() {
        return TrainerOptions.defaults().microBatchTokens(8192).memory(TrainerOptions.ALL_THAT_FITS, GIB);
    }

    /** Activations give way first, then as many groups' optimizer state as must. */
    @Test
    void optimizerStateThatDoesNotFitStaysOnTheHost() {
        ModelConfig config = qwen3(true);
        WeightLayout layout = new WeightLayout(config, 1);
        long least = onGpu(config, 200 * GIB, 128 * GIB, 0, gpuTraining().memory(0, GIB)).training().get(Use.ACTIVATIONS);
        int[] expected = {0, 0, 0, 1, 6, 15, 37};
        long[] limits = {200 * GIB, 160 * GIB, 130 * GIB, 0, 116 * GIB, 100 * GIB, 60 * GIB};
        for (int i = 0; i < limits.length; i++) {
            MemoryPlan plan = onGpu(config, limits[i], 128 * GIB, 0, gpuTraining());
            plan.requireTraining();
            int groups = plan.hostGroups();
            assertEquals(expected[i], groups, plan.toString());
            assertTrue(plan.trainingBytes() <= plan.limit() && plan.generationBytes() <= plan.limit(), plan.toString());
            assertEquals(10 * layout.groupOffset(groups), plan.hostOptimizer());
            assertEquals(10 * layout.length(), plan.training().get(Use.OPTIMIZER) + plan.hostOptimizer());
            if (groups > 0) {
                long last = 10 * (layout.groupOffset(groups) - layout.groupOffset(groups - 1));
                long fixed = plan.trainingBytes() - plan.training().get(Use.ACTIVATIONS);
                assertTrue(fixed + least + last > plan.limit(), "one fewer fits: " + plan);
                assertTrue(plan.toString().contains("optimizer state of " + groups + " groups while training"), plan.toString());
            }
        }
        assertEquals(0, onGpu(config, 139 * GIB, 128 * GIB, 0, gpuTraining().moments(DType.BFLOAT16)).hostGroups());
        assertEquals(0, onGpu(qwen3(false), 0, 128 * GIB, 0, gpuTraining()).hostGroups());
        TandemException e = assertThrows(TandemException.class, onGpu(config, 40 * GIB, 128 * GIB, 0, gpuTraining())::requireTraining);
        assertTrue(e.getMessage().contains("training does not fit"), e.getMessage());
    }

    @Test
    void hostMemoryIsPlannedToo() {
        MemoryPlan little = onGpu(qwen3(true), 100 * GIB, 20 * GIB, 0, gpuTraining());
        TandemException e = assertThrows(TandemException.class, little::requireTraining);
        assertTrue(e.getMessage().contains("host memory") && e.getMessage().contains("15 groups")
                && e.getMessage().contains("20480.0 MiB are available"), e.getMessage());
        assertEquals(0, little.generation().get(Use.OPTIMIZER));
        // A large KV cache: what is on the device while training waits beside what is not.
        MemoryPlan parked = onGpu(qwen3(true), 100 * GIB, 128 * GIB, 60 * GIB, gpuTraining());
        assertEquals(15, parked.hostGroups());
        assertEquals(parked.training().get(Use.OPTIMIZER), parked.parked());
        assertEquals(0, parked.generation().get(Use.OPTIMIZER));
        assertEquals(parked.limit(), parked.generationBytes() - parked.generation().get(Use.KV) + parked.parked()
                + parked.kvBytesBesideOptimizer());
        assertTrue(parked.toString().contains("of 15 groups while training, of all when the KV cache needs its room"), parked.toString());
    }
}
