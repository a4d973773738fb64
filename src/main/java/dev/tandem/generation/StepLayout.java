package dev.tandem.generation;

import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.MemorySegment;
import java.util.Arrays;

/**
 * How a step's input lies in memory, field by field, for the kernels under {@code native/cuda} to read: token ids, positions, block
 * tables, which rows are sampled and how. It knows nothing of a device.
 *
 * <p>Rows of one token come first; each is a row of the decode attention. Rows of several tokens follow, each a sequence of the prefill
 * attention, cut into tiles. The i-th row in this order is its own "slot" in the block tables. The fields of a decoding step come first, so
 * that one copy of {@link #decodeBytes} carries it; a step with prompts needs the rest too.
 */
final class StepLayout {
    /** The fields in their order. */
    enum Field {
        /** 32-bit counts, at the places named below. */
        COUNTS,
        /** Of each decoding row its slot. */
        ROW_SLOT,
        /** Of each decoding row the tokens of its context, the new one included. */
        ROW_LENGTH,
        /** The tokens of a decoding step: ids, or -1 - i for the token that pair i of the step before samples. */
        ROW_TOKENS,
        /** Their positions. */
        ROW_POSITIONS,
        /** Of each row of logits the token whose state it is computed from. */
        WANTED,
        /** Of each sample the struct Pair of sampling.cuh. */
        PAIRS,
        /** Of each row its block table. */
        TABLES,
        /** The tokens of a step with prompts, as ROW_TOKENS. */
        TOKENS,
        /** Their positions. */
        POSITIONS,
        /** The slot of each. */
        TOKEN_SLOT,
        /** Of each sequence its slot. */
        SEQUENCE_SLOT,
        /** Of each sequence its first token in the step. */
        SEQUENCE_FIRST,
        /** Of each sequence the position of that token. */
        SEQUENCE_START,
        /** Of each sequence its number of new tokens. */
        SEQUENCE_TOKENS,
        /** Of each tile its sequence. */
        TILE_SEQUENCE,
        /** Of each tile its first query within the sequence. */
        TILE_FIRST,
        /** Of each sample the tokens that must not be drawn. */
        MASKED
    }

    /** Places in the counts. */
    static final int TOKENS = 0;

    static final int DECODE_ROWS = 1;
    static final int WANTED = 2;
    static final int PAIRS = 3;

    static final int MAX_MASKED = 32;
    static final int PAIR_BYTES = 64;
    private static final int COUNTS = 16;
    private static final int ALIGNMENT = 256;

    private final int tableWidth;
    private final int tileQueries;
    private final long[] offsets = new long[Field.values().length + 1];
    private final int[] order;
    private final int[] lastToken;
    private final int[] wantedIndex;
    /** For each slot the pair of the latest step that sampled for it. */
    private int[] lastPair = new int[0];

    private int tokenCount;
    private int rows;
    private int decodeRows;
    private int sequences;
    private boolean readsNew;
    private int tiles;
    private int wantedCount;
    private boolean truncates;
    private boolean edits;
    private boolean penalises;

