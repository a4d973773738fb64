package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.management.ThreadMXBean;
import java.lang.management.ManagementFactory;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;

/** The cases in which schedulers of other engines went wrong, one by one. */
class SchedulerTest {
    private static final int VOCABULARY = 1000;
    private static final int EOS = 2;
    private static final SamplingParams GREEDY = SamplingParams.greedy().ignoreEos(true).maxTokens(16);
    private static final long[] KEYS = {11, 12, 13, 14, 15, 16, 17, 18};

    private BlockPool pool = new BlockPool(4, 2);
    private Scheduler scheduler = new Scheduler(options(1, 1, 1), pool);
    private FakeDevice device = new FakeDevice(scheduler, pool, VOCABULARY);
    private StepPlan plan = new StepPlan(1);

    private static SchedulerOptions options(int budget, int maxRunning, int threshold) {
        return new SchedulerOptions(budget, maxRunning, threshold, 256, VOCABULARY, 0, false, true, List.of(EOS));
    }

    /** A pool of {@code blocks} usable blocks of four tokens. */
    private void create(int blocks, SchedulerOptions options) {
        pool = new BlockPool(4, blocks + 1);
        scheduler = new Scheduler(options, pool);
        device = new FakeDevice(scheduler, pool, VOCABULARY);
        plan = new StepPlan(options.maxRunning());
    }

    private int submit(long request, int[] prompt, SamplingParams params) {
        return scheduler.submit(request, prompt, params, KEYS);
    }

    private static int[] prompt(int length, int first) {
        return IntStream.range(first, first + length).toArray();
    }

    private boolean step() {
        if (!scheduler.schedule(plan)) {
            return false;
        }
        device.launch(plan);
        device.finishOldest();
        scheduler.assertInvariants();
        return true;
    }

    private int finishAll() {
        int steps = 0;
        while (scheduler.hasWork()) {
            assertTrue((step() || !scheduler.hasWork()) && ++steps < 1000, "no progress after " + steps + " steps");
        }
        return steps;
    }

    private int[] tokens(int slot) {
        return Arrays.copyOf(scheduler.requests().tokens[slot], scheduler.requests().tokenCount[slot]);
    }

    private void assertAsAlone(int slot, int[] prompt, SamplingParams params) {
        assertArrayEquals(FakeDevice.alone(prompt, params, scheduler.requests().sampleKey[slot], new int[] {EOS}, 256, VOCABULARY, -1,
                device.weightVersion), tokens(slot));
    }

    @Test
    void rejectsARequestThatExceedsTheWholePoolWithNumbers() {
        create(4, options(64, 4, 64));
        var e = assertThrows(IllegalArgumentException.class, () -> submit(7, prompt(10, 0), GREEDY.maxTokens(7)));
        assertTrue(e.getMessage().contains("request 7") && e.getMessage().contains("need 5 KV blocks")
                && e.getMessage().contains("pool has 4"), e.getMessage());
        submit(8, prompt(10, 0), GREEDY.maxTokens(6));
        finishAll();
    }

    @Test
    void rejectsPromptsThatCanNeverRun() {
        create(100, options(64, 4, 64));
        for (int[] bad : new int[][] {{}, {VOCABULARY}, {-1}, prompt(256, 0)}) {
            assertThrows(IllegalArgumentException.class, () -> submit(1, bad, GREEDY));
        }
        assertThrows(IllegalArgumentException.class, () -> submit(1, prompt(3, 0), GREEDY.stopTokenIds(List.of(VOCABULARY))));
        assertThrows(IllegalArgumentException.class, () -> scheduler.submit(1, prompt(3, 0), GREEDY.n(2), new long[1]));
        assertFalse(scheduler.hasWork());
    }

    @Test
    void endsAtTheContextLengthIfMaxTokensGoesBeyondIt() {
        create(100, options(64, 4, 300));
        int slot = submit(1, prompt(250, 0), GREEDY.maxTokens(100));
        finishAll();
        assertEquals(new Finish.ContextLength(), scheduler.requests().finish[slot]);
        assertEquals(256, tokens(slot).length);
    }

    @Test
    void doesNotAdmitAPromptWhoseLaterChunksDoNotFit() {
        create(8, options(4, 4, 4));
        submit(1, prompt(16, 0), GREEDY.maxTokens(8)); // 5 of 8 blocks at first
        submit(2, prompt(16, 100), GREEDY.maxTokens(8));
        step();
        assertEquals(1, scheduler.runningCount(), "the second prompt's first chunk would fit, the whole prompt does not");
        finishAll();
        assertEquals(0, scheduler.preemptionCount());
    }

