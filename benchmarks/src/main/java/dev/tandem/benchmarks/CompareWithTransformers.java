package dev.tandem.benchmarks;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;

/**
 * Opens a checkpoint that transformers wrote and compares greedy answers and log-probs with those that it gave
 * ({@code transformers_answers.py}).
 */
final class CompareWithTransformers {
    private CompareWithTransformers() {}

    public static void main(String[] args) throws IOException {
        long start = ProcessHandle.current().info().startInstant().orElseThrow().toEpochMilli();
        Path folder = Path.of(args[0]);
        JsonArray answers = JsonParser.parseString(Files.readString(folder.resolve("answers.json"))).getAsJsonArray();
        try (HybridEngine engine = HybridEngine.open(folder, EngineOptions.defaults())) {
            engine.generateTokens(List.of(new int[] {1, 2, 3}), SamplingParams.greedy().maxTokens(1).ignoreEos(true));
            System.out.printf(Locale.ROOT, "process start to first token: %.1f s%n", (System.currentTimeMillis() - start) / 1e3);
            List<Double> generation = new ArrayList<>();
            List<Double> training = new ArrayList<>();
            int equal = 0;
            int diverged = 0;
            double widest = 0;
            for (JsonElement each : answers) {
                JsonObject answer = each.getAsJsonObject();
                int[] prompt = ints(answer.getAsJsonArray("prompt"));
                int[] tokens = ints(answer.getAsJsonArray("tokens"));
                Completion found = engine.generateTokens(List.of(prompt), SamplingParams.greedy().maxTokens(tokens.length).ignoreEos(true))
                        .getFirst();
                int same = 0;
                while (same < tokens.length && tokens[same] == found.tokens()[same]) {
                    generation.add(Math.abs(found.logprobs()[same] - answer.getAsJsonArray("logprobs").get(same).getAsDouble()));
                    same++;
                }
                equal += same;
                if (same < tokens.length) {
                    diverged++;
                    widest = Math.max(widest, answer.getAsJsonArray("margins").get(same).getAsDouble());
                }
                int[] all = Arrays.copyOf(prompt, prompt.length + tokens.length);
                System.arraycopy(tokens, 0, all, prompt.length, tokens.length);
                float[] logprobs = engine.logprobs(List.of(TrainingSequence.of(all, prompt.length, 1)), 1)[0];
                for (int i = 0; i < tokens.length; i++) {
                    training.add(Math.abs(logprobs[prompt.length + i] - answer.getAsJsonArray("logprobs").get(i).getAsDouble()));
                }
            }
            System.out.printf(Locale.ROOT, "%d greedy tokens equal; %d of %d answers part ways, at margins of at most %.4f%n", equal,
                    diverged, answers.size(), widest);
            report("generation against transformers", generation);
            report("training side against transformers", training);
        }
    }

    private static void report(String name, List<Double> differences) {
        double[] sorted = differences.stream().mapToDouble(Double::doubleValue).sorted().toArray();
        System.out.printf(Locale.ROOT, "%s: %d log-probs, differences: median %.5f, 90 %% %.5f, 99 %% %.5f, largest %.5f, mean %.5f%n", name,
                sorted.length, sorted[sorted.length / 2], sorted[sorted.length * 9 / 10], sorted[sorted.length * 99 / 100],
                sorted[sorted.length - 1], Arrays.stream(sorted).average().orElse(0));
    }

    private static int[] ints(JsonArray array) {
        int[] values = new int[array.size()];
        for (int i = 0; i < values.length; i++) {
            values[i] = array.get(i).getAsInt();
        }
        return values;
    }
}
