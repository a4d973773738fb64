package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assertions.fail;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;

/** Random mixes of requests, pools, budgets and disturbances against one-at-a-time decoding. */
class SchedulerSimulationTest {
    private static final int VOCABULARY = 23;
    private static final int[] EOS = {0, 1};
    /** Stands for a stop string: the caller ends a sample of a marked request at this token. */
    private static final int STOP_TEXT = 22;

    private record Sample(int[] prompt, SamplingParams params, long key, boolean stopText, long requestId) {}

    private long preemptions;
    private long forked;
    private long kvCapacity;
    private long copies;
    private long cached;
    private long dropped;
    private long readingNew;
    private long sayingSo;

    @Test
    void equalsOneAtATimeDecodingForTwoHundredMixes() {
        for (long seed = 0; seed < 200; seed++) {
            run(seed, false, false);
        }
        assertTrue(preemptions > 100 && forked > 100 && copies > 100 && cached > 1000 && kvCapacity > 0,
                "the mixes exercise too little: " + statistics());
    }

    @Test
    void equalsOneAtATimeDecodingWithTwoStepsInFlight() {
        for (long seed = 1000; seed < 1200; seed++) {
            run(seed, true, false);
        }
        assertTrue(preemptions > 100 && forked > 100 && copies > 100 && cached > 1000 && dropped > 100 && readingNew > 10,
                "the mixes exercise too little: " + statistics());
    }

    @Test
    void neverPreemptsWhenCompletionsAreReserved() {
        for (long seed = 2000; seed < 2060; seed++) {
            run(seed, seed % 2 == 0, true);
        }
        assertEquals(0, preemptions);
        assertTrue(forked > 20 && copies > 20, "the mixes exercise too little: " + statistics());
    }

    private String statistics() {
        return preemptions + " preemptions, " + forked + " forks, " + copies + " copies, " + cached + " cached tokens, " + kvCapacity
                + " over capacity, " + dropped + " results dropped, " + readingNew + " steps that read what they write, " + sayingSo + " taken for such";
    }

    private void run(long seed, boolean overlap, boolean reserveFull) {
        try {
            new Mix(seed, overlap, reserveFull).run();
        } catch (RuntimeException | AssertionError e) {
            throw new AssertionError("seed " + seed + ": " + e.getMessage(), e);
        }
    }

    private final class Mix {
        final SplittableRandom random;
        final boolean overlap;
        final boolean disturb;
        final int context;
        final BlockPool pool;
        final Scheduler scheduler;
        final FakeDevice device;
        final SchedulerOptions options;
        final int blocks;
        final List<int[]> prefixes = new ArrayList<>();
        final Map<Integer, Sample> live = new HashMap<>();
        final ArrayList<StepPlan> plans = new ArrayList<>();
        int toSubmit;
        long nextRequest;
        boolean versionChanged;

        Mix(long seed, boolean overlap, boolean reserveFull) {
            random = new SplittableRandom(seed);
            this.overlap = overlap;
            disturb = !reserveFull && random.nextInt(3) > 0;
            context = random.nextInt(20, 90);
            int size = 1 << random.nextInt(4);
            blocks = 1 + Math.ceilDiv(random.nextInt(20, 160), size);
            pool = new BlockPool(size, blocks);
            int maxRunning = random.nextInt(1, 12);
            options = new SchedulerOptions(maxRunning + random.nextInt(40), maxRunning, random.nextInt(1, 40), context, VOCABULARY,
                    random.nextInt(3), reserveFull, random.nextInt(4) > 0, Arrays.stream(EOS).boxed().toList());
            scheduler = new Scheduler(options, pool);
            device = new FakeDevice(scheduler, pool, VOCABULARY);
            for (int i = 0; i < 3; i++) {
                prefixes.add(tokens(random.nextInt(1, 30)));
            }
            toSubmit = random.nextInt(3, 25);
            plans.add(new StepPlan(maxRunning));
            plans.add(new StepPlan(maxRunning));
        }

