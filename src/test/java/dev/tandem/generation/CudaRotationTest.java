package dev.tandem.generation;

import static dev.tandem.generation.CudaLayerTest.EPSILON;

import dev.tandem.device.DType;
import dev.tandem.device.KernelModule;
import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import dev.tandem.testing.Gpu;
import java.util.Arrays;
import java.util.List;
import java.util.stream.IntStream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Biases, norms and rotations of queries and keys, and the write of keys and values into pages; rounded as {@link CudaLayerTest} does. */
@Gpu
class CudaRotationTest extends KernelTest {
    private static final double TOLERANCE = 1e-2;
    private static final int LAYERS = 3;
    private static final int LAYER = 1;
    /** Tokens beyond those that count. */
    private static final int PADDING = 5;

    @ParameterizedTest(name = "heads of {0}")
    @ValueSource(ints = {64, 96, 128, 256})
    void rotatesAndWritesPages(int headDim) {
        ModelConfig config = CudaLayerTest.config(headDim);
        GeneratorOptions options = CudaLayerTest.options(config);
        KernelModule module = load(config, options, "layer.cu").getFirst();
        for (List<String> parts : List.of(List.<String>of(), List.of("rotation"), List.of("bias", "rotation"), List.of("norm", "rotation"),
                List.of("bias", "norm", "rotation"))) {
            check(module, config, options.blockSize(), parts);
        }
    }

    private void check(KernelModule module, ModelConfig config, int pageSize, List<String> parts) {
        int rows = 37;
        int slots = 5;
        int limit = config.maxPositions();
        int width = limit / pageSize + 2;
        int headDim = config.headDim();
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        int all = heads + 2 * kvHeads;
        // Places are distinct, as in a step. Token 1 has no slot; what is beyond the count must not be looked at.
        int[] places = Arrays.copyOf(shuffled(slots * limit, 4), rows + PADDING);
        int[] slot = Arrays.stream(places).map(at -> at / limit).toArray();
        int[] position = Arrays.stream(places).map(at -> at % limit).toArray();
        slot[1] = -1;
        position[1] = 1 << 30;
        Arrays.fill(slot, rows, rows + PADDING, 1 << 30);
        int[] live = IntStream.range(0, rows).filter(i -> i != 1).toArray();
        int[] table = shuffled(slots * width, 5);

        Tensor qkv = normal(1, rows + PADDING, (long) all * headDim);
        Tensor bias = parts.contains("bias") ? normal(1, (long) all * headDim) : null;
        Tensor queryNorm = parts.contains("norm") ? normal(1, headDim) : null;
        Tensor keyNorm = parts.contains("norm") ? normal(1, headDim) : null;
        Tensor angles = normalFloats(2, limit, headDim / 2);
        Tensor cosines = parts.contains("rotation") ? angles.cos() : null;
        Tensor sines = parts.contains("rotation") ? angles.sin() : null;
        Tensor pages = poison(DType.BFLOAT16, table.length, LAYERS, 2, kvHeads, pageSize, headDim);
        Tensor query = poison(DType.BFLOAT16, rows + PADDING, heads, headDim);
        Tensor before = qkv.copy();
        Tensor positions = ints(position);
        Tensor tokenSlot = ints(slot);
        Tensor tables = ints(table);
        module.kernel("rotateAndWrite").launch(CUDA, CudaDecoder.rotateGrid(config, rows + PADDING), qkv.address(), address(bias),
                address(queryNorm), address(keyNorm), (float) EPSILON, address(cosines), address(sines), positions.address(),
                tokenSlot.address(), tables.address(), width, pages.address(), LAYER, LAYERS, query.address(), ints(rows).address());

        Tensor rowsLive = Tensor.of(CUDA, live);
        Tensor x = exact(qkv.indexSelect(0, rowsLive)).reshape(live.length, all, headDim);
        x = bias == null ? x : rounded(x.add(exact(bias).reshape(1, all, headDim)));
        Tensor rotated = x.narrow(1, 0, heads + kvHeads);
        if (queryNorm != null && keyNorm != null) {
            Tensor weight = Tensor.concatenate(0, queryNorm.unsqueeze(0).expand(heads, headDim),
                    keyNorm.unsqueeze(0).expand(kvHeads, headDim));
            rotated = rounded(CudaLayerTest.norm(rotated, Norm.RMS, weight, null));
        }
        if (cosines != null && sines != null) {
            Tensor at = Tensor.of(CUDA, Arrays.stream(live).map(i -> position[i]).toArray());
            rotated = rotated(rotated, rounded(cosines.indexSelect(0, at)).unsqueeze(1), rounded(sines.indexSelect(0, at)).unsqueeze(1));
        }
        String what = "rotateAndWrite of heads of " + headDim + " with " + parts;
        Tensor wanted = poison(DType.FLOAT64, query.shape());
        wanted.unsqueeze(0).indexPutInPlace(Tensor.zeros(CUDA, DType.INT64, live.length), rowsLive, rotated.narrow(1, 0, heads));
        compare(what + ": queries", query, wanted, TOLERANCE);
        Tensor wantedPages = poison(DType.FLOAT64, pages.shape());
        Tensor block = Tensor.of(CUDA, Arrays.stream(live).map(i -> table[slot[i] * width + position[i] / pageSize]).toArray());
        Tensor place = Tensor.of(CUDA, Arrays.stream(live).map(i -> position[i] % pageSize).toArray());
        Tensor keysAndValues = Tensor.concatenate(1, rotated.narrow(1, heads, kvHeads), x.narrow(1, heads + kvHeads, kvHeads));
        wantedPages.transpose(1, 4).select(4, LAYER)
                .indexPutInPlace(block, place, keysAndValues.reshape(live.length, 2, kvHeads, headDim));
        compare(what + ": pages", pages, wantedPages, TOLERANCE);
        assertSame(what + ": what it reads", qkv, before);
    }

    /** Element i of a head with element i + headDim / 2. */
    private static Tensor rotated(Tensor x, Tensor cosine, Tensor sine) {
        long half = x.size(2) / 2;
        Tensor a = x.narrow(2, 0, half);
        Tensor b = x.narrow(2, half, half);
        return Tensor.concatenate(2, rounded(a.mul(cosine)).sub(rounded(b.mul(sine))), rounded(b.mul(cosine)).add(rounded(a.mul(sine))));
    }
}
