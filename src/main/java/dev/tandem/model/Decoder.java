package dev.tandem.model;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Gradients;
import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * A decoder-only transformer, for every architecture: what differs between families is data in {@link ModelConfig}, and how
 * tokens attend is the caller's {@link Attention}. Generation and training call the same methods with the same weights, so what
 * they compute differs only by how libtorch rounds for other shapes.
 *
 * <p>Tokens of all sequences lie one after the other in the first dimension; nothing is padded. With gradients enabled the
 * operations are recorded. Confined to its rank's thread; the owner closes it.
 *
 * <p>Letters in comments: T tokens, H heads, K KV heads, D head size, E hidden size.
 */
public final class Decoder implements AutoCloseable {
    private final ModelConfig config;
    private final @Nullable Rotary rotary;

    /**
     * @param config the model
     * @param device of the weights
     * @param dtype of the weights
     */
    public Decoder(ModelConfig config, Device device, DType dtype) {
        this.config = config;
        rotary = config.positions() instanceof Positions.Rope rope ? new Rotary(rope, config, device, dtype) : null;
    }

    /** Where the tokens of a step stand in their sequences, in the form in which the layers use it. */
    public static final class Placement {
        private final Tensor positions;
        private final Rotary.@Nullable Rotation rotation;

        private Placement(Tensor positions, Rotary.@Nullable Rotation rotation) {
            this.positions = positions;
            this.rotation = rotation;
        }

        /** {@return queries and keys [T, heads + KV heads, D] with their positions, where these enter by rotation} */
        public Tensor rotate(Tensor queryKey) {
            return rotation == null ? queryKey : rotation.rotate(queryKey);
        }

        /** {@return the gradient of {@link #rotate}'s argument, from that of its result} */
        public Tensor rotateBack(Tensor gradient) {
            return rotation == null ? gradient : rotation.rotateBack(gradient);
        }
    }

    /**
     * Prepares positions for a step.
     *
     * @param positions INT64 [T], from 0 in each sequence
     * @param limit greater than every position
     * @return valid as long as the innermost scope
     */
    public Placement place(Tensor positions, int limit) {
        return new Placement(positions, rotary == null ? null : rotary.at(positions, limit, config.heads() + config.kvHeads()));
    }

    /** {@return where tokens stand, for {@link #embed} alone} */
    public Placement placeEmbeddings(Tensor positions) {
        return new Placement(positions, null);
    }

    /** {@return hidden states [T, E] of tokens, INT64 [T]} */
    public Tensor embed(WeightGroup embedding, Tensor tokens, Placement placement) {
        Tensor x = embedding.weight(ParameterRole.EMBED_TOKENS).indexSelect(0, tokens);
        Tensor projection = embedding.find(ParameterRole.PROJECT_IN);
        if (projection != null) {
            x = x.linear(projection, null);
        }
        if (config.positions() instanceof Positions.Learned learned) {
            Tensor rows = placement.positions.add(learned.offset());
            x = x.add(embedding.weight(ParameterRole.EMBED_POSITIONS).indexSelect(0, rows));
        }
        return x;
    }

    /**
     * Runs one layer.
     *
     * @param x hidden states [T, E]
     * @param wanted INT64 [W], the tokens whose result is wanted, or null for all; others only leave their keys and values
     * @return [T, E] or [W, E]
     */
    public Tensor layer(int layer, WeightGroup w, Tensor x, Placement placement, Attention attention, @Nullable Tensor wanted) {
        Tensor input = config.normFirst()
                ? norm(x, w.find(ParameterRole.ATTENTION_NORM_WEIGHT), w.find(ParameterRole.ATTENTION_NORM_BIAS))
                : x;
        Tensor attended = attend(layer, w, input, placement, attention);
        if (wanted != null) {
            x = x.indexSelect(0, wanted);
            attended = attended.indexSelect(0, wanted);
        }
        x = x.add(attended.linear(w.weight(ParameterRole.O_WEIGHT), w.find(ParameterRole.O_BIAS)));
        if (!config.normFirst()) {
            x = norm(x, w.find(ParameterRole.ATTENTION_NORM_WEIGHT), w.find(ParameterRole.ATTENTION_NORM_BIAS));
        }
        input = config.normFirst()
                ? norm(x, w.find(ParameterRole.MLP_NORM_WEIGHT), w.find(ParameterRole.MLP_NORM_BIAS))
                : x;
        x = x.add(mlp(w, input));
        if (!config.normFirst()) {
            x = norm(x, w.find(ParameterRole.MLP_NORM_WEIGHT), w.find(ParameterRole.MLP_NORM_BIAS));
        }
        return x;
    }

