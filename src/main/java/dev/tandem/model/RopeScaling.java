package dev.tandem.model;

import org.jspecify.annotations.Nullable;

/**
 * How rotary frequencies are stretched to a longer context.
 *
 * <p>The arithmetic follows transformers ({@code modeling_rope_utils.py}) down to its rounding: frequencies are made
 * in float32 step by step, even in a float64 model, and at position 100,000 one unit in the last place of a frequency
 * is already a visible angle. A cleaner computation in double precision would be a different model.
 */
public sealed interface RopeScaling {

    /**
     * {@return headDim / 2 angles per position step, each a float32 value}
     *
     * @param theta the base
     * @param headDim channels of a head, even
     */
    double[] inverseFrequencies(double theta, int headDim);

    /** {@return what cosine and sine are multiplied with} */
    default double attentionScale() {
        return 1.0;
    }

    /** The plain frequencies {@code theta^(-2i / headDim)}. */
    record None() implements RopeScaling {
        @Override
        public double[] inverseFrequencies(double theta, int headDim) {
            double[] frequencies = new double[headDim / 2];
            for (int i = 0; i < frequencies.length; i++) {
                frequencies[i] = 1f / period(theta, headDim, i);
            }
            return frequencies;
        }
    }

    /**
     * Every frequency divided by one factor.
     *
     * @param factor how much longer the context becomes
     */
    record Linear(double factor) implements RopeScaling {
        /** Checks the factor. */
        public Linear {
            requirePositive("factor", factor);
        }

        @Override
        public double[] inverseFrequencies(double theta, int headDim) {
            double[] frequencies = new None().inverseFrequencies(theta, headDim);
            for (int i = 0; i < frequencies.length; i++) {
                frequencies[i] = (float) frequencies[i] / (float) factor;
            }
            return frequencies;
        }
    }

    /**
     * Llama 3.1: long wavelengths are stretched, short ones kept, those between are blended.
     *
     * @param factor how much long wavelengths are stretched
     * @param lowFrequencyFactor originalMaxPositions over this is the wavelength above which all is stretched
     * @param highFrequencyFactor originalMaxPositions over this is the wavelength below which nothing is
     * @param originalMaxPositions the context of pre-training
     */
    record Llama3(double factor, double lowFrequencyFactor, double highFrequencyFactor, int originalMaxPositions)
            implements RopeScaling {
        /** Checks the factors. */
        public Llama3 {
            requirePositive("factor", factor);
            requirePositive("low_freq_factor", lowFrequencyFactor);
            requirePositive("high_freq_factor", highFrequencyFactor);
            requirePositive("original_max_position_embeddings", originalMaxPositions);
            if (highFrequencyFactor <= lowFrequencyFactor) {
                throw new IllegalArgumentException("rope scaling: expected high_freq_factor above"
                        + " low_freq_factor, found " + highFrequencyFactor + " and " + lowFrequencyFactor);
            }
        }

        @Override
        public double[] inverseFrequencies(double theta, int headDim) {
            double[] frequencies = new None().inverseFrequencies(theta, headDim);
            float longest = (float) (originalMaxPositions / lowFrequencyFactor);
            float shortest = (float) (originalMaxPositions / highFrequencyFactor);
            for (int i = 0; i < frequencies.length; i++) {
                float frequency = (float) frequencies[i];
                float wavelength = (float) (2 * Math.PI) / frequency;
                if (wavelength > longest) {
                    frequencies[i] = frequency / (float) factor;
                } else if (wavelength >= shortest) {
                    float smooth = (originalMaxPositions / wavelength - (float) lowFrequencyFactor)
                            / (float) (highFrequencyFactor - lowFrequencyFactor);
                    frequencies[i] = (1 - smooth) * frequency / (float) factor + smooth * frequency;
                }
            }
            return frequencies;
        }
    }

    /**
     * YaRN (Peng et al., 2023): channels that turn often keep their frequency, slow ones are interpolated, and
     * attention gets a temperature.
     *
     * @param factor how much longer the context becomes
     * @param originalMaxPositions the context of pre-training
     * @param betaFast turns over that context above which a channel is kept
     * @param betaSlow turns below which it is interpolated
     * @param attentionFactor the factor on cosine and sine, or null to derive it from {@code factor}
     * @param mscale with {@code mscaleAllDim} another way to derive that factor, or null
     * @param mscaleAllDim see {@code mscale}
     * @param truncate whether the blended range is widened to whole channels
     */
    record Yarn(double factor, int originalMaxPositions, double betaFast, double betaSlow,
            @Nullable Double attentionFactor,
            @Nullable Double mscale, @Nullable Double mscaleAllDim, boolean truncate) implements RopeScaling {
        /** Checks the numbers. */
        public Yarn {
            requirePositive("factor", factor);
            requirePositive("original_max_position_embeddings", originalMaxPositions);
            requirePositive("beta_fast", betaFast);
            requirePositive("beta_slow", betaSlow);
            if (attentionFactor != null) {
                requirePositive("attention_factor", attentionFactor);
            }
        }

        /**
         * YaRN with the paper's constants.
         *
         * @param factor how much longer the context becomes
         * @param originalMaxPositions the context of pre-training
         */
        public Yarn(double factor, int originalMaxPositions) {
            this(factor, originalMaxPositions, 32, 1, null, null, null, true);
        }

        @Override
        public double attentionScale() {
            if (attentionFactor != null) {
                return attentionFactor;
            }
            if (mscale != null && mscaleAllDim != null && mscale != 0 && mscaleAllDim != 0) {
                return temperature(mscale) / temperature(mscaleAllDim);
            }
            return temperature(1);
        }

        private double temperature(double scale) {
            return factor <= 1 ? 1 : 0.1 * scale * Math.log(factor) + 1;
        }

        @Override
        public double[] inverseFrequencies(double theta, int headDim) {
            double low = channelOf(betaFast, theta, headDim);
            double high = channelOf(betaSlow, theta, headDim);
            if (truncate) {
                low = Math.floor(low);
                high = Math.ceil(high);
            }
            low = Math.max(low, 0);
            high = Math.min(high, headDim - 1);
            if (low == high) {
                high += 0.001;
            }
            double[] frequencies = new double[headDim / 2];
            for (int i = 0; i < frequencies.length; i++) {
                float period = period(theta, headDim, i);
                float ramp = Math.clamp((i - (float) low) / (float) (high - low), 0f, 1f);
                float kept = 1 - ramp;
                frequencies[i] = 1f / ((float) factor * period) * (1 - kept) + 1f / period * kept;
            }
            return frequencies;
        }

        /** The (fractional) channel that turns this often over the original context. */
        private double channelOf(double turns, double theta, int headDim) {
            return headDim * Math.log(originalMaxPositions / (turns * 2 * Math.PI)) / (2 * Math.log(theta));
        }
    }

    private static float period(double theta, int headDim, int channel) {
        return (float) Math.pow((float) theta, 2f * channel / headDim);
    }

    private static void requirePositive(String field, double value) {
        if (!(value > 0) || Double.isInfinite(value)) {
            throw new IllegalArgumentException("rope scaling: expected a positive " + field + ", found " + value);
        }
    }
}
