package dev.tandem.generation;

import java.util.ArrayDeque;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/**
 * Executes step plans as a device would, with KV that can be checked: the "KV" of a position is a hash of the weights' version and
 * of all tokens up to it. A sampled token is a pure function of that hash and the sample key. What a row attends to is compared
 * with what its tokens say, so a block that is shared, copied, freed or reused wrongly is noticed where it happens.
 */
final class FakeDevice {
    private final Scheduler scheduler;
    private final BlockPool pool;
    private final int vocabulary;
    private final Map<Integer, Integer> lastSample = new HashMap<>();
    private final ArrayDeque<Launched> queue = new ArrayDeque<>();
    private long[] kv = new long[0];
    long weightVersion;
    int widestStep;

    /** A plan and what the caller copies from the request table when it launches a step. */
    private record Launched(StepPlan plan, int[][] tokens, int[][] blocks, long[] keys, int[][] banned, long version) {}

    FakeDevice(Scheduler scheduler, BlockPool pool, int vocabulary) {
        this.scheduler = scheduler;
        this.pool = pool;
        this.vocabulary = vocabulary;
    }

    int queued() {
        return queue.size();
    }

    void launch(StepPlan plan) {
        RequestTable requests = scheduler.requests();
        int[][] tokens = new int[plan.rowCount][];
        int[][] blocks = new int[plan.rowCount][];
        int total = 0;
        Set<Integer> slots = new HashSet<>();
        for (int row = 0; row < plan.rowCount; row++) {
            int slot = plan.slot[row];
            require(slots.add(slot), "slot " + slot + " has two rows");
            require(plan.granted[row] > 0 && plan.known[row] >= plan.granted[row] - 1, "row " + row + " has no or too few inputs");
            tokens[row] = Arrays.copyOf(requests.tokens[slot], plan.start[row] + plan.known[row]);
            blocks[row] = Arrays.copyOf(requests.blocks[slot], requests.blockCount[slot]);
            total += plan.granted[row];
        }
        require(total == plan.totalTokens, "totalTokens is " + plan.totalTokens + " but rows have " + total);
        widestStep = Math.max(widestStep, total);
        long[] keys = new long[plan.sampleCount];
        int[][] banned = new int[plan.sampleCount][];
        for (int i = 0; i < plan.sampleCount; i++) {
            int slot = plan.sampleSlot[i];
            keys[i] = requests.sampleKey[slot];
            int generated = plan.samplePosition[i] - requests.promptLength[slot];
            banned[i] = generated < requests.params[slot].minTokens() ? requests.stopIds[slot] : new int[0];
        }
        queue.add(new Launched(plan, tokens, blocks, keys, banned, weightVersion));
    }

    /** Runs the oldest launched step and completes it. */
    StepPlan finishOldest() {
        Launched step = queue.remove();
        int[] sampled = execute(step);
        scheduler.complete(step.plan, sampled);
        RequestTable requests = scheduler.requests();
        for (int i = 0; i < step.plan.sampleCount; i++) {
            int slot = step.plan.sampleSlot[i];
            if (step.plan.accepted[i]) {
                require(requests.tokenCount[slot] == step.plan.samplePosition[i] + 1
                        && requests.tokens[slot][step.plan.samplePosition[i]] == sampled[i],
                        "slot " + slot + ": a token of position " + step.plan.samplePosition[i] + " was appended, now "
                                + requests.tokenCount[slot] + " tokens, prompt " + requests.promptLength[slot] + " limit "
                                + requests.limit[slot] + ", pair " + i + " of " + step.plan.sampleCount);
            }
        }
        return step.plan;
    }

    /** Drops what was launched, as a device that failed. KV memory is garbage afterwards. */
    void fail() {
        queue.clear();
        Arrays.fill(kv, -1);
    }

