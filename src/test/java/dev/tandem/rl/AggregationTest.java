package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.Arrays;
import org.junit.jupiter.api.Test;

class AggregationTest {
    /** The sequence without tokens must change nothing for the others. */
    private static final int[] COUNTS = {4, 0, 1, 5};

    @Test
    void weighsTokens() {
        assertArrayEquals(new float[] {.1f, 0, .1f, .1f}, new Aggregation.TokenMean().weights(COUNTS));
        assertArrayEquals(
                new float[] {1 / 12f, 0, 1 / 3f, 1 / 15f}, new Aggregation.SequenceMeanTokenMean().weights(COUNTS));
        assertArrayEquals(
                new float[] {1 / 3f, 0, 1 / 3f, 1 / 3f}, new Aggregation.SequenceMeanTokenSum().weights(COUNTS));
        assertArrayEquals(new float[] {1 / 24f, 0, 1 / 24f, 1 / 24f},
                new Aggregation.SequenceMeanTokenSumNorm(8).weights(COUNTS));
    }

    /** The counts and the products of counts that a large step reaches do not fit an int. */
    @Test
    void largeStepsDoNotOverflow() {
        int[] counts = new int[1 << 16];
        Arrays.fill(counts, 1 << 17);
        assertEquals(0x1p-33f, new Aggregation.TokenMean().weights(counts)[0]);
        assertEquals(0x1p-33f, new Aggregation.SequenceMeanTokenMean().weights(counts)[0]);
        assertEquals(0x1p-46f, new Aggregation.SequenceMeanTokenSumNorm(1 << 30).weights(counts)[0]);
    }

    @Test
    void misuseIsNamed() {
        Aggregation mean = new Aggregation.TokenMean();
        assertThrows(IllegalArgumentException.class, () -> mean.weights(new int[0]));
        assertThrows(IllegalArgumentException.class, () -> mean.weights(new int[] {0, 0}));
        int[] negative = {1, -1};
        String message = assertThrows(IllegalArgumentException.class, () -> mean.weights(negative)).getMessage();
        assertTrue(message.contains("sequence 1"), message);
        assertThrows(IllegalArgumentException.class, () -> new Aggregation.SequenceMeanTokenSumNorm(0));
    }
}
