package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.api.Test;

class StepPlanTest {
    @Test
    void sharesHoldEveryTokenAndEverySampleOnce() {
        Random random = new Random(3);
        for (int run = 0; run < 300; run++) {
            StepPlan plan = new StepPlan(40);
            plan.begin(run);
            int rows = 1 + random.nextInt(20);
            for (int row = 0; row < rows; row++) {
                int granted = random.nextBoolean() ? 1 : 1 + random.nextInt(60);
                int added = plan.addRow(100 + row, random.nextInt(50), granted, granted, random.nextBoolean());
                for (int i = 0; plan.sampled[added] && i <= random.nextInt(2); i++) {
                    plan.addSample(added, 100 + row + 1000 * i, row);
                }
            }
            int count = 1 + random.nextInt(4);
            int[] next = plan.start.clone();
            List<Integer> pairs = new ArrayList<>();
            StepPlan part = new StepPlan(40);
            int least = Integer.MAX_VALUE;
            int most = 0;
            for (int share = 0; share < count; share++) {
                plan.share(part, share, count);
                least = Math.min(least, part.totalTokens);
                most = Math.max(most, part.totalTokens);
                for (int row = 0; row < part.rowCount; row++) {
                    int whole = part.slot[row] - 100;
                    assertEquals(next[whole], part.start[row]);
                    next[whole] += part.granted[row];
                }
                for (int i = 0; i < part.sampleCount; i++) {
                    int pair = part.samplePair[i];
                    pairs.add(pair);
                    assertEquals(plan.sampleSlot[pair], part.sampleSlot[i]);
                    assertEquals(plan.samplePosition[pair], part.samplePosition[i]);
                    assertEquals(plan.slot[plan.sampleRow[pair]], part.slot[part.sampleRow[i]]);
                }
            }
            for (int row = 0; row < rows; row++) {
                assertEquals(plan.start[row] + plan.granted[row], next[row]);
            }
            assertEquals(java.util.stream.IntStream.range(0, plan.sampleCount).boxed().toList(), pairs);
            assertTrue(most - least <= 1);
        }
    }
}
