package dev.tandem.generation;

import java.util.Arrays;

/**
 * Who holds which KV block, and which blocks still hold a known prefix.
 *
 * <p><b>Free blocks.</b> A block is used while its reference count is positive. Blocks from {@link #extent} on were never handed out.
 * Other free blocks are in one doubly linked list, those without a known prefix first, then the others, least recently used first. Its
 * sentinel is block 0: the null block is never handed out, so its links are free for that. Taking the head, adding at either end and
 * unlinking from the middle are O(1). A block without a prefix is taken first, then one never handed out, in ascending order, so that
 * memory behind the extent need not exist; a prefix is given up only when neither is left. A request gives its blocks back last one
 * first, so the tail of a sequence is evicted before the prefix that others may want.
 *
 * <p><b>Prefix cache.</b> A full block of tokens is entered under a hash, and stays entered while it is free; only when it is
 * handed out again does its entry go (lazy eviction). A hash alone would be wrong once in 2<sup>64</sup> lookups, so a hit is
 * verified: the block's tokens are compared, and so is the prefix before them. For the latter every distinct prefix has an
 * <em>identity</em>, a number that is never reused; an entry is keyed by the identity of the prefix before the block and by the
 * block's tokens, and has an identity of its own. Two blocks with equal content behind equal prefixes share an identity (block
 * tables are append-only, hence duplicates are entered, not merged), so a chain survives the eviction of either. A chain starts
 * from the identity of the namespace, the version of the weights: a new version takes a new identity, and everything computed
 * by older weights becomes unreachable in O(1).
 *
 * <p>The structure follows vLLM's block pool; identities replace its cryptographic hashes. Nothing is allocated after
 * construction except by {@link #grow}. Not thread-safe.
 */
final class BlockPool {
    /** The block that is never handed out. Its memory may be used as a dummy target. */
    static final int NULL_BLOCK = 0;

    private final int blockSize;
    private int blockCount;
    private int freeCount;
    private int extent = 1;
    private int[] references = new int[0];
    private int[] previous = new int[0];
    private int[] next = new int[0];
    /** Tokens of entered blocks, {@code blockSize} each. */
    private int[] tokens = new int[0];
    private long[] hash = new long[0];
    private long[] parent = new long[0];
    /** Identity of the prefix that ends with this block; 0 if the block is not entered. */
    private long[] identity = new long[0];
    /** Open addressing with linear probing: block ids, {@link #NULL_BLOCK} where empty. At most half full. */
    private int[] slots = new int[0];

    private int entered;
    private long lastIdentity;
    private long namespace;
    private long root;

    /**
     * @param blockSize tokens per block
     * @param blockCount blocks in all, the null block included
     */
    BlockPool(int blockSize, int blockCount) {
        if (blockSize < 1) {
            throw new IllegalArgumentException("KV block size is " + blockSize + " tokens but must be at least 1");
        }
        this.blockSize = blockSize;
        root = ++lastIdentity;
        grow(blockCount);
    }

    int blockSize() {
        return blockSize;
    }

    /** {@return the number of blocks, the null block included} */
    int blockCount() {
        return blockCount;
    }

    /** {@return the number of blocks that requests can hold} */
    int usableCount() {
        return blockCount - 1;
    }

    int freeCount() {
        return freeCount;
    }

    /** {@return how many blocks, the null block included, cover all that were handed out since the pool was made or reset} */
    int extent() {
        return extent;
    }

    int references(int block) {
        return references[block];
    }

    /** {@return the number of blocks that hold {@code length} tokens} */
    int blocksFor(int length) {
        return Math.ceilDiv(length, blockSize);
    }

    /**
     * Takes {@code count} free blocks, or none.
     *
     * @return false, with nothing changed, if fewer than {@code count} are free
     */
    boolean allocate(int count, int[] into, int at) {
        if (count > freeCount) {
            return false;
        }
        for (int i = 0; i < count; i++) {
            int block = takeFree();
            references[block] = 1;
            into[at + i] = block;
        }
        return true;
    }

    private int takeFree() {
        int block = next[NULL_BLOCK];
        if (extent < blockCount && (block == NULL_BLOCK || identity[block] != 0)) {
            freeCount--;
            return extent++;
        }
        unlink(block);
        if (identity[block] != 0) {
            evict(block);
        }
        return block;
    }

    /** Adds a reference to a used block, or to a free block that a lookup found. */
    void touch(int block) {
        if (references[block]++ == 0) {
            unlink(block);
        }
    }

