package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.generation.Completion;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.generation.LogprobKind;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Generation in Tandem's kernels against the training side, which is libtorch's operations, with the same weights. */
@Gpu
class CudaGenerationTest {
    private static final Device CUDA = Device.cuda(0);

    static EngineOptions options(GeneratorOptions generation) {
        return EngineOptions.defaults().devices(CUDA).dtype(DType.BFLOAT16).kvBytes(256 << 20).memoryLimit(16L << 30).seed(5)
                .generation(generation);
    }

    private static List<Prompt> prompts(ModelConfig config, int count, SamplingParams params, int seed) {
        Random random = new Random(seed);
        List<Prompt> prompts = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            int length = i % 5 == 0 ? 1 + random.nextInt(4) : 1 + random.nextInt(700);
            prompts.add(new Prompt(i, "", random.ints(length, 0, config.vocabSize()).toArray(),
                    params.maxTokens(1 + random.nextInt(params.maxTokens()))));
        }
        return prompts;
    }

    /** {@return prompts with what was generated, of which only that is trained} */
    static List<TrainingSequence> sequences(List<Completion> completions) {
        List<TrainingSequence> sequences = new ArrayList<>();
        for (Completion c : completions) {
            int prompt = c.promptTokens().length;
            int[] all = java.util.Arrays.copyOf(c.promptTokens(), prompt + c.tokens().length);
            System.arraycopy(c.tokens(), 0, all, prompt, c.tokens().length);
            sequences.add(TrainingSequence.of(all, prompt, 1));
        }
        return sequences;
    }

    /** Largest and mean difference of log-probs between the kernels and the training side. */
    static double[] gap(HybridEngine engine, List<Completion> completions, double temperature) {
        float[][] expected = engine.logprobs(sequences(completions), temperature);
        double worst = 0;
        double sum = 0;
        int count = 0;
        for (int s = 0; s < expected.length; s++) {
            int prompt = completions.get(s).promptTokens().length;
            for (int i = 0; i < completions.get(s).tokens().length; i++, count++) {
                double difference = Math.abs(expected[s][prompt + i] - completions.get(s).logprobs()[i]);
                worst = Double.isNaN(difference) ? Double.POSITIVE_INFINITY : Math.max(worst, difference);
                sum += difference;
            }
        }
        return new double[] {worst, sum / count};
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void logprobsAreThoseOfTheTrainingSide(String family) {
        ModelConfig config = TinyModels.published(family);
        for (GeneratorOptions generation : List.of(GeneratorOptions.defaults().blockSize(64).step(4096, 64, 4096),
                GeneratorOptions.defaults().blockSize(16).step(300, 20, 130))) {
            try (HybridEngine engine = HybridEngine.create(config, null, options(generation))) {
                assertTrue(engine.onEachRank(rank -> rank.generator().runsKernels()).getFirst());
                SamplingParams params = SamplingParams.defaults().maxTokens(60).ignoreEos(true);
                List<Completion> done = engine.rollout(prompts(config, 40, params, 1), c -> {});
                double[] gap = gap(engine, done, 1);
                System.out.printf("%s, pages of %d: log-probs within %.3f, mean %.5f%n", family, generation.blockSize(), gap[0], gap[1]);
                assertTrue(gap[0] < 0.1 && gap[1] < 0.01, "gap " + gap[0] + ", mean " + gap[1]);
            }
        }
    }

    @Test
    void samplesOfOnePromptSharePagesAndPrefixesAreFound() {
        ModelConfig config = TinyModels.published("qwen3");
        try (HybridEngine engine = HybridEngine.create(config, null, options(GeneratorOptions.defaults().blockSize(32).step(2048, 64, 512)))) {
            SamplingParams params = SamplingParams.defaults().maxTokens(40).ignoreEos(true).n(6).seed(3L);
            List<Prompt> prompts = prompts(config, 12, params, 2);
            List<Completion> first = engine.rollout(prompts, c -> {});
            List<Completion> again = engine.rollout(prompts, c -> {});
            assertTrue(again.stream().anyMatch(c -> c.cachedTokens() > 0));
            double[] gap = gap(engine, first, 1);
            double[] gapAgain = gap(engine, again, 1);
            System.out.printf("six samples each: log-probs within %.3f, mean %.5f; again %.3f, %.5f%n", gap[0], gap[1], gapAgain[0], gapAgain[1]);
            assertTrue(gap[0] < 0.1 && gap[1] < 0.01 && gapAgain[0] < 0.1 && gapAgain[1] < 0.01);
        }
    }

    /** Requests come and go, so that steps of many sizes follow each other: whoever reads what is not yet written differs now and then. */
    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen3"})
    void rolloutsRepeatBitForBit(String family) {
        ModelConfig config = TinyModels.published(family);
        GeneratorOptions generation = GeneratorOptions.defaults().blockSize(64).step(4096, 64, 4096).prefixCaching(false);
        try (HybridEngine engine = HybridEngine.create(config, null, options(generation))) {
            List<Prompt> prompts = prompts(config, 40, SamplingParams.defaults().maxTokens(60).ignoreEos(true).seed(7L), 1);
            List<Completion> first = engine.rollout(prompts, c -> {});
            for (int run = 0; run < 5; run++) {
                List<Completion> again = engine.rollout(prompts, c -> {});
                for (int i = 0; i < first.size(); i++) {
                    assertArrayEquals(first.get(i).tokens(), again.get(i).tokens(), "tokens of prompt " + i + ", run " + run);
                    assertArrayEquals(first.get(i).logprobs(), again.get(i).logprobs(), "log-probs of prompt " + i + ", run " + run);
                }
            }
        }
    }

    /** A pool that holds a few samples only: they are preempted and computed again. */
    @Test
    void preemptionsChangeNothing() {
        ModelConfig config = TinyModels.published("llama");
        long block = 2L * 3 * 3 * 64 * 16 * 2;
        EngineOptions options = options(GeneratorOptions.defaults().blockSize(16).step(512, 32, 512)).kvBytes(100 * block);
        try (HybridEngine engine = HybridEngine.create(config, null, options)) {
            SamplingParams params = SamplingParams.defaults().maxTokens(200).ignoreEos(true);
            List<Completion> done = engine.rollout(prompts(config, 30, params, 3), c -> {});
            long preemptions = engine.onEachRank(rank -> rank.generator().preemptions()).getFirst();
            double[] gap = gap(engine, done, 1);
            System.out.printf("%d preemptions: log-probs within %.3f, mean %.5f%n", preemptions, gap[0], gap[1]);
            assertTrue(preemptions > 0);
            assertTrue(gap[0] < 0.1 && gap[1] < 0.01, "gap " + gap[0] + ", mean " + gap[1]);
        }
    }

    /** Kinds of log-prob that the training side can compute too. */
    @Test
    void temperatureTruncationPenaltiesAndStops() {
        ModelConfig config = TinyModels.published("llama");
        try (HybridEngine engine = HybridEngine.create(config, null, options(GeneratorOptions.defaults().blockSize(16)))) {
            SamplingParams plain = SamplingParams.defaults().maxTokens(30).ignoreEos(true);
            SamplingParams cool = plain.temperature(0.7).logprobKind(LogprobKind.TEMPERATURE);
            double[] gap = gap(engine, engine.rollout(prompts(config, 10, cool, 4), c -> {}), 0.7);
            assertTrue(gap[0] < 0.15 && gap[1] < 0.015, "temperature: gap " + gap[0] + ", mean " + gap[1]);
            SamplingParams cut = plain.topK(20).topP(0.9).minP(0.01);
            gap = gap(engine, engine.rollout(prompts(config, 10, cut, 5), c -> {}), 1);
            assertTrue(gap[0] < 0.1 && gap[1] < 0.01, "truncation: gap " + gap[0] + ", mean " + gap[1]);
            for (Completion c : engine.rollout(prompts(config, 10, plain.topK(1), 6), c -> {})) {
                assertEquals(engine.generateTokens(List.of(c.promptTokens()), plain.temperature(0).maxTokens(c.tokens().length))
                        .getFirst().tokens()[0], c.tokens()[0], "top-k 1 is greedy");
            }
            // With a huge penalty no token comes twice; log-probs are raw ones and stay comparable.
            List<Completion> once = engine.rollout(prompts(config, 6, plain.temperature(0).repetitionPenalty(1e6), 7), c -> {});
            for (Completion c : once) {
                assertEquals(c.tokens().length, java.util.Arrays.stream(c.tokens()).distinct().count());
            }
            gap = gap(engine, once, 1);
            assertTrue(gap[0] < 0.1 && gap[1] < 0.01, "penalty: gap " + gap[0] + ", mean " + gap[1]);
            int favourite = engine.generateTokens(List.of(new int[] {7}), plain.temperature(0).maxTokens(1)).getFirst().tokens()[0];
            Completion late = engine.generateTokens(List.of(new int[] {7}),
                    plain.temperature(0).stopTokenIds(List.of(favourite)).minTokens(3).maxTokens(9)).getFirst();
            assertTrue(late.tokens().length >= 3);
            assertTrue(java.util.Arrays.stream(late.tokens()).limit(2).noneMatch(t -> t == favourite));
        }
    }

    static java.util.stream.Stream<Fixture> fixtures() {
        return Fixture.all();
    }

    /** Greedy continuations in bfloat16 against transformers in float64, as far as the margins are wide. */
    @ParameterizedTest
    @MethodSource("fixtures")
    void fixturesInBfloat16(Fixture fixture) {
        JsonArray golden = fixture.golden().getAsJsonArray("prompts");
        double worst = 0;
        double sum = 0;
        int count = 0;
        try (HybridEngine engine = HybridEngine.open(fixture.folder(), options(GeneratorOptions.defaults().blockSize(16)))) {
            boolean kernels = engine.onEachRank(rank -> rank.generator().runsKernels()).getFirst();
            for (int i = 0; i < golden.size(); i++) {
                JsonObject p = golden.get(i).getAsJsonObject();
                int[] expected = Fixture.ints(p.getAsJsonArray("greedy"));
                double[] logprobs = Fixture.doubles(p.getAsJsonArray("greedy_logprobs"));
                double[] margins = Fixture.doubles(p.getAsJsonArray("greedy_margins"));
                Completion found = engine.generateTokens(List.of(Fixture.ints(p.getAsJsonArray("ids"))),
                        SamplingParams.greedy().maxTokens(expected.length).ignoreEos(true)).getFirst();
                for (int t = 0; t < expected.length && margins[t] > 0.1; t++, count++) {
                    assertEquals(expected[t], found.tokens()[t], "prompt " + i + ", token " + t);
                    double difference = Math.abs(logprobs[t] - found.logprobs()[t]);
                    worst = Math.max(worst, difference);
                    sum += difference;
                }
            }
            System.out.printf("%s in bfloat16, kernels %s: %d tokens equal, log-probs within %.4f, mean %.5f%n",
                    fixture.family(), kernels, count, worst, sum / count);
        }
        assertTrue(worst < 0.05 && sum / count < 0.01, "largest " + worst + ", mean " + sum / count);
    }
}
