package dev.tandem.generation;

import static dev.tandem.generation.CudaLayerTest.EPSILON;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.HopperProducts.Kind;
import dev.tandem.generation.HopperProducts.Variant;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** The product that rotates against the product and the rotation that follows it, on a Hopper GPU. */
@Gpu
class RotatedProductTest extends KernelTest {
    /** The sum of a norm's squares may be contracted differently, and a power of two as a factor be a bit off. */
    private static final double NORM_TOLERANCE = 1e-2;

    private static final int LAYERS = 3;
    private static final int LAYER = 1;
    private static final int SLOTS = 5;
    private static final int[] ROWS = {8, 37, 64, 200, 256};
    private static final List<List<String>> PARTS = List.of(List.of("rotation"), List.of("norm", "rotation"), List.of("bias", "rotation"),
            List.of(), List.of("bias", "norm", "rotation"), List.of("factors", "rotation"), List.of("factors", "norm", "rotation"));

    /** One to three warpgroups, with a cluster and without, CTAs that finish no row and such that have many tiles. */
    private static List<Variant> variants(int headDim, boolean many) {
        int[][] all = headDim == 64
                ? many ? new int[][] {{64, 64, 1, 4}, {128, 64, 4, 4}, {192, 128, 2, 4}, {64, 256, 2, 4}}
                        : new int[][] {{192, 64, 1, 4}, {128, 32, 2, 3}, {64, 16, 4, 4}, {64, 256, 1, 4}}
                : many ? new int[][] {{128, 64, 4, 4}, {128, 128, 1, 4}, {128, 192, 2, 4}, {128, 16, 1, 4}}
                        : new int[][] {{128, 64, 1, 4}, {128, 128, 2, 4}, {128, 256, 4, 4}, {128, 16, 4, 2}};
        return Arrays.stream(all).map(v -> new Variant(v[0], v[1], v[2], v[3])).toList();
    }

    @ParameterizedTest(name = "{0} query and {1} KV heads of {2}, width {3}")
    @CsvSource({"16, 8, 128, 1024", "12, 2, 128, 1536", "14, 2, 64, 896", "5, 1, 64, 328", "32, 8, 128, 4096"})
    void equalsProductAndRotation(int heads, int kvHeads, int headDim, int width) {
        assumeTrue(HopperProducts.runsOn(CUDA), "a Hopper GPU");
        ModelConfig config = TinyModels.of("{\"model_type\":\"llama\",\"num_hidden_layers\":3,\"vocab_size\":1000,"
                + "\"max_position_embeddings\":512,\"intermediate_size\":1536,\"hidden_size\":" + width
                + ",\"num_attention_heads\":" + heads + ",\"num_key_value_heads\":" + kvHeads + ",\"head_dim\":" + headDim + "}");
        GeneratorOptions options = GeneratorOptions.defaults().blockSize(headDim == 64 ? 16 : 64);
        Kernel rotate = load(config, options, "layer.cu").getFirst().kernel("rotateAndWrite");
        try (HopperProducts products = new HopperProducts(CUDA, config, options)) {
            int number = 0;
            for (Variant variant : variants(headDim, heads > 12)) {
                for (int i = 0; i < ROWS.length; i++) {
                    try (Scope inner = Scope.open()) {
                        check(products, rotate, variant, config, options.blockSize(), ROWS[i], PARTS.get((number + i) % PARTS.size()));
                    }
                }
                number++;
            }
            Cuda.synchronize(CUDA);
        }
    }