    /**
     * @param tableWidth most blocks of a row
     * @param tileQueries tokens of a tile of the prefill attention
     */
    StepLayout(GeneratorOptions options, int tableWidth, int tileQueries) {
        this.tableWidth = tableWidth;
        this.tileQueries = tileQueries;
        int maxRows = options.maxRunning();
        int maxTokens = options.tokenBudget();
        for (Field field : Field.values()) {
            long numbers = switch (field) {
                case COUNTS -> COUNTS;
                case ROW_SLOT, ROW_LENGTH, ROW_TOKENS, ROW_POSITIONS, WANTED -> maxRows;
                case SEQUENCE_SLOT, SEQUENCE_FIRST, SEQUENCE_START, SEQUENCE_TOKENS -> maxRows;
                case PAIRS -> maxRows * (PAIR_BYTES / 4L);
                case TABLES -> (long) maxRows * tableWidth;
                case TOKENS, POSITIONS, TOKEN_SLOT -> maxTokens;
                case TILE_SEQUENCE, TILE_FIRST -> maxTokens / tileQueries + maxRows;
                case MASKED -> (long) maxRows * MAX_MASKED;
            };
            int i = field.ordinal();
            offsets[i + 1] = (offsets[i] + 4 * numbers + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        }
        order = new int[maxRows];
        lastToken = new int[maxRows];
        wantedIndex = new int[maxRows];
    }

    /** {@return bytes of all fields} */
    long bytes() {
        return offsets[offsets.length - 1];
    }

    /** {@return the offset of a field in bytes} */
    long at(Field field) {
        return offsets[field.ordinal()];
    }

    /** {@return the width of a block table} */
    int tableWidth() {
        return tableWidth;
    }

    /** {@return the length of what a decoding step needs, from the beginning} */
    long decodeBytes() {
        return at(Field.TABLES) + 4L * rows * tableWidth;
    }

    /**
     * Lays out a plan.
     *
     * @param memory of {@link #bytes}, what it held before is of no interest
     * @param requests the table that the plan refers to
     * @param seed of requests that bring none
     */
    void fill(MemorySegment memory, StepPlan plan, RequestTable requests, long seed) {
        arrange(plan);
        boolean decodes = decodesOnly();
        if (lastPair.length < requests.capacity()) {
            lastPair = Arrays.copyOf(lastPair, requests.capacity());
        }
        int next = 0;
        tiles = 0;
        for (int i = 0; i < rows; i++) {
            int row = order[i];
            int slot = plan.slot[row];
            long table = at(Field.TABLES) + 4L * i * tableWidth;
            MemorySegment.copy(requests.blocks[slot], 0, memory, JAVA_INT, table, requests.blockCount[slot]);
            if (i < decodeRows) {
                put(memory, Field.ROW_SLOT, i, i);
                put(memory, Field.ROW_LENGTH, i, plan.start[row] + 1);
            } else {
                sequence(memory, i - decodeRows, i, next, plan.start[row], plan.granted[row]);
            }
            next = tokens(memory, plan, requests, row, i, next, decodes);
            lastToken[row] = next - 1;
        }
        tokenCount = next;
        wantedRows(memory, plan);
        samples(memory, plan, requests, seed);
        put(memory, Field.COUNTS, TOKENS, tokenCount);
        put(memory, Field.COUNTS, DECODE_ROWS, decodeRows);
        put(memory, Field.COUNTS, WANTED, wantedCount);
        put(memory, Field.COUNTS, PAIRS, plan.sampleCount);
    }

    private void arrange(StepPlan plan) {
        rows = plan.rowCount;
        readsNew = plan.readsNew;
        decodeRows = 0;
        for (int row = 0; row < rows; row++) {
            if (plan.granted[row] == 1) {
                order[decodeRows++] = row;
            }
        }
        sequences = 0;
        for (int row = 0; row < rows; row++) {
            if (plan.granted[row] > 1) {
                order[decodeRows + sequences++] = row;
            }
        }
    }

    private void sequence(MemorySegment memory, int sequence, int row, int first, int start, int count) {
        put(memory, Field.SEQUENCE_SLOT, sequence, row);
        put(memory, Field.SEQUENCE_FIRST, sequence, first);
        put(memory, Field.SEQUENCE_START, sequence, start);
        put(memory, Field.SEQUENCE_TOKENS, sequence, count);
        for (int query = (count - 1) / tileQueries * tileQueries; query >= 0; query -= tileQueries) {
            put(memory, Field.TILE_SEQUENCE, tiles, sequence);
            put(memory, Field.TILE_FIRST, tiles++, query);
        }
    }

    private int tokens(MemorySegment memory, StepPlan plan, RequestTable requests, int row, int index, int first, boolean decodes) {
        int slot = plan.slot[row];
        int start = plan.start[row];
        int granted = plan.granted[row];
        int known = plan.known[row];
        Field ids = decodes ? Field.ROW_TOKENS : Field.TOKENS;
        Field places = decodes ? Field.ROW_POSITIONS : Field.POSITIONS;
        MemorySegment.copy(requests.tokens[slot], start, memory, JAVA_INT, at(ids) + 4L * first, known);
        for (int i = 0; i < granted; i++) {
            put(memory, places, first + i, start + i);
        }
        if (!decodes) {
            for (int i = 0; i < granted; i++) {
                put(memory, Field.TOKEN_SLOT, first + i, index);
            }
        }
        if (known < granted) {
            put(memory, ids, first + known, -1 - lastPair[slot]);
        }
        return first + granted;
    }

    /** In a decoding step every row has its logits computed, so that one captured graph fits all. */
    private void wantedRows(MemorySegment memory, StepPlan plan) {
        wantedCount = 0;
        for (int i = 0; i < rows; i++) {
            int row = order[i];
            wantedIndex[row] = -1;
            if (plan.sampled[row] || decodesOnly()) {
                wantedIndex[row] = wantedCount;
                put(memory, Field.WANTED, wantedCount++, lastToken[row]);
            }
        }
    }

    private void samples(MemorySegment memory, StepPlan plan, RequestTable requests, long seed) {
        truncates = false;
        edits = false;
        penalises = false;
        for (int i = 0; i < plan.sampleCount; i++) {
            int slot = plan.sampleSlot[i];
            lastPair[slot] = i;
            SamplingParams params = requests.params[slot];
            int maskedCount = 0;
            if (plan.samplePosition[i] - requests.promptLength[slot] < params.minTokens()) {
                int[] stops = requests.stopIds[slot];
                maskedCount = Math.min(stops.length, MAX_MASKED);
                MemorySegment.copy(stops, 0, memory, JAVA_INT, at(Field.MASKED) + 4L * i * MAX_MASKED, maskedCount);
            }
            pair(memory, at(Field.PAIRS) + (long) i * PAIR_BYTES, wantedIndex[plan.sampleRow[i]], i, plan.samplePosition[i], params,
                    seed, requests.sampleKey[slot], maskedCount);
            truncates |= params.truncates() && !params.isGreedy();
            penalises |= params.repetitionPenalty() != 1;
            edits |= maskedCount > 0 || params.repetitionPenalty() != 1;
        }
    }

    /** Lays out the struct Pair: what is sampled from a row of logits, into a slot of the tokens seen. */
    static void pair(MemorySegment memory, long at, int row, int slot, int position, SamplingParams params, long seed, long sampleKey,
            int maskedCount) {
        Long own = params.seed();
        memory.set(JAVA_INT, at, row);
        memory.set(JAVA_INT, at + 4, slot);
        memory.set(JAVA_INT, at + 8, position);
        memory.set(JAVA_INT, at + 12, params.topK());
        memory.set(JAVA_LONG, at + 16, own == null ? seed : own);
        memory.set(JAVA_LONG, at + 24, sampleKey);
        memory.set(JAVA_FLOAT, at + 32, (float) params.temperature());
        memory.set(JAVA_FLOAT, at + 36, (float) params.topP());
        memory.set(JAVA_FLOAT, at + 40, (float) params.minP());
        memory.set(JAVA_FLOAT, at + 44, (float) params.repetitionPenalty());
        memory.set(JAVA_INT, at + 48, params.logprobKind().ordinal());
        memory.set(JAVA_INT, at + 52, maskedCount);
    }

    private void put(MemorySegment memory, Field field, int index, int value) {
        memory.set(JAVA_INT, at(field) + 4L * index, value);
    }

    // ---- what was laid out ----------------------------------------------------------------------------------------------

    /** {@return whether every row has one token and none {@link #readsNew}: a decoding step, as its captured graph expects it} */
    boolean decodesOnly() {
        return sequences == 0 && !readsNew;
    }

    /** {@return whether a row of one token reads what another row writes in the same step} */
    boolean readsNew() {
        return readsNew;
    }

    int tokenCount() {
        return tokenCount;
    }

    int rows() {
        return rows;
    }

    int decodeRows() {
        return decodeRows;
    }

    int tiles() {
        return tiles;
    }

    int wantedCount() {
        return wantedCount;
    }

    /** {@return whether some pair has top-k, top-p or min-p} */
    boolean truncates() {
        return truncates;
    }

    /** {@return whether some pair has masked tokens or a repetition penalty} */
    boolean edits() {
        return edits;
    }

    /** {@return whether some pair has a repetition penalty} */
    boolean penalises() {
        return penalises;
    }
}
