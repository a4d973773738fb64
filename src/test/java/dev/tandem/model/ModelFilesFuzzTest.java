package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assertions.fail;

import dev.tandem.device.DType;
import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.random.RandomGenerator;
import java.util.random.RandomGeneratorFactory;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/**
 * Damages the files of a model at random, keeping most of their structure, and reads them: whatever stands in a file,
 * only ModelFormatException and IllegalArgumentException may come out, with a message. The heap of the tests is the
 * memory bound: an OutOfMemoryError or StackOverflowError is a failure like any other.
 *
 * <p>{@code -Dfuzz.seconds=600} runs longer, {@code -Dfuzz.seed} repeats a run.
 */
class ModelFilesFuzzTest {
    private static final List<String> JSON_PARTS = List.of("{", "}", "[", "]", ",", ":", "\"", "null", "true", "false",
            "NaN", "Infinity", "-1", "0",
            "1e999", "1e-999", "1.5", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
                    "4294967296", "18446744073709551615",
            "\"F32\"", "\"BF16\"", "\"I64\"", "\"U8\"", "[0,0]", "[0,8]", "[8,0]", "[]", "{}", "\"\\ud800\"", "\\u0000",
                    "\"\"", "//x\n", "'a'", "\ufeff",
            "\"__metadata__\":{}", "\"a\":", "[[[[[[[[", "{\"a\":{\"a\":{\"a\":", "00", "1E+5", "\"../x\"", "\"yarn\"",
                    "\"llama3\"", "0.0", "1e-300");
    private static final List<String> TEMPLATE_PARTS = List.of("{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{#", "#}",
            "messages", "loop.index0", "loop",
            "[::-1]", "[1:]", "[-1]", ".content", "['role']", " | trim", " | tojson", " | length", " | map('upper')",
                    " | join", " | list", " | string",
            " is defined", " is not none", " not in ", " in ", " and ", " or ", "not ", " if ", " else ", "for x in ",
                    "endfor", "endif", "set x = ",
            "set ns.x = ns.x ~ ns.x", "set ns.x = [ns.x, ns.x]", "set ns = namespace(x='a')", "endset", "macro f(a)",
                    "endmacro", "f(f)", "f(1)", "range(99999)",
            "raise_exception('x')", "strftime_now('%Y')", "1", "0", "-1", "1.5", "'x'", "\"y\"", "none", "true", "x",
                    "ns", "ns.x", "(", ")", "[", "]", "{", "}", ",",
            ".", "|", "~", " + ", " * ", " - ", " // ", " % ", " ** ", " == ", " < ", "99999999", "break", "continue",
                    "\n", "  ", "é🙂", "dict(a=1)", ".items()",
            ".split('a')", ".replace('', 'aaaa')", ".get('a')", "'\\", " | reverse",
                    " | selectattr('role', 'equalto', 'user')", " * 999999");

    @TempDir
    Path folder;
    private RandomGenerator random;
    private long read;
    private long accepted;

    @Test
    void damagedFilesOnlyEverGiveFormatErrors() throws IOException {
        long seed = Long.getLong("fuzz.seed", System.nanoTime());
        random = RandomGeneratorFactory.of("L64X128MixRandom").create(seed);
        List<String> templates = new ArrayList<>();
        for (String name : List.of("fixture", "llama2", "llama3", "llama31", "llama32", "qwen25", "qwen3", "smollm2")) {
            templates.add(Files.readString(TestFiles.resource("chat/" + name + ".jinja")));
        }
        TestFiles.json("chat/golden.json").getAsJsonObject("snippets").entrySet().forEach(e ->
                templates.add(e.getValue().getAsString()));
        List<String> configs = new ArrayList<>();
        for (String name : List.of("llama", "qwen2", "qwen3", "opt")) {
            configs.add(Files.readString(TestFiles.resource("fixtures/" + name + "/config.json")));
        }
        Path shards = Files.createDirectories(folder.resolve("shards"));
        for (String name : List.of("a", "b")) {
            SafetensorsWriter.writeFile(shards.resolve(name.equals("a") ? "s1.safetensors" : "s2.safetensors"),
                    List.of(new SafetensorsWriter.Tensor(name, DType.FLOAT32, new long[0])),
                    (tensor, sink) -> sink.write(MemorySegment.ofArray(new byte[4])));
        }
        long end = System.nanoTime() + Long.getLong("fuzz.seconds", 5) * 1_000_000_000;
        while (System.nanoTime() < end) {
            String template = damage(pick(templates), TEMPLATE_PARTS);
            check(seed, template, () -> renderTemplate(template));
            String config = damage(pick(configs), JSON_PARTS);
            check(seed, config, () -> Architecture.readConfig(JsonFields.of("config.json",
                    StrictJson.parse("config.json", config))).parameters());
            safetensors(seed);
            if (random.nextInt(4) == 0) {
                folderFiles(seed, templates);
            }
        }
        System.getLogger("fuzz").log(System.Logger.Level.INFO, "seed " + seed + ": " + read + " files read, "
                + accepted + " accepted");
        assertTrue(accepted > 0 && accepted < read, "seed " + seed + ": " + accepted + " of " + read
                + " accepted: the damage is not well dosed");
    }

    private interface Reading {
        void run() throws IOException;
    }

