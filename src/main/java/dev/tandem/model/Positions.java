package dev.tandem.model;

/** How a decoder learns where a token stands. */
public sealed interface Positions {

    /**
     * Rotary position embedding (Su et al., 2021): each pair of a head's channels (i, i + headDim / 2) is turned by
     * an angle that grows with the position.
     *
     * @param theta the base of the frequencies
     * @param scaling how the frequencies are stretched beyond the context they were trained for
     */
    record Rope(double theta, RopeScaling scaling) implements Positions {
        /** Checks the base. */
        public Rope {
            if (!(theta > 1) || theta > Float.MAX_VALUE) {
                throw new IllegalArgumentException("rope theta: expected a finite number above 1, found " + theta);
            }
        }

        /** @param theta the base of the frequencies, without scaling */
        public Rope(double theta) {
            this(theta, new RopeScaling.None());
        }

        /**
         * {@return headDim / 2 angles per position step, in radians, each a float32 value}
         *
         * @param headDim channels of a head, even
         */
        public double[] inverseFrequencies(int headDim) {
            return scaling.inverseFrequencies(theta, headDim);
        }

        /** {@return what cosine and sine are multiplied with} */
        public double attentionScale() {
            return scaling.attentionScale();
        }
    }

    /**
     * A table with one row per position, added to the token embeddings.
     *
     * @param offset rows before the row of position 0 (OPT keeps two from fairseq's padding index)
     */
    record Learned(int offset) implements Positions {
        /** Checks the offset. */
        public Learned {
            if (offset < 0 || offset > 1024) {
                throw new IllegalArgumentException("learned positions: expected an offset from 0 to 1024, found "
                        + offset);
            }
        }
    }
}
