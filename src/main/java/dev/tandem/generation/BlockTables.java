package dev.tandem.generation;

import java.util.Arrays;

/**
 * The block tables of the requests: which blocks of the pool hold a slot's KV, in order.
 *
 * <p><b>Step fences.</b> A step that is in flight reads and writes the blocks that its rows had when it was scheduled. If such a
 * row's request ends meanwhile, its blocks are not free yet: they are kept back, with their references, until the step completes.
 * So a free block is always one that nothing on the device touches any more, and may even be unmapped.
 *
 * <p><b>Forks.</b> The samples of one prompt share its full blocks. The partial one is copied, but its content appears only while
 * the present step runs; the copy is therefore queued for the start of the next step, and holds a reference to its source until
 * that step has completed.
 */
final class BlockTables {
    private final RequestTable requests;
    private final BlockPool pool;
    private final boolean prefixCaching;

    private long completedStep;
    private int[] fenced = new int[64];
    private long[] fences = new long[64];
    private int fencedCount;

    private final int[] copySource;
    private final int[] copyTarget;
    private final int[] copySlot;
    /** The step whose forward pass fills the source. */
    private final long[] copyStep;
    private int copyCount;

    BlockTables(RequestTable requests, BlockPool pool, boolean prefixCaching, int maxRunning) {
        this.requests = requests;
        this.pool = pool;
        this.prefixCaching = prefixCaching;
        copySource = new int[maxRunning];
        copyTarget = new int[maxRunning];
        copySlot = new int[maxRunning];
        copyStep = new long[maxRunning];
    }

    /**
     * Starts a slot's table: takes the blocks of the longest known prefix, and new blocks up to {@code length} tokens.
     *
     * <p>The prefix ends before the last token, rounded down to a block, because the last token must be computed to have logits.
     *
     * @param keepFree blocks that must stay free
     * @return the number of tokens whose KV is there, or -1 (with nothing changed) if there are too few free blocks
     */
    int admit(int slot, int length, int keepFree) {
        int[] table = requests.blocks[slot];
        int[] tokens = requests.tokens[slot];
        int size = pool.blockSize();
        long chain = pool.root();
        int found = 0;
        int foundFree = 0;
        int most = prefixCaching ? (requests.tokenCount[slot] - 1) / size : 0;
        while (found < most) {
            int block = pool.find(chain, tokens, found * size);
            if (block == BlockPool.NULL_BLOCK) {
                break;
            }
            chain = pool.identity(block);
            foundFree += pool.references(block) == 0 ? 1 : 0;
            table[found++] = block;
        }
        int missing = pool.blocksFor(length) - found;
        if (missing > pool.freeCount() - foundFree - keepFree) {
            return -1;
        }
        for (int i = 0; i < found; i++) {
            pool.touch(table[i]);
        }
        pool.allocate(missing, table, found);
        requests.blockCount[slot] = found + missing;
        requests.hashedBlocks[slot] = found;
        requests.chain[slot] = chain;
        return found * size;
    }

    /** Makes room for {@code length} tokens. @return false, with nothing changed, if there are too few free blocks */
    boolean extend(int slot, int length) {
        int missing = pool.blocksFor(length) - requests.blockCount[slot];
        if (missing <= 0) {
            return true;
        }
        if (!pool.allocate(missing, requests.blocks[slot], requests.blockCount[slot])) {
            return false;
        }
        requests.blockCount[slot] += missing;
        return true;
    }

    /**
     * Gives {@code to} the prompt's blocks of {@code from}: the full ones shared, the partial one as a queued copy, and room up to
     * {@code length} tokens.
     *
     * @param prompt tokens that are computed once the step being scheduled has run
     * @param step that step
     * @return false, with nothing changed, if fewer than the missing blocks and {@code keepFree} are free
     */
    boolean fork(int from, int to, int prompt, int length, int keepFree, long step) {
        int full = prompt / pool.blockSize();
        int missing = pool.blocksFor(length) - full;
        if (missing > pool.freeCount() - keepFree) {
            return false;
        }
        int[] table = requests.blocks[to];
        int[] source = requests.blocks[from];
        for (int i = 0; i < full; i++) {
            table[i] = source[i];
            pool.touch(table[i]);
        }
        pool.allocate(missing, table, full);
        requests.blockCount[to] = full + missing;
        requests.hashedBlocks[to] = requests.hashedBlocks[from];
        requests.chain[to] = requests.chain[from];
        if (prompt % pool.blockSize() != 0) {
            pool.touch(source[full]);
            copySource[copyCount] = source[full];
            copyTarget[copyCount] = table[full];
            copySlot[copyCount] = to;
            copyStep[copyCount++] = step;
        }
        return true;
    }

