package dev.tandem.samples;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.HybridEngine;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ChatMessage;
import dev.tandem.testing.Fixture;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The samples as a user starts them: a process each, judged by its standard output and its exit code. */
final class SamplesTest {
    private static final Path JAVA = Path.of(System.getProperty("java.home"), "bin", "java");
    private static final Path MODEL = Path.of("src/test/resources/fixtures/llama");

    @TempDir
    private Path folder;

    private record Result(int exitCode, String out, String err) {
        List<JsonObject> objects() {
            return out.lines().map(line -> JsonParser.parseString(line).getAsJsonObject()).toList();
        }
    }

    private Result run(String sample, String... arguments) throws IOException, InterruptedException {
        List<String> command = new ArrayList<>();
        command.addAll(List.of(JAVA.toString(), "@target/java.args", "samples/" + sample + ".java"));
        command.addAll(List.of(arguments));
        Path out = folder.resolve("stdout");
        Path err = folder.resolve("stderr");
        Process process = new ProcessBuilder(command).redirectOutput(out.toFile()).redirectError(err.toFile()).start();
        if (!process.waitFor(300, TimeUnit.SECONDS)) {
            process.destroyForcibly();
            throw new AssertionError(command + " did not end: " + Files.readString(err));
        }
        return new Result(process.exitValue(), Files.readString(out), Files.readString(err));
    }

    private Result succeed(String sample, String... arguments) throws IOException, InterruptedException {
        Result result = run(sample, arguments);
        assertEquals(0, result.exitCode(), result.err());
        assertEquals("", result.err(), "nothing but the sample speaks");
        return result;
    }

    @Test
    void generateContinuesEachKindOfPromptInTheOrderGiven() throws Exception {
        JsonObject golden = golden(1);
        int[] prompt = Fixture.ints(golden.getAsJsonArray("ids"));
        int[] expected = Fixture.ints(golden.getAsJsonArray("greedy"));
        List<JsonObject> lines = succeed("Generate", "--model", MODEL.toString(), "--temperature", "0", "--json",
                "--max-tokens", "6", "--ignore-eos",
                "--chat", "Hello", "--prompt-ids", join(prompt), "--prompt", "the cat").objects();
        assertEquals(3, lines.size());
        SamplingParams sampling = SamplingParams.greedy().maxTokens(6).ignoreEos(true);
        try (HybridEngine engine = HybridEngine.open(MODEL)) {
            assertCompletion(engine.chat(List.of(ChatMessage.user("Hello")), sampling), lines.get(0));
            assertCompletion(engine.generate("the cat", sampling), lines.get(2));
        }
        assertArrayEquals(Arrays.copyOf(expected, 6), Fixture.ints(lines.get(1).getAsJsonArray("tokens")));
        assertEquals("length", lines.get(1).get("finish").getAsString());
    }

    private static void assertCompletion(Completion expected, JsonObject found) {
        assertEquals(List.of("tokens", "logprobs", "text", "finish"), List.copyOf(found.keySet()));
        assertArrayEquals(expected.tokens(), Fixture.ints(found.getAsJsonArray("tokens")));
        assertEquals(expected.text(), found.get("text").getAsString());
        assertEquals(expected.finish().label(), found.get("finish").getAsString());
        JsonArray logprobs = found.getAsJsonArray("logprobs");
        IntStream.range(0, expected.tokens().length)
                .forEach(i -> assertEquals(expected.logprobs()[i], logprobs.get(i).getAsFloat(), 1e-4));
    }

    @Test
    void generateStreamsTheTextOfOnePrompt() throws Exception {
        Result result = succeed("Generate", "--model", MODEL.toString(), "--prompt", "the cat", "--temperature", "0",
                "--max-tokens", "8");
        try (HybridEngine engine = HybridEngine.open(MODEL)) {
            String text = engine.generate("the cat", SamplingParams.greedy().maxTokens(8)).text();
            assertEquals(text + System.lineSeparator(), result.out());
        }
    }

    @Test
    void scoreIsTheTrainingSidesLogProbability() throws Exception {
        JsonObject golden = golden(2);
        double[] expected = Fixture.doubles(golden.getAsJsonArray("token_logprobs"));
        List<JsonObject> lines = succeed("Score", "--model", MODEL.toString(), "--json", "--dtype", "float32",
                "--ids", join(Fixture.ints(golden.getAsJsonArray("ids"))), "--ids", "4,5").objects();
        assertEquals(2, lines.size());
        assertArrayEquals(expected, Fixture.doubles(lines.getFirst().getAsJsonArray("logprobs")), 1e-4);
        assertEquals(1, lines.getLast().getAsJsonArray("logprobs").size());
    }

