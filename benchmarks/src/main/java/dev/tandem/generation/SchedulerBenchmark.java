package dev.tandem.generation;

import java.util.List;
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

/**
 * What the scheduler and the block pool cost per step at 256 running requests: planning, taking and hashing blocks at their
 * boundaries, applying the results, and (about once per two steps) the end of a request and the admission of the next, which comes
 * with a prompt of 128 tokens and generates 512. In {@code scarce}, the pool holds only about three quarters of what all requests
 * want, so that they are also preempted and recomputed.
 */
@State(Scope.Thread)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.MICROSECONDS)
@Warmup(iterations = 5, time = 1)
@Measurement(iterations = 5, time = 1)
@Fork(2)
public class SchedulerBenchmark {
    private static final int RUNNING = 256;
    private static final int VOCABULARY = 32_000;
    private static final int PROMPT = 128;

    /** Whether all running requests fit into the pool. */
    @Param({"ample", "scarce"})
    public String pool;

    private final StepPlan plan = new StepPlan(RUNNING);
    private final int[] sampled = new int[RUNNING];
    private final long[] key = new long[1];
    private final int[] prompt = new int[PROMPT];
    private final SamplingParams params = SamplingParams.defaults().maxTokens(512).ignoreEos(true);
    private Scheduler scheduler;
    private long request;

    @Setup
    public void fill() {
        int blocks = pool.equals("ample") ? 1 + 40 * RUNNING : 1 + 18 * RUNNING;
        scheduler = new Scheduler(new SchedulerOptions(2048, RUNNING, 2048, 4096, VOCABULARY, 16, false, true, List.of(2)),
                new BlockPool(16, blocks));
        for (int i = 0; i < RUNNING; i++) { // staggered, so that requests end one by one
            submit();
            for (int step = 0; step < 2; step++) {
                step();
            }
        }
    }

    private void submit() {
        request++;
        key[0] = request;
        for (int i = 0; i < PROMPT; i++) {
            prompt[i] = (int) (request * 31 + i) % VOCABULARY;
        }
        scheduler.submit(request, prompt, params, key);
    }

    @Benchmark
    public int step() {
        scheduler.schedule(plan);
        for (int i = 0; i < plan.sampleCount; i++) {
            sampled[i] = (int) (plan.step * 7 + i) % VOCABULARY;
        }
        scheduler.complete(plan, sampled);
        for (int slot = scheduler.pollFinished(); slot >= 0; slot = scheduler.pollFinished()) {
            scheduler.release(slot);
            submit();
        }
        return plan.totalTokens;
    }
}
