package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.KernelModule;
import dev.tandem.generation.SamplingLaunches.Draws;
import dev.tandem.generation.SamplingLaunches.Sample;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.stream.IntStream;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Draws and log-probs on a GPU against {@link SamplingReference}. */
@Gpu
class CudaSamplingTest extends KernelTest {
    private static final int[] NONE = {};
    private static final int TILE = 512;
    private static final double SLACK = 3e-6;
    private static final SamplingParams PLAIN = SamplingParams.defaults();

    private SamplingLaunches launches;

    @BeforeEach
    void compile() {
        ModelConfig any = ModelConfig.llama(1000, 64, 1, 1, 1, 64, 64);
        List<KernelModule> modules = load(any, GeneratorOptions.defaults(), "sampling.cu", "truncation.cu");
        launches = new SamplingLaunches(modules.get(0), modules.get(1));
    }

    /** Logits as they come, nearly flat, with ties, mostly impossible, and with a favourite. */
    private static float[][] rows(int vocabulary, Random random) {
        float[][] rows = new float[5][vocabulary];
        for (int i = 0; i < vocabulary; i++) {
            double x = random.nextGaussian();
            rows[0][i] = (float) (3 * x + 5);
            rows[1][i] = (float) (x / 2);
            rows[2][i] = (float) Math.rint(2 * x);
            rows[3][i] = random.nextInt(10) < 7 ? Float.NEGATIVE_INFINITY : (float) (3 * x - 20);
            rows[4][i] = (float) (2 * x);
        }
        rows[4][random.nextInt(vocabulary)] = 18;
        return rows;
    }

    private static double pick(Random random, double... choices) {
        return choices[random.nextInt(choices.length)];
    }

    /** Values that are float32 numbers, so that kernel and reference mean the same. */
    private static Sample sample(Random random, float[][] rows, boolean edited) {
        int vocabulary = rows[0].length;
        SamplingParams params = PLAIN.temperature(pick(random, 0, 0.5, 1, 1, 1.25))
                .topK((int) pick(random, 0, 0, 1, 5, 200, 4000, vocabulary - 1, vocabulary))
                .topP(pick(random, 1, 1, 0.125, 0.5, 0.90625, 0.984375)).minP(pick(random, 0, 0, 0, 0.0625, 0.125))
                .logprobKind(LogprobKind.values()[random.nextInt(3)]).repetitionPenalty(edited ? pick(random, 1, 1.25, 0.75) : 1);
        int row = random.nextInt(rows.length);
        int[] masked = NONE;
        if (edited) { // the likeliest tokens, without which the others matter, and any
            List<Integer> order = new ArrayList<>(IntStream.range(0, vocabulary).boxed().toList());
            order.sort((a, b) -> Float.compare(rows[row][b], rows[row][a]));
            masked = IntStream.range(0, (int) pick(random, 0, 1, 5, StepLayout.MAX_MASKED))
                    .map(i -> i % 2 == 0 ? order.get(i) : random.nextInt(vocabulary)).toArray();
        }
        int[] seen = params.repetitionPenalty() == 1 ? NONE : random.ints(random.nextInt(3000), 0, vocabulary).toArray();
        return new Sample(row, params, random.nextLong(), random.nextLong(), random.nextInt(1 << 17), seen, masked);
    }

    @ParameterizedTest(name = "{1} samples of {0} tokens, edited {2}")
    @CsvSource({"5003, 120, false", "5003, 120, true", "151936, 20, false"})
    void tokensAreInTheSupportAndLogprobsRight(int vocabulary, int count, boolean edited) {
        Random random = new Random(vocabulary + count);
        float[][] rows = rows(vocabulary, random);
        List<Sample> samples = IntStream.range(0, count).mapToObj(i -> sample(random, rows, edited)).toList();
        Draws draws = launches.draw(rows, Math.min(7, Math.ceilDiv(vocabulary, 4 * TILE)), samples);
        double[] worst = new double[LogprobKind.values().length];
        int moved = 0;
        for (int i = 0; i < count; i++) {
            Sample each = samples.get(i);
            float[] row = rows[each.row()];
            int token = draws.tokens()[i];
            assertTrue(token >= 0 && token < vocabulary, each + ": token " + token);
            String fault = fault(row, each, 0, token, draws.logprobs()[i], worst);
            if (!fault.isEmpty() && each.params().truncates()) {
                moved++;
                fault = fault(row, each, SLACK, token, draws.logprobs()[i], worst).isEmpty() ? ""
                        : fault(row, each, -SLACK, token, draws.logprobs()[i], worst);
            }
            assertEquals("", fault, each + ": token " + token);
            if (each.params().repetitionPenalty() != 1) {
                assertArrayEquals(IntStream.concat(Arrays.stream(each.seen()), IntStream.of(token)).distinct().sorted().toArray(),
                        bits(draws.seen(), i * Math.ceilDiv(vocabulary, Integer.SIZE), vocabulary), each + ": tokens seen");
            }
        }
        System.out.printf("%d samples of %d tokens, edited %s: log-probs within %.1e raw, %.1e at temperature, %.1e truncated; "
                + "%d cuts moved by rounding%n", count, vocabulary, edited, worst[0], worst[1], worst[2], moved);
    }

