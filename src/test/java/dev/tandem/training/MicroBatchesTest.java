package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.Arrays;
import java.util.List;
import java.util.SplittableRandom;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;

class MicroBatchesTest {
    private static List<TrainingSequence> sequences(int... inputTokens) {
        return Arrays.stream(inputTokens).mapToObj(n -> TrainingSequence.of(new int[n + 1], 1, 1)).toList();
    }

    private static long[] loads(List<TrainingSequence> sequences, List<List<Integer>> batches) {
        return batches.stream().mapToLong(batch -> batch.stream().mapToLong(i -> sequences.get(i).inputTokens()).sum()).toArray();
    }

    @Test
    void everySequenceOnceWithinTheBudgetAndEven() {
        SplittableRandom random = new SplittableRandom(1);
        for (int mix = 0; mix < 300; mix++) {
            int ranks = random.nextInt(1, 4);
            int budget = random.nextInt(500, 4000);
            List<TrainingSequence> sequences = sequences(random.ints(random.nextInt(1, 80), 1, 600).toArray());
            List<List<List<Integer>>> shares = MicroBatches.cut(sequences, budget, ranks);
            assertEquals(ranks, shares.size());
            assertEquals(IntStream.range(0, sequences.size()).boxed().toList(),
                    shares.stream().flatMap(List::stream).flatMap(List::stream).sorted().toList());
            for (List<List<Integer>> batches : shares) {
                long[] loads = loads(sequences, batches);
                for (int i = 0; i < loads.length; i++) {
                    assertTrue(loads[i] <= budget || batches.get(i).size() == 1, Arrays.toString(loads));
                }
                long[] within = Arrays.stream(loads).filter(n -> n <= budget).toArray();
                if (within.length > 1) {
                    long most = Arrays.stream(within).max().orElseThrow();
                    long least = Arrays.stream(within).min().orElseThrow();
                    assertTrue(most - least <= 600, "no sequence is longer than 600 tokens, so no two batches differ by more: "
                            + Arrays.toString(within));
                    assertTrue(Arrays.stream(within).sum() > (within.length - 2L) * budget * 0.6, "too many: " + Arrays.toString(within));
                }
            }
        }
    }

    @Test
    void aRestIsSharedOut() {
        List<TrainingSequence> sequences = sequences(900, 800, 700, 600, 500, 400, 300, 200, 100);
        assertArrayEquals(new long[] {1400, 1500, 1600},
                Arrays.stream(loads(sequences, MicroBatches.cut(sequences, 2200, 1).getFirst())).sorted().toArray());
        assertEquals(2, MicroBatches.cut(sequences(4095, 4095, 4095, 4095), 8192, 1).getFirst().size());
        assertEquals(List.of(List.of(1), List.of(0)), MicroBatches.cut(sequences(10, 50), 20, 1).getFirst());
    }
}
