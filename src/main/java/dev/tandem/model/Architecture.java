package dev.tandem.model;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.device.DType;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import java.util.stream.Collectors;

/**
 * The families of decoders whose files are understood.
 *
 * <p>A family is a spelling, not a computation: it says how {@code config.json} becomes a {@link ModelConfig} and
 * what Hugging Face calls each {@link ParameterRole}. What the model then computes follows from the config alone, so
 * a further family of the same pattern is one constant here, with its defaults, and (where it spells differently) one
 * {@link FamilyFormat}.
 */
@SuppressWarnings("ImmutableEnumChecker") // formats are immutable, only not marked as such
public enum Architecture {
    /** Llama 1 to 3.2 and everything saved as one (SmolLM, TinyLlama, …). */
    LLAMA("LlamaForCausalLM", "llama", LlamaFormat.llama()),
    /** Qwen2 and Qwen2.5. */
    QWEN2("Qwen2ForCausalLM", "qwen2", LlamaFormat.qwen2()),
    /** Qwen3, dense. */
    QWEN3("Qwen3ForCausalLM", "qwen3", LlamaFormat.qwen3()),
    /** OPT, 125M to 66B. */
    OPT("OPTForCausalLM", "opt", new OptFormat());

    private final String className;
    private final String modelType;
    private final FamilyFormat format;

    Architecture(String className, String modelType, FamilyFormat format) {
        this.className = className;
        this.modelType = modelType;
        this.format = format;
    }

    /** {@return the name of the class in transformers, as {@code architectures} in config.json has it} */
    public String className() {
        return className;
    }

    /**
     * {@return its full name in a Hugging Face checkpoint}
     *
     * @param role what the tensor does
     * @param layer its layer, ignored for roles outside layers
     */
    public String tensorName(ParameterRole role, int layer) {
        String pattern = format.names().get(role);
        if (pattern == null) {
            throw new IllegalArgumentException(className + " has no tensor for the role " + role);
        }
        return pattern.replace("{layer}", Integer.toString(layer));
    }

    /**
     * Lists every tensor of a model, a tied LM head left out: embeddings, then the layers in order with q, k, v
     * weights next to each other, their biases next to each other, and gate and up likewise, then what follows the
     * layers. The weight arena lays its bytes out in this order.
     *
     * @param config the model
     * @return the tensors
     */
    public static List<ParameterSpec> parameters(ModelConfig config) {
        return new ParameterList(config).all();
    }

    /**
     * Reads a config.
     *
     * @throws ModelFormatException naming file, field, expected, found
     */
    static ModelConfig readConfig(JsonFields fields) {
        Architecture architecture = of(fields);
        if (fields.has("quantization_config")) {
            throw fields.wrong("quantization_config",
                    "none: quantised weights cannot be loaded, take the original checkpoint");
        }
        try {
            return architecture.format.read(architecture, fields);
        } catch (IllegalArgumentException e) {
            throw new ModelFormatException(fields.source() + ": " + e.getMessage(), e);
        }
    }

    private static Architecture of(JsonFields fields) {
        List<String> classes = fields.texts("architectures");
        String type = fields.text("model_type");
        for (Architecture each : values()) {
            // A base model ("LlamaModel") is exported without its head; where the head is tied nothing is missing.
            String base = each.className.replace("ForCausalLM", "Model");
            boolean byType = classes.isEmpty() && each.modelType.equals(type);
            if (byType || classes.contains(each.className) || classes.contains(base)) {
                if (type != null && !type.equals(each.modelType)) {
                    throw fields.wrong("model_type", "\"" + each.modelType + "\" because architectures says "
                            + classes);
                }
                return each;
            }
        }
        String supported = Arrays.stream(values()).map(Architecture::className).collect(Collectors.joining(", "));
        String found = classes.isEmpty() ? "model_type " + (type == null ? "missing" : "\"" + StrictJson.brief(type)
                + "\"")
                : StrictJson.brief(classes.toString());
        throw new ModelFormatException(fields.source() + ": field \"architectures\": expected one of " + supported
                + ", found " + found);
    }

