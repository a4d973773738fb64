package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Products of one, two and four rows with a matrix; what a row yields is the same for all three. */
@Gpu
class FewRowsTest extends KernelTest {
    private static final double TOLERANCE = 1e-2;
    private static final double FLOAT_TOLERANCE = 1e-4;
    private static final double SUM_TOLERANCE = 1e-5;
    /** Rows are rounded before the norm's factor or after it. */
    private static final double NORM_TOLERANCE = 2e-2;
    private static final int MOST = FewRows.MOST;
    private static final int GAP = 3;

    /** Those of one, two and four rows that ask for weights early, then those that do not. */
    private final List<FewRows> kernels = new ArrayList<>();

    @BeforeEach
    void compile() {
        for (boolean early : new boolean[] {true, false}) {
            for (int rows = 1; rows <= MOST; rows *= 2) {
                kernels.add(new FewRows(CUDA, rows, early));
            }
        }
    }

    @AfterEach
    void close() {
        Cuda.synchronize(CUDA);
        kernels.forEach(FewRows::close);
    }

    private interface Product {
        void run(FewRows by, long x, long out);
    }

    /** In memory that goes on with NaN, which reads beyond the end would bring in. */
    private Tensor matrix(double deviation, long rows, long columns) {
        Tensor memory = poison(DType.BFLOAT16, rows * columns + 4096);
        return memory.narrow(0, 0, rows * columns).copyInPlace(normal(deviation, rows * columns)).reshape(rows, columns);
    }

    private static Tensor run(FewRows by, Product product, Tensor x, DType dtype, long stride) {
        Tensor out = poison(dtype, x.size(0) + 1, stride);
        // Weights may be read before the kernel waits for its predecessor, which in a step never writes them.
        Cuda.synchronize(CUDA);
        product.run(by, x.address(), out.address());
        return out;
    }

    private void check(String what, Product product, Tensor x, Tensor expected, DType dtype, long stride, double tolerance) {
        long n = expected.size(1);
        Tensor out = run(kernels.get(2), product, x, dtype, stride);
        compare(what, out.narrow(0, 0, MOST).narrow(1, 0, n), expected, tolerance);
        assertSame(what + ": past the columns", out.narrow(1, n, stride - n), poison(dtype, MOST + 1, stride - n));
        for (int i = 0; i < kernels.size(); i++) {
            int rows = 1 << i % 3;
            for (int first = 0; first < MOST; first += rows) {
                Tensor some = run(kernels.get(i), product, x.narrow(0, first, rows), dtype, stride);
                assertSame(what + ": some rows", some.narrow(0, 0, rows), out.narrow(0, first, rows));
                assertSame(what + ": past the rows", some.narrow(0, rows, 1), poison(dtype, 1, stride));
            }
        }
        Tensor padded = x.copy();
        padded.narrow(0, MOST - 1, 1).fillInPlace(Double.NaN);
        Tensor found = run(kernels.get(2), product, padded, dtype, stride);
        assertSame(what + ": beside a padding row of NaN", found.narrow(0, 0, MOST - 1), out.narrow(0, 0, MOST - 1));
    }

    @ParameterizedTest(name = "{0} columns, {1} rows of weights")
    @CsvSource({"8, 1", "40, 1025", "896, 1152", "1024, 4096", "3080, 1025", "4864, 896", "12288, 4096"})
    void multiplies(int k, int n) {
        Tensor x = matrix(1, MOST, k);
        Tensor weight = matrix(1 / Math.sqrt(k), n, k);
        Tensor expected = exact(x).matmul(exact(weight).transpose(0, 1));
        check("product with " + n + " x " + k, (by, from, to) -> by.multiply(from, weight.address(), to, k, n, RowSquares.NONE), x, expected,
                DType.BFLOAT16, n, TOLERANCE);
        check("product with " + n + " x " + k + " in float32",
                (by, from, to) -> by.multiplyToFloat(from, weight.address(), to, k, n, n + GAP), x, expected, DType.FLOAT32, n + GAP,
                FLOAT_TOLERANCE);
        Tensor both = matrix(1 / Math.sqrt(k), 2L * n, k);
        Tensor widened = rounded(exact(x).matmul(exact(both).transpose(0, 1)));
        Tensor gated = rounded(widened.narrow(1, 0, n).silu()).mul(widened.narrow(1, n, n));
        check("gated product with " + n + " x " + k,
                (by, from, to) -> by.multiplyGated(from, both.address(), to, k, n, RowSquares.NONE), x, gated, DType.BFLOAT16, n, TOLERANCE);
    }

