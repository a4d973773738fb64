package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import java.nio.file.Path;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class ModelConfigTest {
    private static final String LLAMA = """
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64""";
    private static final String OPT = """
            {"architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64""";

    private static ModelConfig read(String json) {
        return Architecture.readConfig(JsonFields.of("config.json", StrictJson.parse("config.json", json)));
    }

    private static String refusal(String json) {
        return assertThrows(ModelFormatException.class, () -> read(json)).getMessage();
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void fixturesAreWholeAndSurviveARoundTrip(String name, @TempDir Path folder) {
        Path fixture = TestFiles.resource("fixtures/" + name);
        ModelConfig config = ModelConfig.read(fixture);
        assertEquals(512, config.vocabSize());
        assertEquals(List.of(2), config.eosTokenIds());
        assertEquals(name.toUpperCase(Locale.ROOT), config.architecture().name());
        try (Safetensors weights = Safetensors.open(fixture)) {
            CheckpointTensors.check(config.parameters(), weights);
            assertEquals(config.parameters().size(), weights.names().size());
        }
        config.write(folder, DType.BFLOAT16);
        assertEquals(config, ModelConfig.read(folder));
    }

    @Test
    void llamaDefaults() {
        ModelConfig config = read(LLAMA + "}");
        assertEquals(4, config.kvHeads());
        assertEquals(8, config.headDim());
        assertEquals(1, config.bosTokenId());
        assertEquals(List.of(2), config.eosTokenIds());
        assertFalse(config.tiedEmbeddings() || config.qkvBias() || config.mlpBias() || config.outputBias());
        assertEquals(new Positions.Rope(10_000), config.positions());
        ModelConfig biased = read(LLAMA
                + ", \"attention_bias\": true, \"mlp_bias\": true, \"eos_token_id\": [5, 6], \"bos_token_id\": null}");
        assertTrue(biased.qkvBias() && biased.outputBias() && biased.mlpBias());
        assertEquals(List.of(5, 6), biased.eosTokenIds());
        assertEquals(null, biased.bosTokenId());
    }

    @Test
    void bothSpellingsOfRopeAreRead() {
        String scaling = "\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
                + "\"original_max_position_embeddings\": 32";
        Positions expected = new Positions.Rope(500_000, new RopeScaling.Llama3(8, 1, 4, 32));
        assertEquals(expected, read(LLAMA + ", \"rope_theta\": 500000.0, \"rope_scaling\": {" + scaling
                + "}}").positions());
        assertEquals(expected, read(LLAMA + ", \"rope_parameters\": {\"rope_theta\": 500000.0, " + scaling
                + "}}").positions());
        assertEquals(new Positions.Rope(10_000, new RopeScaling.Linear(2)),
                read(LLAMA + ", \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}}").positions());
        assertEquals(new Positions.Rope(10_000, new RopeScaling.Yarn(4, 16)), read(LLAMA
                + ", \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 16}}").positions());
        assertTrue(refusal(LLAMA + ", \"rope_scaling\": {\"rope_type\": \"dynamic\", \"factor\": 2}}").contains("rope_type"));
        assertTrue(refusal(LLAMA + ", \"rope_scaling\": {\"rope_type\": \"linear\"}}").contains("factor"));
        assertTrue(refusal(LLAMA + ", \"partial_rotary_factor\": 0.5}").contains("partial_rotary_factor"));
    }

    @Test
    void everyRopeScalingIsWritten(@TempDir Path folder) {
        for (RopeScaling scaling : List.of(new RopeScaling.None(), new RopeScaling.Linear(2),
                new RopeScaling.Llama3(8, 1, 4, 32),
                new RopeScaling.Yarn(4, 16), new RopeScaling.Yarn(4, 16, 24, 2, 1.25, 0.7, 0.9, false))) {
            ModelConfig config = ModelConfig.qwen3(100, 64, 2, 4, 2, 48,
                    64).withPositions(new Positions.Rope(1e6, scaling))
                    .withHeadDim(32).withSpecialTokens(null, List.of(3, 4), 5);
            config.write(folder, DType.FLOAT32);
            assertEquals(config, ModelConfig.read(folder));
        }
    }

    @Test
    void qwenWindowsAreRefusedOnlyWhereTheyMatter() {
        String qwen = LLAMA.replace("Llama", "Qwen2").replace("llama", "qwen2") + ", \"num_key_value_heads\": 2";
        assertTrue(read(qwen + "}").qkvBias());
        assertFalse(read(qwen + "}").outputBias());
        read(qwen + ", \"use_sliding_window\": true, \"sliding_window\": 64, \"max_window_layers\": 1}");
        read(qwen + ", \"use_sliding_window\": true, \"sliding_window\": 8, \"max_window_layers\": 2}");
        read(qwen + ", \"use_sliding_window\": false, \"sliding_window\": 8, \"max_window_layers\": 1}");
        String window = refusal(qwen + ", \"use_sliding_window\": true, \"sliding_window\": 8, \"max_window_layers\": 1}");
        assertTrue(window.contains("use_sliding_window") && window.contains("sliding-window"), window);
        assertTrue(refusal(qwen + ", \"use_sliding_window\": true, \"sliding_window\": 8, \"layer_types\": [\"full_attention\","
                + " \"sliding_attention\"]}").contains("layer_types"));
        // transformers takes 32 key heads where Qwen2 says nothing, which does not fit four heads.
        assertTrue(refusal(qwen.replace(", \"num_key_value_heads\": 2", "}")).contains("num_key_value_heads"));
    }

    @Test
    void optVariants() {
        ModelConfig opt350 = read(OPT + ", \"do_layer_norm_before\": false, \"word_embed_proj_dim\": 16}");
        assertFalse(opt350.normFirst() || opt350.finalNorm());
        Map<ParameterRole, ParameterSpec> roles = opt350.parameters().stream()
                .collect(Collectors.toMap(ParameterSpec::role, spec -> spec, (first, second) -> first));
        assertEquals("model.decoder.project_in.weight[32, 16]", roles.get(ParameterRole.PROJECT_IN).toString());
        assertEquals("model.decoder.project_out.weight[16, 32]", roles.get(ParameterRole.PROJECT_OUT).toString());
        assertEquals("model.decoder.embed_tokens.weight[100, 16]", roles.get(ParameterRole.EMBED_TOKENS).toString());
        assertEquals("model.decoder.embed_positions.weight[66, 32]",
                roles.get(ParameterRole.EMBED_POSITIONS).toString());
        assertFalse(roles.containsKey(ParameterRole.FINAL_NORM_WEIGHT) || roles.containsKey(ParameterRole.LM_HEAD));
        ModelConfig bare = read(OPT + ", \"enable_bias\": false, \"layer_norm_elementwise_affine\": false}");
        assertTrue(bare.parameters().stream().noneMatch(spec -> spec.name().endsWith("bias")
                || spec.name().contains("norm")));
        assertFalse(read(OPT + ", \"_remove_final_layer_norm\": true}").finalNorm());
        assertTrue(read(OPT + "}").finalNorm());
    }

    @Test
    void canonicalOrder() {
        List<ParameterRole> layer = ModelConfig.llama(100, 32, 1, 4, 2, 48,
                64).parameters().stream().map(ParameterSpec::role).toList();
        assertEquals(List.of(ParameterRole.EMBED_TOKENS, ParameterRole.ATTENTION_NORM_WEIGHT, ParameterRole.Q_WEIGHT,
                ParameterRole.K_WEIGHT, ParameterRole.V_WEIGHT, ParameterRole.O_WEIGHT, ParameterRole.MLP_NORM_WEIGHT,
                ParameterRole.GATE_WEIGHT, ParameterRole.UP_WEIGHT, ParameterRole.DOWN_WEIGHT,
                        ParameterRole.FINAL_NORM_WEIGHT,
                ParameterRole.LM_HEAD), layer);
        assertTrue(ModelConfig.qwen3(100, 32, 1, 4, 2, 48, 64).parameters().stream()
                .anyMatch(spec -> spec.toString().equals("model.layers.0.self_attn.q_norm.weight[8]")));
    }

    @ParameterizedTest
    @CsvSource(delimiter = '#', value = {
        "\"vocab_size\": 100 # \"vocab_size\": \"many\" # field \"vocab_size\": expected a whole number, found \"many\"",
        "\"vocab_size\": 100 # \"vocab_size\": 1.5 # field \"vocab_size\": expected a whole number, found 1.5",
        "\"vocab_size\": 100 # \"vocab_size\": 99999999999999999999999 # field \"vocab_size\"",
        "\"vocab_size\": 100 # \"vocab_size\": -1 # field \"vocab_size\": expected a positive number, found -1",
        "\"vocab_size\": 100 # \"vocab_size\": NaN # malformed JSON",
        "\"vocab_size\": 100 # \"vocab_size\": 100, \"vocab_size\": 101 # stands twice",
        "\"vocab_size\": 100, # '' # field \"vocab_size\": expected a positive number, found no such field",
        "\"hidden_size\": 32 # \"hidden_size\": 33 # num_attention_heads",
        "\"hidden_size\": 32 # \"hidden_size\": 12 # ModelConfig.headDim",
        "\"num_hidden_layers\": 2 # \"num_hidden_layers\": 2000000000 # ModelConfig.layers",
        "\"num_attention_heads\": 4 # \"num_attention_heads\": 4, \"num_key_value_heads\": 3 # num_key_value_heads",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"hidden_act\": \"xielu\" # field \"hidden_act\": expected one of silu",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"rms_norm_eps\": \"x\" # rms_norm_eps",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"tie_word_embeddings\": 1 # tie_word_embeddings",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"eos_token_id\": [\"x\"] # eos_token_id",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"rope_theta\": 1e999 # rope_theta",
        "\"intermediate_size\": 48 # \"intermediate_size\": 48, \"quantization_config\": {\"bits\": 4} # quantization_config",
        "[\"LlamaForCausalLM\"] # [\"MambaForCausalLM\"] # expected one of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, OPTForCausalLM, found [MambaForCausalLM]",
        "\"model_type\": \"llama\" # \"model_type\": \"qwen2\" # model_type",
    })
    void wrongFieldsAreNamed(String correct, String wrong, String problem) {
        String message = refusal(LLAMA.replace(correct, wrong) + "}");
        assertTrue(message.startsWith("config.json: ") && message.contains(problem), message);
    }

    @Test
    void whatAFamilyCannotSayIsNotWritten(@TempDir Path folder) {
        ModelConfig config = ModelConfig.qwen3(100, 32, 1, 4, 2, 48, 64).withPositions(new Positions.Learned(0));
        assertThrows(IllegalArgumentException.class, () -> config.write(folder, DType.FLOAT32));
        assertTrue(assertThrows(ModelFormatException.class, () ->
                ModelConfig.read(folder)).getMessage().contains("config.json: there is no such file"));
    }

    @Test
    void aBaseModelAndAModelTypeAloneAreEnough() {
        assertEquals(Architecture.LLAMA, read(LLAMA.replace("LlamaForCausalLM", "LlamaModel") + "}").architecture());
        assertEquals(Architecture.OPT, read(OPT.replace("\"architectures\": [\"OPTForCausalLM\"], ", "")
                + "}").architecture());
    }
}