    private Tensor attend(int layer, WeightGroup w, Tensor x, Placement placement, Attention attention) {
        long tokens = x.size(0);
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        Tensor qkv = x.linear(w.weight(ParameterRole.Q_WEIGHT), w.find(ParameterRole.Q_BIAS))
                .reshape(tokens, heads + 2L * kvHeads, config.headDim());
        Tensor value = qkv.narrow(1, heads + kvHeads, kvHeads);
        Tensor queryKey = qkv.narrow(1, 0, heads + kvHeads);
        if (config.qkNorm()) {
            queryKey = Tensor.concatenate(1,
                    qkv.narrow(1, 0, heads).rmsNorm(w.weight(ParameterRole.Q_NORM), config.normEps()),
                    qkv.narrow(1, heads, kvHeads).rmsNorm(w.weight(ParameterRole.K_NORM), config.normEps()));
        }
        if (placement.rotation != null) {
            queryKey = placement.rotation.rotate(queryKey);
        }
        return attention.attend(layer, queryKey.narrow(1, 0, heads), queryKey.narrow(1, heads, kvHeads), value);
    }

    private Tensor mlp(WeightGroup w, Tensor x) {
        Tensor inner;
        if (config.gatedMlp()) {
            Tensor both = x.linear(w.weight(ParameterRole.GATE_WEIGHT), w.find(ParameterRole.GATE_BIAS));
            long size = config.intermediateSize();
            Tensor gate = both.narrow(1, 0, size);
            Tensor up = both.narrow(1, size, size);
            boolean inPlace = config.activation() == Activation.SILU && !Gradients.areEnabled();
            inner = inPlace ? gate.siluInPlace().mulInPlace(up) : activate(gate).mul(up);
        } else {
            inner = activate(x.linear(w.weight(ParameterRole.UP_WEIGHT), w.find(ParameterRole.UP_BIAS)));
        }
        return inner.linear(w.weight(ParameterRole.DOWN_WEIGHT), w.find(ParameterRole.DOWN_BIAS));
    }

    private Tensor activate(Tensor x) {
        return switch (config.activation()) {
            case SILU -> x.silu();
            case RELU -> x.relu();
            case GELU -> x.gelu(false);
            case GELU_TANH -> x.gelu(true);
        };
    }

    private Tensor norm(Tensor x, @Nullable Tensor weight, @Nullable Tensor bias) {
        return switch (config.norm()) {
            case RMS -> x.rmsNorm(java.util.Objects.requireNonNull(weight), config.normEps());
            case LAYER -> x.layerNorm(weight, bias, config.normEps());
        };
    }

    /** {@return the states [T, embedding size] that the logit matrix is multiplied with} */
    public Tensor finish(WeightGroup head, Tensor x) {
        if (config.finalNorm()) {
            x = norm(x, head.find(ParameterRole.FINAL_NORM_WEIGHT), head.find(ParameterRole.FINAL_NORM_BIAS));
        }
        Tensor projection = head.find(ParameterRole.PROJECT_OUT);
        return projection == null ? x : x.linear(projection, null);
    }

    @Override
    public void close() {
        if (rotary != null) {
            rotary.close();
        }
    }
}
