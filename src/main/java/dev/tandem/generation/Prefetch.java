package dev.tandem.generation;

/**
 * What a product reads first of its weight, which the kernel before it brings to the L2 cache ({@code common.cuh}): some of the weight's
 * rows, or the beginnings of pieces of all of them. Addresses, distances and lengths are multiples of 16 bytes.
 *
 * @param address of the first piece
 * @param rows how many pieces there are
 * @param stride bytes from one piece to the next
 * @param bytes of each piece
 */
record Prefetch(long address, long rows, long stride, long bytes) {
    /** Nothing. */
    static final Prefetch NONE = new Prefetch(0, 0, 0, 0);

    /** What the memory delivers while one kernel ends and the next one begins, amply; a small part of the cache. */
    private static final long MOST_BYTES = Long.getLong("dev.tandem.prefetchBytes", 8 << 20);

    private static final int LINE = 128;

    /** {@return the beginnings of pieces, as long as they may be in all}
     * @param length bytes of a whole piece, which is where the next one begins
     */
    static Prefetch beginnings(long address, long pieces, long length) {
        long bytes = Math.min(length, MOST_BYTES / pieces / LINE * LINE);
        return bytes == 0 || length % 16 != 0 ? NONE : new Prefetch(address, pieces, length, bytes);
    }

    /** {@return the argument of a kernel} */
    long[] argument() {
        return new long[] {address, rows, stride, bytes};
    }
}
