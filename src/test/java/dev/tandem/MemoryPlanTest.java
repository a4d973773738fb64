package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.TrainerOptions;
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
}