    @Test
    void twoHalfLoadedPromptsDoNotWaitForEachOther() {
        create(10, options(8, 4, 4));
        int[] a = prompt(19, 0);
        int[] b = prompt(19, 100);
        int first = submit(1, a, GREEDY.maxTokens(12));
        int second = submit(2, b, GREEDY.maxTokens(12));
        step();
        assertEquals(2, scheduler.runningCount());
        assertEquals(0, pool.freeCount(), "both hold all blocks up to their first output");
        finishAll();
        assertAsAlone(first, a, GREEDY.maxTokens(12));
        assertAsAlone(second, b, GREEDY.maxTokens(12));
    }

    @Test
    void blocksOfAnAbortedRequestInFlightAreFreeOnlyAfterTheStep() {
        create(8, options(64, 4, 64));
        submit(1, prompt(12, 0), GREEDY);
        assertTrue(scheduler.schedule(plan));
        device.launch(plan);
        assertEquals(4, pool.freeCount());
        assertEquals(1, scheduler.abort(1));
        assertEquals(4, pool.freeCount());
        device.finishOldest(); // checks that the blocks are still held
        assertEquals(8, pool.freeCount());
        assertFalse(plan.accepted[0]);
    }

    @Test
    void neverPreemptsASampleInFlight() {
        create(4, options(64, 2, 64));
        int[] a = prompt(7, 0);
        int[] b = prompt(7, 100);
        int first = submit(1, a, GREEDY.maxTokens(9));
        int second = submit(2, b, GREEDY.maxTokens(9));
        StepPlan other = new StepPlan(2);
        assertTrue(scheduler.schedule(plan)); // both prompts: all four blocks
        device.launch(plan);
        assertTrue(scheduler.schedule(other)); // position 7 of both
        device.launch(other);
        device.finishOldest();
        assertFalse(scheduler.schedule(plan), "position 8 needs a block, and both samples are in flight");
        assertEquals(0, scheduler.preemptionCount());
        device.finishOldest();
        assertTrue(scheduler.schedule(plan));
        assertEquals(1, scheduler.preemptionCount());
        assertEquals(1, plan.rowCount);
        device.launch(plan);
        device.finishOldest();
        finishAll();
        assertAsAlone(first, a, GREEDY.maxTokens(9));
        assertAsAlone(second, b, GREEDY.maxTokens(9));
    }

    @Test
    void preemptsTheSampleThatIsCheapestToRecompute() {
        create(7, options(64, 3, 64));
        int small = submit(1, prompt(3, 0), GREEDY.maxTokens(25));
        int large = submit(2, prompt(14, 100), GREEDY.maxTokens(14));
        int middle = submit(3, prompt(6, 200), GREEDY.maxTokens(20));
        RequestTable requests = scheduler.requests();
        while (scheduler.preemptionCount() == 0) {
            step();
        }
        assertEquals(RequestTable.State.WAITING, requests.state[small]);
        assertEquals(RequestTable.State.RUNNING, requests.state[large]);
        assertEquals(RequestTable.State.RUNNING, requests.state[middle]);
        finishAll();
        assertAsAlone(small, prompt(3, 0), GREEDY.maxTokens(25));
    }

    @Test
    void resultsInFlightOfAPreemptedSampleAreNeitherLostNorAppendedTwice() {
        create(8, options(64, 4, 64));
        int[] prompt = prompt(5, 0);
        int slot = submit(1, prompt, GREEDY.maxTokens(6));
        step();
        assertTrue(scheduler.schedule(plan));
        device.launch(plan);
        scheduler.preemptAll();
        device.finishOldest();
        assertFalse(plan.accepted[0]);
        assertEquals(6, tokens(slot).length);
        finishAll();
        assertAsAlone(slot, prompt, GREEDY.maxTokens(6));
    }

    @Test
    void aSampleIsFinishedAndFreedOnce() {
        create(8, options(64, 4, 64));
        int slot = submit(1, prompt(5, 0), GREEDY);
        step();
        int epoch = scheduler.requests().epoch[slot];
        assertTrue(scheduler.finish(slot, epoch, new Finish.StopString("x")));
        assertFalse(scheduler.finish(slot, epoch, new Finish.StopString("x")));
        assertEquals(0, scheduler.abort(1));
        assertEquals(8, pool.freeCount());
        assertEquals(slot, scheduler.pollFinished());
        assertEquals(RequestTable.NONE, scheduler.pollFinished());
        scheduler.release(slot);
        assertThrows(IllegalStateException.class, () -> scheduler.release(slot));
        int reused = submit(2, prompt(5, 0), GREEDY);
        assertEquals(slot, reused);
        assertFalse(scheduler.finish(slot, epoch, new Finish.Aborted()), "the epoch is that of the former request");
    }