        int[] tokens(int count) {
            return random.ints(count, 2, VOCABULARY).toArray();
        }

        void run() {
            for (int step = 0; toSubmit > 0 || scheduler.hasWork() || device.queued() > 0; step++) {
                if (step > 20_000) {
                    fail("no end after " + step + " steps: " + scheduler.runningCount() + " running, " + scheduler.waitingCount()
                            + " waiting, " + pool.freeCount() + " blocks free");
                }
                while (toSubmit > 0 && random.nextInt(3) == 0) {
                    submit();
                    toSubmit--;
                }
                if (disturb) {
                    disturb();
                }
                while (device.queued() < (overlap ? 2 : 1) && scheduler.schedule(plans.get(0))) {
                    StepPlan plan = plans.remove(0);
                    assertTrue(plan.totalTokens <= options.tokenBudget(), "over the token budget");
                    copies += plan.copyCount;
                    forked += plan.sampleCount - countSampledRows(plan);
                    assertOldPagesAreOld(plan);
                    device.launch(plan);
                    scheduler.assertInvariants();
                }
                if (device.queued() == 0) {
                    assertFalse(scheduler.hasWork(), "nothing is scheduled and nothing is in flight although samples wait");
                }
                if (device.queued() > 0) {
                    StepPlan plan = device.finishOldest();
                    plans.add(plan);
                    endAtStopText(plan);
                }
                collect();
                scheduler.assertInvariants();
            }
            preemptions += scheduler.preemptionCount();
            assertTrue(live.isEmpty(), "samples were lost: " + live.keySet());
            assertEquals(pool.usableCount(), pool.freeCount(), "blocks were lost");
            assertEquals(0, scheduler.requests().used(), "slots were lost");
        }

        /** Unless the plan says so, a row of one token reads nothing that others write in the same step. */
        void assertOldPagesAreOld(StepPlan plan) {
            int[][] tables = scheduler.requests().blocks;
            boolean readsNew = false;
            for (int reader = 0; reader < plan.rowCount; reader++) {
                for (int writer = 0; plan.granted[reader] == 1 && writer < plan.rowCount; writer++) {
                    int first = plan.start[writer] / pool.blockSize();
                    int last = (plan.start[writer] + plan.granted[writer] - 1) / pool.blockSize();
                    for (int block = first; block <= last && writer != reader; block++) {
                        for (int read = 0; read <= plan.start[reader] / pool.blockSize(); read++) {
                            readsNew |= tables[plan.slot[reader]][read] == tables[plan.slot[writer]][block];
                        }
                    }
                }
            }
            assertTrue(plan.readsNew || !readsNew, "a row of one token reads what another one writes, and the plan does not say so");
            readingNew += readsNew ? 1 : 0;
            sayingSo += plan.readsNew ? 1 : 0;
        }

        int countSampledRows(StepPlan plan) {
            int count = 0;
            for (int row = 0; row < plan.rowCount; row++) {
                count += plan.sampled[row] ? 1 : 0;
            }
            return count;
        }

        void submit() {
            int[] prefix = prefixes.get(random.nextInt(prefixes.size()));
            int[] prompt = Arrays.copyOf(prefix, prefix.length + random.nextInt(4));
            System.arraycopy(tokens(prompt.length), 0, prompt, prefix.length, prompt.length - prefix.length);
            int maxTokens = random.nextInt(1, 40);
            SamplingParams params = SamplingParams.defaults().maxTokens(maxTokens).minTokens(random.nextInt(Math.min(4, maxTokens)))
                    .n(random.nextInt(3) == 0 ? random.nextInt(2, 7) : 1).ignoreEos(random.nextInt(2) == 0)
                    .stopTokenIds(random.nextInt(4) == 0 ? List.of(5) : List.of());
            boolean stopText = random.nextInt(4) == 0;
            long request = nextRequest++;
            long[] keys = random.longs(params.n()).toArray();
            try {
                int i = 0;
                for (int slot = scheduler.submit(request, prompt, params, keys); slot >= 0;
                        slot = scheduler.requests().nextSibling[slot]) {
                    live.put(slot, new Sample(prompt, params, keys[i++], stopText, request));
                }
                assertEquals(params.n(), i);
            } catch (IllegalArgumentException e) {
                int all = Math.min(prompt.length + params.maxTokens(), context);
                assertTrue(prompt.length >= context || pool.blocksFor(all) > pool.usableCount(), e.getMessage());
            }
        }