    private static JsonObject golden(int prompt) {
        return Fixture.of("llama").golden().getAsJsonArray("prompts").get(prompt).getAsJsonObject();
    }

    @Test
    void sftTrainsAndSaves() throws Exception {
        Path data = Files.writeString(folder.resolve("data.jsonl"), """
                {"text": "the cat sat on the mat"}
                {"prompt": "the cat", "completion": " sat"}

                {"messages": [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "mat"}]}
                """);
        Path trained = folder.resolve("trained");
        List<String> lines = succeed("Sft", "--model", MODEL.toString(), "--data", data.toString(), "--steps", "2",
                "--lr", "0.01", "--batch-size", "3", "--schedule", "linear", "--out", trained.toString())
                .out().lines().toList();
        assertEquals(3, lines.size(), lines.toString());
        assertTrue(lines.get(0).startsWith("step 1: loss "), lines.get(0));
        assertTrue(loss(lines.get(1)) < loss(lines.get(0)), lines.toString());
        try (HybridEngine before = HybridEngine.open(MODEL); HybridEngine after = HybridEngine.open(trained)) {
            SamplingParams sampling = SamplingParams.greedy().maxTokens(4);
            float[] first = before.generate("the cat", sampling).logprobs();
            assertFalse(Arrays.equals(first, after.generate("the cat", sampling).logprobs()));
        }
    }

    private static double loss(String line) {
        return Double.parseDouble(line.replaceFirst(".*loss ", "").replaceFirst(",.*", ""));
    }

    @Test
    void grpoWritesMetrics() throws Exception {
        Path metrics = folder.resolve("metrics.jsonl");
        Result result = succeed("Grpo", "--model", MODEL.toString(), "--data", "samples/data/arithmetic.jsonl",
                "--steps", "1", "--group-size", "2", "--max-tokens", "4", "--kl", "K3:0.04",
                "--metrics", metrics.toString());
        assertEquals(1, result.out().lines().count());
        JsonObject step = JsonParser.parseString(Files.readString(metrics)).getAsJsonObject();
        assertEquals(0, step.get("step").getAsInt());
        assertEquals(20, step.getAsJsonObject("reward").get("tokens").getAsInt(), "ten prompts, two samples each");
        JsonElement kl = step.get("kl");
        assertEquals(0, kl.getAsDouble(), 1e-3, "the reference is the model itself");
        assertFalse(step.get("skipped").getAsBoolean());
    }

    @Test
    void additionPractisesAndIsExamined() throws Exception {
        Path chart = folder.resolve("reward.svg");
        List<String> lines = succeed("Addition", "--model", MODEL.toString(), "--steps", "2", "--prompts-per-step", "3", "--group-size", "2",
                "--unseen", "4", "--max-tokens", "4", "--dtype", "float32", "--chart", chart.toString()).out().lines().toList();
        assertEquals(6, lines.size(), lines.toString());
        assertEquals("unseen sums right before: 0.0 %", lines.get(1));
        assertTrue(lines.get(3).startsWith("step 2: reward 0.000, 4.0 tokens"), lines.toString());
        assertTrue(Files.readString(chart).contains("<polyline"));
    }

    @ParameterizedTest
    @ValueSource(strings = {
        "Addition --model MODEL --group-size 1|--group-size 2",
        "Generate --model MODEL|--prompt",
        "Generate --model nowhere --prompt a|nowhere",
        "Generate --model MODEL --prompt-ids 99999|99999",
        "Score --model MODEL --ids 1 --json|two tokens",
        "Grpo --model MODEL --data nowhere.jsonl --kl K9:1|K9:1",
        "Quickstart --sede 3|--sede",
    })
    void badArgumentsAreNamed(String line) throws Exception {
        String[] parts = line.replace("MODEL", MODEL.toString()).split("\\|");
        String[] words = parts[0].split(" ");
        Result result = run(words[0], Arrays.copyOfRange(words, 1, words.length));
        assertEquals(2, result.exitCode(), result.err());
        assertEquals("", result.out());
        assertTrue(result.err().contains(parts[1]), result.err());
        assertFalse(result.err().contains("\tat "), result.err());
    }

    private static String join(int[] ids) {
        return String.join(",", Arrays.stream(ids).mapToObj(Integer::toString).toList());
    }
}
