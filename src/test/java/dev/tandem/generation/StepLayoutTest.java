package dev.tandem.generation;

import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.generation.StepLayout.Field;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** What kernels read of a step is what the scheduler planned, with one step in flight. */
class StepLayoutTest {
    private static final int TABLE_WIDTH = 40;
    private static final int TILE = 8;
    private static final GeneratorOptions OPTIONS = GeneratorOptions.defaults().blockSize(4).step(48, 12, 20);

    private final Random random = new Random(11);
    private final BlockPool pool = new BlockPool(4, 90);
    private final Scheduler scheduler = new Scheduler(new SchedulerOptions(48, 12, 20, 150, 1000, 1, false, true, List.of(7)), pool);
    private final RequestTable requests = scheduler.requests();
    private final StepLayout layout = new StepLayout(OPTIONS, TABLE_WIDTH, TILE);

    @ParameterizedTest
    @ValueSource(ints = {1, 2})
    void holdsThePlan(int depth) {
        StepPlan[] plans = {new StepPlan(12), new StepPlan(12)};
        int[] sampled = new int[12];
        int begun = 0;
        int ended = 0;
        int decoding = 0;
        int unknown = 0;
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment memory = arena.allocate(layout.bytes(), 8);
            for (int step = 0; step < 600; step++) {
                if (step < 500 && random.nextInt(4) == 0) {
                    submit(step);
                }
                while (begun - ended < depth && scheduler.schedule(plans[begun % 2])) {
                    StepPlan plan = plans[begun % 2];
                    StepPlan before = begun > ended ? plans[(begun + 1) % 2] : null;
                    memory.fill((byte) 0x5a);
                    layout.fill(memory, plan, requests, 99);
                    unknown += check(memory, plan, before);
                    decoding += layout.decodesOnly() ? 1 : 0;
                    begun++;
                }
                if (begun > ended) {
                    StepPlan plan = plans[ended++ % 2];
                    for (int i = 0; i < plan.sampleCount; i++) {
                        sampled[i] = random.nextInt(20) == 0 ? 7 : random.nextInt(1000);
                    }
                    scheduler.complete(plan, sampled);
                }
                for (int slot = scheduler.pollFinished(); slot != RequestTable.NONE; slot = scheduler.pollFinished()) {
                    scheduler.release(slot);
                }
            }
        }
        assertTrue(begun > 300 && decoding > 50 && begun - decoding > 50, begun + " steps, " + decoding + " of them decode");
        assertEquals(depth == 2, unknown > 0);
    }

    private void submit(int step) {
        int[] prompt = random.ints(1 + random.nextInt(60), 0, 1000).toArray();
        SamplingParams params = SamplingParams.defaults().n(1 + random.nextInt(3)).maxTokens(1 + random.nextInt(40))
                .temperature(random.nextInt(3) * 0.5).topK(random.nextInt(2) * 5).minTokens(random.nextInt(2))
                .repetitionPenalty(1 + random.nextInt(2));
        scheduler.submit(step, prompt, random.nextBoolean() ? params : params.seed((long) step), new long[] {step, step + 1, step + 2});
    }

    /** Returns how many tokens were left to the device. */
    private int check(MemorySegment memory, StepPlan plan, @org.jspecify.annotations.Nullable StepPlan before) {
        boolean decodes = layout.decodesOnly();
        assertEquals(plan.readsNew, layout.readsNew());
        assertEquals(!plan.readsNew && Arrays.stream(plan.granted, 0, plan.rowCount).allMatch(n -> n == 1), decodes);
        assertEquals(plan.totalTokens, number(memory, Field.COUNTS, StepLayout.TOKENS));
        assertEquals(plan.sampleCount, number(memory, Field.COUNTS, StepLayout.PAIRS));
        int decodeRows = number(memory, Field.COUNTS, StepLayout.DECODE_ROWS);
        int next = 0;
        int unknown = 0;
        int tiles = 0;
        int[] lastToken = new int[plan.rowCount];
        boolean[] seen = new boolean[plan.rowCount];
        for (int i = 0; i < plan.rowCount; i++) {
            int row = rowOfTable(memory, plan, i, decodes ? Field.ROW_POSITIONS : Field.POSITIONS, next, seen);
            seen[row] = true;
            int slot = plan.slot[row];
            assertEquals(plan.granted[row] == 1, i < decodeRows);
            if (i < decodeRows) {
                assertEquals(i, number(memory, Field.ROW_SLOT, i));
                assertEquals(plan.start[row] + 1, number(memory, Field.ROW_LENGTH, i));
            } else {
                int sequence = i - decodeRows;
                assertEquals(i, number(memory, Field.SEQUENCE_SLOT, sequence));
                assertEquals(next, number(memory, Field.SEQUENCE_FIRST, sequence));
                assertEquals(plan.start[row], number(memory, Field.SEQUENCE_START, sequence));
                assertEquals(plan.granted[row], number(memory, Field.SEQUENCE_TOKENS, sequence));
                int covered = 0;
                while (tiles < layout.tiles() && number(memory, Field.TILE_SEQUENCE, tiles) == sequence) {
                    int first = number(memory, Field.TILE_FIRST, tiles++);
                    covered += Math.min(TILE, plan.granted[row] - first);
                }
                assertEquals(plan.granted[row], covered);
            }
            for (int t = 0; t < plan.granted[row]; t++, next++) {
                assertEquals(plan.start[row] + t, number(memory, decodes ? Field.ROW_POSITIONS : Field.POSITIONS, next));
                int id = number(memory, decodes ? Field.ROW_TOKENS : Field.TOKENS, next);
                if (t < plan.known[row]) {
                    assertEquals(requests.tokens[slot][plan.start[row] + t], id);
                } else {
                    unknown++;
                    assertEquals(slot, java.util.Objects.requireNonNull(before).sampleSlot[-1 - id]);
                }
                if (!decodes) {
                    assertEquals(i, number(memory, Field.TOKEN_SLOT, next));
                }
            }
            lastToken[row] = next - 1;
        }
        assertEquals(layout.tiles(), tiles);
        for (int i = 0; i < plan.sampleCount; i++) {
            pair(memory, plan, i, lastToken);
        }
        return unknown;
    }

    /** The plan's row whose block table is the i-th and whose first position is that of token {@code next}. */
    private int rowOfTable(MemorySegment memory, StepPlan plan, int i, Field positions, int next, boolean[] seen) {
        for (int row = 0; row < plan.rowCount; row++) {
            int slot = plan.slot[row];
            boolean same = !seen[row] && number(memory, positions, next) == plan.start[row];
            for (int b = 0; same && b < requests.blockCount[slot]; b++) {
                same = number(memory, Field.TABLES, i * TABLE_WIDTH + b) == requests.blocks[slot][b];
            }
            if (same) {
                return row;
            }
        }
        throw new AssertionError("table " + i + " belongs to no row");
    }

    private void pair(MemorySegment memory, StepPlan plan, int i, int[] lastToken) {
        long at = layout.at(Field.PAIRS) + (long) i * StepLayout.PAIR_BYTES;
        int slot = plan.sampleSlot[i];
        SamplingParams params = requests.params[slot];
        int logits = memory.get(JAVA_INT, at);
        assertEquals(lastToken[plan.sampleRow[i]], number(memory, Field.WANTED, logits));
        assertEquals(i, memory.get(JAVA_INT, at + 4));
        assertEquals(plan.samplePosition[i], memory.get(JAVA_INT, at + 8));
        assertEquals(params.topK(), memory.get(JAVA_INT, at + 12));
        assertEquals(params.seed() == null ? 99 : params.seed(), memory.get(JAVA_LONG, at + 16));
        assertEquals(requests.sampleKey[slot], memory.get(JAVA_LONG, at + 24));
        assertEquals((float) params.temperature(), memory.get(JAVA_FLOAT, at + 32));
        assertEquals((float) params.repetitionPenalty(), memory.get(JAVA_FLOAT, at + 44));
        boolean masks = plan.samplePosition[i] - requests.promptLength[slot] < params.minTokens();
        assertEquals(masks ? 1 : 0, memory.get(JAVA_INT, at + 52));
        if (masks) {
            assertEquals(7, number(memory, Field.MASKED, i * StepLayout.MAX_MASKED));
        }
    }

    private int number(MemorySegment memory, Field field, int index) {
        return memory.get(JAVA_INT, layout.at(field) + 4L * index);
    }
}