        void disturb() {
            switch (random.nextInt(60)) {
                case 0 -> scheduler.abort(random.nextLong(nextRequest + 1));
                case 1 -> scheduler.preemptAll();
                case 2 -> {
                    while (device.queued() > 0) {
                        plans.add(device.finishOldest());
                        collect();
                    }
                    scheduler.preemptAll();
                    assertEquals(pool.usableCount(), pool.freeCount());
                    pool.setNamespace(++device.weightVersion);
                    versionChanged = true;
                }
                case 3 -> pool.shrink(Math.max(pool.smallestCount(), 1 + random.nextInt(pool.blockCount())));
                case 4, 5 -> pool.grow(blocks);
                case 6 -> {
                    device.fail();
                    while (plans.size() < 2) {
                        plans.add(new StepPlan(options.maxRunning()));
                    }
                    scheduler.abandonSteps();
                }
                default -> { }
            }
        }

        void endAtStopText(StepPlan plan) {
            RequestTable requests = scheduler.requests();
            for (int i = 0; i < plan.sampleCount; i++) {
                int slot = plan.sampleSlot[i];
                dropped += plan.accepted[i] ? 0 : 1;
                if (plan.accepted[i] && live.get(slot).stopText && requests.tokens[slot][requests.tokenCount[slot] - 1] == STOP_TEXT) {
                    scheduler.finish(slot, requests.epoch[slot], new Finish.StopString("stop"));
                }
            }
        }

        void collect() {
            RequestTable requests = scheduler.requests();
            for (int slot = scheduler.pollFinished(); slot >= 0; slot = scheduler.pollFinished()) {
                Sample sample = live.remove(slot);
                int[] found = Arrays.copyOf(requests.tokens[slot], requests.tokenCount[slot]);
                Finish finish = requests.finish[slot];
                cached += Math.max(0, requests.cachedTokens[slot]);
                scheduler.release(slot);
                kvCapacity += finish instanceof Finish.KvCapacity ? 1 : 0;
                if (versionChanged) {
                    continue; // its tokens come from several versions; the device has checked them one by one
                }
                int[] expected = FakeDevice.alone(sample.prompt, sample.params, sample.key, EOS, context, VOCABULARY,
                        sample.stopText ? STOP_TEXT : -1, 0);
                if (finish instanceof Finish.Aborted || finish instanceof Finish.KvCapacity) {
                    expected = Arrays.copyOf(expected, found.length);
                } else {
                    assertEquals(expectedFinish(sample, expected), finish);
                }
                assertArrayEquals(expected, found, () -> "request " + sample.requestId + " " + finish);
            }
        }

        Finish expectedFinish(Sample sample, int[] tokens) {
            int last = tokens[tokens.length - 1];
            int generated = tokens.length - sample.prompt.length;
            SamplingParams params = sample.params;
            if (generated > params.minTokens() && !params.ignoreEos() && (last == EOS[0] || last == EOS[1])) {
                return new Finish.Eos();
            }
            if (generated > params.minTokens() && params.stopTokenIds().contains(last)) {
                return new Finish.StopToken(last);
            }
            if (generated == params.maxTokens()) {
                return new Finish.Length();
            }
            return tokens.length == context ? new Finish.ContextLength() : new Finish.StopString("stop");
        }
    }
}
