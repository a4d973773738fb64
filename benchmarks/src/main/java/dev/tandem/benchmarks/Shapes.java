package dev.tandem.benchmarks;

import dev.tandem.model.ModelConfig;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/** The published models whose shapes are measured, with random weights. */
final class Shapes {
    private Shapes() {}

    /** {@return the config of a shape, such as qwen3-0.6b; or of the model folder of that name} */
    static ModelConfig config(String name) {
        String json = json(name);
        return json == null ? ModelConfig.read(Path.of(name)) : read(json);
    }

    /** {@return the config of a shape with another number of layers} */
    static ModelConfig config(String name, int layers) {
        return read(Objects.requireNonNull(json(name), name).replaceFirst("(\"num_hidden_layers\"):\\d+", "$1:" + layers));
    }

    private static @Nullable String json(String name) {
        return switch (name) {
            case "qwen3-0.6b" -> """
                    {"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":1024,"num_hidden_layers":28,
                     "num_attention_heads":16,"num_key_value_heads":8,"head_dim":128,"intermediate_size":3072,"vocab_size":151936,
                     "tie_word_embeddings":true,"max_position_embeddings":40960,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu","attention_bias":false}""";
            case "qwen2.5-0.5b" -> """
                    {"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","hidden_size":896,"num_hidden_layers":24,
                     "num_attention_heads":14,"num_key_value_heads":2,"intermediate_size":4864,"vocab_size":151936,
                     "tie_word_embeddings":true,"max_position_embeddings":32768,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu"}""";
            case "qwen2.5-1.5b" -> """
                    {"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","hidden_size":1536,"num_hidden_layers":28,
                     "num_attention_heads":12,"num_key_value_heads":2,"intermediate_size":8960,"vocab_size":151936,
                     "tie_word_embeddings":true,"max_position_embeddings":32768,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu"}""";
            case "qwen3-4b" -> """
                    {"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":2560,"num_hidden_layers":36,
                     "num_attention_heads":32,"num_key_value_heads":8,"head_dim":128,"intermediate_size":9728,"vocab_size":151936,
                     "tie_word_embeddings":true,"max_position_embeddings":40960,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu","attention_bias":false}""";
            case "qwen3-14b" -> """
                    {"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":5120,"num_hidden_layers":40,
                     "num_attention_heads":40,"num_key_value_heads":8,"head_dim":128,"intermediate_size":17408,"vocab_size":151936,
                     "tie_word_embeddings":false,"max_position_embeddings":40960,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu","attention_bias":false}""";
            case "qwen3-8b" -> """
                    {"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":4096,"num_hidden_layers":36,
                     "num_attention_heads":32,"num_key_value_heads":8,"head_dim":128,"intermediate_size":12288,"vocab_size":151936,
                     "tie_word_embeddings":false,"max_position_embeddings":40960,"rope_theta":1000000.0,"rms_norm_eps":1e-6,
                     "hidden_act":"silu","attention_bias":false}""";
            default -> null;
        };
    }

    private static ModelConfig read(String json) {
        try {
            Path folder = Files.createTempDirectory("shape");
            Path file = Files.writeString(folder.resolve("config.json"), json);
            try {
                return ModelConfig.read(folder);
            } finally {
                Files.delete(file);
                Files.delete(folder);
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }
}