    /** Gives one reference back; the last one frees the block, which keeps its prefix as the most recently used one. */
    void release(int block) {
        if (block == NULL_BLOCK || references[block] <= 0) {
            throw new IllegalStateException("KV block " + block + " is released but nobody holds it");
        }
        if (--references[block] == 0) {
            linkBefore(identity[block] == 0 ? next[NULL_BLOCK] : NULL_BLOCK, block);
        }
    }

    /** {@return the identity of the empty prefix under the present weights} */
    long root() {
        return root;
    }

    /** Makes every entry unreachable if {@code version} differs from the present one. Used blocks stay used. */
    void setNamespace(long version) {
        if (version != namespace) {
            namespace = version;
            root = ++lastIdentity;
        }
    }

    /**
     * Enters a full block that holds (or, once the scheduled step has run, will hold) the KV of {@code blockSize} tokens.
     *
     * @param before identity of the prefix before the block
     * @param from index of the block's first token in {@code source}
     * @return identity of the prefix that ends with the block
     */
    long enter(int block, long before, int[] source, int from) {
        if (identity[block] != 0) {
            throw new IllegalStateException("KV block " + block + " is entered into the prefix cache twice");
        }
        int equal = find(before, source, from);
        System.arraycopy(source, from, tokens, block * blockSize, blockSize);
        hash[block] = hash(before, source, from);
        parent[block] = before;
        identity[block] = equal == NULL_BLOCK ? ++lastIdentity : identity[equal];
        insert(block);
        entered++;
        return identity[block];
    }

    /** {@return a block with these tokens behind this prefix, or {@link #NULL_BLOCK}} Its reference count may be 0. */
    int find(long before, int[] source, int from) {
        long wanted = hash(before, source, from);
        int mask = slots.length - 1;
        for (int i = home(wanted); slots[i] != NULL_BLOCK; i = (i + 1) & mask) {
            int block = slots[i];
            if (hash[block] == wanted && parent[block] == before
                    && Arrays.equals(tokens, block * blockSize, (block + 1) * blockSize, source, from, from + blockSize)) {
                return block;
            }
        }
        return NULL_BLOCK;
    }

    /** {@return the identity of the prefix that ends with an entered block} */
    long identity(int block) {
        return identity[block];
    }

    /** Adds blocks, which are handed out before any free block that still holds a prefix. */
    void grow(int newCount) {
        if (newCount < Math.max(1, blockCount)) {
            throw new IllegalArgumentException(
                    "a KV pool of " + blockCount + " blocks cannot grow to " + newCount + " blocks; the null block is one of them");
        }
        Math.multiplyExact(newCount, blockSize);
        if (newCount > references.length) {
            references = Arrays.copyOf(references, newCount);
            previous = Arrays.copyOf(previous, newCount);
            next = Arrays.copyOf(next, newCount);
            tokens = Arrays.copyOf(tokens, newCount * blockSize);
            hash = Arrays.copyOf(hash, newCount);
            parent = Arrays.copyOf(parent, newCount);
            identity = Arrays.copyOf(identity, newCount);
            rehash(Integer.highestOneBit(Math.max(4, newCount) - 1) << 2);
        }
        freeCount += newCount - Math.max(1, blockCount);
        blockCount = newCount;
    }

    /**
     * Removes the blocks from {@code newCount} on.
     *
     * @return false, with nothing changed, if one of them is used
     */
    boolean shrink(int newCount) {
        if (newCount < 1 || newCount > blockCount) {
            throw new IllegalArgumentException("a KV pool of " + blockCount + " blocks cannot shrink to " + newCount + " blocks");
        }
        for (int block = newCount; block < blockCount; block++) {
            if (references[block] > 0) {
                return false;
            }
        }
        for (int block = newCount; block < extent; block++) {
            unlink(block);
            if (identity[block] != 0) {
                evict(block);
            }
        }
        freeCount -= blockCount - Math.max(newCount, extent);
        extent = Math.min(extent, newCount);
        blockCount = newCount;
        return true;
    }

    /** {@return the smallest count that {@link #shrink} accepts now} */
    int smallestCount() {
        int count = blockCount;
        while (count > 1 && references[count - 1] == 0) {
            count--;
        }
        return count;
    }

