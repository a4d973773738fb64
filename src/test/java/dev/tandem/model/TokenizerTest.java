package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class TokenizerTest {
    @TempDir
    Path folder;

    private static int[] ids(JsonArray array) {
        return array.asList().stream().mapToInt(JsonElement::getAsInt).toArray();
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "opt", "qwen2", "qwen3"})
    void equalsTheFixtures(String name) throws IOException {
        try (Tokenizer tokenizer = Tokenizer.open(TestFiles.resource("fixtures/" + name))) {
            assertEquals(512, tokenizer.vocabSize());
            assertEquals(2, tokenizer.id("<|im_end|>"));
            assertEquals(-1, tokenizer.id("no such token"));
            assertEquals(List.of(0, 2, 3), List.of(tokenizer.bosTokenId(), tokenizer.eosTokenId(),
                    tokenizer.padTokenId()));
            List<String> texts = new ArrayList<>();
            JsonArray cases = TestFiles.json("fixtures/" + name + "/golden.json").getAsJsonArray("tokenizer");
            for (JsonElement element : cases) {
                JsonObject each = element.getAsJsonObject();
                String text = each.get("text").getAsString();
                texts.add(text);
                int[] expected = ids(each.getAsJsonArray("ids"));
                assertArrayEquals(expected, tokenizer.encode(text, true), text);
                assertArrayEquals(ids(each.getAsJsonArray("ids_no_special")), tokenizer.encode(text, false), text);
                assertEquals(each.get("decoded").getAsString(), tokenizer.decode(expected, false));
                assertEquals(each.get("decoded_skip_special").getAsString(), tokenizer.decode(expected, true));
            }
            List<int[]> all = tokenizer.encodeAll(texts, true);
            for (int i = 0; i < texts.size(); i++) {
                assertArrayEquals(tokenizer.encode(texts.get(i), true), all.get(i));
            }
            assertEquals(2000, tokenizer.encode("\n1".repeat(1000), false).length, "long texts are not cut");
        }
    }

    @Test
    void characters() throws IOException {
        Tokenizer.writeCharacters(folder, "0123456789+= abc<🙂é\"", List.of("<think>"));
        try (Tokenizer tokenizer = Tokenizer.open(folder)) {
            assertEquals(4 + 20, tokenizer.vocabSize());
            int[] ids = tokenizer.encode("12+3=<think>🙂é\"<eos>", true);
            assertArrayEquals(new int[] {5, 6, 14, 7, 15, 3, 21, 22, 23, 2}, ids);
            assertEquals("12+3=<think>🙂é\"<eos>", tokenizer.decode(ids, false));
            assertEquals("2+3=🙂", tokenizer.decode(ids, 1, 7, true));
            assertEquals("", tokenizer.decode(ids, 3, 3, true));
            assertEquals("<bos>user\n1+1<eos>\n<bos>assistant\n",
                    tokenizer.chatTemplate().render(List.of(ChatMessage.user("1+1")), true));
            Path copy = Files.createDirectory(folder.resolve("copy"));
            tokenizer.copyTo(copy);
            try (Tokenizer copied = Tokenizer.open(copy)) {
                assertArrayEquals(ids, copied.encode("12+3=<think>🙂é\"<eos>", true));
            }
        }
        assertThrows(IllegalArgumentException.class, () -> Tokenizer.writeCharacters(folder, "aa", List.of()));
    }

    @ParameterizedTest
    @CsvSource(delimiter = '#', value = {
        "tokenizer.json # {} # model.vocab",
        "tokenizer.json # {\"model\": {\"vocab\": {\"a\": -1}}} # has the id -1",
        "tokenizer.json # {\"model\": {\"vocab\": {\"a\": 0}}} # cannot be loaded",
        "tokenizer.json # [[[[ # malformed JSON",
        "tokenizer_config.json # {\"bos_token\": 3} # field \"bos_token\": expected a string, found 3",
        "tokenizer_config.json # {\"bos_token\": {\"x\": 3}} # content",
        "tokenizer_config.json # {\"chat_template\": [{\"name\": \"rag\", \"template\": \"x\"}]} # a template named \"default\"",
        "tokenizer_config.json # {\"chat_template\": \"{{ x | nope }}\"} # line 1: unknown filter 'nope'",
        "tokenizer_config.json # {\"a\": 1, \"a\": 2} # stands twice",
        "config.json # {\"architectures\": [\"GPT2LMHeadModel\"]} # architectures",
        "generation_config.json # {\"top_p\": 2} # field \"top_p\"",
        "generation_config.json # {\"eos_token_id\": \"x\"} # field \"eos_token_id\"",
    })
    void damagedFilesAreNamed(String file, String text, String problem) throws IOException {
        TestFiles.copy("fixtures/llama", folder);
        Files.deleteIfExists(folder.resolve("chat_template.jinja"));
        Files.writeString(folder.resolve(file), text);
        String message = assertThrows(ModelFormatException.class, () -> ModelFolder.open(folder).close()).getMessage();
        assertTrue(message.contains(file) && message.contains(problem), message);
    }

    @Test
    void aFolderIsOpenedAsAWhole() throws IOException {
        TestFiles.copy("fixtures/llama", folder);
        try (ModelFolder model = ModelFolder.open(folder)) {
            assertEquals(Set.of(2), model.eosTokenIds());
            assertEquals(model.config().parameters().size(), model.tensors().size());
        }
        Files.writeString(folder.resolve("generation_config.json"),
                "{\"eos_token_id\": [7, 9], \"temperature\": 0.6, \"top_k\": 20, \"top_p\": 0.95, \"do_sample\": true}");
        try (ModelFolder model = ModelFolder.open(folder)) {
            assertEquals(Set.of(7, 9), model.eosTokenIds());
            assertEquals(new GenerationDefaults(List.of(7, 9), null, true, 0.6, 20, 0.95, null),
                    model.generationDefaults());
            model.generationDefaults().write(folder);
            assertEquals(model.generationDefaults(), GenerationDefaults.read(folder));
        }
        Path config = folder.resolve("config.json");
        Files.writeString(config, Files.readString(config).replace("\"vocab_size\": 512", "\"vocab_size\": 500"));
        String message = assertThrows(ModelFormatException.class, () -> ModelFolder.open(folder)).getMessage();
        assertTrue(message.contains("token ids up to 511") && message.contains("vocab_size 500"), message);
        for (String name : List.of("config.json", "tokenizer.json")) {
            Files.deleteIfExists(folder.resolve(name));
            assertTrue(assertThrows(ModelFormatException.class, () ->
                    ModelFolder.open(folder)).getMessage().contains(name));
            Files.copy(TestFiles.resource("fixtures/llama/" + name), folder.resolve(name));
        }
        Files.delete(folder.resolve("model.safetensors"));
        assertTrue(assertThrows(ModelFormatException.class, () ->
                ModelFolder.open(folder)).getMessage().contains("model.safetensors"));
        assertTrue(assertThrows(ModelFormatException.class, () ->
                ModelFolder.open(config)).getMessage().contains("found a file"));
    }
}
