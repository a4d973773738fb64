package dev.tandem.generation;

import static dev.tandem.generation.CudaLayerTest.EPSILON;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.HopperProducts.Kind;
import dev.tandem.generation.HopperProducts.Variant;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Products in float64, and such that are parts of a norm against those with a norm between them. */
@Gpu
class HopperProductsTest extends KernelTest {
    private static final double ROUNDING = 4e-3;
    private static final double TOLERANCE = 2e-2;
    private static final double FLOAT_TOLERANCE = 1e-5;
    private static final int[] ROWS = {8, 37, 64, 200, 256, 300};
    private static final int GAP = 5;

    private static final Variant[] VARIANTS = {new Variant(64, 16, 4, 4), new Variant(64, 64, 1, 4), new Variant(128, 64, 2, 4),
        new Variant(192, 96, 1, 4), new Variant(64, 256, 1, 4), new Variant(128, 128, 8, 3), new Variant(128, 256, 4, 3),
        new Variant(192, 192, 2, 3)};

    private static ModelConfig config(int width, int inner) {
        assumeTrue(HopperProducts.runsOn(CUDA), "a Hopper GPU");
        return ModelConfig.llama(1000, width, 1, 8, 2, inner, 512).withHeadDim(64);
    }

    @ParameterizedTest(name = "{0} columns, {1} rows of weights")
    @CsvSource({"896, 1025", "1024, 4096", "3080, 520", "40, 515"})
    void multiplies(int k, int n) {
        try (HopperProducts products = new HopperProducts(CUDA, config(896, 1024), GeneratorOptions.defaults())) {
            for (int i = 0; i < VARIANTS.length; i++) {
                try (Scope scope = Scope.open()) {
                    multiplies(products, VARIANTS[i], ROWS[i % ROWS.length], k, n);
                }
            }
            Cuda.synchronize(CUDA);
        }
    }

    private void multiplies(HopperProducts products, Variant variant, int rows, int k, int n) {
        String what = variant + ", " + rows + " rows, " + n + " x " + k;
        Tensor x = normal(1, rows, k);
        Tensor weight = normal(1 / Math.sqrt(k), 2L * n, k);
        Tensor expected = exact(x).matmul(exact(weight).transpose(0, 1));
        int stride = n + GAP;
        Tensor plain = poison(DType.BFLOAT16, rows + 1, stride);
        Tensor floats = poison(DType.FLOAT32, rows + 1, stride);
        Tensor gated = poison(DType.BFLOAT16, rows + 1, stride);
        // Weights may be read before a kernel waits for its predecessor, which in a step never writes them.
        Cuda.synchronize(CUDA);
        products.product(variant, Kind.PLAIN, rows, n, k, stride).run(x.address(), weight.address(), plain.address());
        products.product(variant, Kind.FLOAT, rows, n, k, stride).run(x.address(), weight.address(), floats.address());
        compareWithin(what, plain, expected.narrow(1, 0, n), ROUNDING);
        compareWithin(what + ", float32", floats, expected.narrow(1, 0, n), FLOAT_TOLERANCE);
        if (n % 8 == 0) {
            products.product(variant, Kind.GATED, rows, n, k, stride)
                    .activate(x.address(), weight.address(), gated.address(), RowSquares.NONE);
            compareWithin(what + ", gated", gated, rounded(rounded(expected.narrow(1, 0, n)).silu()).mul(rounded(expected.narrow(1, n, n))),
                    TOLERANCE);
        }
    }

    /** What is past the rows and the columns stays as it was. */
    private static void compareWithin(String what, Tensor out, Tensor expected, double tolerance) {
        long rows = expected.size(0);
        long n = expected.size(1);
        compare(what, out.narrow(0, 0, rows).narrow(1, 0, n), expected, tolerance);
        assertSame(what + ": past the columns", out.narrow(1, n, GAP), poison(out.dtype(), rows + 1, GAP));
        assertSame(what + ": past the rows", out.narrow(0, rows, 1), poison(out.dtype(), 1, n + GAP));
    }