    private int[] execute(Launched step) {
        StepPlan plan = step.plan;
        int size = pool.blockSize();
        kv = kv.length < pool.blockCount() * size ? Arrays.copyOf(kv, pool.blockCount() * size) : kv;
        for (int i = 0; i < plan.copyCount; i++) {
            requireHeld(plan.copySource[i]);
            requireHeld(plan.copyTarget[i]);
            System.arraycopy(kv, plan.copySource[i] * size, kv, plan.copyTarget[i] * size, size);
        }
        Set<Integer> written = new HashSet<>();
        int[][] inputs = new int[plan.rowCount][];
        long[][] hashes = new long[plan.rowCount][];
        for (int row = 0; row < plan.rowCount; row++) {
            int end = plan.start[row] + plan.granted[row];
            int[] tokens = Arrays.copyOf(step.tokens[row], end);
            if (plan.known[row] < plan.granted[row]) {
                tokens[end - 1] = lastSample.get(plan.slot[row]);
            }
            inputs[row] = tokens;
            hashes[row] = hashes(tokens, end, step.version);
            for (int p = plan.start[row]; p < end; p++) {
                int cell = cell(step.blocks[row], p, size);
                require(written.add(cell), "two rows write block " + cell / size);
                kv[cell] = hashes[row][p];
            }
        }
        int[] sampled = new int[plan.sampleCount];
        for (int row = 0; row < plan.rowCount; row++) {
            for (int p = 0; p < inputs[row].length; p++) {
                int cell = cell(step.blocks[row], p, size);
                requireHeld(cell / size);
                require(kv[cell] == hashes[row][p], "slot " + plan.slot[row] + " attends to foreign KV at position " + p
                        + " in block " + cell / size + " (step " + plan.step + ")");
            }
        }
        for (int i = 0; i < plan.sampleCount; i++) {
            int row = plan.sampleRow[i];
            require(plan.sampled[row], "row " + row + " is sampled but not marked");
            require(plan.samplePosition[i] == inputs[row].length, "wrong sample position");
            sampled[i] = next(hashes[row][inputs[row].length - 1], step.keys[i], step.banned[i], vocabulary);
            lastSample.put(plan.sampleSlot[i], sampled[i]);
        }
        return sampled;
    }

    private void requireHeld(int block) {
        require(block > 0 && block < pool.extent() && pool.references(block) > 0,
                "a step in flight uses block " + block + ", which is free or gone");
    }

    private static int cell(int[] blocks, int position, int size) {
        return blocks[position / size] * size + position % size;
    }

    private static long[] hashes(int[] tokens, int count, long version) {
        long[] hashes = new long[count];
        long h = CounterRandom.bits(version, 1, 2);
        for (int p = 0; p < count; p++) {
            h = CounterRandom.bits(h, tokens[p], p);
            hashes[p] = h;
        }
        return hashes;
    }

    private static int next(long hash, long key, int[] banned, int vocabulary) {
        int token = (int) Math.floorMod(CounterRandom.bits(hash, key, 7), (long) vocabulary);
        while (Arrays.stream(banned).anyMatch(Integer.valueOf(token)::equals)) {
            token = (token + 1) % vocabulary;
        }
        return token;
    }

    /** One-at-a-time decoding: prompt and completion of a sample that nothing disturbs, with {@code version} fixed. */
    static int[] alone(int[] prompt, SamplingParams params, long key, int[] eos, int context, int vocabulary, int stopText, long version) {
        int[] tokens = Arrays.copyOf(prompt, (int) Math.min((long) prompt.length + params.maxTokens(), context));
        int count = prompt.length;
        while (count < tokens.length) {
            int generated = count - prompt.length;
            Set<Integer> stops = new HashSet<>(params.stopTokenIds());
            if (!params.ignoreEos()) {
                Arrays.stream(eos).forEach(stops::add);
            }
            int[] banned = generated < params.minTokens() ? stops.stream().mapToInt(Integer::intValue).toArray() : new int[0];
            int token = next(hashes(tokens, count, version)[count - 1], key, banned, vocabulary);
            tokens[count++] = token;
            if (generated >= params.minTokens() && stops.contains(token) || token == stopText) {
                break;
            }
        }
        return Arrays.copyOf(tokens, count);
    }

    private static void require(boolean holds, String message) {
        if (!holds) {
            throw new AssertionError(message);
        }
    }
}