    /**
     * What is wrong with a draw, empty if nothing. Sums in float32 may cut one token earlier or later, so filters' bounds can be moved by
     * a share; {@code worst} takes the largest difference of each kind of log-prob.
     */
    private static String fault(float[] row, Sample sample, double share, int token, float logprob, double[] worst) {
        SamplingParams params = sample.params();
        SamplingParams cut = params.minP(params.minP() * (1 + 10 * share)).topP(params.topP() < 1 ? params.topP() * (1 + share) : 1);
        SamplingReference reference = new SamplingReference(row, cut, sample.seen(), sample.masked());
        if (params.isGreedy()) {
            double best = Arrays.stream(reference.scaled).max().orElseThrow();
            int expected = IntStream.range(0, row.length).filter(t -> reference.scaled[t] == best).findFirst().orElseThrow();
            if (token != expected) {
                return "not the first of the likeliest, which is " + expected;
            }
        } else if (reference.kept[token] == 0) {
            return "not among those that are kept";
        }
        double expected = switch (params.logprobKind()) {
            case RAW -> reference.raw[token];
            case TEMPERATURE -> reference.scaled[token];
            case TRUNCATED -> params.isGreedy() ? 0 : Math.log(reference.kept[token]);
        };
        double difference = Math.abs(expected - logprob) / (1 + 0.05 * Math.abs(expected));
        if (!(difference < 1e-5)) {
            return "log-prob " + logprob + ", not " + expected;
        }
        int kind = params.logprobKind().ordinal();
        worst[kind] = Math.max(worst[kind], difference);
        return "";
    }

    private static int[] bits(int[] words, int first, int vocabulary) {
        return IntStream.range(0, vocabulary).filter(t -> (words[first + t / Integer.SIZE] >>> t % Integer.SIZE & 1) == 1).toArray();
    }

    @Test
    void rowsThatAreNotFiniteAreReported() {
        int vocabulary = 5003;
        Random random = new Random(8);
        float[][] rows = new float[6][];
        Arrays.setAll(rows, i -> rows(vocabulary, random)[0]);
        rows[1][vocabulary - 1] = Float.NaN;
        rows[2][0] = Float.POSITIVE_INFINITY;
        Arrays.fill(rows[3], Float.NEGATIVE_INFINITY);
        Arrays.fill(rows[4], 0, 2048, Float.NEGATIVE_INFINITY);
        Arrays.fill(rows[5], Float.NEGATIVE_INFINITY);
        rows[5][vocabulary - 1] = 1;
        rows[5][3] = 2;
        for (int used = 5; used <= 6; used++) { // the sixth has all that is possible masked, which takes another kernel
            List<Sample> samples = new ArrayList<>();
            for (SamplingParams params : List.of(PLAIN.temperature(0), PLAIN.temperature(0.75), PLAIN.topK(7), PLAIN.topP(0.75),
                    PLAIN.minP(0.125))) {
                for (int row = 0; row < used; row++) {
                    samples.add(new Sample(row, params, 1, 2, 3, NONE, row == 5 ? new int[] {vocabulary - 1, 3} : NONE));
                }
            }
            Draws draws = launches.draw(rows, 2, samples);
            for (int i = 0; i < samples.size(); i++) {
                String what = samples.get(i).toString();
                boolean sound = samples.get(i).row() == 0 || samples.get(i).row() == 4;
                assertTrue(sound ? draws.tokens()[i] >= 0 : draws.tokens()[i] == -1, what);
                assertEquals(sound, !Float.isNaN(draws.logprobs()[i]), what);
                assertTrue(samples.get(i).row() != 4 || draws.tokens()[i] >= 2048, "an impossible token was drawn: " + what);
            }
        }
    }

