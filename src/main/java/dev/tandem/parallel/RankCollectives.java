package dev.tandem.parallel;

import dev.tandem.device.Tensor;
import org.jspecify.annotations.Nullable;

/**
 * The collectives of one rank for as long as the rank lives. The group behind them is given up when a rank fails and formed anew
 * before the next call, so whoever keeps these, as the trainer does, never holds a dead group.
 */
final class RankCollectives implements Collectives {
    private final int rank;
    private final int size;
    private volatile @Nullable Collectives group;

    RankCollectives(int rank, int size) {
        this.rank = rank;
        this.size = size;
    }

    /** Takes a new group, which is closed by {@link #close}. */
    void join(Collectives formed) {
        group = formed;
    }

    @Override
    public int rank() {
        return rank;
    }

    @Override
    public int size() {
        return size;
    }

    @Override
    public void allReduce(Tensor tensor) {
        group().allReduce(tensor);
    }

    @Override
    public Tensor reduceScatter(Tensor vector) {
        return group().reduceScatter(vector);
    }

    @Override
    public void allGather(Tensor vector) {
        group().allGather(vector);
    }

    @Override
    public void barrier() {
        group().barrier();
    }

    private Collectives group() {
        Collectives current = group;
        if (current == null) {
            throw new RankException(rank, "rank " + rank + " called a collective after its call was given up");
        }
        return current;
    }

    /** Leaves the group, if there is one. */
    @Override
    public void close() {
        Collectives current = group;
        group = null;
        if (current != null) {
            current.close();
        }
    }
}
