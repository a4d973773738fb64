package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightLayout;
import dev.tandem.training.TrainerOptions;
import java.util.List;
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
        long layer = most.activationBudget() / CONFIG.layers();
        assertEquals(0, most.activationBudget() % CONFIG.layers());
        assertTrue(most.training().get(Use.ACTIVATIONS) > least.training().get(Use.ACTIVATIONS));
        long before = -1;
        for (long limit = least.trainingBytes(); limit < most.trainingBytes() + layer; limit += layer / 3) {
            MemoryPlan plan = plan(limit, TrainerOptions.ALL_THAT_FITS);
            assertTrue(plan.trainingBytes() <= limit, plan.toString());
            assertTrue(plan.activationBudget() >= before);
            assertTrue(plan.activationBudget() == most.activationBudget()
                    || plan(1L << 40, plan.activationBudget() + layer).trainingBytes() > limit, "another layer would fit: " + plan);
            before = plan.activationBudget();
        }
        assertEquals(most.activationBudget(), before);
    }

    /** FLOAT32 master and moments of 12 bytes for each weight; BFLOAT16 moments take half of theirs. */
    @Test
    void roundedMomentsAreCounted() {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).memoryLimit(1L << 40);
        TrainerOptions rounded = TrainerOptions.defaults().moments(DType.BFLOAT16);
        for (DType dtype : List.of(DType.FLOAT32, DType.BFLOAT16)) {
            long weights = new WeightLayout(CONFIG, 1).length();
            long masters = dtype == DType.FLOAT32 ? 0 : 4 * weights;
            assertEquals(masters + 8 * weights, MemoryPlan.of(CONFIG, options.dtype(dtype)).training().get(Use.OPTIMIZER));
            assertEquals(masters + 4 * weights,
                    MemoryPlan.of(CONFIG, options.dtype(dtype).training(rounded)).training().get(Use.OPTIMIZER));
        }
    }
}