    @Test
    void drawsDependOnRowAndKeysAlone() {
        int vocabulary = 32_003;
        Random random = new Random(9);
        float[][] rows = rows(vocabulary, random);
        List<Sample> samples = IntStream.range(0, 32).mapToObj(i -> sample(random, rows, false)).toList();
        Draws first = launches.draw(rows, 1, samples);
        for (int slices : new int[] {3, 16}) {
            List<Sample> reversed = new ArrayList<>(samples);
            Collections.reverse(reversed);
            Draws again = launches.draw(rows, slices, reversed);
            for (int i = 0; i < samples.size(); i++) {
                int other = samples.size() - 1 - i;
                assertEquals(first.tokens()[i], again.tokens()[other]);
                assertEquals(first.logprobs()[i], again.logprobs()[other]);
            }
        }
        Draws alone = launches.draw(rows, 5, samples.subList(6, 7));
        assertEquals(first.tokens()[6], alone.tokens()[0]);
        assertEquals(first.logprobs()[6], alone.logprobs()[0]);
        // Of a nearly flat row the same token hardly ever comes twice.
        List<Sample> varied = IntStream.range(0, 64).mapToObj(i -> new Sample(1, i % 2 == 0 ? PLAIN : PLAIN.topP(0.9375),
                i % 4 == 1 ? i : 5, i % 4 == 2 ? i : -6, i % 4 == 3 ? i : 7, NONE, NONE)).toList();
        int[] tokens = launches.draw(rows, 4, varied).tokens();
        assertTrue(Arrays.stream(tokens).distinct().count() >= 45, Arrays.toString(tokens));
        assertEquals(1, IntStream.range(0, 16).map(i -> tokens[4 * i]).distinct().count(), "equal keys");
    }

    @Test
    void drawsFollowTheDistribution() {
        int vocabulary = 2048;
        int count = 100_000;
        Random random = new Random(10);
        float[] row = new float[vocabulary];
        Arrays.fill(row, Float.NEGATIVE_INFINITY);
        random.ints(40, 0, vocabulary).forEach(token -> row[token] = (float) (1.5 * random.nextGaussian()));
        int[] seen = IntStream.range(0, vocabulary / 2).toArray();
        List<SamplingParams> cases = List.of(PLAIN, PLAIN.temperature(2), PLAIN.topK(10), PLAIN.temperature(0.5).topP(0.8125),
                PLAIN.minP(0.125), PLAIN.topK(20).topP(0.90625).minP(0.03125), PLAIN.repetitionPenalty(1.5));
        for (int varied = 0; varied < cases.size(); varied++) {
            SamplingParams params = cases.get(varied);
            boolean penalises = params.repetitionPenalty() != 1;
            // The tokens seen are listed for each sample, so there are fewer of these.
            int draws = penalises ? count / 10 : count;
            List<Sample> samples = new ArrayList<>();
            for (int i = 0; i < draws; i++) {
                samples.add(new Sample(0, params, varied % 3 == 0 ? i : 3, varied % 3 == 1 ? i * 7919L : 4, varied % 3 == 2 ? i : 5,
                        penalises ? seen : NONE, NONE));
            }
            long[] counts = new long[vocabulary];
            Arrays.stream(launches.draw(new float[][] {row}, 1, samples).tokens()).forEach(token -> counts[token]++);
            double[] kept = new SamplingReference(row, params, penalises ? seen : NONE, NONE).kept;
            double worst = 0;
            for (int token = 0; token < vocabulary; token++) {
                double expected = kept[token] * draws;
                assertTrue(expected > 0 || counts[token] == 0, "a removed token was drawn: " + params);
                if (expected >= 25) { // below, the normal distribution is no measure
                    worst = Math.max(worst, Math.abs(counts[token] - expected) / Math.sqrt(expected * (1 - kept[token])));
                }
            }
            System.out.printf("%d draws within %.1f sigma: temperature %s, top-k %d, top-p %s, min-p %s, penalty %s%n", draws, worst,
                    params.temperature(), params.topK(), params.topP(), params.minP(), params.repetitionPenalty());
            assertTrue(worst < 5, worst + " sigma: " + params);
        }
    }
}
