package dev.tandem.generation;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Tensor;
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
    private static final int MOST = 4;
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
        check("product with " + n + " x " + k, (by, from, to) -> by.multiply(from, weight.address(), to, k, n), x, expected,
                DType.BFLOAT16, n, TOLERANCE);
        check("product with " + n + " x " + k + " in float32",
                (by, from, to) -> by.multiplyToFloat(from, weight.address(), to, k, n, n + GAP), x, expected, DType.FLOAT32, n + GAP,
                FLOAT_TOLERANCE);
        Tensor both = matrix(1 / Math.sqrt(k), 2L * n, k);
        Tensor widened = rounded(exact(x).matmul(exact(both).transpose(0, 1)));
        Tensor gated = rounded(widened.narrow(1, 0, n).silu()).mul(widened.narrow(1, n, n));
        check("gated product with " + n + " x " + k, (by, from, to) -> by.multiplyGated(from, both.address(), to, k, n), x, gated,
                DType.BFLOAT16, n, TOLERANCE);
    }
}
