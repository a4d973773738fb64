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

/** The product that adds to the residual stream and the gated one that completes the norm, against those with a norm between them. */
@Gpu
class AddedProductTest extends KernelTest {
    private static final double TOLERANCE = 2e-2;
    private static final double FLOAT_TOLERANCE = 1e-5;
    private static final int[] ROWS = {8, 37, 64, 200, 256, 300};
    private static final int GAP = 5;

    private static final Variant[] VARIANTS = {new Variant(64, 16, 4, 4), new Variant(64, 64, 1, 4), new Variant(128, 64, 2, 4),
        new Variant(192, 96, 1, 4), new Variant(64, 256, 1, 4), new Variant(128, 128, 8, 3), new Variant(128, 256, 4, 3),
        new Variant(192, 192, 2, 3)};

    @ParameterizedTest(name = "width {0}, inner {1}")
    @CsvSource({"1024, 3072", "896, 4864", "1536, 8960", "4096, 1032"})
    void equalsProductAndNorm(int width, int inner) {
        assumeTrue(HopperProducts.runsOn(CUDA), "a Hopper GPU");
        ModelConfig config = ModelConfig.llama(1000, width, 1, 8, 2, inner, 512).withHeadDim(64);
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
        products.product(first, Kind.PLAIN, rows, width, inner, width).run(x.address(), weight.address(), product.address());
        Grid grid = CudaDecoder.rowGrid(rows, width);
        norm.launch(CUDA, grid, expected.address(), product.address(), 0L, normWeight.address(), 0L, normed.address(), width,
                (float) EPSILON, ints(rows).address());
        products.product(second, Kind.GATED, rows, inner, width, inner)
                .activate(normed.address(), gates.address(), gated.address(), RowSquares.NONE);

        Tensor residual = before.copy();
        Tensor scaled = poison(DType.BFLOAT16, rows, width);
        Tensor sums = poison(DType.FLOAT32, width / 64, rows + GAP);
        Tensor activated = poison(DType.BFLOAT16, rows, inner);
        RowSquares squares = new RowSquares(sums.address(), rows + GAP, (float) EPSILON);
        Cuda.synchronize(CUDA);
        products.product(first, Kind.ADDED, rows, width, inner, 0)
                .add(x.address(), weight.address(), residual.address(), normWeight.address(), scaled.address(), squares);
        products.product(second, Kind.GATED, rows, inner, width, inner)
                .activate(scaled.address(), gates.address(), activated.address(), squares);

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
