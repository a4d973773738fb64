package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/**
 * What the device needs to know of a step, in buffers that are allocated once and written in place: token ids, positions, where
 * each token's keys and values go, and which rows are sampled.
 *
 * <p>Rows of one token (decoding) come first, shortest context first, so that neighbours can be padded to each other; then the
 * rows of several tokens. One plan of a step is laid out at a time. The owner closes it.
 */
final class StepBatch implements AutoCloseable {
    private static final ValueLayout.OfLong LONG = ValueLayout.JAVA_LONG;

    private final int blockSize;
    private final Tensor tokens;
    private final Tensor positions;
    private final Tensor blocks;
    private final Tensor offsets;
    private final Tensor wanted;
    private final int[] order;
    /** For each plan row, the index of its last token in the batch. */
    private final int[] lastToken;

    private final int[] wantedIndex;
    private int rows;
    private int decodeRows;
    private int tokenCount;
    private int wantedCount;
    private int limit;

    StepBatch(int tokenBudget, int maxRows, int blockSize) {
        this.blockSize = blockSize;
        try (Scope scope = Scope.open()) {
            tokens = buffer(tokenBudget);
            positions = buffer(tokenBudget);
            blocks = buffer(tokenBudget);
            offsets = buffer(tokenBudget);
            wanted = buffer(maxRows);
        }
        order = new int[maxRows];
        lastToken = new int[maxRows];
        wantedIndex = new int[maxRows];
    }

    private static Tensor buffer(int length) {
        return Tensor.zeros(Device.cpu(), DType.INT64, length).keep();
    }

    /** Lays out a plan. */
    void fill(StepPlan plan, RequestTable requests) {
        arrange(plan);
        MemorySegment ids = tokens.memory();
        MemorySegment places = positions.memory();
        MemorySegment pages = blocks.memory();
        MemorySegment slots = offsets.memory();
        int at = 0;
        limit = 0;
        for (int i = 0; i < rows; i++) {
            int row = order[i];
            int slot = plan.slot[row];
            int start = plan.start[row];
            int end = start + plan.granted[row];
            int[] known = requests.tokens[slot];
            int[] table = requests.blocks[slot];
            for (int p = start; p < end; p++, at++) {
                ids.setAtIndex(LONG, at, known[p]);
                places.setAtIndex(LONG, at, p);
                pages.setAtIndex(LONG, at, table[p / blockSize]);
                slots.setAtIndex(LONG, at, p % blockSize);
            }
            lastToken[row] = at - 1;
            limit = Math.max(limit, end);
        }
        tokenCount = at;
        MemorySegment rowsWanted = wanted.memory();
        wantedCount = 0;
        for (int row = 0; row < rows; row++) {
            wantedIndex[row] = -1;
            if (plan.sampled[row]) {
                wantedIndex[row] = wantedCount;
                rowsWanted.setAtIndex(LONG, wantedCount++, lastToken[row]);
            }
        }
    }

    private void arrange(StepPlan plan) {
        rows = plan.rowCount;
        decodeRows = 0;
        for (int row = 0; row < rows; row++) {
            if (plan.granted[row] == 1) {
                int i = decodeRows++;
                // Insertion: contexts grow together, so the order of the last step is nearly right.
                for (; i > 0 && plan.start[order[i - 1]] > plan.start[row]; i--) {
                    order[i] = order[i - 1];
                }
                order[i] = row;
            }
        }
        int next = decodeRows;
        for (int row = 0; row < rows; row++) {
            if (plan.granted[row] > 1) {
                order[next++] = row;
            }
        }
    }

    int rows() {
        return rows;
    }

    /** {@return how many of the rows, the first ones, have one token} */
    int decodeRows() {
        return decodeRows;
    }

    /** {@return the plan's row at place {@code i} of the batch} */
    int planRow(int i) {
        return order[i];
    }

    int tokenCount() {
        return tokenCount;
    }

    /** {@return a number greater than every position} */
    int limit() {
        return limit;
    }

    /** {@return how many rows are sampled} */
    int wantedCount() {
        return wantedCount;
    }

    /** {@return the index among the sampled rows of a plan's row, or -1} */
    int wantedIndex(int planRow) {
        return wantedIndex[planRow];
    }

    Tensor tokens(Device device) {
        return tokens.narrow(0, 0, tokenCount).on(device);
    }

    Tensor positions(Device device) {
        return positions.narrow(0, 0, tokenCount).on(device);
    }

    Tensor blocks(Device device) {
        return blocks.narrow(0, 0, tokenCount).on(device);
    }

    Tensor offsets(Device device) {
        return offsets.narrow(0, 0, tokenCount).on(device);
    }

    /** {@return the tokens whose logits are wanted} */
    Tensor wanted(Device device) {
        return wanted.narrow(0, 0, wantedCount).on(device);
    }

    @Override
    public void close() {
        tokens.close();
        positions.close();
        blocks.close();
        offsets.close();
        wanted.close();
    }
}