    @ParameterizedTest(name = "width {0}, inner {1}")
    @CsvSource({"1024, 3072", "896, 4864", "1536, 8960", "4096, 1032"})
    void equalsProductAndNorm(int width, int inner) {
        ModelConfig config = config(width, inner);
        GeneratorOptions options = GeneratorOptions.defaults();
        Kernel norm = load(config, options, "layer.cu").getFirst().kernel("residualNorm");
        try (HopperProducts products = new HopperProducts(CUDA, config, options)) {
            for (int i = 0; i < VARIANTS.length; i++) {
                for (int rows : new int[] {ROWS[i % ROWS.length], ROWS[(i + 3) % ROWS.length]}) {
                    try (Scope scope = Scope.open()) {
                        check(products, norm, VARIANTS[i], VARIANTS[(i + 1) % VARIANTS.length], rows, width, inner);
                    }
                }
            }
            Cuda.synchronize(CUDA);
        }
    }

    private void check(HopperProducts products, Kernel norm, Variant first, Variant second, int rows, int width, int inner) {
        String what = first + ", then " + second + ", " + rows + " rows";
        Tensor x = normal(1, rows, inner);
        Tensor weight = normal(1 / Math.sqrt(inner), width, inner);
        Tensor normWeight = normal(1, width);
        Tensor gates = normal(1 / Math.sqrt(width), 2L * inner, width);
        Tensor before = normal(3, rows, width);

        Tensor expected = before.copy();
        Tensor product = poison(DType.BFLOAT16, rows, width);
        Tensor normed = poison(DType.BFLOAT16, rows, width);
        Tensor gated = poison(DType.BFLOAT16, rows, inner);
        // Weights may be read before a kernel waits for its predecessor, which in a step never writes them.
        Cuda.synchronize(CUDA);
        HopperProducts.Product activating = products.product(second, Kind.GATED, rows, inner, width, inner);
        products.product(first, Kind.PLAIN, rows, width, inner, width).run(x.address(), weight.address(), product.address());
        Grid grid = CudaDecoder.rowGrid(rows, width);
        norm.launch(CUDA, grid, expected.address(), product.address(), 0L, normWeight.address(), 0L, normed.address(), width,
                (float) EPSILON, ints(rows).address());
        activating.activate(normed.address(), gates.address(), gated.address(), RowSquares.NONE);

        Tensor residual = before.copy();
        Tensor scaled = poison(DType.BFLOAT16, rows, width);
        Tensor sums = poison(DType.FLOAT32, width / 64, rows + GAP);
        Tensor activated = poison(DType.BFLOAT16, rows, inner);
        RowSquares squares = new RowSquares(sums.address(), rows + GAP, (float) EPSILON);
        Cuda.synchronize(CUDA);
        products.product(first, Kind.ADDED, rows, width, inner, 0)
                .add(x.address(), weight.address(), residual.address(), normWeight.address(), scaled.address(), squares);
        activating.activate(scaled.address(), gates.address(), activated.address(), squares);

        assertSame(what + ": residual", residual, expected);
        assertSame(what + ": times the norm's weight", scaled, residual.mul(normWeight));
        Tensor parts = exact(residual).square().reshape(rows, width / 64, 64).sum(-1).transpose(0, 1);
        compare(what + ": squares", sums.narrow(1, 0, rows), parts, FLOAT_TOLERANCE);
        assertSame(what + ": past the rows", sums.narrow(1, rows, GAP), poison(DType.FLOAT32, width / 64, GAP));
        compare(what + ": activated", activated, gated, TOLERANCE);

        Tensor last = before.copy();
        products.product(first, Kind.ADDED, rows, width, inner, 0)
                .add(x.address(), weight.address(), last.address(), 0, 0, RowSquares.NONE);
        assertSame(what + ": without a norm", last, expected);
    }
}
