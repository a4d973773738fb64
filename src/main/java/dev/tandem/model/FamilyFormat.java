package dev.tandem.model;

import com.google.gson.JsonObject;
import java.util.EnumMap;
import java.util.Map;

/** How a group of families spells its config and names its tensors. Instances are immutable. */
abstract class FamilyFormat {
    private final Map<ParameterRole, String> names = new EnumMap<>(ParameterRole.class);

    /** Reads the fields, with the defaults that transformers gives to absent ones. */
    abstract ModelConfig read(Architecture architecture, JsonFields fields);

    /** Adds the fields that are not common to all families. */
    abstract void write(ModelConfig config, JsonObject json);

    /** {@return the full name of each role's tensor, with {@code {layer}} for the layer's number} */
    final Map<ParameterRole, String> names() {
        return names;
    }

    final void name(ParameterRole role, String name) {
        names.put(role, name);
    }

    static ModelConfigBuilder builder(Architecture architecture, JsonFields fields) {
        ModelConfigBuilder builder = new ModelConfigBuilder(architecture);
        builder.vocabSize = fields.size("vocab_size");
        builder.hiddenSize = fields.size("hidden_size");
        builder.layers = fields.size("num_hidden_layers");
        builder.heads = fields.size("num_attention_heads");
        return builder;
    }

    static int headDim(JsonFields fields, ModelConfigBuilder builder) {
        if (builder.hiddenSize % builder.heads != 0) {
            throw fields.wrong("num_attention_heads", "a divisor of hidden_size " + builder.hiddenSize);
        }
        return builder.hiddenSize / builder.heads;
    }

    static Activation activation(JsonFields fields, String name, Activation whenAbsent) {
        String found = fields.text(name);
        Activation activation = found == null ? whenAbsent : Activation.byHubName().get(found);
        if (activation == null) {
            throw fields.wrong(name, "one of " + String.join(", ", Activation.byHubName().keySet()));
        }
        return activation;
    }
}
