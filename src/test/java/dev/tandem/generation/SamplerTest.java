package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.management.ThreadMXBean;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.lang.management.ManagementFactory;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.stream.IntStream;
import org.apache.commons.math3.stat.inference.ChiSquareTest;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

/** The sampler against a reference that sorts the vocabulary and computes in doubles with {@link Math#exp}. */
class SamplerTest {
    private static final int[] NONE = {};

    private final Arena arena = Arena.ofConfined();

    @AfterEach
    void close() {
        arena.close();
    }

    private MemorySegment segment(float[] row) {
        MemorySegment segment = arena.allocate(4L * (row.length + 3));
        MemorySegment.copy(row, 0, segment, ValueLayout.JAVA_FLOAT, 12, row.length);
        return segment;
    }

    private int sample(Sampler sampler, float[] row, SamplingParams params, double uniform) {
        return sampler.sample(segment(row), 12, params, NONE, 0, NONE, uniform, Double.NaN);
    }

    private static float[] randomRow(Random random, int size) {
        double scale = Math.exp(random.nextDouble(-2, 3));
        boolean ties = random.nextInt(3) == 0;
        float[] row = new float[size];
        for (int i = 0; i < size; i++) {
            double x = random.nextGaussian() * scale;
            row[i] = (float) (ties ? Math.rint(x) : x);
        }
        return row;
    }

    private static SamplingParams randomParams(Random random, int size) {
        return SamplingParams.defaults().temperature(random.nextInt(4) == 0 ? 1 : Math.exp(random.nextDouble(-2, 1)))
                .topK(random.nextInt(3) == 0 ? 1 + random.nextInt(size + 5) : 0)
                .topP(random.nextInt(2) == 0 ? 1 - random.nextDouble() * 0.9 : 1)
                .minP(random.nextInt(3) == 0 ? random.nextDouble() * 0.5 : 0);
    }

    @Test
    void keepsExactlyWhatASortKeeps() {
        long seed = new Random().nextLong();
        Random random = new Random(seed);
        int compared = 0;
        for (int trial = 0; trial < 3000; trial++) {
            int size = 1 + random.nextInt(trial % 10 == 0 ? 3000 : 60);
            float[] row = randomRow(random, size);
            if (random.nextInt(4) == 0) {
                row[random.nextInt(size)] = Float.NEGATIVE_INFINITY;
                row[random.nextInt(size)] = -0f;
                row[random.nextInt(size)] = 0f;
            }
            SamplingParams params = randomParams(random, size);
            float max = IntStream.range(0, size).mapToObj(i -> row[i]).max(Float::compare).orElseThrow();
            SamplingReference reference = new SamplingReference(row, params, NONE, NONE);
            if (max == Float.NEGATIVE_INFINITY || reference.close) {
                continue;
            }
            compared++;
            Truncation truncation = new Truncation(size);
            truncation.apply(row, max, 1 / params.temperature(), params);
            int[] expected = IntStream.range(0, size).filter(i -> reference.kept[i] > 0).toArray();
            String message = "seed " + seed + ", trial " + trial + ": " + params;
            double total = Arrays.stream(truncation.weights, 0, truncation.count).sum();
            for (int i = 0, e = 0; i < truncation.count; i++) {
                int id = truncation.ids[i];
                if (reference.kept[id] == 0 && truncation.weights[i] < 1e-300) {
                    continue; // too unlikely to be a double in the reference
                }
                assertTrue(e < expected.length && expected[e] == id, message + ": keeps " + id);
                assertEquals(reference.kept[id], truncation.weights[i] / total, 1e-10, message);
                e++;
                if (i == truncation.count - 1) {
                    assertEquals(expected.length, e, message);
                }
            }
        }
        assertTrue(compared > 2500, "most trials were skipped: " + compared);
    }

    @Test
    void tokenIsTheInverseOfTheCumulativeDistribution() {
        long seed = new Random().nextLong();
        Random random = new Random(seed);
        for (int trial = 0; trial < 2000; trial++) {
            int size = 1 + random.nextInt(trial % 10 == 0 ? 3000 : 60);
            float[] row = randomRow(random, size);
            int[] tokens = random.ints(random.nextInt(8), 0, size).toArray();
            int[] masked = random.nextInt(3) == 0 && size > 2 ? new int[] {random.nextInt(size)} : NONE;
            SamplingParams params = randomParams(random, size).repetitionPenalty(random.nextInt(2) == 0 ? 1 : 1.3);
            SamplingReference reference = new SamplingReference(row, params, tokens, masked);
            if (reference.close) {
                continue;
            }
            Sampler sampler = new Sampler(size);
            double uniform = random.nextDouble();
            for (LogprobKind kind : LogprobKind.values()) {
                int token = sampler.sample(segment(row), 12, params.logprobKind(kind), tokens, tokens.length, masked, uniform,
                        Double.NaN);
                String message = "seed " + seed + ", trial " + trial + ", token " + token + ": " + params;
                double below = Arrays.stream(reference.kept, 0, token).sum();
                assertTrue(below <= uniform + 1e-9 && uniform <= below + reference.kept[token] + 1e-9, message);
                double expected = switch (kind) {
                    case RAW -> reference.raw[token];
                    case TEMPERATURE -> reference.scaled[token];
                    case TRUNCATED -> Math.log(reference.kept[token]);
                };
                assertEquals(expected, sampler.logprob(), 1e-6, message);
            }
        }
    }

