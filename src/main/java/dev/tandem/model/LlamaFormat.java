package dev.tandem.model;

import com.google.gson.JsonObject;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Llama and the families that copied its layout (Touvron et al., 2023; Qwen2 and Qwen3 technical reports). They
 * differ in a few biases, the norm over query and key heads, and the defaults of absent fields; those differences are
 * the fields below.
 */
final class LlamaFormat extends FamilyFormat {
    /** Whether biases are there: always, never, or as a field says. */
    private enum Bias {
        NEVER, ALWAYS, FIELD
    }

    private final Bias qkvBias;
    private final Bias outputBias;
    private final Bias mlpBias;
    private final boolean qkNorm;
    private final boolean slidingWindow;
    private final @Nullable Integer defaultKvHeads;
    private final @Nullable Integer defaultHeadDim;
    private final int defaultMaxPositions;
    private final @Nullable Integer defaultBos;
    private final List<Integer> defaultEos;

    private LlamaFormat(Bias qkvBias, Bias outputBias, Bias mlpBias, boolean qkNorm, boolean slidingWindow,
            @Nullable Integer defaultKvHeads, @Nullable Integer defaultHeadDim, int defaultMaxPositions,
            @Nullable Integer defaultBos, List<Integer> defaultEos) {
        this.qkvBias = qkvBias;
        this.outputBias = outputBias;
        this.mlpBias = mlpBias;
        this.qkNorm = qkNorm;
        this.slidingWindow = slidingWindow;
        this.defaultKvHeads = defaultKvHeads;
        this.defaultHeadDim = defaultHeadDim;
        this.defaultMaxPositions = defaultMaxPositions;
        this.defaultBos = defaultBos;
        this.defaultEos = defaultEos;
        nameTensors();
    }

    static LlamaFormat llama() {
        return new LlamaFormat(Bias.FIELD, Bias.FIELD, Bias.FIELD, false, false, null, null, 2048, 1, List.of(2));
    }

    static LlamaFormat qwen2() {
        return new LlamaFormat(Bias.ALWAYS, Bias.NEVER, Bias.NEVER, false, true, 32, null, 32_768, null, List.of());
    }

    static LlamaFormat qwen3() {
        return new LlamaFormat(Bias.FIELD, Bias.FIELD, Bias.NEVER, true, true, 32, 128, 32_768, null, List.of());
    }

    private void nameTensors() {
        String layer = "model.layers.{layer}.";
        name(ParameterRole.EMBED_TOKENS, "model.embed_tokens.weight");
        name(ParameterRole.FINAL_NORM_WEIGHT, "model.norm.weight");
        name(ParameterRole.LM_HEAD, "lm_head.weight");
        name(ParameterRole.ATTENTION_NORM_WEIGHT, layer + "input_layernorm.weight");
        name(ParameterRole.Q_WEIGHT, layer + "self_attn.q_proj.weight");
        name(ParameterRole.K_WEIGHT, layer + "self_attn.k_proj.weight");
        name(ParameterRole.V_WEIGHT, layer + "self_attn.v_proj.weight");
        name(ParameterRole.Q_BIAS, layer + "self_attn.q_proj.bias");
        name(ParameterRole.K_BIAS, layer + "self_attn.k_proj.bias");
        name(ParameterRole.V_BIAS, layer + "self_attn.v_proj.bias");
        name(ParameterRole.Q_NORM, layer + "self_attn.q_norm.weight");
        name(ParameterRole.K_NORM, layer + "self_attn.k_norm.weight");
        name(ParameterRole.O_WEIGHT, layer + "self_attn.o_proj.weight");
        name(ParameterRole.O_BIAS, layer + "self_attn.o_proj.bias");
        name(ParameterRole.MLP_NORM_WEIGHT, layer + "post_attention_layernorm.weight");
        name(ParameterRole.GATE_WEIGHT, layer + "mlp.gate_proj.weight");
        name(ParameterRole.UP_WEIGHT, layer + "mlp.up_proj.weight");
        name(ParameterRole.GATE_BIAS, layer + "mlp.gate_proj.bias");
        name(ParameterRole.UP_BIAS, layer + "mlp.up_proj.bias");
        name(ParameterRole.DOWN_WEIGHT, layer + "mlp.down_proj.weight");
        name(ParameterRole.DOWN_BIAS, layer + "mlp.down_proj.bias");
    }

