package dev.tandem.generation;

import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.util.Arrays;

/**
 * What the kernels of a step read, laid out once in pinned host memory and once on the device, field by field at the same offsets.
 *
 * <p>A decoding step copies one piece: counts, rows, pairs, and the block tables of its rows. A step with prompts in it copies a second
 * one, the tokens. There are as many pinned halves as steps may run, so the next step is laid out while the last one's copy may still
 * wait; the device's side is one, because copies and kernels follow each other on one stream.
 *
 * <p>Rows of one token come first; each is a row of the decode attention. Rows of several tokens follow, each a sequence of the prefill
 * attention. A plan row is its own "slot" in the block tables.
 */
final class CudaStepInput implements AutoCloseable {
    private static final int PAIR_BYTES = 64;
    private static final int ALIGNMENT = 256;

    /** Places in the counts. */
    private static final int TOKENS = 0;

    private static final int DECODE_ROWS = 1;
    private static final int WANTED = 2;
    private static final int PAIRS = 3;
    private static final int COUNTS = 16;

    static final int MAX_MASKED = 32;

    private final Device device;
    private final int blockSize;
    private final int tableWidth;
    private final int tileQueries;
    private final Tensor buffer;
    private final PinnedMemory[] pinned;
    private int half;

    private final Layout at;

    private final int[] order;
    private final int[] lastToken;
    private final int[] wantedIndex;
    /** For each slot the pair of the latest step that sampled for it. */
    private int[] lastPair = new int[0];

    private int tokenCount;
    private int rows;
    private int decodeRows;
    private int sequences;
    private int tiles;
    private int wantedCount;
    private boolean truncates;
    private boolean edits;
    private boolean penalises;

    /**
     * @param tableWidth most blocks of a row
     * @param tileQueries tokens of a tile of the prefill attention
     * @param halves how many steps may run
     */
    CudaStepInput(Device device, GeneratorOptions options, int tableWidth, int tileQueries, int halves) {
        this.device = device;
        blockSize = options.blockSize();
        this.tableWidth = tableWidth;
        this.tileQueries = tileQueries;
        at = new Layout(options, tableWidth, tileQueries);
        int maxRows = options.maxRunning();
        try (Scope scope = Scope.open()) {
            buffer = Tensor.zeros(device, DType.INT32, at.end / 4).keep();
        }
        pinned = new PinnedMemory[halves];
        Arrays.setAll(pinned, i -> new PinnedMemory(device, at.end));
        order = new int[maxRows];
        lastToken = new int[maxRows];
        wantedIndex = new int[maxRows];
    }

    /** {@return bytes on the device, known from the sizes alone} */
    static long bytes(GeneratorOptions options, int tableWidth, int tileQueries) {
        return new Layout(options, tableWidth, tileQueries).end;
    }

    /** Offsets of the fields in bytes; those from {@code tokens} on are copied only when a step has prompts. */
    private static final class Layout {
        private long end;
        final long counts = field(COUNTS);
        final long rowSlot;
        final long rowLength;
        final long rowTokens;
        final long rowPositions;
        final long wanted;
        final long pairs;
        final long tables;
        final long tokens;
        final long positions;
        final long tokenSlot;
        final long sequenceSlot;
        final long sequenceFirst;
        final long sequenceStart;
        final long sequenceTokens;
        final long tileSequence;
        final long tileFirst;
        final long masked;

        Layout(GeneratorOptions options, int tableWidth, int tileQueries) {
            int maxRows = options.maxRunning();
            int maxTokens = options.tokenBudget();
            int maxTiles = maxTokens / tileQueries + maxRows;
            rowSlot = field(maxRows);
            rowLength = field(maxRows);
            rowTokens = field(maxRows);
            rowPositions = field(maxRows);
            wanted = field(maxRows);
            pairs = field(maxRows * (PAIR_BYTES / 4L));
            tables = field((long) maxRows * tableWidth);
            tokens = field(maxTokens);
            positions = field(maxTokens);
            tokenSlot = field(maxTokens);
            sequenceSlot = field(maxRows);
            sequenceFirst = field(maxRows);
            sequenceStart = field(maxRows);
            sequenceTokens = field(maxRows);
            tileSequence = field(maxTiles);
            tileFirst = field(maxTiles);
            masked = field((long) maxRows * MAX_MASKED);
        }

        /** Reserves room for 32-bit numbers. */
        private long field(long count) {
            long start = end;
            end = (start + 4 * count + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
            return start;
        }
    }

    /** Lays out a plan and starts its copy to the device. */
    void fill(StepPlan plan, RequestTable requests, long seed) {
        half = (half + 1) % pinned.length;
        MemorySegment memory = pinned[half].segment();
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
            MemorySegment.copy(requests.blocks[slot], 0, memory, JAVA_INT, at.tables + 4L * i * tableWidth, requests.blockCount[slot]);
            if (i < decodeRows) {
                put(memory, at.rowSlot, i, i);
                put(memory, at.rowLength, i, plan.start[row] + 1);
            } else {
                sequence(memory, i - decodeRows, i, next, plan.start[row], plan.granted[row]);
            }
            next = tokens(memory, plan, requests, row, i, next, decodes);
            lastToken[row] = next - 1;
        }
        tokenCount = next;
        wantedRows(memory, plan);
        samples(memory, plan, requests, seed);
        put(memory, at.counts, TOKENS, tokenCount);
        put(memory, at.counts, DECODE_ROWS, decodeRows);
        put(memory, at.counts, WANTED, wantedCount);
        put(memory, at.counts, PAIRS, plan.sampleCount);
        pinned[half].copyTo(device, buffer.address(), 0, at.tables + 4L * rows * tableWidth);
        if (!decodes || edits) {
            pinned[half].copyTo(device, buffer.address(), at.tokens, at.end - at.tokens);
        }
    }

