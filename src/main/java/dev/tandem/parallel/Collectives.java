package dev.tandem.parallel;

import dev.tandem.device.Tensor;

/**
 * What the ranks of a group do together. Every rank must call the same operations in the same order with tensors of the same
 * length and type; each waits for the others, at most for the group's time limit, after which a {@link RankException} names who is
 * missing. Each rank uses its own instance, from its own thread.
 */
public interface Collectives extends AutoCloseable {
    /** {@return this rank's number, from 0} */
    int rank();

    /** {@return how many ranks there are} */
    int size();

    /** Replaces the tensor by the sum of all ranks' tensors. */
    void allReduce(Tensor tensor);

    /**
     * Sums all ranks' vectors and cuts the sum evenly.
     *
     * @param vector contiguous, its length a multiple of the number of ranks; its content afterwards is undefined
     * @return this rank's slice of the sum, which may share memory with {@code vector}, in the innermost scope
     */
    Tensor reduceScatter(Tensor vector);

    /**
     * Completes a vector of which each rank holds one even slice: afterwards all ranks have all of it.
     *
     * @param vector contiguous; slice number {@link #rank} of it is this rank's contribution
     */
    void allGather(Tensor vector);

    /** Waits until all ranks have come here. */
    void barrier();

    @Override
    void close();

    /** {@return a group of one, in which every operation has its result already} */
    static Collectives alone() {
        return new Alone();
    }

    /** A group of one. */
    final class Alone implements Collectives {
        private Alone() {}

        @Override
        public int rank() {
            return 0;
        }

        @Override
        public int size() {
            return 1;
        }

        @Override
        public void allReduce(Tensor tensor) {}

        @Override
        public Tensor reduceScatter(Tensor vector) {
            return vector;
        }

        @Override
        public void allGather(Tensor vector) {}

        @Override
        public void barrier() {}

        @Override
        public void close() {}
    }
}
