package dev.tandem.benchmarks;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.DType;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ChatMessage;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;

/**
 * Opens a checkpoint that transformers wrote or read and compares greedy answers and log-probs with those that it gave
 * ({@code transformers_answers.py}). A model that chats is then asked each question 16 times at temperature 1, and some answers are shown.
 *
 * <pre>
 * CompareWithTransformers DIR
 * </pre>
 */
final class CompareWithTransformers {
    private static final int SAMPLES = 16;

    private final HybridEngine engine;
    private final List<Double> generation = new ArrayList<>();
    private final List<Double> training = new ArrayList<>();
    private final List<Double> generationExact = new ArrayList<>();
    private final List<Double> trainingExact = new ArrayList<>();
    private final List<Double> transformersExact = new ArrayList<>();
    private int tokens;
    private int equal;
    private int diverged;
    private double widest;

    private CompareWithTransformers(HybridEngine engine) {
        this.engine = engine;
    }

    public static void main(String[] args) throws IOException {
        long start = ProcessHandle.current().info().startInstant().orElseThrow().toEpochMilli();
        Path folder = Path.of(args[0]);
        JsonObject file = JsonParser.parseString(Files.readString(folder.resolve("answers.json"))).getAsJsonObject();
        JsonArray answers = file.getAsJsonArray("answers");
        EngineOptions options = EngineOptions.defaults().dtype(DType.valueOf(file.get("dtype").getAsString()));
        try (HybridEngine engine = HybridEngine.open(folder, options)) {
            engine.generateTokens(List.of(new int[] {1, 2, 3}), SamplingParams.greedy().maxTokens(1).ignoreEos(true));
            System.out.printf(Locale.ROOT, "process start to first token: %.1f s%n", (System.currentTimeMillis() - start) / 1e3);
            CompareWithTransformers comparison = new CompareWithTransformers(engine);
            answers.forEach(answer -> comparison.add(answer.getAsJsonObject()));
            comparison.report();
        }
        if (answers.get(0).getAsJsonObject().has("question")) {
            try (HybridEngine engine = HybridEngine.open(folder)) {
                chat(engine, answers);
            }
        }
    }

    private void add(JsonObject answer) {
        int[] prompt = ints(answer.getAsJsonArray("prompt"));
        int[] wanted = ints(answer.getAsJsonArray("tokens"));
        double[] logprobs = doubles(answer.getAsJsonArray("logprobs"));
        double[] exact = answer.has("float32") ? doubles(answer.getAsJsonArray("float32")) : null;
        if (answer.has("question")) {
            String text = engine.chatPrompt(List.of(ChatMessage.user(answer.get("question").getAsString())));
            if (!Arrays.equals(prompt, engine.tokenizer().encode(text, false))) {
                System.out.println("the prompt differs: " + text);
            }
        }
        Completion found = engine.generateTokens(List.of(prompt), SamplingParams.greedy().maxTokens(wanted.length).ignoreEos(true)).getFirst();
        int same = 0;
        while (same < wanted.length && wanted[same] == found.tokens()[same]) {
            generation.add(Math.abs(found.logprobs()[same] - logprobs[same]));
            if (exact != null) {
                generationExact.add(Math.abs(found.logprobs()[same] - exact[same]));
            }
            same++;
        }
        tokens += wanted.length;
        equal += same;
        if (same < wanted.length) {
            diverged++;
            widest = Math.max(widest, answer.getAsJsonArray("margins").get(same).getAsDouble());
        }
        int[] all = Arrays.copyOf(prompt, prompt.length + wanted.length);
        System.arraycopy(wanted, 0, all, prompt.length, wanted.length);
        float[] ours = engine.logprobs(List.of(TrainingSequence.of(all, prompt.length, 1)), 1)[0];
        for (int i = 0; i < wanted.length; i++) {
            training.add(Math.abs(ours[prompt.length + i] - logprobs[i]));
            if (exact != null) {
                trainingExact.add(Math.abs(ours[prompt.length + i] - exact[i]));
                transformersExact.add(Math.abs(logprobs[i] - exact[i]));
            }
        }
    }

    private void report() {
        System.out.printf(Locale.ROOT, "%d of %d greedy tokens equal; %d answers part ways, at margins of at most %.4f%n", equal, tokens,
                diverged, widest);
        report("generation against transformers", generation);
        report("training side against transformers", training);
        report("transformers against its own float32", transformersExact);
        report("generation against transformers in float32", generationExact);
        report("training side against transformers in float32", trainingExact);
    }

    private static void report(String name, List<Double> differences) {
        if (differences.isEmpty()) {
            return;
        }
        double[] sorted = differences.stream().mapToDouble(Double::doubleValue).sorted().toArray();
        System.out.printf(Locale.ROOT, "%s: %d log-probs, differences: median %.6f, 90 %% %.6f, 99 %% %.6f, largest %.6f, mean %.6f%n", name,
                sorted.length, sorted[sorted.length / 2], sorted[sorted.length * 9 / 10], sorted[sorted.length * 99 / 100],
                sorted[sorted.length - 1], Arrays.stream(sorted).average().orElse(0));
    }

    private static void chat(HybridEngine engine, JsonArray answers) {
        List<String> prompts = new ArrayList<>();
        for (JsonElement answer : answers) {
            prompts.add(engine.chatPrompt(List.of(ChatMessage.user(answer.getAsJsonObject().get("question").getAsString()))));
        }
        List<Completion> said = engine.generate(prompts, SamplingParams.defaults().n(SAMPLES).maxTokens(128));
        System.out.printf("%d answers at temperature 1, %d ended by themselves; two to each question:%n", said.size(),
                said.stream().filter(c -> c.tokens().length < 128).count());
        for (Completion completion : said) {
            if (completion.sample() < 2) {
                String question = answers.get(completion.prompt()).getAsJsonObject().get("question").getAsString();
                System.out.println("  " + question + " → " + completion.text().replace('\n', ' '));
            }
        }
    }

    private static int[] ints(JsonArray array) {
        return array.asList().stream().mapToInt(JsonElement::getAsInt).toArray();
    }

    private static double[] doubles(JsonArray array) {
        return array.asList().stream().mapToDouble(JsonElement::getAsDouble).toArray();
    }
}