    @Test
    void takesABlockExactlyWhenTheBoundaryIsCrossed() {
        create(8, options(64, 4, 64));
        int slot = submit(1, prompt(3, 0), GREEDY.maxTokens(12));
        RequestTable requests = scheduler.requests();
        while (scheduler.hasWork()) {
            int length = requests.computed[slot];
            int expected = length == 0 ? 1 : Math.ceilDiv(length + 1, 4); // the prompt and its first output fill one block
            assertTrue(scheduler.schedule(plan));
            assertEquals(expected, requests.blockCount[slot], "before position " + length);
            device.launch(plan);
            device.finishOldest();
        }
        assertAsAlone(slot, prompt(3, 0), GREEDY.maxTokens(12));
    }

    @Test
    void chunksOfAPromptAreContiguousAndOnlyTheLastIsSampled() {
        create(8, options(5, 4, 64));
        submit(1, prompt(13, 0), GREEDY);
        List<List<Object>> rows = new ArrayList<>();
        for (int i = 0; i < 4; i++) {
            step();
            rows.add(List.of(plan.start[0], plan.granted[0], plan.sampled[0], plan.sampleCount));
        }
        assertEquals(List.of(List.of(0, 5, false, 0), List.of(5, 5, false, 0), List.of(10, 3, true, 1), List.of(13, 1, true, 1)), rows);
    }

    @Test
    void longPromptsDoNotStallDecoding() {
        create(64, options(8, 4, 6));
        int decoding = submit(1, prompt(3, 0), GREEDY.maxTokens(20));
        step();
        submit(2, prompt(100, 100), GREEDY.maxTokens(2));
        for (int i = 0; i < 10; i++) {
            int before = tokens(decoding).length;
            step();
            assertEquals(before + 1, tokens(decoding).length);
            assertEquals(7, plan.totalTokens, "one decoded token, and a chunk of the threshold");
            assertEquals(decoding, plan.slot[0]);
        }
    }

    @Test
    void aFullPrefixHitStillComputesTheLastToken() {
        create(16, options(64, 4, 64));
        int[] prompt = prompt(12, 0);
        submit(1, prompt, GREEDY.maxTokens(2));
        finishAll();
        int slot = submit(2, prompt, GREEDY.maxTokens(2));
        step();
        assertEquals(8, scheduler.requests().cachedTokens[slot], "eleven tokens, rounded down to blocks");
        assertEquals(8, plan.start[0]);
        assertEquals(4, plan.granted[0]);
    }

    @Test
    void followersInTheSameStepShareThePrefix() {
        create(16, options(64, 4, 64));
        int[] prompt = prompt(10, 0);
        submit(1, prompt, GREEDY.maxTokens(4));
        int follower = submit(2, prompt, GREEDY.maxTokens(4));
        step();
        assertEquals(2, plan.rowCount);
        assertEquals(12, plan.totalTokens);
        assertEquals(8, scheduler.requests().cachedTokens[follower]);
    }

    @Test
    void aNewWeightVersionInvalidatesEveryPrefix() {
        create(16, options(64, 4, 64));
        int[] prompt = prompt(12, 0);
        int running = submit(1, prompt, GREEDY.maxTokens(8));
        step();
        scheduler.preemptAll();
        device.weightVersion = 1;
        pool.setNamespace(1);
        int other = submit(2, prompt, GREEDY.maxTokens(8));
        step(); // the device compares all KV with the new version
        assertEquals(13, scheduler.requests().computed[running]);
        assertEquals(13 + 4, plan.totalTokens, "the first recomputes everything, the second shares what it computes");
        finishAll();
        assertAsAlone(other, prompt, GREEDY.maxTokens(8));
    }

    @Test
    void aContinuedSampleKeepsItsBudget() {
        create(16, options(64, 4, 64));
        int[] prompt = prompt(6, 0);
        SamplingParams params = GREEDY.maxTokens(10);
        int[] whole = FakeDevice.alone(prompt, params, KEYS[0], new int[0], 256, VOCABULARY, -1, 0);
        int slot = scheduler.resume(1, Arrays.copyOf(whole, 6 + 4), 6, params, KEYS[0]);
        finishAll();
        assertArrayEquals(whole, tokens(slot));
        assertEquals(new Finish.Length(), scheduler.requests().finish[slot]);
        var e = assertThrows(IllegalArgumentException.class, () -> scheduler.resume(2, whole, 6, params, 1));
        assertTrue(e.getMessage().contains("10 tokens are generated already"), e.getMessage());
    }