    /**
     * Forgets every prefix and which blocks were handed out, as when the blocks' memory has lost its content.
     *
     * @throws IllegalStateException if a block is used
     */
    void reset() {
        if (freeCount != usableCount()) {
            throw new IllegalStateException("the KV pool cannot be reset: " + (usableCount() - freeCount) + " of "
                    + usableCount() + " blocks are used; preempt or abort their requests first");
        }
        Arrays.fill(slots, NULL_BLOCK);
        Arrays.fill(identity, 0);
        entered = 0;
        next[NULL_BLOCK] = NULL_BLOCK;
        previous[NULL_BLOCK] = NULL_BLOCK;
        extent = 1;
    }

    private void linkBefore(int after, int block) {
        int before = previous[after];
        next[before] = block;
        previous[block] = before;
        next[block] = after;
        previous[after] = block;
        freeCount++;
    }

    private void unlink(int block) {
        next[previous[block]] = next[block];
        previous[next[block]] = previous[block];
        freeCount--;
    }

    private long hash(long before, int[] source, int from) {
        long h = before * 0x9E3779B97F4A7C15L;
        for (int i = from; i < from + blockSize; i++) {
            h = (h ^ source[i]) * 0xBF58476D1CE4E5B9L;
            h ^= h >>> 29;
        }
        return h;
    }

    private int home(long hash) {
        return (int) ((hash * 0x94D049BB133111EBL) >>> 33) & (slots.length - 1);
    }

    private void insert(int block) {
        int mask = slots.length - 1;
        int i = home(hash[block]);
        while (slots[i] != NULL_BLOCK) {
            i = (i + 1) & mask;
        }
        slots[i] = block;
    }

    /** Removes an entry and closes the gap in its probe sequence (Knuth, 6.4, algorithm R), so no tombstones pile up. */
    private void evict(int block) {
        int mask = slots.length - 1;
        int gap = home(hash[block]);
        while (slots[gap] != block) {
            gap = (gap + 1) & mask;
        }
        for (int i = (gap + 1) & mask; slots[i] != NULL_BLOCK; i = (i + 1) & mask) {
            int distance = (i - home(hash[slots[i]])) & mask;
            if (distance >= ((i - gap) & mask)) {
                slots[gap] = slots[i];
                gap = i;
            }
        }
        slots[gap] = NULL_BLOCK;
        identity[block] = 0;
        entered--;
    }

    private void rehash(int capacity) {
        slots = new int[capacity];
        for (int block = 1; block < blockCount; block++) {
            if (identity[block] != 0) {
                insert(block);
            }
        }
    }

    /** {@return the sum of all reference counts} Used by tests. */
    long totalReferences() {
        long sum = 0;
        for (int block = 1; block < blockCount; block++) {
            sum += references[block];
        }
        return sum;
    }

    /** Checks everything that must hold between calls. Used by tests; O(blocks). */
    void assertInvariants() {
        boolean[] free = new boolean[blockCount];
        int seen = 0;
        for (int block = next[NULL_BLOCK], before = NULL_BLOCK; block != NULL_BLOCK; before = block, block = next[block]) {
            check(block < extent && !free[block], "block " + block + " is twice in the free list or was never handed out");
            check(previous[block] == before, "block " + block + " has a wrong back link");
            check(identity[before] == 0 || identity[block] != 0, "block " + block + " without a prefix comes after one with a prefix");
            free[block] = true;
            seen++;
        }
        check(extent <= blockCount, "blocks up to " + extent + " of " + blockCount + " were handed out");
        check(seen + blockCount - extent == freeCount, seen + " free blocks and " + (blockCount - extent) + " never handed out, counted "
                + freeCount);
        Arrays.fill(free, extent, blockCount, true);
        int known = 0;
        for (int block = 1; block < blockCount; block++) {
            check(references[block] >= 0, "block " + block + " has a negative count");
            check(free[block] == (references[block] == 0), "block " + block + " is neither free nor used, or both");
            if (identity[block] != 0) {
                known++;
                check(block < extent, "block " + block + " was never handed out and has a prefix");
                int found = find(parent[block], tokens, block * blockSize);
                check(found != NULL_BLOCK && identity[found] == identity[block], "entered block " + block + " is not found");
            }
        }
        check(known == entered, known + " blocks are entered, counted " + entered);
        int mapped = 0;
        for (int block : slots) {
            mapped += block == NULL_BLOCK ? 0 : 1;
        }
        check(mapped == entered, "the map holds " + mapped + " blocks, counted " + entered);
    }

    private static void check(boolean holds, String message) {
        if (!holds) {
            throw new IllegalStateException("KV pool: " + message);
        }
    }
}
