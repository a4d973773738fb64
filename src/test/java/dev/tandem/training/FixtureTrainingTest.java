package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.parallel.Ranks;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.Gpu;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

/** Losses, gradient norms and log-probs against transformers in float64. */
class FixtureTrainingTest {
    static Stream<Arguments> variants() {
        return Fixture.all().flatMap(fixture -> Stream.of(
                Arguments.of(fixture, 1, 0L, 1 << 20, 4096),
                Arguments.of(fixture, 1, 1L << 30, 1 << 14, 64),
                Arguments.of(fixture, 2, 1L << 18, 1 << 16, 40)));
    }

    @ParameterizedTest(name = "{0}, {1} ranks, activations {2}, logits {3}, micro-batch {4}")
    @MethodSource("variants")
    void tenStepsOfAdamW(Fixture fixture, int ranks, long activations, long logits, int microBatchTokens) {
        train(fixture, ranks(ranks), activations, logits, microBatchTokens);
    }

    @Gpu
    @ParameterizedTest
    @MethodSource("fixtures")
    void tenStepsOfAdamWOnCuda(Fixture fixture) {
        train(fixture, new Ranks(List.of(Device.cuda(0)), Duration.ofMinutes(1)), 1L << 30, 1 << 14, 64);
    }

    private static void train(Fixture fixture, Ranks ranks, long activations, long logits, int microBatchTokens) {
        JsonObject run = fixture.golden().getAsJsonObject("train_float64");
        List<int[]> sequences = sequences(run.getAsJsonArray("sequences"));
        int targets = sequences.stream().mapToInt(s -> s.length - 1).sum();
        List<TrainingSequence> batch =
                sequences.stream().map(s -> TrainingSequence.of(s, 1, 1f / targets)).toList();
        JsonObject o = run.getAsJsonObject("optimizer");
        TrainerOptions options = TrainerOptions.defaults()
                .lr(o.get("lr").getAsDouble())
                .betas(o.get("beta1").getAsDouble(), o.get("beta2").getAsDouble())
                .weightDecay(o.get("weight_decay").getAsDouble(), o.get("decay_all_parameters").getAsBoolean())
                .clip(o.get("clip").getAsDouble())
                .microBatchTokens(microBatchTokens)
                .memory(activations, logits);
        double[] losses = Fixture.doubles(run.getAsJsonArray("loss"));
        double[] norms = Fixture.doubles(run.getAsJsonArray("grad_norm"));
        double worst = 0;
        try (ranks; RankModel model = new RankModel(fixture.folder(), ranks, DType.FLOAT32,
                options)) {
            for (int i = 0; i < losses.length; i++) {
                TrainStep step = model.trainer.step(batch, t -> t.logprob().mul(t.weight()).sum().neg(), 1);
                worst = Math.max(worst, Math.abs(step.loss() / losses[i] - 1));
                worst = Math.max(worst, Math.abs(step.gradientNorm() / norms[i] - 1));
            }
        }
        System.out.printf("%s, %d ranks: largest relative difference of loss or gradient norm %.2e%n", fixture, ranks.count(),
                worst);
        assertTrue(worst < 1e-4, "largest relative difference " + worst);
    }

    @ParameterizedTest
    @MethodSource("fixtures")
    void twoRanksTakeTheStepsOfOne(Fixture fixture) {
        JsonObject run = fixture.golden().getAsJsonObject("train_float64");
        List<int[]> sequences = sequences(run.getAsJsonArray("sequences"));
        int targets = sequences.stream().mapToInt(s -> s.length - 1).sum();
        List<TrainingSequence> batch =
                sequences.stream().map(s -> TrainingSequence.of(s, 1, 1f / targets)).toList();
        TrainerOptions options = TrainerOptions.defaults().lr(1e-3).weightDecay(0.1, true);
        double worst = 0;
        try (Ranks one = ranks(1);
                Ranks two = ranks(2);
                RankModel whole = new RankModel(fixture.folder(), one, DType.FLOAT32, options);
                RankModel cut = new RankModel(fixture.folder(), two, DType.FLOAT32, options)) {
            for (int i = 0; i < 10; i++) {
                TrainStep a = whole.trainer.step(batch, t -> t.logprob().mul(t.weight()).sum().neg(), 1);
                TrainStep b = cut.trainer.step(batch, t -> t.logprob().mul(t.weight()).sum().neg(), 1);
                worst = Math.max(worst, Math.abs(b.loss() / a.loss() - 1));
                worst = Math.max(worst, Math.abs(b.gradientNorm() / a.gradientNorm() - 1));
            }
        }
        System.out.printf("%s: two ranks within %.2e of one over ten steps%n", fixture, worst);
        assertTrue(worst < 1e-5, "largest relative difference " + worst);
    }

    static Stream<Fixture> fixtures() {
        return Fixture.all();
    }

    @ParameterizedTest
    @MethodSource("fixtures")
    void logprobsOfPrompts(Fixture fixture) {
        check(fixture, Device.cpu(), DType.FLOAT32, 1e-4, 1e-4);
        check(fixture, Device.cpu(), DType.BFLOAT16, 0.05, 0.01);
    }

    @Gpu
    @ParameterizedTest
    @MethodSource("fixtures")
    void logprobsOfPromptsOnCuda(Fixture fixture) {
        check(fixture, Device.cuda(0), DType.FLOAT32, 1e-4, 1e-4);
        check(fixture, Device.cuda(0), DType.BFLOAT16, 0.05, 0.01);
    }

    private static void check(Fixture fixture, Device device, DType dtype, double most, double mean) {
        List<TrainingSequence> batch = new ArrayList<>();
        List<double[]> expected = new ArrayList<>();
        for (JsonElement e : fixture.golden().getAsJsonArray("prompts")) {
            int[] ids = Fixture.ints(e.getAsJsonObject().getAsJsonArray("ids"));
            if (ids.length > 1) {
                batch.add(TrainingSequence.of(ids, 1, 0));
                expected.add(Fixture.doubles(e.getAsJsonObject().getAsJsonArray("token_logprobs")));
            }
        }
        double worst = 0;
        double sum = 0;
        int count = 0;
        try (Ranks group = new Ranks(List.of(device), Duration.ofMinutes(1));
                RankModel model = new RankModel(fixture.folder(), group, dtype, TrainerOptions.defaults())) {
            float[][] found = model.trainer.logprobs(batch, null, 1);
            for (int s = 0; s < found.length; s++) {
                assertEquals(expected.get(s).length, found[s].length - 1);
                for (int i = 1; i < found[s].length; i++) {
                    double difference = Math.abs(found[s][i] - expected.get(s)[i - 1]);
                    worst = Math.max(worst, difference);
                    sum += difference;
                    count++;
                }
            }
        }
        System.out.printf("%s %s: log-prob differences up to %.2e, mean %.2e%n", fixture, dtype, worst, sum / count);
        assertTrue(worst < most && sum / count < mean, "largest " + worst + ", mean " + sum / count);
    }

    static Ranks ranks(int count) {
        List<Device> devices = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            devices.add(Device.cpu(i));
        }
        return new Ranks(devices, Duration.ofSeconds(20));
    }

    static List<int[]> sequences(JsonArray array) {
        List<int[]> sequences = new ArrayList<>();
        array.forEach(s -> sequences.add(Fixture.ints(s.getAsJsonArray())));
        return sequences;
    }
}