    @Test
    void theLastRequestOverThePoolEndsWithAReason() {
        create(8, options(64, 1, 64));
        int running = submit(1, prompt(9, 0), GREEDY.maxTokens(20));
        int waiting = submit(2, prompt(18, 100), GREEDY.maxTokens(5));
        step();
        assertTrue(pool.shrink(5));
        finishAll();
        assertEquals(new Finish.KvCapacity(), scheduler.requests().finish[running]);
        assertEquals(new Finish.KvCapacity(), scheduler.requests().finish[waiting]);
        int[] alone = FakeDevice.alone(prompt(9, 0), GREEDY.maxTokens(20), KEYS[0], new int[0], 256, VOCABULARY, -1, 0);
        assertArrayEquals(Arrays.copyOf(alone, tokens(running).length), tokens(running));
        assertEquals(17, tokens(running).length, "four blocks hold the KV of all tokens but the last");
    }

    @Test
    void cachedTokensAreCountedAtTheFirstAdmissionOnly() {
        create(16, options(64, 4, 64));
        int slot = submit(1, prompt(12, 0), GREEDY.maxTokens(8));
        step();
        scheduler.preemptAll();
        step();
        assertNotEquals(0, plan.start[0], "the second admission finds the prefix");
        assertEquals(0, scheduler.requests().cachedTokens[slot]);
    }

    @Test
    void stopTokensAreNotSampledBeforeMinTokens() {
        create(16, options(64, 4, 64));
        int[] free = FakeDevice.alone(prompt(4, 0), GREEDY.maxTokens(12), KEYS[0], new int[0], 256, VOCABULARY, -1, 0);
        SamplingParams params = GREEDY.maxTokens(12).stopTokenIds(List.of(free[6])); // the third token it wants
        int early = submit(1, prompt(4, 0), params);
        int late = submit(2, prompt(4, 0), params.minTokens(5));
        finishAll();
        assertEquals(new Finish.StopToken(free[6]), scheduler.requests().finish[early]);
        assertEquals(7, tokens(early).length);
        assertTrue(tokens(late).length >= 10);
        assertAsAlone(late, prompt(4, 0), params.minTokens(5));
    }

    @Test
    void endOfSequenceComesBeforeStopTokensAndLength() {
        create(16, options(64, 4, 64));
        SamplingParams params = SamplingParams.defaults().maxTokens(1).stopTokenIds(List.of(EOS, 9));
        int eos = submit(1, prompt(4, 0), params);
        int stop = submit(2, prompt(4, 0), params);
        int ignored = submit(3, prompt(4, 0), params.ignoreEos(true).stopTokenIds(List.of()));
        int nan = submit(4, prompt(4, 0), params);
        assertTrue(scheduler.schedule(plan));
        scheduler.complete(plan, new int[] {EOS, 9, EOS, Scheduler.NON_FINITE});
        RequestTable requests = scheduler.requests();
        assertEquals(new Finish.Eos(), requests.finish[eos]);
        assertEquals(new Finish.StopToken(9), requests.finish[stop]);
        assertEquals(new Finish.Length(), requests.finish[ignored]);
        assertEquals(new Finish.NonFinite(), requests.finish[nan]);
        assertEquals(4, tokens(nan).length);
        assertFalse(scheduler.hasWork());
    }

    @Test
    void siblingsShareThePromptAndCopyThePartialBlock() {
        create(32, options(64, 8, 64));
        int[] prompt = prompt(10, 0);
        SamplingParams params = GREEDY.n(4).maxTokens(9);
        int first = submit(1, prompt, params);
        assertTrue(scheduler.schedule(plan));
        assertEquals(1, plan.rowCount);
        assertEquals(10, plan.totalTokens, "the prompt is computed once");
        assertEquals(4, plan.sampleCount);
        assertArrayEquals(new int[4], Arrays.copyOf(plan.sampleRow, 4), "all draw from the same logits");
        assertEquals(0, plan.copyCount);
        assertEquals(32 - 2 - 4, pool.freeCount(), "two full blocks are shared, each sample has its own third");
        device.launch(plan);
        device.finishOldest();
        step();
        assertEquals(3, plan.copyCount);
        finishAll();
        for (int slot = first; slot != RequestTable.NONE; slot = scheduler.requests().nextSibling[slot]) {
            assertAsAlone(slot, prompt, params);
        }
        assertEquals(32, pool.freeCount());
    }