    private void arrange(StepPlan plan) {
        rows = plan.rowCount;
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
        put(memory, at.sequenceSlot, sequence, row);
        put(memory, at.sequenceFirst, sequence, first);
        put(memory, at.sequenceStart, sequence, start);
        put(memory, at.sequenceTokens, sequence, count);
        for (int query = (count - 1) / tileQueries * tileQueries; query >= 0; query -= tileQueries) {
            put(memory, at.tileSequence, tiles, sequence);
            put(memory, at.tileFirst, tiles++, query);
        }
    }

    private int tokens(MemorySegment memory, StepPlan plan, RequestTable requests, int row, int index, int first, boolean decodes) {
        int slot = plan.slot[row];
        int start = plan.start[row];
        int granted = plan.granted[row];
        int known = plan.known[row];
        long ids = decodes ? at.rowTokens : at.tokens;
        long places = decodes ? at.rowPositions : at.positions;
        MemorySegment.copy(requests.tokens[slot], start, memory, JAVA_INT, ids + 4L * first, known);
        for (int i = 0; i < granted; i++) {
            put(memory, places, first + i, start + i);
        }
        if (!decodes) {
            for (int i = 0; i < granted; i++) {
                put(memory, at.tokenSlot, first + i, index);
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
                put(memory, at.wanted, wantedCount++, lastToken[row]);
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
            long pair = at.pairs + (long) i * PAIR_BYTES;
            Long own = params.seed();
            memory.set(JAVA_INT, pair, wantedIndex[plan.sampleRow[i]]);
            memory.set(JAVA_INT, pair + 4, i);
            memory.set(JAVA_INT, pair + 8, plan.samplePosition[i]);
            memory.set(JAVA_INT, pair + 12, params.topK());
            memory.set(JAVA_LONG, pair + 16, own == null ? seed : own);
            memory.set(JAVA_LONG, pair + 24, requests.sampleKey[slot]);
            memory.set(JAVA_FLOAT, pair + 32, (float) params.temperature());
            memory.set(JAVA_FLOAT, pair + 36, (float) params.topP());
            memory.set(JAVA_FLOAT, pair + 40, (float) params.minP());
            memory.set(JAVA_FLOAT, pair + 44, (float) params.repetitionPenalty());
            memory.set(JAVA_INT, pair + 48, params.logprobKind().ordinal());
            int maskedCount = 0;
            if (plan.samplePosition[i] - requests.promptLength[slot] < params.minTokens()) {
                int[] stops = requests.stopIds[slot];
                maskedCount = Math.min(stops.length, MAX_MASKED);
                MemorySegment.copy(stops, 0, memory, JAVA_INT, at.masked + 4L * i * MAX_MASKED, maskedCount);
            }
            memory.set(JAVA_INT, pair + 52, maskedCount);
            truncates |= params.truncates() && !params.isGreedy();
            penalises |= params.repetitionPenalty() != 1;
            edits |= maskedCount > 0 || params.repetitionPenalty() != 1;
        }
    }

    private static void put(MemorySegment memory, long field, int index, int value) {
        memory.set(JAVA_INT, field + 4L * index, value);
    }

    // ---- what was laid out ----------------------------------------------------------------------------------------------

    /** {@return whether every row has one token} */
    boolean decodesOnly() {
        return sequences == 0;
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

    // ---- addresses on the device ----------------------------------------------------------------------------------------

    long tokenCountAddress() {
        return buffer.address() + at.counts + 4 * TOKENS;
    }

    long decodeRowsAddress() {
        return buffer.address() + at.counts + 4 * DECODE_ROWS;
    }

    long wantedCountAddress() {
        return buffer.address() + at.counts + 4 * WANTED;
    }

    long pairCountAddress() {
        return buffer.address() + at.counts + 4 * PAIRS;
    }

    long rowSlotAddress() {
        return buffer.address() + at.rowSlot;
    }

    long rowLengthAddress() {
        return buffer.address() + at.rowLength;
    }

    /** @param decodes as {@link #decodesOnly}: tokens of such a step travel with the rows */
    long tokensAddress(boolean decodes) {
        return buffer.address() + (decodes ? at.rowTokens : at.tokens);
    }

    long positionsAddress(boolean decodes) {
        return buffer.address() + (decodes ? at.rowPositions : at.positions);
    }

    long tokenSlotAddress(boolean decodes) {
        return buffer.address() + (decodes ? at.rowSlot : at.tokenSlot);
    }

    long tablesAddress() {
        return buffer.address() + at.tables;
    }

    int tableWidth() {
        return tableWidth;
    }

    long wantedAddress() {
        return buffer.address() + at.wanted;
    }

    long pairsAddress() {
        return buffer.address() + at.pairs;
    }

    long maskedAddress() {
        return buffer.address() + at.masked;
    }

    long sequenceSlotAddress() {
        return buffer.address() + at.sequenceSlot;
    }

    long sequenceFirstAddress() {
        return buffer.address() + at.sequenceFirst;
    }

    long sequenceStartAddress() {
        return buffer.address() + at.sequenceStart;
    }

    long sequenceTokensAddress() {
        return buffer.address() + at.sequenceTokens;
    }

    long tileSequenceAddress() {
        return buffer.address() + at.tileSequence;
    }

    long tileFirstAddress() {
        return buffer.address() + at.tileFirst;
    }

    @Override
    public void close() {
        buffer.close();
        for (PinnedMemory memory : pinned) {
            memory.close();
        }
    }
}