    private void check(HopperProducts products, Kernel rotate, Variant variant, ModelConfig config, int pageSize, int rows,
            List<String> parts) {
        int headDim = config.headDim();
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        int k = config.hiddenSize();
        int n = (heads + 2 * kvHeads) * headDim;
        int limit = config.maxPositions();
        int tableWidth = limit / pageSize + 2;
        // Places are distinct, as in a step. Row 1 has no slot; what is beyond the count must not be looked at.
        int count = rows - rows / 8;
        int[] places = Arrays.copyOf(shuffled(SLOTS * limit, rows), rows);
        int[] slot = Arrays.stream(places).map(at -> at / limit).toArray();
        int[] position = Arrays.stream(places).map(at -> at % limit).toArray();
        slot[1] = -1;
        position[1] = 1 << 30;
        Arrays.fill(slot, count, rows, 1 << 30);
        Tensor tables = ints(shuffled(SLOTS * tableWidth, 5));
        Tensor positions = ints(position);
        Tensor slots = ints(slot);
        Tensor counts = ints(count);
        Tensor x = normal(1, rows, k);
        Tensor weight = normal(1 / Math.sqrt(k), n, k);
        Tensor bias = parts.contains("bias") ? normal(1, n) : null;
        Tensor queryNorm = parts.contains("norm") ? normal(1, headDim) : null;
        Tensor keyNorm = parts.contains("norm") ? normal(1, headDim) : null;
        Tensor angles = normalFloats(2, limit, headDim / 2);
        Tensor cosines = parts.contains("rotation") ? angles.cos() : null;
        Tensor sines = parts.contains("rotation") ? angles.sin() : null;
        Tensor[] pages = new Tensor[2];
        Tensor[] queries = new Tensor[2];
        Object[][] arguments = new Object[2][];
        for (int i = 0; i < 2; i++) {
            pages[i] = poison(DType.BFLOAT16, (long) SLOTS * tableWidth, LAYERS, 2, kvHeads, pageSize, headDim);
            queries[i] = poison(DType.BFLOAT16, rows, heads, headDim);
            arguments[i] = new Object[] {address(bias), address(queryNorm), address(keyNorm), (float) EPSILON, address(cosines),
                address(sines), positions.address(), slots.address(), tables.address(), tableWidth, pages[i].address(), LAYER, LAYERS,
                queries[i].address(), counts.address()};
        }
        Tensor qkv = poison(DType.BFLOAT16, rows, n);
        // Factors of half, one and two, which rows can be multiplied by without rounding.
        float[] factors = new float[rows];
        float[] sums = new float[rows];
        for (int row = 0; row < rows; row++) {
            factors[row] = parts.contains("factors") ? (float) Math.scalb(1, row % 3 - 1) : 1;
            sums[row] = (float) ((1 / (factors[row] * factors[row]) - EPSILON) * k / (k / 64));
        }
        Tensor scaled = x.mul(Tensor.of(CUDA, factors).to(DType.BFLOAT16).unsqueeze(1));
        Tensor squares = Tensor.of(CUDA, sums).unsqueeze(0).add(Tensor.zeros(CUDA, DType.FLOAT32, k / 64, 1)).copy();
        RowSquares norm = parts.contains("factors") ? new RowSquares(squares.address(), rows, (float) EPSILON) : RowSquares.NONE;
        // Weights may be read before a kernel waits for its predecessor, which in a step never writes them.
        Cuda.synchronize(CUDA);
        products.product(variant, Kind.PLAIN, rows, n, k, n).run(scaled.address(), weight.address(), qkv.address());
        Object[] after = new Object[arguments[0].length + 1];
        after[0] = qkv.address();
        System.arraycopy(arguments[0], 0, after, 1, arguments[0].length);
        rotate.launch(CUDA, CudaDecoder.rotateGrid(config, rows), after);
        products.product(variant, Kind.ROTATED, rows, n, k, 0).rotate(x.address(), weight.address(), norm, arguments[1]);
        String what = variant + " of " + rows + " rows with " + parts;
        if (parts.contains("norm") || parts.contains("factors")) {
            compare(what + ": queries", queries[1], queries[0], NORM_TOLERANCE);
            compare(what + ": pages", pages[1], pages[0], NORM_TOLERANCE);
        } else {
            assertSame(what + ": queries", queries[1], queries[0]);
            assertSame(what + ": pages", pages[1], pages[0]);
        }
    }
}