    /**
     * @throws IllegalArgumentException when this family's files cannot say what the config says
     */
    JsonObject toJson(ModelConfig config, DType dtype) {
        JsonObject json = new JsonObject();
        json.add("architectures", JsonParser.parseString("[\"" + className + "\"]"));
        json.addProperty("model_type", modelType);
        json.addProperty("torch_dtype", dtype.name().toLowerCase(Locale.ROOT));
        json.addProperty("vocab_size", config.vocabSize());
        json.addProperty("hidden_size", config.hiddenSize());
        json.addProperty("num_hidden_layers", config.layers());
        json.addProperty("num_attention_heads", config.heads());
        json.addProperty("max_position_embeddings", config.maxPositions());
        json.addProperty("tie_word_embeddings", config.tiedEmbeddings());
        json.addProperty("bos_token_id", config.bosTokenId());
        json.add("eos_token_id", GenerationDefaults.idsToJson(config.eosTokenIds()));
        json.addProperty("pad_token_id", config.padTokenId());
        json.addProperty("use_cache", true);
        format.write(config, json);
        JsonElement written = StrictJson.parse("config.json", StrictJson.print(json));
        ModelConfig back = readConfig(JsonFields.of("config.json", written));
        if (!back.equals(config)) {
            throw new IllegalArgumentException("A config.json of " + className
                    + " cannot express this config.\nasked: " + config
                    + "\nits files would say: " + back);
        }
        return json;
    }

    /** Walks a config in canonical order. */
    private static final class ParameterList {
        private final ModelConfig config;
        private final List<ParameterSpec> all = new ArrayList<>();

        ParameterList(ModelConfig config) {
            this.config = config;
        }

        List<ParameterSpec> all() {
            int hidden = config.hiddenSize();
            add(ParameterRole.EMBED_TOKENS, -1, config.vocabSize(), config.embeddingSize());
            if (config.positions() instanceof Positions.Learned learned) {
                add(ParameterRole.EMBED_POSITIONS, -1, config.maxPositions() + learned.offset(), hidden);
            }
            boolean projected = config.embeddingSize() != hidden;
            if (projected) {
                add(ParameterRole.PROJECT_IN, -1, hidden, config.embeddingSize());
            }
            for (int layer = 0; layer < config.layers(); layer++) {
                attention(layer);
                mlp(layer);
            }
            if (config.finalNorm()) {
                norm(ParameterRole.FINAL_NORM_WEIGHT, ParameterRole.FINAL_NORM_BIAS, -1);
            }
            if (projected) {
                add(ParameterRole.PROJECT_OUT, -1, config.embeddingSize(), hidden);
            }
            if (!config.tiedEmbeddings()) {
                add(ParameterRole.LM_HEAD, -1, config.vocabSize(), config.embeddingSize());
            }
            return List.copyOf(all);
        }

        private void attention(int layer) {
            int hidden = config.hiddenSize();
            int queries = config.heads() * config.headDim();
            int keys = config.kvHeads() * config.headDim();
            norm(ParameterRole.ATTENTION_NORM_WEIGHT, ParameterRole.ATTENTION_NORM_BIAS, layer);
            add(ParameterRole.Q_WEIGHT, layer, queries, hidden);
            add(ParameterRole.K_WEIGHT, layer, keys, hidden);
            add(ParameterRole.V_WEIGHT, layer, keys, hidden);
            if (config.qkvBias()) {
                add(ParameterRole.Q_BIAS, layer, queries);
                add(ParameterRole.K_BIAS, layer, keys);
                add(ParameterRole.V_BIAS, layer, keys);
            }
            if (config.qkNorm()) {
                add(ParameterRole.Q_NORM, layer, config.headDim());
                add(ParameterRole.K_NORM, layer, config.headDim());
            }
            add(ParameterRole.O_WEIGHT, layer, hidden, queries);
            if (config.outputBias()) {
                add(ParameterRole.O_BIAS, layer, hidden);
            }
        }

        private void mlp(int layer) {
            int hidden = config.hiddenSize();
            int intermediate = config.intermediateSize();
            norm(ParameterRole.MLP_NORM_WEIGHT, ParameterRole.MLP_NORM_BIAS, layer);
            if (config.gatedMlp()) {
                add(ParameterRole.GATE_WEIGHT, layer, intermediate, hidden);
            }
            add(ParameterRole.UP_WEIGHT, layer, intermediate, hidden);
            if (config.mlpBias()) {
                if (config.gatedMlp()) {
                    add(ParameterRole.GATE_BIAS, layer, intermediate);
                }
                add(ParameterRole.UP_BIAS, layer, intermediate);
            }
            add(ParameterRole.DOWN_WEIGHT, layer, hidden, intermediate);
            if (config.mlpBias()) {
                add(ParameterRole.DOWN_BIAS, layer, hidden);
            }
        }

        private void norm(ParameterRole weight, ParameterRole bias, int layer) {
            if (config.normAffine()) {
                add(weight, layer, config.hiddenSize());
                if (config.norm() == Norm.LAYER) {
                    add(bias, layer, config.hiddenSize());
                }
            }
        }

        private void add(ParameterRole role, int layer, long... shape) {
            all.add(new ParameterSpec(config.architecture().tensorName(role, layer), role, layer, shape));
        }
    }
}