    @Test
    void drawsFollowTheDistribution() {
        float[] row = {2, -1, 0.5f, 0.5f, 3, -4, 1, 0, 2.5f, -0.5f};
        Sampler sampler = new Sampler(row.length);
        MemorySegment segment = segment(row);
        List<SamplingParams> cases = List.of(SamplingParams.defaults(), SamplingParams.defaults().temperature(2),
                SamplingParams.defaults().topK(4), SamplingParams.defaults().topP(0.8).temperature(1.5),
                SamplingParams.defaults().minP(0.1), SamplingParams.defaults().topK(6).topP(0.9).minP(0.02));
        for (SamplingParams params : cases) {
            double[] kept = new SamplingReference(row, params, NONE, NONE).kept;
            long[] counts = new long[row.length];
            for (int position = 0; position < 200_000; position++) {
                double uniform = CounterRandom.uniform(42, params.hashCode() % 7, position);
                counts[sampler.sample(segment, 12, params, NONE, 0, NONE, uniform, Double.NaN)]++;
            }
            int[] support = IntStream.range(0, row.length).filter(i -> kept[i] > 0).toArray();
            assertEquals(200_000, Arrays.stream(support).mapToLong(i -> counts[i]).sum(), "a removed token was drawn: " + params);
            double p = new ChiSquareTest().chiSquareTest(Arrays.stream(support).mapToDouble(i -> kept[i]).toArray(),
                    Arrays.stream(support).mapToLong(i -> counts[i]).toArray());
            assertTrue(p > 1e-4, "chi-square p = " + p + " for " + params + ": " + Arrays.toString(counts));
        }
    }

    @Test
    void greedyTakesTheLowestIdOfTheLargest() {
        float[] row = {1, 4, -2, 4, 4};
        Sampler sampler = new Sampler(row.length);
        assertEquals(1, sample(sampler, row, SamplingParams.greedy(), 0.99));
        assertEquals(SamplingReference.logSoftmax(new double[] {1, 4, -2, 4, 4})[1], sampler.logprob(), 1e-12);
        sample(sampler, row, SamplingParams.greedy().logprobKind(LogprobKind.TRUNCATED), 0.5);
        assertEquals(0, sampler.logprob());
        int[] tokens = {1, 1, 1};
        int token = sampler.sample(segment(row), 12, SamplingParams.greedy().repetitionPenalty(1.5)
                .logprobKind(LogprobKind.TEMPERATURE), tokens, 3, new int[] {3}, 0, Double.NaN);
        assertEquals(4, token, "1 is penalised (once), 3 is masked");
        double[] edited = {1, 4f / 1.5f, -2, Double.NEGATIVE_INFINITY, 4};
        assertEquals(SamplingReference.logSoftmax(edited)[4], sampler.logprob(), 1e-7);
    }

    @Test
    void aGivenLogSumExpIsUsedForRawLogprobs() {
        float[] row = {1, 2, 3};
        Sampler sampler = new Sampler(3);
        int token = sampler.sample(segment(row), 12, SamplingParams.greedy(), NONE, 0, NONE, 0, 10.0);
        assertEquals(3 - 10.0, sampler.logprob());
        assertEquals(2, token);
    }

    @Test
    void rowsThatAreNotFiniteAreReported() {
        Sampler sampler = new Sampler(4);
        for (SamplingParams params : List.of(SamplingParams.greedy(), SamplingParams.defaults(), SamplingParams.defaults().topP(0.5))) {
            assertEquals(Sampler.NON_FINITE, sample(sampler, new float[] {1, Float.NaN, 2, 3}, params, 0.5));
            assertEquals(Sampler.NON_FINITE, sample(sampler, new float[] {1, 2, Float.POSITIVE_INFINITY, 3}, params, 0.5));
            assertEquals(Sampler.NON_FINITE, sampler.sample(segment(new float[4]), 12, params, NONE, 0, new int[] {0, 1, 2, 3}, 0.5,
                    Double.NaN), "everything is masked");
            assertTrue(Double.isNaN(sampler.logprob()));
            assertEquals(2, sample(sampler, new float[] {Float.NEGATIVE_INFINITY, -300, 3, Float.NEGATIVE_INFINITY}, params, 0.999999));
        }
    }

