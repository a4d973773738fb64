package dev.tandem.generation;

import java.util.Arrays;
import org.jspecify.annotations.Nullable;

/**
 * The state of every sample that waits, runs or has just finished, as one array per field indexed by slot. Slots, and the token
 * and block arrays in them, are reused, so a long-running generator stops allocating once it has seen its largest load.
 *
 * <p>The scheduler writes; the generator reads. A slot's {@code epoch} grows whenever what is in flight for it stops being
 * wanted (preemption, finish), and never shrinks when the slot is reused: a result is valid exactly if its epoch is the slot's.
 */
final class RequestTable {
    /** Where a sample is in its life. */
    enum State {
        /** The slot holds no sample. */
        FREE,
        /** Waits for the first sample of its group to compute the shared prompt. */
        PARKED,
        /** Waits for admission; holds no KV blocks. */
        WAITING,
        /** Holds KV blocks and takes part in steps. */
        RUNNING,
        /** Ended; {@code finish} says why. Tokens stay readable until {@link Scheduler#release}. */
        FINISHED
    }

    /** Ends a sibling chain, and any other chain of slots. */
    static final int NONE = -1;

    State[] state = new State[0];
    int[] epoch = new int[0];
    /** The caller's number for the request that this sample belongs to. */
    long[] requestId = new long[0];
    /** Index of the sample in its group, 0 … n-1. */
    int[] sampleIndex = new int[0];
    /** Keys the sample's random numbers, together with seed and position. */
    long[] sampleKey = new long[0];
    /** Grows with each submitted sample: first come, first served. */
    long[] arrival = new long[0];
    SamplingParams[] params = new SamplingParams[0];
    /** Tokens that end the sample: the request's stop tokens, and the end-of-sequence tokens unless ignored. */
    int[][] stopIds = new int[0][];
    @Nullable Finish[] finish = new Finish[0];

    /** Prompt, then completion; {@code tokenCount} entries are known. */
    int[][] tokens = new int[0][];
    int[] promptLength = new int[0];
    int[] tokenCount = new int[0];
    /** The sample ends when {@code tokenCount} reaches this: prompt + maxTokens, or the context if that is shorter. */
    int[] limit = new int[0];
    /** Positions whose KV is computed or will be by a scheduled step. */
    int[] computed = new int[0];
    /** Positions whose KV was found at the last admission. */
    int[] found = new int[0];
    /** Tokens that scheduled steps will sample and that are not in {@code tokens} yet. */
    int[] pending = new int[0];
    /** The last step this slot took part in; it is in flight while the step is. */
    long[] lastStep = new long[0];
    /** Prompt tokens whose KV was found instead of computed at the first admission; not touched by later ones. */
    int[] cachedTokens = new int[0];

    int[][] blocks = new int[0][];
    int[] blockCount = new int[0];
    /** Leading blocks that are known to the prefix cache. */
    int[] hashedBlocks = new int[0];
    /** Prefix identity of the last of them. */
    long[] chain = new long[0];

    /** The next sample of the same group, or {@link #NONE}. Valid from the group's first sample, while that holds its slot. */
    int[] nextSibling = new int[0];
    /** First sample of the group. */
    int[] leader = new int[0];
    /** Links of {@link WaitingQueue}. */
    int[] queuePrevious = new int[0];
    int[] queueNext = new int[0];

    private int[] free = new int[0];
    private int freeCount;

    /** {@return the number of slots, used or not} */
    int capacity() {
        return state.length;
    }

    /** {@return the number of slots that hold a sample} */
    int used() {
        return state.length - freeCount;
    }

    /** Takes a free slot and sizes its arrays for {@code maxTokens} tokens and {@code maxBlocks} blocks. */
    int claim(int maxTokens, int maxBlocks) {
        if (freeCount == 0) {
            grow(Math.max(16, capacity() * 2));
        }
        int slot = free[--freeCount];
        tokens[slot] = sized(tokens[slot], maxTokens);
        blocks[slot] = sized(blocks[slot], maxBlocks);
        tokenCount[slot] = 0;
        computed[slot] = 0;
        pending[slot] = 0;
        lastStep[slot] = 0;
        cachedTokens[slot] = NONE;
        blockCount[slot] = 0;
        hashedBlocks[slot] = 0;
        finish[slot] = null;
        nextSibling[slot] = NONE;
        return slot;
    }

    /** Returns a slot; its arrays stay for the next sample. */
    void free(int slot) {
        unlink(slot);
        state[slot] = State.FREE;
        free[freeCount++] = slot;
    }

    /** A reused slot must not stay in the chain of its former group. If the group's first sample is gone, nobody follows it. */
    private void unlink(int slot) {
        int before = leader[slot];
        while (before != NONE && nextSibling[before] != slot) {
            before = nextSibling[before];
        }
        if (before != NONE) {
            nextSibling[before] = nextSibling[slot];
        }
        nextSibling[slot] = NONE;
    }

    /** Keeps an array that is long enough, unless it is so long that keeping it would hoard memory. */
    private static int[] sized(int[] array, int length) {
        return array.length >= length && array.length <= 4 * Math.max(length, 64) ? array : new int[length];
    }

    private void grow(int capacity) {
        int old = capacity();
        state = Arrays.copyOf(state, capacity);
        Arrays.fill(state, old, capacity, State.FREE);
        epoch = Arrays.copyOf(epoch, capacity);
        requestId = Arrays.copyOf(requestId, capacity);
        sampleIndex = Arrays.copyOf(sampleIndex, capacity);
        sampleKey = Arrays.copyOf(sampleKey, capacity);
        arrival = Arrays.copyOf(arrival, capacity);
        params = Arrays.copyOf(params, capacity);
        Arrays.fill(params, old, capacity, SamplingParams.defaults());
        stopIds = Arrays.copyOf(stopIds, capacity);
        finish = Arrays.copyOf(finish, capacity);
        tokens = Arrays.copyOf(tokens, capacity);
        promptLength = Arrays.copyOf(promptLength, capacity);
        tokenCount = Arrays.copyOf(tokenCount, capacity);
        limit = Arrays.copyOf(limit, capacity);
        computed = Arrays.copyOf(computed, capacity);
        found = Arrays.copyOf(found, capacity);
        pending = Arrays.copyOf(pending, capacity);
        lastStep = Arrays.copyOf(lastStep, capacity);
        cachedTokens = Arrays.copyOf(cachedTokens, capacity);
        blocks = Arrays.copyOf(blocks, capacity);
        blockCount = Arrays.copyOf(blockCount, capacity);
        hashedBlocks = Arrays.copyOf(hashedBlocks, capacity);
        chain = Arrays.copyOf(chain, capacity);
        nextSibling = Arrays.copyOf(nextSibling, capacity);
        leader = Arrays.copyOf(leader, capacity);
        queuePrevious = Arrays.copyOf(queuePrevious, capacity);
        queueNext = Arrays.copyOf(queueNext, capacity);
        free = Arrays.copyOf(free, capacity);
        int[] empty = {};
        for (int slot = capacity - 1; slot >= old; slot--) { // so that the lowest slot is taken first
            tokens[slot] = empty;
            blocks[slot] = empty;
            stopIds[slot] = empty;
            leader[slot] = slot;
            nextSibling[slot] = NONE;
            free[freeCount++] = slot;
        }
    }
}
