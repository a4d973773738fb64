package dev.tandem.model;

import com.google.gson.JsonObject;
import java.util.List;

/**
 * OPT (Zhang et al., 2022). Its 350M checkpoint is the odd one out and the reason for several components of {@link
 * ModelConfig}: norms follow the residual sum, none follows the last layer, and embeddings are narrower than the
 * model.
 */
final class OptFormat extends FamilyFormat {

    OptFormat() {
        String layer = "model.decoder.layers.{layer}.";
        name(ParameterRole.EMBED_TOKENS, "model.decoder.embed_tokens.weight");
        name(ParameterRole.EMBED_POSITIONS, "model.decoder.embed_positions.weight");
        name(ParameterRole.PROJECT_IN, "model.decoder.project_in.weight");
        name(ParameterRole.PROJECT_OUT, "model.decoder.project_out.weight");
        name(ParameterRole.FINAL_NORM_WEIGHT, "model.decoder.final_layer_norm.weight");
        name(ParameterRole.FINAL_NORM_BIAS, "model.decoder.final_layer_norm.bias");
        name(ParameterRole.LM_HEAD, "lm_head.weight");
        name(ParameterRole.ATTENTION_NORM_WEIGHT, layer + "self_attn_layer_norm.weight");
        name(ParameterRole.ATTENTION_NORM_BIAS, layer + "self_attn_layer_norm.bias");
        name(ParameterRole.Q_WEIGHT, layer + "self_attn.q_proj.weight");
        name(ParameterRole.K_WEIGHT, layer + "self_attn.k_proj.weight");
        name(ParameterRole.V_WEIGHT, layer + "self_attn.v_proj.weight");
        name(ParameterRole.Q_BIAS, layer + "self_attn.q_proj.bias");
        name(ParameterRole.K_BIAS, layer + "self_attn.k_proj.bias");
        name(ParameterRole.V_BIAS, layer + "self_attn.v_proj.bias");
        name(ParameterRole.O_WEIGHT, layer + "self_attn.out_proj.weight");
        name(ParameterRole.O_BIAS, layer + "self_attn.out_proj.bias");
        name(ParameterRole.MLP_NORM_WEIGHT, layer + "final_layer_norm.weight");
        name(ParameterRole.MLP_NORM_BIAS, layer + "final_layer_norm.bias");
        name(ParameterRole.UP_WEIGHT, layer + "fc1.weight");
        name(ParameterRole.UP_BIAS, layer + "fc1.bias");
        name(ParameterRole.DOWN_WEIGHT, layer + "fc2.weight");
        name(ParameterRole.DOWN_BIAS, layer + "fc2.bias");
    }

    @Override
    ModelConfig read(Architecture architecture, JsonFields fields) {
        ModelConfigBuilder builder = builder(architecture, fields);
        builder.kvHeads = builder.heads;
        builder.headDim = headDim(fields, builder);
        builder.intermediateSize = fields.size("ffn_dim");
        builder.maxPositions = fields.size("max_position_embeddings", 2048);
        builder.embeddingSize = fields.size("word_embed_proj_dim", builder.hiddenSize);
        builder.norm = Norm.LAYER;
        builder.normEps = 1e-5;
        builder.normAffine = fields.flag("layer_norm_elementwise_affine", true);
        builder.normFirst = fields.flag("do_layer_norm_before", true);
        builder.finalNorm = builder.normFirst && !fields.flag("_remove_final_layer_norm", false);
        builder.activation = activation(fields, "activation_function", Activation.RELU);
        builder.gatedMlp = false;
        boolean bias = fields.flag("enable_bias", true);
        builder.qkvBias = bias;
        builder.outputBias = bias;
        builder.mlpBias = bias;
        builder.positions = new Positions.Learned(2);
        builder.tiedEmbeddings = fields.flag("tie_word_embeddings", true);
        builder.bosTokenId = fields.tokenId("bos_token_id", 2);
        builder.eosTokenIds = fields.tokenIds("eos_token_id", List.of(2));
        builder.padTokenId = fields.tokenId("pad_token_id", 1);
        return builder.build();
    }

    @Override
    void write(ModelConfig config, JsonObject json) {
        json.addProperty("ffn_dim", config.intermediateSize());
        json.addProperty("word_embed_proj_dim", config.embeddingSize());
        json.addProperty("activation_function", config.activation().hubName());
        json.addProperty("layer_norm_elementwise_affine", config.normAffine());
        json.addProperty("do_layer_norm_before", config.normFirst());
        json.addProperty("_remove_final_layer_norm", config.normFirst() && !config.finalNorm());
        json.addProperty("enable_bias", config.qkvBias());
        json.addProperty("dropout", 0.0);
        json.addProperty("attention_dropout", 0.0);
    }
}
