package dev.tandem.testing;

import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.model.ModelConfig;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.random.RandomGenerator;

/** Configs of models that run in microseconds, spelled as their families' files spell them. */
public final class TinyModels {
    private TinyModels() {}

    /** A config of random sizes. */
    public static ModelConfig random(String family, RandomGenerator random) {
        int heads = 1 << random.nextInt(3);
        int headDim = 2 << random.nextInt(3);
        JsonObject json = new JsonObject();
        json.addProperty("model_type", family);
        json.addProperty("vocab_size", random.nextInt(20, 70));
        json.addProperty("hidden_size", heads * headDim);
        json.addProperty("num_hidden_layers", random.nextInt(1, 4));
        json.addProperty("num_attention_heads", heads);
        json.addProperty("max_position_embeddings", random.nextInt(24, 96));
        json.addProperty("tie_word_embeddings", random.nextBoolean());
        json.addProperty("bos_token_id", 0);
        json.addProperty("eos_token_id", 2);
        json.addProperty("pad_token_id", 1);
        if (family.equals("opt")) {
            json.addProperty("ffn_dim", 8 * random.nextInt(1, 5));
            json.addProperty("word_embed_proj_dim", random.nextBoolean() ? heads * headDim : 6);
            json.addProperty("do_layer_norm_before", random.nextInt(4) > 0);
        } else {
            json.addProperty("intermediate_size", 8 * random.nextInt(1, 5));
            json.addProperty("num_key_value_heads", heads >> random.nextInt(Integer.numberOfTrailingZeros(heads) + 1));
            json.addProperty("head_dim", family.equals("qwen2") ? headDim : headDim << random.nextInt(2));
            json.addProperty("rope_theta", 10_000.0);
        }
        return read(json);
    }

    /** A Llama with two layers of width 16, 64 tokens and a context of 128, which ends with token 2. */
    public static ModelConfig llama() {
        return ModelConfig.llama(64, 16, 2, 4, 2, 24, 128).withSpecialTokens(1, java.util.List.of(2), 0);
    }

    /** The shape of a published family's model, a few layers of it. */
    public static ModelConfig published(String family) {
        return of(switch (family) {
            case "llama" -> """
                    {"model_type":"llama","hidden_size":576,"num_hidden_layers":3,"num_attention_heads":9,"num_key_value_heads":3,
                     "intermediate_size":1536,"vocab_size":5003,"max_position_embeddings":2048,"rope_theta":10000.0}""";
            case "qwen2" -> """
                    {"model_type":"qwen2","hidden_size":896,"num_hidden_layers":2,"num_attention_heads":14,"num_key_value_heads":2,
                     "intermediate_size":1024,"vocab_size":32000,"max_position_embeddings":2048,"rope_theta":1000000.0}""";
            case "qwen3" -> """
                    {"model_type":"qwen3","hidden_size":1024,"num_hidden_layers":2,"num_attention_heads":16,"num_key_value_heads":8,
                     "head_dim":128,"intermediate_size":1536,"vocab_size":8192,"max_position_embeddings":2048,
                     "rope_theta":1000000.0,"tie_word_embeddings":true}""";
            case "opt" -> """
                    {"model_type":"opt","hidden_size":768,"num_hidden_layers":2,"num_attention_heads":8,"ffn_dim":1024,
                     "vocab_size":5003,"max_position_embeddings":2048,"word_embed_proj_dim":768,"do_layer_norm_before":true}""";
            default -> throw new IllegalArgumentException(family);
        });
    }

    /** The config that a config.json describes. */
    public static ModelConfig of(String json) {
        return read(JsonParser.parseString(json).getAsJsonObject());
    }

    private static ModelConfig read(JsonObject json) {
        try {
            Path folder = Files.createTempDirectory("tiny-model");
            Path file = folder.resolve("config.json");
            try {
                Files.writeString(file, json.toString());
                return ModelConfig.read(folder);
            } finally {
                Files.deleteIfExists(file);
                Files.delete(folder);
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }
}
