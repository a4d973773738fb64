package dev.tandem.generation;

import dev.tandem.device.Cuda;
import dev.tandem.device.CublasLt;
import dev.tandem.device.DType;
import dev.tandem.device.LargeProducts;
import dev.tandem.device.Tensor;
import dev.tandem.testing.Gpu;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Products of many rows, by algorithms that are found for other numbers of rows, from and to rows of a wider matrix. */
@Gpu
class LargeProductsTest extends KernelTest {
    private static final double TOLERANCE = 1e-2;
    private static final double FLOAT_TOLERANCE = 1e-4;
    private static final int GAP = 8;

    private CublasLt cublas;
    private LargeProducts products;

    @BeforeEach
    void open() {
        cublas = new CublasLt(CUDA);
        products = new LargeProducts(CUDA, cublas);
    }

    @AfterEach
    void close() {
        Cuda.synchronize(CUDA);
        products.close();
        cublas.close();
    }

    @ParameterizedTest(name = "{0} x {1}")
    @CsvSource({"1152, 896", "4096, 1024", "5003, 512"})
    void multiplies(int n, int k) {
        Tensor weight = normal(1 / Math.sqrt(k), n, k);
        int stride = Math.ceilDiv(n, 8) * 8 + GAP;
        for (int rows : new int[] {1500, 2048, 1029, 1000, 4097}) {
            Tensor x = normal(1, rows, k);
            Tensor forward = exact(x).matmul(exact(weight).transpose(0, 1));
            for (DType type : new DType[] {DType.BFLOAT16, DType.FLOAT32}) {
                Tensor out = poison(type, rows + 1, stride);
                products.forward(x, weight, out.narrow(0, 0, rows).narrow(1, 0, n));
                check(rows + " rows times transpose, " + type, out, forward, type);
            }
            Tensor wide = normal(1, rows, stride);
            Tensor by = wide.narrow(1, 0, n);
            Tensor out = poison(DType.BFLOAT16, rows + 1, k + GAP);
            products.backward(by, weight, out.narrow(0, 0, rows).narrow(1, 0, k));
            check(rows + " rows times weight", out, exact(by).matmul(exact(weight)), DType.BFLOAT16);
        }
    }

    /** {@code out} has a row and some columns more, which nothing may write. */
    private static void check(String what, Tensor out, Tensor expected, DType type) {
        long rows = expected.size(0);
        long columns = expected.size(1);
        long gap = out.size(1) - columns;
        compare(what, out.narrow(0, 0, rows).narrow(1, 0, columns), expected, type == DType.FLOAT32 ? FLOAT_TOLERANCE : TOLERANCE);
        assertSame(what + ": past the columns", out.narrow(1, columns, gap), poison(type, rows + 1, gap));
        assertSame(what + ": past the rows", out.narrow(0, rows, 1), poison(type, 1, out.size(1)));
    }
}
