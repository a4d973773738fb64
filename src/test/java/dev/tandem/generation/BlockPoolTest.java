package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import org.junit.jupiter.api.Test;

class BlockPoolTest {
    private static int[] take(BlockPool pool, int count) {
        int[] blocks = new int[count];
        assertTrue(pool.allocate(count, blocks, 0));
        return blocks;
    }

    @Test
    void allocatesAllOrNothing() {
        BlockPool pool = new BlockPool(2, 6);
        int[] three = take(pool, 3);
        int[] into = {-7, -7, -7};
        assertFalse(pool.allocate(3, into, 0));
        assertArrayEquals(new int[] {-7, -7, -7}, into);
        assertEquals(2, pool.freeCount());
        pool.release(three[1]);
        assertTrue(pool.allocate(3, into, 0));
        assertEquals(0, pool.freeCount());
        pool.assertInvariants();
    }

    @Test
    void neverHandsOutTheNullBlock() {
        BlockPool pool = new BlockPool(2, 6);
        for (int block : take(pool, 5)) {
            assertNotEquals(BlockPool.NULL_BLOCK, block);
        }
        assertThrows(IllegalStateException.class, () -> pool.release(BlockPool.NULL_BLOCK));
    }

    @Test
    void aSecondReleaseIsAnError() {
        BlockPool pool = new BlockPool(2, 4);
        int block = take(pool, 1)[0];
        pool.release(block);
        var e = assertThrows(IllegalStateException.class, () -> pool.release(block));
        assertTrue(e.getMessage().contains("block " + block), e.getMessage());
    }

    @Test
    void evictsTheLeastRecentlyUsedAndKeepsHitsAlive() {
        BlockPool pool = new BlockPool(1, 5);
        int[] blocks = take(pool, 4);
        long chain = pool.root();
        for (int i = 0; i < 4; i++) {
            chain = pool.enter(blocks[i], chain, new int[] {10 + i}, 0);
        }
        for (int i = 3; i >= 0; i--) {
            pool.release(blocks[i]); // the tail first
        }
        assertEquals(blocks[0], pool.find(pool.root(), new int[] {10}, 0));
        pool.touch(blocks[0]);
        int[] two = take(pool, 2);
        assertArrayEquals(new int[] {blocks[3], blocks[2]}, two);
        assertEquals(blocks[1], pool.find(pool.identity(blocks[0]), new int[] {11}, 0), "the block behind the root is evicted last");
        pool.assertInvariants();
    }