    /**
     * Enters blocks into the prefix cache that are full of known tokens and computed by scheduled steps. Doing so at schedule
     * time lets requests that are admitted in the same step share them, since a step writes all KV before it attends.
     */
    void enterFullBlocks(int slot) {
        if (!prefixCaching) {
            return;
        }
        int size = pool.blockSize();
        int full = Math.min(requests.computed[slot], requests.tokenCount[slot]) / size;
        for (int i = requests.hashedBlocks[slot]; i < full; i++) {
            requests.chain[slot] = pool.enter(requests.blocks[slot][i], requests.chain[slot], requests.tokens[slot], i * size);
            requests.hashedBlocks[slot] = i + 1;
        }
    }

    /**
     * Gives a slot's blocks back, last one first: now, or when the step that uses them completes. A copy that is queued for the slot
     * is forgotten.
     */
    void release(int slot) {
        long fence = requests.lastStep[slot];
        int[] table = requests.blocks[slot];
        for (int i = requests.blockCount[slot] - 1; i >= 0; i--) {
            release(table[i], fence);
        }
        requests.blockCount[slot] = 0;
        requests.hashedBlocks[slot] = 0;
        dropCopy(slot);
    }

    private void release(int block, long fence) {
        if (fence <= completedStep) {
            pool.release(block);
            return;
        }
        if (fencedCount == fenced.length) {
            fenced = Arrays.copyOf(fenced, 2 * fencedCount);
            fences = Arrays.copyOf(fences, 2 * fencedCount);
        }
        fenced[fencedCount] = block;
        fences[fencedCount++] = fence;
    }

    /** Frees what waited for this step or an earlier one. */
    void stepCompleted(long step) {
        completedStep = step;
        int kept = 0;
        for (int i = 0; i < fencedCount; i++) {
            if (fences[i] <= step) {
                pool.release(fenced[i]);
            } else {
                fenced[kept] = fenced[i];
                fences[kept++] = fences[i];
            }
        }
        fencedCount = kept;
    }

    /** {@return how many blocks would be free at once if the slot were preempted} */
    int exclusiveBlocks(int slot) {
        int count = 0;
        for (int i = 0; i < requests.blockCount[slot]; i++) {
            count += pool.references(requests.blocks[slot][i]) == 1 ? 1 : 0;
        }
        return count;
    }

    /** Forgets the queued copy of a slot that ends or is preempted. */
    private void dropCopy(int slot) {
        for (int i = 0; i < copyCount; i++) {
            if (copySlot[i] == slot) {
                release(copySource[i], completedStep);
                copyCount--;
                System.arraycopy(copySource, i + 1, copySource, i, copyCount - i);
                System.arraycopy(copyTarget, i + 1, copyTarget, i, copyCount - i);
                System.arraycopy(copySlot, i + 1, copySlot, i, copyCount - i);
                System.arraycopy(copyStep, i + 1, copyStep, i, copyCount - i);
                return;
            }
        }
    }

    /** Makes the copies that earlier steps queued part of this one. Forks of the step itself stay queued for the next. */
    void planCopies(StepPlan plan) {
        int due = 0;
        while (due < copyCount && copyStep[due] < plan.step) {
            plan.addCopy(copySource[due], copyTarget[due]);
            release(copySource[due], plan.step);
            requests.lastStep[copySlot[due]] = plan.step; // this step writes the slot's block, whether or not it has a row
            due++;
        }
        copyCount -= due;
        System.arraycopy(copySource, due, copySource, 0, copyCount);
        System.arraycopy(copyTarget, due, copyTarget, 0, copyCount);
        System.arraycopy(copySlot, due, copySlot, 0, copyCount);
        System.arraycopy(copyStep, due, copyStep, 0, copyCount);
    }

    /** {@return references held by no table: fenced blocks and sources of queued copies} Used by tests. */
    int extraReferences() {
        return fencedCount + copyCount;
    }
}
