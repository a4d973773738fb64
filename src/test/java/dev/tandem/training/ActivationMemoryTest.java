package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.TinyModels;
import org.junit.jupiter.api.Test;

class ActivationMemoryTest {
    private static final long GIB = 1L << 30;
    private static final int MOST = 16_384;

    /** As Qwen3-8B is published. */
    private static final ModelConfig CONFIG = TinyModels.of("""
            {"model_type":"qwen3","hidden_size":4096,"num_hidden_layers":36,"num_attention_heads":32,"num_key_value_heads":8,
             "head_dim":128,"intermediate_size":12288,"vocab_size":151936,"tie_word_embeddings":false,"max_position_embeddings":40960,
             "rope_theta":1000000.0,"rms_norm_eps":1e-6}""");

    private static ActivationMemory memory(Device device, long budget, long room) {
        TrainerOptions options = TrainerOptions.defaults().microBatchTokens(MOST).memory(budget, 2 * GIB);
        return new ActivationMemory(CONFIG, DType.BFLOAT16, device, options, room);
    }

    @Test
    void microBatchesAreSmallerWhereMoreLayersAreKeptThen() {
        Device gpu = Device.cuda(0);
        int[] gibibytes = {12, 33, 70};
        int[] expected = {4096, 8192, MOST}; // all layers of 16,384 tokens take 57 GiB
        for (int i = 0; i < expected.length; i++) {
            ActivationMemory memory = memory(gpu, TrainerOptions.ALL_THAT_FITS, gibibytes[i] * GIB);
            int tokens = memory.microBatchTokens(3000);
            int kept = memory.recordedLayers(tokens);
            System.out.printf("%d GiB: %d tokens, %d of 36 layers are kept, of 16,384 tokens %d%n", gibibytes[i], tokens, kept,
                    memory.recordedLayers(MOST));
            assertEquals(expected[i], tokens);
            assertTrue(memory.bytes(tokens, kept) <= gibibytes[i] * GIB);
            assertTrue(kept == CONFIG.layers() || memory.bytes(tokens, kept + 1) > gibibytes[i] * GIB);
        }
    }

    @Test
    void noMicroBatchIsShorterThanTheLongestSequence() {
        ActivationMemory memory = memory(Device.cuda(0), TrainerOptions.ALL_THAT_FITS, 12 * GIB);
        for (int longest : new int[] {1, 4096, 4097, 9000, MOST, 40_000}) {
            int tokens = memory.microBatchTokens(longest);
            assertTrue(tokens == MOST || tokens >= longest, tokens + " tokens where a sequence has " + longest);
        }
        assertEquals(8192, memory.microBatchTokens(4097));
    }

    @Test
    void aBudgetOfTheUserAndTheCpuLeaveThemAsTheyAre() {
        assertEquals(MOST, memory(Device.cuda(0), GIB, GIB).microBatchTokens(1));
        assertEquals(MOST, memory(Device.cpu(), TrainerOptions.ALL_THAT_FITS, GIB).microBatchTokens(1));
    }
}
