package dev.tandem.generation;

/**
 * What one step computes: filled by {@link Scheduler#schedule}, executed by the caller, handed back to
 * {@link Scheduler#complete}. All arrays are allocated once and reused; only the first {@code …Count} entries mean something.
 *
 * <p>The order of execution, on one stream (or thread), is binding:
 *
 * <ol>
 *   <li>Copy whole KV blocks, all layers: {@code copySource[i] → copyTarget[i]}. They duplicate partial blocks that the previous
 *       step filled, before this step writes behind the copied tokens.
 *   <li>Forward over the rows. Row {@code r} feeds tokens {@code start[r] … start[r] + granted[r] - 1} of slot {@code slot[r]};
 *       their KV goes to the same positions of the slot's block table (position {@code p} lies in block
 *       {@code blocks[slot][p / blockSize]}, offset {@code p % blockSize}), and token {@code p} attends to positions
 *       {@code 0 … p}. In every layer the KV of all rows must be written before any row attends: a row may share blocks that
 *       another row writes in this very step.
 *   <li>Sample pair {@code i} from the logits of the last token of row {@code sampleRow[i]}, on behalf of slot
 *       {@code sampleSlot[i]}; the token's position is {@code samplePosition[i]}. Several pairs may name one row: the siblings of a
 *       prompt draw their first token from the same logits.
 *   <li>Call {@link Scheduler#complete} with the tokens, one per pair. Steps complete in the order they were scheduled.
 * </ol>
 *
 * <p>Block tables and token arrays of {@link RequestTable} must be read (copied to where the device sees them) before the next
 * call into the scheduler. When step n+1 is scheduled while step n still runs, the last input of a row can be a token that
 * step n is about to sample: only the first {@code known[r]} of the {@code granted[r]} inputs are in {@code tokens[slot]}, the rest
 * (never more than one) is the most recent sample of that slot and must be taken from where sampling leaves it.
 */
final class StepPlan {
    /** The step's number, counted from 1; 0 before the first use. */
    long step;
    /** Rows of the forward pass, at most {@code maxRunning}. */
    int rowCount;
    /** Sum of {@code granted}. */
    int totalTokens;
    /** Request slot of each row. */
    final int[] slot;
    /** Position of the row's first input token: the slot's computed tokens before this step. */
    final int[] start;
    /** Number of input tokens of each row, at least 1. */
    final int[] granted;
    /** How many of the input tokens the host knows; see the class comment. */
    final int[] known;
    /** Whether the row's last logits are sampled; other rows are chunks of a longer prefill. */
    final boolean[] sampled;

    /** Whether a row of one token may attend to KV in blocks that another row writes in this very step. */
    boolean readsNew;

    /** (row, slot) pairs to sample, at most {@code maxRunning}. */
    int sampleCount;
    /** Row whose last logits pair i is sampled from. */
    final int[] sampleRow;
    /** Slot that receives the token. */
    final int[] sampleSlot;
    /** Position of the sampled token in the slot's sequence, which keys its random number. */
    final int[] samplePosition;
    /** After {@link Scheduler#complete}: whether the token was appended; false if the request was aborted or preempted meanwhile. */
    final boolean[] accepted;
    /** The pair's number in the whole step's plan; differs from i in a {@link #share} alone. */
    final int[] samplePair;
    /** Epoch of the slot when the pair was planned. */
    final int[] sampleEpoch;

    /** Block copies to run before the forward pass. */
    int copyCount;
    /** Block to copy from. */
    final int[] copySource;
    /** Block to copy to. */
    final int[] copyTarget;

    /** @param maxRunning the scheduler's {@link SchedulerOptions#maxRunning()} */
    StepPlan(int maxRunning) {
        slot = new int[maxRunning];
        start = new int[maxRunning];
        granted = new int[maxRunning];
        known = new int[maxRunning];
        sampled = new boolean[maxRunning];
        sampleRow = new int[maxRunning];
        sampleSlot = new int[maxRunning];
        samplePosition = new int[maxRunning];
        samplePair = new int[maxRunning];
        sampleEpoch = new int[maxRunning];
        accepted = new boolean[maxRunning];
        copySource = new int[maxRunning];
        copyTarget = new int[maxRunning];
    }

    void begin(long step) {
        this.step = step;
        rowCount = 0;
        totalTokens = 0;
        readsNew = false;
        sampleCount = 0;
        copyCount = 0;
    }

    int addRow(int slot, int start, int granted, int known, boolean sampled) {
        int row = rowCount++;
        this.slot[row] = slot;
        this.start[row] = start;
        this.granted[row] = granted;
        this.known[row] = known;
        this.sampled[row] = sampled;
        totalTokens += granted;
        return row;
    }

    /** {@return whether every row has one token} */
    boolean decodesOnly() {
        return totalTokens == rowCount;
    }

    void addSample(int row, int slot, int epoch) {
        int pair = sampleCount++;
        sampleRow[pair] = row;
        sampleSlot[pair] = slot;
        sampleEpoch[pair] = epoch;
        samplePair[pair] = pair;
        samplePosition[pair] = start[row] + granted[row];
        accepted[pair] = false;
    }

    void addCopy(int source, int target) {
        copySource[copyCount] = source;
        copyTarget[copyCount++] = target;
    }

    /**
     * Fills {@code part} with share number {@code index} of {@code count} of this plan's rows: about the same number of tokens in
     * each, in this plan's order. A row that lies across the border of two shares is cut there; the share with its end samples.
     */
    void share(StepPlan part, int index, int count) {
        part.begin(step);
        int first = border(index, count);
        int end = border(index + 1, count);
        int at = 0;
        int pair = 0; // pairs are in the order of their rows
        for (int row = 0; row < rowCount; row++) {
            while (pair < sampleCount && sampleRow[pair] < row) {
                pair++;
            }
            int from = Math.max(first, at);
            int to = Math.min(end, at + granted[row]);
            boolean whole = to == at + granted[row];
            if (from < to) {
                int own = part.addRow(slot[row], start[row] + from - at, to - from, to - from, sampled[row] && whole);
                for (int i = pair; whole && i < sampleCount && sampleRow[i] == row; i++) {
                    part.addSample(own, sampleSlot[i], sampleEpoch[i]);
                    part.samplePair[part.sampleCount - 1] = i;
                }
            }
            at += granted[row];
        }
    }

    private int border(int index, int count) {
        return (int) ((long) totalTokens * index / count);
    }
}