    @Test
    void siblingsWithoutAPlaceComeLaterThroughThePrefixCache() {
        create(32, options(64, 2, 64));
        int[] prompt = prompt(10, 0);
        SamplingParams params = GREEDY.n(5).maxTokens(3);
        int first = submit(1, prompt, params);
        finishAll();
        RequestTable requests = scheduler.requests();
        List<Integer> cached = new ArrayList<>();
        for (int slot = first; slot != RequestTable.NONE; slot = requests.nextSibling[slot]) {
            assertAsAlone(slot, prompt, params);
            cached.add(requests.cachedTokens[slot]);
        }
        assertEquals(List.of(0, 10, 8, 8, 8), cached);
    }

    @Test
    void siblingsOfAnAbortedFirstSampleGoOn() {
        create(32, options(4, 4, 64));
        int[] prompt = prompt(10, 0);
        int first = submit(1, prompt, GREEDY.n(2).maxTokens(3));
        int second = scheduler.requests().nextSibling[first];
        step();
        assertTrue(scheduler.finish(first, scheduler.requests().epoch[first], new Finish.Aborted()));
        finishAll();
        assertAsAlone(second, prompt, GREEDY.maxTokens(3));
        assertEquals(new Finish.Length(), scheduler.requests().finish[second]);
    }

    @Test
    void stepsCompleteInOrderAndAtMostTwoAreInFlight() {
        create(32, options(64, 4, 64));
        submit(1, prompt(10, 0), GREEDY);
        StepPlan second = new StepPlan(4);
        assertTrue(scheduler.schedule(plan));
        assertTrue(scheduler.schedule(second));
        assertEquals(0, second.known[0], "its input is what the first step samples");
        assertThrows(IllegalStateException.class, () -> scheduler.schedule(new StepPlan(4)));
        assertThrows(IllegalStateException.class, () -> scheduler.complete(second, new int[4]));
        scheduler.complete(plan, new int[] {5});
        scheduler.complete(second, new int[] {6});
        assertThrows(IllegalStateException.class, () -> scheduler.complete(second, new int[4]));
        assertArrayEquals(new int[] {5, 6}, Arrays.copyOfRange(tokens(0), 10, 12));
    }

    @Test
    void continuesAfterAFailedStep() {
        create(8, options(64, 4, 64));
        int[] prompt = prompt(9, 0);
        int slot = submit(1, prompt, GREEDY.maxTokens(6));
        step();
        assertTrue(scheduler.schedule(plan));
        device.fail();
        scheduler.abandonSteps();
        assertEquals(8, pool.freeCount());
        assertNull(scheduler.requests().finish[slot]);
        finishAll();
        assertAsAlone(slot, prompt, GREEDY.maxTokens(6));
    }

    @Test
    void aSteadyStateAllocatesNothing() {
        create(4096, new SchedulerOptions(512, 256, 512, 4096, VOCABULARY, 4, false, true, List.of(EOS)));
        int[] prompt = prompt(32, 0);
        int[] sampled = new int[256];
        var threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
        long thread = Thread.currentThread().threadId();
        long least = Long.MAX_VALUE;
        for (int round = 0; round < 20; round++) { // until all arrays have their size and the code is compiled
            long before = threads.getThreadAllocatedBytes(thread);
            for (int i = 0; i < 200; i++) {
                while (scheduler.runningCount() + scheduler.waitingCount() < 256) {
                    prompt[i % 32] = i;
                    scheduler.submit(i, prompt, STEADY[scheduler.waitingCount() % 8], KEYS);
                }
                scheduler.schedule(plan);
                for (int s = 0; s < plan.sampleCount; s++) {
                    sampled[s] = 3 + (i * 31 + s) % 500;
                }
                scheduler.complete(plan, sampled);
                for (int slot = scheduler.pollFinished(); slot >= 0; slot = scheduler.pollFinished()) {
                    scheduler.release(slot);
                }
            }
            least = Math.min(least, threads.getThreadAllocatedBytes(thread) - before);
        }
        assertEquals(0, least, "bytes allocated by 200 steps of 256 requests");
        assertTrue(pool.freeCount() < 4096);
    }

    private static final SamplingParams[] STEADY =
            IntStream.range(0, 8).mapToObj(i -> SamplingParams.defaults().maxTokens(40 + 7 * i)).toArray(SamplingParams[]::new);
}
