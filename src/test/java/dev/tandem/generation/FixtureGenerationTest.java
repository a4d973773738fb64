package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.Gpu;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

/** Greedy continuations against transformers in float64. */
class FixtureGenerationTest {
    private static final double MARGIN = 1e-3;

    static Stream<Arguments> variants() {
        return Fixture.all().flatMap(fixture -> Stream.of(
                Arguments.of(fixture, GeneratorOptions.defaults(), 200),
                Arguments.of(fixture, GeneratorOptions.defaults().blockSize(4).step(8, 3, 5), 90),
                Arguments.of(fixture, GeneratorOptions.defaults().prefixCaching(false).step(64, 64, 7), 24)));
    }

    @ParameterizedTest
    @MethodSource("variants")
    void greedyContinuations(Fixture fixture, GeneratorOptions options, int blocks) {
        check(fixture, Device.cpu(), options, blocks);
    }

    @Gpu
    @ParameterizedTest
    @MethodSource("variants")
    void greedyContinuationsOnCuda(Fixture fixture, GeneratorOptions options, int blocks) {
        check(fixture, Device.cuda(0), options, blocks);
    }

    private static void check(Fixture fixture, Device device, GeneratorOptions options, int blocks) {
        JsonArray golden = fixture.golden().getAsJsonArray("prompts");
        List<Prompt> prompts = new ArrayList<>();
        for (int i = 0; i < golden.size(); i++) {
            JsonObject p = golden.get(i).getAsJsonObject();
            SamplingParams params = SamplingParams.greedy().maxTokens(p.getAsJsonArray("greedy").size()).ignoreEos(true);
            prompts.add(new Prompt(i, "", Fixture.ints(p.getAsJsonArray("ids")), params));
        }
        double worst = 0;
        int compared = 0;
        try (RankGenerator rank = new RankGenerator(fixture.folder(), device, DType.FLOAT32, options, blocks)) {
            List<Completion> found = rank.run(prompts);
            assertEquals(prompts.size(), found.size());
            for (int i = 0; i < golden.size(); i++) {
                JsonObject p = golden.get(i).getAsJsonObject();
                int[] expected = Fixture.ints(p.getAsJsonArray("greedy"));
                double[] logprobs = Fixture.doubles(p.getAsJsonArray("greedy_logprobs"));
                double[] margins = Fixture.doubles(p.getAsJsonArray("greedy_margins"));
                for (int t = 0; t < expected.length && margins[t] > MARGIN; t++, compared++) {
                    assertEquals(expected[t], found.get(i).tokens()[t], "prompt " + i + ", token " + t);
                    worst = Math.max(worst, Math.abs(logprobs[t] - found.get(i).logprobs()[t]));
                }
            }
            System.out.printf("%s: %d tokens equal, log-probs within %.2e, %d preemptions%n", fixture, compared, worst,
                    rank.generator.preemptions());
        }
        assertTrue(worst < 1e-4, "largest log-prob difference " + worst);
    }
}
