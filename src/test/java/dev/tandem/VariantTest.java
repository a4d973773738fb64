package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;

/** What the families' files can ask for beside the usual, against transformers in float64: forward, backward,
        generated, saved. */
@ExtendWith(NativeObjects.class)
class VariantTest {
    static Stream<String> variants() throws IOException {
        try (Stream<Path> folders = Files.list(Fixture.folder("variants"))) {
            return folders.map(folder -> folder.getFileName().toString()).sorted().toList().stream();
        }
    }

    @ParameterizedTest
    @MethodSource("variants")
    void equalsTransformers(String name, @TempDir Path saved) throws IOException {
        Path folder = Fixture.folder("variants/" + name);
        JsonObject answers = JsonParser.parseString(Files.readString(folder.resolve("answers.json"))).getAsJsonObject();
        List<TrainingSequence> batch = new ArrayList<>();
        List<double[]> expected = new ArrayList<>();
        for (JsonElement sequence : answers.getAsJsonArray("sequences")) {
            batch.add(TrainingSequence.of(Fixture.ints(sequence.getAsJsonArray()), 1, 1));
        }
        answers.getAsJsonArray("logprobs").forEach(row -> expected.add(Fixture.doubles(row.getAsJsonArray())));
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).training(TrainerOptions.defaults().lr(0));
        try (HybridEngine engine = HybridEngine.open(folder, options)) {
            check(engine, batch, expected);
            TrainStep step = engine.train(batch);
            assertEquals(answers.get("loss").getAsDouble(), step.loss(), 1e-5);
            assertEquals(1, step.gradientNorm() / answers.get("grad_norm").getAsDouble(), 1e-4);
            generatorAgrees(engine, batch.getFirst().tokens());
            engine.save(saved);
            try (HybridEngine again = HybridEngine.open(saved, options)) {
                assertEquals(engine.config(), again.config());
                assertArrayEquals(engine.onEachRank(HybridEngineTest::weights).getFirst(),
                        again.onEachRank(HybridEngineTest::weights).getFirst());
            }
        }
    }

    private static void check(HybridEngine engine, List<TrainingSequence> batch, List<double[]> expected) {
        float[][] found = engine.logprobs(batch, 1);
        for (int s = 0; s < found.length; s++) {
            for (int i = 1; i < found[s].length; i++) {
                assertEquals(expected.get(s)[i - 1], found[s][i], 1e-4, "sequence " + s + ", token " + i);
            }
        }
    }

    /** The generator's log-probs of what it samples are the trainer's, behind a prompt that is computed in chunks. */
    private static void generatorAgrees(HybridEngine engine, int[] prompt) {
        SamplingParams params = SamplingParams.defaults().maxTokens(10).ignoreEos(true);
        for (Completion completion : engine.generateTokens(List.of(prompt, Arrays.copyOf(prompt, 3)), params)) {
            int length = completion.promptTokens().length;
            int[] whole = Arrays.copyOf(completion.promptTokens(), length + completion.tokens().length);
            System.arraycopy(completion.tokens(), 0, whole, length, completion.tokens().length);
            float[] scored = engine.logprobs(List.of(TrainingSequence.of(whole, length, 1)), 1)[0];
            assertTrue(completion.tokens().length == 10);
            for (int t = 0; t < completion.tokens().length; t++) {
                assertEquals(scored[length + t], completion.logprobs()[t], 1e-4);
            }
        }
    }
}