    /** A product that adds to the residual stream and one that completes the norm, against those with a norm between them. */
    @ParameterizedTest(name = "width {0}, inner {1}")
    @CsvSource({"1024, 3072", "896, 4864", "1536, 8960", "4096, 1032", "128, 192"})
    void completesNorms(int width, int inner) {
        ModelConfig config = ModelConfig.llama(1000, width, 1, 8, 2, inner, 512).withHeadDim(64);
        Kernel norm = load(config, GeneratorOptions.defaults(), "layer.cu").getFirst().kernel("residualNorm");
        assertTrue(FewRows.completesNorm(width));
        Tensor weight = matrix(1 / Math.sqrt(inner), width, inner);
        Tensor normWeight = normal(1, width);
        Tensor gates = matrix(1 / Math.sqrt(width), 2L * inner, width);
        for (int i = 0; i < kernels.size(); i++) {
            FewRows by = kernels.get(i);
            int rows = 1 << i % 3;
            Tensor x = matrix(1, rows, inner);
            Tensor before = normal(3, rows, width);
            Tensor expected = before.copy();
            Tensor product = poison(DType.BFLOAT16, rows, width);
            Tensor normed = poison(DType.BFLOAT16, rows, width);
            Tensor[] plain = {poison(DType.BFLOAT16, rows, inner), poison(DType.BFLOAT16, rows, inner)};
            Tensor[] gated = {poison(DType.BFLOAT16, rows, inner), poison(DType.BFLOAT16, rows, inner)};
            Tensor residual = before.copy();
            Tensor scaled = poison(DType.BFLOAT16, rows, width);
            Tensor sums = poison(DType.FLOAT32, rows, width / 8);
            Tensor last = before.copy();
            RowSquares squares = new RowSquares(sums.address(), 0, (float) CudaLayerTest.EPSILON);
            // Weights may be read before the kernel waits for its predecessor, which in a step never writes them.
            Cuda.synchronize(CUDA);
            by.multiply(x.address(), weight.address(), product.address(), inner, width, RowSquares.NONE);
            norm.launch(CUDA, CudaDecoder.rowGrid(rows, width), expected.address(), product.address(), 0L, normWeight.address(), 0L,
                    normed.address(), width, (float) CudaLayerTest.EPSILON, ints(rows).address());
            by.multiply(normed.address(), gates.address(), plain[0].address(), width, inner, RowSquares.NONE);
            by.multiplyGated(normed.address(), gates.address(), gated[0].address(), width, inner, RowSquares.NONE);
            by.multiplyAdded(x.address(), weight.address(), residual.address(), inner, width, normWeight.address(), scaled.address(),
                    squares);
            by.multiply(scaled.address(), gates.address(), plain[1].address(), width, inner, squares);
            by.multiplyGated(scaled.address(), gates.address(), gated[1].address(), width, inner, squares);
            by.multiplyAdded(x.address(), weight.address(), last.address(), inner, width, 0, 0, RowSquares.NONE);
            String what = rows + " rows";
            assertSame(what + ": residual", residual, expected);
            assertSame(what + ": without a norm", last, expected);
            assertSame(what + ": times the norm's weight", scaled, residual.mul(normWeight));
            compare(what + ": squares", sums, exact(residual).square().reshape(rows, width / 8, 8).sum(-1), SUM_TOLERANCE);
            compare(what + ": product", plain[1], plain[0], NORM_TOLERANCE);
            compare(what + ": activated", gated[1], gated[0], NORM_TOLERANCE);
        }
    }
}