    @Test
    void extremeTemperaturesStayExact() {
        float[] row = {0, 1, 2, 2, -1e30f};
        Sampler sampler = new Sampler(5);
        for (double uniform : new double[] {0, 0.4999, 0.5001, 1 - 0x1p-53}) {
            assertEquals(uniform < 0.5 ? 2 : 3, sample(sampler, row, SamplingParams.defaults().temperature(Double.MIN_VALUE), uniform));
            assertEquals(uniform < 0.5 ? 2 : 3, sample(sampler, row, SamplingParams.defaults().temperature(1e-5).topP(0.99), uniform));
        }
        assertEquals(0, sample(sampler, row, SamplingParams.defaults().temperature(1e300), 0.19));
        assertEquals(4, sample(sampler, row, SamplingParams.defaults().temperature(1e300), 0.81));
    }

    @Test
    void theResultDoesNotDependOnWhatWasSampledBefore() {
        Random random = new Random(5);
        Sampler used = new Sampler(700);
        for (int trial = 0; trial < 200; trial++) {
            float[] row = randomRow(random, 700);
            SamplingParams params = randomParams(random, 700).repetitionPenalty(1.1);
            int[] tokens = random.ints(20, 0, 700).toArray();
            double uniform = random.nextDouble();
            Sampler fresh = new Sampler(700);
            MemorySegment segment = segment(row);
            assertEquals(fresh.sample(segment, 12, params, tokens, 20, NONE, uniform, Double.NaN),
                    used.sample(segment, 12, params, tokens, 20, NONE, uniform, Double.NaN));
            assertEquals(fresh.logprob(), used.logprob());
        }
    }

    @Test
    void allocatesNothing() {
        Random random = new Random(6);
        Sampler sampler = new Sampler(2000);
        MemorySegment segment = segment(randomRow(random, 2000));
        List<SamplingParams> cases = List.of(SamplingParams.greedy(), SamplingParams.defaults(),
                SamplingParams.defaults().topK(50).topP(0.9).repetitionPenalty(1.1), SamplingParams.defaults().topP(0.9));
        int[] tokens = random.ints(20, 0, 2000).toArray();
        var threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
        long thread = Thread.currentThread().threadId();
        long least = Long.MAX_VALUE;
        for (int round = 0; round < 30; round++) {
            long before = threads.getThreadAllocatedBytes(thread);
            for (int i = 0; i < 400; i++) {
                sampler.sample(segment, 12, cases.get(i % 4), tokens, 20, NONE, (i + 0.5) / 400, Double.NaN);
            }
            least = Math.min(least, threads.getThreadAllocatedBytes(thread) - before);
        }
        assertEquals(0, least, "bytes allocated by 400 draws");
    }

    @Test
    void theExponentialIsAccurateAndVanishes() {
        for (double x = 0; x > -100; x -= 0.0137) {
            assertEquals(1, Exponential.exp(x) / Math.exp(x), 1e-11, "exp(" + x + ")");
        }
        assertEquals(1, Exponential.exp(0));
        assertEquals(0, Exponential.exp(Double.NEGATIVE_INFINITY));
        assertEquals(0, Exponential.exp(-1e9));
    }

    @Test
    void uniformNumbersAreKeyedByEachOfSeedSampleAndPosition() {
        ChiSquareTest test = new ChiSquareTest();
        double[] expected = new double[64];
        Arrays.fill(expected, 1);
        for (int varied = 0; varied < 3; varied++) {
            long[] counts = new long[64];
            long[] pairs = new long[64];
            double before = 0;
            for (int i = 0; i < 64_000; i++) {
                double u = CounterRandom.uniform(varied == 0 ? i : 3, varied == 1 ? i : 4, varied == 2 ? i : 5);
                assertTrue(u >= 0 && u < 1);
                counts[(int) (u * 64)]++;
                pairs[(int) (u * 8) * 8 + (int) (before * 8)]++;
                before = u;
            }
            assertTrue(test.chiSquareTest(expected, counts) > 1e-4, "word " + varied + " " + Arrays.toString(counts));
            assertTrue(test.chiSquareTest(expected, pairs) > 1e-4, "successive numbers of word " + varied);
        }
        assertEquals(CounterRandom.bits(1, 2, 3), CounterRandom.bits(1, 2, 3));
    }
}
