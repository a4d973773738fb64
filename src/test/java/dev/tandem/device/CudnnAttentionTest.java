package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.CudnnAttention.Bucket;
import java.util.Arrays;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** What {@link CudnnAttention} decides before it calls cuDNN. */
class CudnnAttentionTest {
    @ParameterizedTest
    @CsvSource({
        "1, 1, 4, 256", "4, 256, 4, 256", "5, 257, 8, 384", "8, 384, 8, 384", "9, 385, 16, 512", "16, 512, 16, 512", "17, 513, 32, 768",
        "8, 1024, 8, 1024", "3, 1025, 4, 1536", "3, 1537, 4, 2048", "1000, 131072, 1024, 131072", "1, 100000, 4, 131072"
    })
    void roundsUp(int sequences, int longest, int batch, int tokens) {
        long[] lengths = new long[sequences];
        Arrays.fill(lengths, 1);
        lengths[sequences / 2] = longest;
        assertEquals(new Bucket(batch, tokens), Bucket.of(lengths));
    }

    @Test
    void refusesMoreElementsThanAnIntegerCounts() {
        assertNull(CudnnAttention.obstacle(1_048_575, 16, 128));
        String obstacle = CudnnAttention.obstacle(1_048_576, 16, 128);
        assertNotNull(obstacle);
        assertTrue(obstacle.contains("1048576 tokens have 2147483648 elements"), obstacle);
        assertNotNull(CudnnAttention.obstacle(1L << 40, 128, 256));
    }
}