    /** Memory behind the extent need not exist. */
    @Test
    void takesWhatHasNoPrefixThenLowBlocksAndEvictsLast() {
        BlockPool pool = new BlockPool(1, 7);
        assertEquals(1, pool.extent());
        assertArrayEquals(new int[] {1, 2, 3}, take(pool, 3));
        assertEquals(4, pool.extent());
        pool.enter(1, pool.root(), new int[] {1}, 0);
        pool.release(1);
        pool.release(2);
        pool.release(3);
        assertEquals(6, pool.freeCount());
        take(pool, 2);
        assertEquals(4, pool.extent(), "blocks without a prefix come first");
        pool.assertInvariants();
        assertArrayEquals(new int[] {4, 5, 6}, take(pool, 3));
        assertEquals(1, pool.find(pool.root(), new int[] {1}, 0), "a prefix is kept while there is another block");
        pool.assertInvariants();
        assertArrayEquals(new int[] {1}, take(pool, 1));
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {1}, 0));
        for (int block = 1; block < 7; block++) {
            pool.release(block);
        }
        pool.reset();
        assertEquals(1, pool.extent());
        assertEquals(6, pool.freeCount());
        assertTrue(pool.shrink(5));
        pool.grow(7);
        assertArrayEquals(new int[] {1, 2, 3, 4, 5, 6}, take(pool, 6));
        pool.assertInvariants();
    }

    @Test
    void verifiesTokensAndPrefix() {
        BlockPool pool = new BlockPool(2, 8);
        int[] blocks = take(pool, 3);
        long ab = pool.enter(blocks[0], pool.root(), new int[] {1, 2}, 0);
        long cd = pool.enter(blocks[1], pool.root(), new int[] {3, 4}, 0);
        pool.enter(blocks[2], ab, new int[] {0, 5, 6}, 1);
        assertEquals(blocks[2], pool.find(ab, new int[] {5, 6}, 0));
        assertEquals(BlockPool.NULL_BLOCK, pool.find(cd, new int[] {5, 6}, 0));
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {5, 6}, 0));
        assertEquals(BlockPool.NULL_BLOCK, pool.find(ab, new int[] {5, 7}, 0));
    }

    @Test
    void equalPrefixesInDifferentBlocksAreOnePrefix() {
        BlockPool pool = new BlockPool(1, 8);
        int[] blocks = take(pool, 3);
        long first = pool.enter(blocks[0], pool.root(), new int[] {1}, 0);
        long second = pool.enter(blocks[1], pool.root(), new int[] {1}, 0);
        assertEquals(first, second);
        pool.enter(blocks[2], first, new int[] {2}, 0);
        pool.release(blocks[0]);
        take(pool, pool.freeCount()); // evicts the first
        assertEquals(blocks[1], pool.find(pool.root(), new int[] {1}, 0));
        assertEquals(blocks[2], pool.find(second, new int[] {2}, 0));
        pool.assertInvariants();
    }

    @Test
    void aNamespaceHidesEverythingBeforeIt() {
        BlockPool pool = new BlockPool(1, 8);
        int block = take(pool, 1)[0];
        pool.enter(block, pool.root(), new int[] {1}, 0);
        pool.setNamespace(0);
        assertEquals(block, pool.find(pool.root(), new int[] {1}, 0), "the same version changes nothing");
        pool.setNamespace(1);
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {1}, 0));
        pool.setNamespace(0);
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {1}, 0));
    }

    @Test
    void shrinksOnlyWhenTheTailIsFree() {
        BlockPool pool = new BlockPool(1, 6);
        int[] blocks = take(pool, 5);
        pool.enter(blocks[4], pool.root(), new int[] {1}, 0);
        assertFalse(pool.shrink(5));
        pool.release(blocks[4]);
        assertEquals(5, pool.smallestCount());
        assertTrue(pool.shrink(5));
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {1}, 0));
        assertEquals(0, pool.freeCount());
        pool.grow(9);
        assertEquals(4, pool.freeCount());
        pool.assertInvariants();
        assertThrows(IllegalArgumentException.class, () -> pool.shrink(0));
        assertThrows(IllegalArgumentException.class, () -> pool.grow(3));
    }

    @Test
    void resetsOnlyWhenNothingIsUsed() {
        BlockPool pool = new BlockPool(1, 4);
        int block = take(pool, 1)[0];
        pool.enter(block, pool.root(), new int[] {1}, 0);
        var e = assertThrows(IllegalStateException.class, pool::reset);
        assertTrue(e.getMessage().contains("1 of 3 blocks"), e.getMessage());
        pool.release(block);
        pool.reset();
        assertEquals(BlockPool.NULL_BLOCK, pool.find(pool.root(), new int[] {1}, 0));
        pool.assertInvariants();
    }

    /** Random holders against a model that knows, for each block, its references and its whole prefix as a list. */
    @Test
    void keepsItsInvariantsUnderAHundredThousandRandomOperations() {
        long seed = new Random().nextLong();
        try {
            new RandomOperations(seed).run();
        } catch (RuntimeException | AssertionError e) {
            throw new AssertionError("seed " + seed + ": " + e.getMessage(), e);
        }
    }

    private static final class RandomOperations {
        final Random random;
        final int size = 3;
        final BlockPool pool = new BlockPool(size, 40);
        final List<List<Integer>> tables = new ArrayList<>();
        final Map<Integer, List<Integer>> content = new HashMap<>();
        long hits;
        int version;

        RandomOperations(long seed) {
            random = new Random(seed);
        }

        void run() {
            for (int operation = 0; operation < 100_000; operation++) {
                switch (random.nextInt(12)) {
                    case 0, 1, 2, 3, 4 -> start();
                    case 5, 6, 7, 8 -> stop();
                    case 9 -> {
                        if (random.nextInt(50) == 0) {
                            pool.setNamespace(++version);
                            content.clear();
                        }
                    }
                    case 10 -> {
                        int count = Math.max(pool.smallestCount(), 20);
                        for (int block = count; block < pool.blockCount(); block++) {
                            content.remove(block);
                        }
                        if (count < pool.blockCount()) {
                            assertTrue(pool.shrink(count));
                        }
                    }
                    default -> pool.grow(Math.max(pool.blockCount(), 20 + random.nextInt(21)));
                }
                if (operation % 20 == 0) {
                    pool.assertInvariants();
                    assertEquals(tables.stream().mapToInt(List::size).sum(), pool.totalReferences());
                }
            }
            assertTrue(hits > 1000, "too few hits to mean anything: " + hits);
        }

        /** Looks a random sequence up, takes what is found and allocates and enters the rest. */
        void start() {
            int blocks = 1 + random.nextInt(6);
            int[] tokens = random.ints(blocks * size, 0, 2).toArray();
            List<Integer> table = new ArrayList<>();
            List<Integer> prefix = new ArrayList<>();
            long chain = pool.root();
            for (int i = 0; i < blocks; i++) {
                int found = pool.find(chain, tokens, i * size);
                if (found == BlockPool.NULL_BLOCK) {
                    break;
                }
                for (int t = i * size; t < (i + 1) * size; t++) {
                    prefix.add(tokens[t]);
                }
                assertEquals(prefix, content.get(found), "block " + found);
                pool.touch(found);
                table.add(found);
                chain = pool.identity(found);
                hits++;
            }
            int[] rest = new int[blocks - table.size()];
            int free = pool.freeCount();
            boolean allocated = pool.allocate(rest.length, rest, 0);
            assertEquals(free >= rest.length, allocated);
            if (allocated) {
                for (int block : rest) {
                    assertEquals(1, pool.references(block));
                    int at = table.size();
                    chain = pool.enter(block, chain, tokens, at * size);
                    for (int t = at * size; t < (at + 1) * size; t++) {
                        prefix.add(tokens[t]);
                    }
                    content.put(block, List.copyOf(prefix));
                    table.add(block);
                }
            }
            tables.add(table);
        }

        void stop() {
            if (!tables.isEmpty()) {
                List<Integer> table = tables.remove(random.nextInt(tables.size()));
                for (int block : table.reversed()) {
                    pool.release(block);
                }
            }
        }
    }
}
