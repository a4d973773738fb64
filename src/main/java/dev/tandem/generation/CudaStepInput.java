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

    private long end;
    private final long counts = field(COUNTS);
    private final long rowSlot;
    private final long rowLength;
    private final long rowTokens;
    private final long rowPositions;
    private final long wanted;
    private final long pairs;
    private final long tables;
    private final long tokensStart;
    private final long tokens;
    private final long positions;
    private final long tokenSlot;
    private final long sequenceSlot;
    private final long sequenceFirst;
    private final long sequenceStart;
    private final long sequenceTokens;
    private final long tileSequence;
    private final long tileFirst;
    private final long masked;

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
        tokensStart = end;
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
        try (Scope scope = Scope.open()) {
            buffer = Tensor.zeros(device, DType.INT32, end / 4).keep();
        }
        pinned = new PinnedMemory[halves];
        Arrays.setAll(pinned, i -> new PinnedMemory(device, end));
        order = new int[maxRows];
        lastToken = new int[maxRows];
        wantedIndex = new int[maxRows];
    }

    /** Reserves room for 32-bit numbers; returns the offset. */
    private long field(long count) {
        long at = end;
        end = (at + 4 * count + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        return at;
    }

    /** {@return bytes on the device} */
    long bytes() {
        return end;
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
        int at = 0;
        tiles = 0;
        for (int i = 0; i < rows; i++) {
            int row = order[i];
            int slot = plan.slot[row];
            MemorySegment.copy(requests.blocks[slot], 0, memory, JAVA_INT, tables + 4L * i * tableWidth, requests.blockCount[slot]);
            if (i < decodeRows) {
                put(memory, rowSlot, i, i);
                put(memory, rowLength, i, plan.start[row] + 1);
            } else {
                sequence(memory, i - decodeRows, i, at, plan.start[row], plan.granted[row]);
            }
            at = tokens(memory, plan, requests, row, i, at, decodes);
            lastToken[row] = at - 1;
        }
        tokenCount = at;
        wantedRows(memory, plan);
        samples(memory, plan, requests, seed);
        put(memory, counts, TOKENS, tokenCount);
        put(memory, counts, DECODE_ROWS, decodeRows);
        put(memory, counts, WANTED, wantedCount);
        put(memory, counts, PAIRS, plan.sampleCount);
        pinned[half].copyTo(device, buffer.address(), 0, tables + 4L * rows * tableWidth);
        if (!decodes || edits) {
            pinned[half].copyTo(device, buffer.address(), tokensStart, end - tokensStart);
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
        put(memory, sequenceSlot, sequence, row);
        put(memory, sequenceFirst, sequence, first);
        put(memory, sequenceStart, sequence, start);
        put(memory, sequenceTokens, sequence, count);
        for (int query = (count - 1) / tileQueries * tileQueries; query >= 0; query -= tileQueries) {
            put(memory, tileSequence, tiles, sequence);
            put(memory, tileFirst, tiles++, query);
        }
    }

    private int tokens(MemorySegment memory, StepPlan plan, RequestTable requests, int row, int index, int at, boolean decodes) {
        int slot = plan.slot[row];
        int start = plan.start[row];
        int granted = plan.granted[row];
        int known = plan.known[row];
        long ids = decodes ? rowTokens : tokens;
        long places = decodes ? rowPositions : positions;
        MemorySegment.copy(requests.tokens[slot], start, memory, JAVA_INT, ids + 4L * at, known);
        for (int i = 0; i < granted; i++) {
            put(memory, places, at + i, start + i);
        }
        if (!decodes) {
            for (int i = 0; i < granted; i++) {
                put(memory, tokenSlot, at + i, index);
            }
        }
        if (known < granted) {
            put(memory, ids, at + known, -1 - lastPair[slot]);
        }
        return at + granted;
    }

    /** In a decoding step every row has its logits computed, so that one captured graph fits all. */
    private void wantedRows(MemorySegment memory, StepPlan plan) {
        wantedCount = 0;
        for (int i = 0; i < rows; i++) {
            int row = order[i];
            wantedIndex[row] = -1;
            if (plan.sampled[row] || decodesOnly()) {
                wantedIndex[row] = wantedCount;
                put(memory, wanted, wantedCount++, lastToken[row]);
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
            long at = pairs + (long) i * PAIR_BYTES;
            Long own = params.seed();
            memory.set(JAVA_INT, at, wantedIndex[plan.sampleRow[i]]);
            memory.set(JAVA_INT, at + 4, i);
            memory.set(JAVA_INT, at + 8, plan.samplePosition[i]);
            memory.set(JAVA_INT, at + 12, params.topK());
            memory.set(JAVA_LONG, at + 16, own == null ? seed : own);
            memory.set(JAVA_LONG, at + 24, requests.sampleKey[slot]);
            memory.set(JAVA_FLOAT, at + 32, (float) params.temperature());
            memory.set(JAVA_FLOAT, at + 36, (float) params.topP());
            memory.set(JAVA_FLOAT, at + 40, (float) params.minP());
            memory.set(JAVA_FLOAT, at + 44, (float) params.repetitionPenalty());
            memory.set(JAVA_INT, at + 48, params.logprobKind().ordinal());
            int maskedCount = 0;
            if (plan.samplePosition[i] - requests.promptLength[slot] < params.minTokens()) {
                int[] stops = requests.stopIds[slot];
                maskedCount = Math.min(stops.length, MAX_MASKED);
                MemorySegment.copy(stops, 0, memory, JAVA_INT, masked + 4L * i * MAX_MASKED, maskedCount);
            }
            memory.set(JAVA_INT, at + 52, maskedCount);
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
        return buffer.address() + counts + 4 * TOKENS;
    }

    long decodeRowsAddress() {
        return buffer.address() + counts + 4 * DECODE_ROWS;
    }

    long wantedCountAddress() {
        return buffer.address() + counts + 4 * WANTED;
    }

    long pairCountAddress() {
        return buffer.address() + counts + 4 * PAIRS;
    }

    long rowSlotAddress() {
        return buffer.address() + rowSlot;
    }

    long rowLengthAddress() {
        return buffer.address() + rowLength;
    }

    /** @param decodes as {@link #decodesOnly}: tokens of such a step travel with the rows */
    long tokensAddress(boolean decodes) {
        return buffer.address() + (decodes ? rowTokens : tokens);
    }

    long positionsAddress(boolean decodes) {
        return buffer.address() + (decodes ? rowPositions : positions);
    }

    long tokenSlotAddress(boolean decodes) {
        return buffer.address() + (decodes ? rowSlot : tokenSlot);
    }

    long tablesAddress() {
        return buffer.address() + tables;
    }

    int tableWidth() {
        return tableWidth;
    }

    long wantedAddress() {
        return buffer.address() + wanted;
    }

    long pairsAddress() {
        return buffer.address() + pairs;
    }

    long maskedAddress() {
        return buffer.address() + masked;
    }

    long sequenceSlotAddress() {
        return buffer.address() + sequenceSlot;
    }

    long sequenceFirstAddress() {
        return buffer.address() + sequenceFirst;
    }

    long sequenceStartAddress() {
        return buffer.address() + sequenceStart;
    }

    long sequenceTokensAddress() {
        return buffer.address() + sequenceTokens;
    }

    long tileSequenceAddress() {
        return buffer.address() + tileSequence;
    }

    long tileFirstAddress() {
        return buffer.address() + tileFirst;
    }

    @Override
    public void close() {
        buffer.close();
        for (PinnedMemory memory : pinned) {
            memory.close();
        }
    }
}