    private void check(long seed, String input, Reading reading) throws IOException {
        try {
            read++;
            reading.run();
            accepted++;
        } catch (ModelFormatException | IllegalArgumentException e) {
            if (e.getMessage() == null || e.getMessage().isBlank()) {
                fail("seed " + seed + ": no message for\n" + show(input), e);
            }
        } catch (Throwable e) {
            fail("seed " + seed + ": " + e + " for\n" + show(input), e);
        }
    }

    private static String show(String input) {
        return input + "\nbase64: " + Base64.getEncoder().encodeToString(input.getBytes(StandardCharsets.UTF_8));
    }

    private static void renderTemplate(String text) {
        ChatTemplate template = ChatTemplate.parse("fuzz.jinja", text, Map.of("bos_token", "<s>", "eos_token", "</s>"));
        List<ChatMessage> messages = List.of(ChatMessage.system("s"), ChatMessage.user("u"),
                ChatMessage.assistant("<think>a</think>b"));
        template.render(messages, true);
        template.render(messages.subList(1, 2), false, Map.of("tools", List.of(Map.of("name", "f", "n", 1.5)),
                "enable_thinking", false));
    }

    private void safetensors(long seed) throws IOException {
        String header = """
                {"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},\
                "b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"c":{"dtype":"I64","shape":[],"data_offsets":[32,40]}}""";
        String damaged = random.nextInt(8) == 0 ? header : damage(header, JSON_PARTS);
        byte[] text = damaged.getBytes(StandardCharsets.UTF_8);
        long length = switch (random.nextInt(8)) {
            case 0 -> random.nextLong();
            case 1 -> text.length + random.nextInt(-3, 50);
            default -> text.length;
        };
        byte[] whole = ByteBuffer.allocate(8 + text.length
                + 40).order(ByteOrder.LITTLE_ENDIAN).putLong(length).put(text).array();
        if (random.nextInt(6) == 0) {
            whole = Arrays.copyOf(whole, random.nextInt(whole.length + 20));
        }
        if (random.nextInt(6) == 0 && whole.length > 0) {
            whole[random.nextInt(whole.length)] = (byte) random.nextInt();
        }
        Path file = Files.write(folder.resolve("f.safetensors"), whole);
        check(seed, new String(whole, StandardCharsets.ISO_8859_1), () -> {
            try (Safetensors opened = Safetensors.open(file)) {
                long sum = 0;
                for (TensorEntry tensor : opened.tensors()) {
                    for (byte b : tensor.data().toArray(ValueLayout.JAVA_BYTE)) {
                        sum += b;
                    }
                }
                assertTrue(sum >= Long.MIN_VALUE);
            }
        });
    }

    private void folderFiles(long seed, List<String> templates) throws IOException {
        Path shards = folder.resolve("shards");
        String index = damage("{\"metadata\":{\"total_size\":4},\"weight_map\":{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}}",
                random.nextBoolean() ? JSON_PARTS : List.of("\"a\"", "\"b\"", "\"s1.safetensors\"", "s1", "s2", "/",
                        "..", ".", "\\u0000", ":", ","));
        Files.write(shards.resolve("model.safetensors.index.json"), index.getBytes(StandardCharsets.UTF_8));
        check(seed, index, () -> Safetensors.open(shards).close());

        String settings = damage("""
                {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null, "model_max_length": 1e30,
                 "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "rag", "template": "x"}]}""", JSON_PARTS);
        Files.write(shards.resolve("tokenizer_config.json"), settings.getBytes(StandardCharsets.UTF_8));
        check(seed, settings, () -> TokenizerSettings.read(shards));
        String generation = damage("{\"eos_token_id\": [1, 2], \"pad_token_id\": 0, \"temperature\": 0.6, \"top_k\": 20, \"top_p\": 0.9}", JSON_PARTS);
        Files.write(shards.resolve("generation_config.json"), generation.getBytes(StandardCharsets.UTF_8));
        check(seed, generation, () -> GenerationDefaults.read(shards));
        String vocabulary = damage("{\"version\":\"1.0\",\"added_tokens\":[{\"id\":2,\"content\":\"<s>\"}],\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},"
                + "\"merges\":[\"a b\"]}}", JSON_PARTS);
        check(seed, vocabulary, () -> Vocabulary.read("tokenizer.json", vocabulary));
    }

    private <T> T pick(List<T> list) {
        return list.get(random.nextInt(list.size()));
    }

    /** A few cuts, copies and insertions of parts, at random places or at the borders of words. */
    private String damage(String text, List<String> parts) {
        StringBuilder out = new StringBuilder(text);
        for (int i = random.nextInt(1, 5); i > 0; i--) {
            int at = random.nextInt(out.length() + 1);
            for (int step = 0; random.nextInt(3) > 0 && step < 30 && at < out.length()
                    && !Character.isWhitespace(out.charAt(at))
                    && "[]{},:\"'".indexOf(out.charAt(at)) < 0; step++) {
                at++;
            }
            int to = Math.min(out.length(), at + random.nextInt(1, random.nextInt(4) == 0 ? 200 : 12));
            switch (random.nextInt(6)) {
                case 0 -> out.delete(at, to);
                case 1 -> out.insert(random.nextInt(out.length() + 1), out.substring(at, to));
                case 2 -> out.replace(at, to, pick(parts));
                case 3 -> out.insert(at, pick(parts).repeat(random.nextInt(20) == 0 ? 5000 : 1));
                case 4 -> out.insert(at, (char) random.nextInt(random.nextBoolean() ? 128 : 65_536));
                default -> out.insert(at, pick(parts) + pick(parts));
            }
        }
        return out.toString();
    }
}
