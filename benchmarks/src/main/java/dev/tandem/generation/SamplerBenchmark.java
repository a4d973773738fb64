package dev.tandem.generation;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.Random;
import java.util.concurrent.TimeUnit;
import org.openjdk.jmh.annotations.Benchmark;
import org.openjdk.jmh.annotations.BenchmarkMode;
import org.openjdk.jmh.annotations.Fork;
import org.openjdk.jmh.annotations.Measurement;
import org.openjdk.jmh.annotations.Mode;
import org.openjdk.jmh.annotations.OutputTimeUnit;
import org.openjdk.jmh.annotations.Param;
import org.openjdk.jmh.annotations.Scope;
import org.openjdk.jmh.annotations.Setup;
import org.openjdk.jmh.annotations.State;
import org.openjdk.jmh.annotations.Warmup;

/** What one row of logits costs to sample, on the vocabularies of SmolLM2 and Qwen2.5. Eight rows take turns. */
@State(Scope.Thread)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.MICROSECONDS)
@Warmup(iterations = 3, time = 1)
@Measurement(iterations = 5, time = 1)
@Fork(1)
public class SamplerBenchmark {
    private static final int ROWS = 8;
    private static final int[] NOTHING = {};

    /** Entries per row. */
    @Param({"49152", "151936"})
    public int vocabulary;

    /** How the row is sampled; log-probabilities are those of the sampled distribution, except in {@code greedy} (raw). */
    @Param({"greedy", "temperature", "topP", "topK", "topKtopP"})
    public String kind;

    private MemorySegment logits;
    private Sampler sampler;
    private SamplingParams params;
    private long draw;

    @Setup
    public void fill() {
        Random random = new Random(1);
        logits = Arena.ofAuto().allocate(4L * vocabulary * ROWS);
        for (long i = 0; i < (long) vocabulary * ROWS; i++) {
            float tail = random.nextInt(500) == 0 ? random.nextFloat() * 12 : 0; // a few tokens stand out, as in a trained model
            logits.setAtIndex(ValueLayout.JAVA_FLOAT, i, (float) random.nextGaussian() * 2 + tail);
        }
        sampler = new Sampler(vocabulary);
        SamplingParams truncated = SamplingParams.defaults().logprobKind(LogprobKind.TRUNCATED);
        params = switch (kind) {
            case "greedy" -> SamplingParams.greedy();
            case "temperature" -> truncated.temperature(0.8);
            case "topP" -> truncated.topP(0.95);
            case "topK" -> truncated.topK(50);
            case "topKtopP" -> truncated.topK(50).topP(0.9);
            default -> throw new IllegalArgumentException(kind);
        };
    }

    @Benchmark
    public int sample() {
        draw++;
        return sampler.sample(logits, draw % ROWS * vocabulary * 4L, params, NOTHING, 0, NOTHING,
                CounterRandom.uniform(1, 2, draw), Double.NaN);
    }
}