    @Override
    ModelConfig read(Architecture architecture, JsonFields fields) {
        ModelConfigBuilder builder = builder(architecture, fields);
        boolean absent = !fields.has("num_key_value_heads") && !fields.isNull("num_key_value_heads");
        builder.kvHeads = fields.size("num_key_value_heads",
                absent && defaultKvHeads != null ? defaultKvHeads : builder.heads);
        if (builder.heads % builder.kvHeads != 0) {
            throw fields.wrong("num_key_value_heads", "a divisor of num_attention_heads " + builder.heads
                    + (absent ? " (absent means " + builder.kvHeads + ")" : ""));
        }
        builder.headDim = fields.has("head_dim") ? fields.size("head_dim")
                : defaultHeadDim != null ? defaultHeadDim : headDim(fields, builder);
        builder.intermediateSize = fields.size("intermediate_size");
        builder.maxPositions = fields.size("max_position_embeddings", defaultMaxPositions);
        builder.embeddingSize = builder.hiddenSize;
        builder.normEps = fields.number("rms_norm_eps", 1e-6);
        builder.activation = activation(fields, "hidden_act", Activation.SILU);
        builder.qkvBias = bias(qkvBias, fields, "attention_bias");
        builder.outputBias = bias(outputBias, fields, "attention_bias");
        builder.mlpBias = bias(mlpBias, fields, "mlp_bias");
        builder.qkNorm = qkNorm;
        builder.positions = RopeFormat.read(fields, builder.maxPositions);
        builder.tiedEmbeddings = fields.flag("tie_word_embeddings", false);
        builder.bosTokenId = fields.tokenId("bos_token_id", defaultBos);
        builder.eosTokenIds = fields.tokenIds("eos_token_id", defaultEos);
        builder.padTokenId = fields.tokenId("pad_token_id", null);
        if (slidingWindow) {
            refuseSlidingWindow(fields, builder);
        }
        return builder.build();
    }

    private static boolean bias(Bias bias, JsonFields fields, String field) {
        return bias == Bias.ALWAYS || (bias == Bias.FIELD && fields.flag(field, false));
    }

    /** A window as wide as the context hides nothing; a narrower one would change what the model computes. */
    private static void refuseSlidingWindow(JsonFields fields, ModelConfigBuilder builder) {
        List<String> layerTypes = fields.texts("layer_types");
        boolean windowed = layerTypes.isEmpty()
                ? fields.flag("use_sliding_window", false) && fields.size("max_window_layers", 28) < builder.layers
                : layerTypes.stream().anyMatch(type -> !type.equals("full_attention"));
        boolean disabled = fields.isNull("sliding_window") || !fields.flag("use_sliding_window", false);
        boolean unknown = !layerTypes.isEmpty() && disabled;
        if (windowed && (unknown || fields.size("sliding_window", 4096) < builder.maxPositions)) {
            throw fields.wrong(layerTypes.isEmpty() ? "use_sliding_window" : "layer_types",
                    "attention over the whole context (sliding-window layers are not supported; to use the model within"
                            + " its window, set max_position_embeddings to it)");
        }
    }

    @Override
    void write(ModelConfig config, JsonObject json) {
        json.addProperty("num_key_value_heads", config.kvHeads());
        json.addProperty("head_dim", config.headDim());
        json.addProperty("intermediate_size", config.intermediateSize());
        json.addProperty("rms_norm_eps", config.normEps());
        json.addProperty("hidden_act", config.activation().hubName());
        if (qkvBias == Bias.FIELD) {
            json.addProperty("attention_bias", config.qkvBias());
        }
        if (mlpBias == Bias.FIELD) {
            json.addProperty("mlp_bias", config.mlpBias());
        }
        json.addProperty("attention_dropout", 0.0);
        if (slidingWindow) {
            json.addProperty("use_sliding_window", false);
        }
        RopeFormat.write(config.positions(), json);
    }
}
