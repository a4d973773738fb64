package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.model.Positions.Rope;
import org.junit.jupiter.api.Test;

/**
 * The expected numbers are the buffers of transformers' LlamaRotaryEmbedding, at channels 0, 1, 7, 13, 17, 20, 24 and
 * the last.
 */
class RopeScalingTest {
    private static final int[] CHANNELS = {0, 1, 7, 13, 17, 20, 24};

    private static void check(Rope rope, int headDim, double attentionScale, double... expected) {
        double[] found = rope.inverseFrequencies(headDim);
        assertEquals(headDim / 2, found.length);
        for (int i = 0; i < expected.length; i++) {
            int channel = i < CHANNELS.length ? CHANNELS[i] : headDim / 2 - 1;
            // Two units in the last place of a float: powf differs that much between machines.
            assertEquals(expected[i], found[channel], 2 * Math.ulp((float) expected[i]), "channel " + channel);
            assertEquals((double) (float) found[channel], found[channel], "float32 value");
        }
        assertEquals(attentionScale, rope.attentionScale(), 1e-15);
    }

    @Test
    void plain() {
        check(new Rope(10_000), 64, 1, 1.0, 0.7498942017555237, 0.1333521455526352, 0.0237137358635664,
                0.007498942315578461,
                0.003162277862429619, 0.0010000000474974513, 0.0001333521504420787);
        check(new Rope(500_000), 128, 1, 1.0, 0.8146172165870667, 0.2380538135766983, 0.06956595182418823,
                0.030634520575404167,
                0.016560440883040428, 0.00729266507551074, 2.4551407022954663e-06);
    }

    @Test
    void linear() {
        check(new Rope(10_000, new RopeScaling.Linear(3)), 64, 1, 0.3333333432674408, 0.24996472895145416,
                0.04445071518421173,
                0.007904578931629658, 0.0024996474385261536, 0.0010540926596149802, 0.0003333333588670939,
                        4.4450716814026237e-05);
    }

    @Test
    void llama3() {
        check(new Rope(500_000, new RopeScaling.Llama3(32, 1, 4, 8192)), 64, 1, 1.0, 0.663601279258728,
                0.05666961893439293,
                0.00483942124992609, 9.708286233944818e-05, 8.570255886297673e-06, 1.6619674170215148e-06,
                        9.418306490260875e-08);
    }

    @Test
    void yarn() {
        check(new Rope(1_000_000, new RopeScaling.Yarn(4, 32_768)), 128, 1.138629436111989, 1.0, 0.8058422207832336,
                0.22067339718341827, 0.0604296438395977, 0.025482967495918274, 0.01333521492779255,
                        0.005375321488827467,
                3.102344408034696e-07);
        check(new Rope(10_000, new RopeScaling.Yarn(40, 4096, 16, 2, null, 0.707, 1.2, false)), 64, 0.8739404576185121,
                1.0,
                0.7498942017555237, 0.1333521455526352, 0.02333124354481697, 0.0033299592323601246,
                        0.00012395245721563697,
                2.499999936844688e-05, 3.3338035336782923e-06);
        assertEquals(1.5, new RopeScaling.Yarn(4, 10, 32, 1, 1.5, null, null, true).attentionScale());
    }

    @Test
    void badNumbersAreNamed() {
        assertTrue(assertThrows(IllegalArgumentException.class, () ->
                new RopeScaling.Linear(0)).getMessage().contains("factor"));
        assertTrue(assertThrows(IllegalArgumentException.class, () -> new RopeScaling.Llama3(8, 4, 1, 10)).getMessage()
                .contains("high_freq_factor"));
        assertTrue(assertThrows(IllegalArgumentException.class, () ->
                new Rope(Double.NaN)).getMessage().contains("theta"));
    }
}
