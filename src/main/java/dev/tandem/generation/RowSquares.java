package dev.tandem.generation;

/**
 * Where sums of squares of rows lie on the device, from which a product takes the factors of the norm of its rows.
 *
 * @param address FLOAT32 [width / 64, stride], sums over 64 columns each; 0 when there is no norm to compute
 * @param stride elements from one such sum of a row to the next
 * @param epsilon of the norm
 */
record RowSquares(long address, int stride, float epsilon) {
    /** Of rows that are normalised already. */
    static final RowSquares NONE = new RowSquares(0, 0, 0);
}
