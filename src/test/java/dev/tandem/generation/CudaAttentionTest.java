package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertEquals;

import dev.tandem.device.DType;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.IntStream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Attention over pages, of decoding rows and of prompts, against softmax attention over the tokens in a row. */
@Gpu
class CudaAttentionTest extends KernelTest {
    private static final double TOLERANCE = 1e-2;
    private static final int LAYERS = 3;
    private static final int LAYER = 1;

    private static ModelConfig config(int heads, int kvHeads, int headDim) {
        return ModelConfig.llama(1000, heads * headDim, LAYERS, heads, kvHeads, 64, 40_000);
    }

    /** Pages that are NaN but for the tokens of some slots in one layer, and block tables that are wild past their ends. */
    private final class Pages {
        final Tensor memory;
        final Tensor tables;
        final int width;
        /** Of each slot its keys and its values, [kvHeads][length][headDim]. */
        final List<Tensor[]> tokens = new ArrayList<>();

        Pages(ModelConfig config, int pageSize, int... lengths) {
            int[] counts = Arrays.stream(lengths).map(length -> Math.ceilDiv(length, pageSize)).toArray();
            int[] order = shuffled(Arrays.stream(counts).sum() + 3, 3);
            int kvHeads = config.kvHeads();
            memory = poison(DType.BFLOAT16, order.length, LAYERS, 2, kvHeads, pageSize, config.headDim());
            width = Arrays.stream(counts).max().orElseThrow() + 1;
            int[] entries = new int[lengths.length * width];
            Arrays.fill(entries, 0x3fffffff);
            int next = 0;
            for (int slot = 0; slot < lengths.length; slot++) {
                int count = counts[slot];
                int[] ids = Arrays.copyOfRange(order, next, next + count);
                next += count;
                System.arraycopy(ids, 0, entries, slot * width, count);
                // Keys grow along the context, so that no part of it weighs what another one does.
                Tensor growth = Tensor.range(CUDA, count).to(DType.FLOAT32).mul(1.5 / count).add(0.5).reshape(count, 1, 1, 1, 1);
                Tensor data = normalFloats(1, count, 2, kvHeads, pageSize, config.headDim()).mul(growth).to(DType.BFLOAT16);
                int tail = (lengths[slot] - 1) % pageSize + 1;
                data.narrow(0, count - 1, 1).narrow(3, tail, pageSize - tail).fillInPlace(Double.NaN);
                memory.indexPutInPlace(Tensor.of(CUDA, ids), Tensor.full(CUDA, DType.INT64, LAYER, count), data);
                tokens.add(new Tensor[] {tokens(data.select(1, 0), lengths[slot]), tokens(data.select(1, 1), lengths[slot])});
            }
            tables = ints(entries);
        }

        private static Tensor tokens(Tensor data, int length) {
            return data.transpose(0, 1).reshape(data.size(1), data.size(0) * data.size(2), data.size(3)).narrow(1, 0, length);
        }
    }

    /** Attention of queries [n][heads][headDim] at positions from {@code start} on. */
    private static Tensor attention(Tensor query, Tensor[] tokens, int start) {
        long n = query.size(0);
        long heads = query.size(1);
        long headDim = query.size(2);
        long kvHeads = tokens[0].size(0);
        long group = heads / kvHeads;
        try (Scope scope = Scope.open()) {
            Tensor q = exact(query).reshape(n, kvHeads, group, headDim).transpose(0, 1).reshape(kvHeads, n * group, headDim);
            Tensor scores = q.matmul(exact(tokens[0]).transpose(1, 2)).mul(1 / Math.sqrt(headDim));
            Tensor position = Tensor.range(CUDA, n).add((long) start).unsqueeze(1).expand(n, group).reshape(n * group, 1);
            Tensor later = Tensor.range(CUDA, tokens[0].size(1)).unsqueeze(0).sub(position).greaterThan(0);
            Tensor weights = later.choose(Tensor.full(CUDA, DType.FLOAT64, Double.NEGATIVE_INFINITY, 1), scores).softmax(2);
            Tensor out = weights.matmul(exact(tokens[1])).reshape(kvHeads, n, group, headDim).transpose(0, 1);
            return scope.escape(out.reshape(n, heads, headDim));
        }
    }

    /** In units of each head's output, which is the smaller, the more tokens it is a mean of. */
    private static void compareHeads(String what, Tensor got, Tensor want) {
        Tensor unit = want.square().sum(-1).mul(1.0 / want.size(-1)).sqrt().unsqueeze(-1);
        compare(what, exact(got).div(unit), want.div(unit), TOLERANCE);
    }

    private static float scale(ModelConfig config) {
        return (float) (1 / Math.sqrt(config.headDim()));
    }

    // ---- decoding -------------------------------------------------------------------------------------------------------

    @ParameterizedTest(name = "{0} and {1} heads of {2}, pages of {3}")
    @CsvSource({"14, 2, 64, 16", "4, 4, 96, 64", "16, 8, 128, 64", "12, 2, 256, 16"})
    void decodes(int heads, int kvHeads, int headDim, int pageSize) {
        ModelConfig config = config(heads, kvHeads, headDim);
        GeneratorOptions options = GeneratorOptions.defaults().blockSize(pageSize);
        KernelModule module = load(config, options, "decode_attention.cu").getFirst();
        Kernel attend = module.kernel("decodeAttention");
        Grid grid = CudaDecoder.decodeGrid(CUDA, attend, config, options);
        int[] lengths = {1, 17, 700, 32_768, 64, 65, 2_049};
        Pages pages = new Pages(config, pageSize, lengths);
        // Two rows without a slot, one without tokens, and two past the count, which look like others.
        int[] slots = {-1, 3, 0, 6, 1, -1, 2, 5, 4, 0, 2, 3};
        int[] rowLengths = Arrays.stream(slots).map(slot -> slot < 0 ? 333 : lengths[slot]).toArray();
        rowLengths[9] = 0;
        Tensor query = normal(1, slots.length, heads, headDim);
        Tensor out = decode(module, config, grid, pages, query, slots, rowLengths, 10, 0);
        Tensor inShortPieces = decode(module, config, grid, pages, query, slots, rowLengths, 10, 100);
        String what = "decode attention of " + heads + " and " + kvHeads + " heads of " + headDim + ", pages of " + pageSize;
        for (int row = 0; row < slots.length; row++) {
            Tensor found = out.narrow(0, row, 1);
            if (slots[row] < 0 || row >= 9) {
                assertSame(what + ": padding", found, poison(DType.BFLOAT16, found.shape()));
                assertSame(what + ": padding", inShortPieces.narrow(0, row, 1), found);
                continue;
            }
            Tensor expected = attention(query.narrow(0, row, 1), pages.tokens.get(slots[row]), rowLengths[row] - 1);
            compareHeads(what + ", " + rowLengths[row] + " tokens", found, expected);
            compareHeads(what + ", " + rowLengths[row] + " tokens in short pieces", inShortPieces.narrow(0, row, 1), expected);
            Tensor alone = decode(module, config, grid, pages, query.narrow(0, row, 1), new int[] {slots[row]},
                    new int[] {rowLengths[row]}, 1, 0);
            assertSame(what + ": alone", alone, found);
        }
        Grid few = new Grid(7, 1, grid.threads(), 1, grid.sharedBytes());
        assertSame(what + ": another grid", decode(module, config, few, pages, query, slots, rowLengths, 10, 0), out);
        assertSame(what + ": another grid, in short pieces", decode(module, config, few, pages, query, slots, rowLengths, 10, 100),
                inShortPieces);
    }

    private static Tensor decode(KernelModule module, ModelConfig config, Grid grid, Pages pages, Tensor query, int[] slots,
            int[] lengths, int count, int wantedItems) {
        int tokens = IntStream.range(0, count).map(row -> slots[row] < 0 ? 0 : lengths[row]).sum();
        int longest = CudaDecoder.split(config);
        int split = IntStream.iterate(64, length -> 2 * length).filter(length -> length >= longest || tokens / length <= wantedItems)
                .findFirst().orElseThrow();
        int maxItems = IntStream.range(0, count).map(row -> slots[row] < 0 ? 0 : Math.ceilDiv(lengths[row], split)).sum() + 1;
        Tensor out = poison(DType.BFLOAT16, query.shape());
        Tensor rowSlot = ints(slots);
        Tensor rowLength = ints(lengths);
        Tensor rowCount = ints(count);
        Tensor work = Tensor.full(CUDA, DType.INT32, -12_345, maxItems, 8);
        Tensor workCount = ints(-1);
        Tensor partials = poison(DType.FLOAT32, maxItems, config.heads(), config.headDim() + 4);
        Tensor counters = Tensor.zeros(CUDA, DType.INT32, slots.length, config.kvHeads());
        module.kernel("planDecode").launch(CUDA, Grid.of(1, 256), rowSlot.address(), rowLength.address(), rowCount.address(),
                slots.length, maxItems, wantedItems, work.address(), workCount.address());
        module.kernel("decodeAttention").launch(CUDA, grid, query.address(), out.address(), pages.memory.address(), LAYER, LAYERS,
                pages.tables.address(), pages.width, work.address(), workCount.address(), maxItems, partials.address(),
                counters.address(), scale(config), 0);
        assertEquals(maxItems - 1, workCount.item(), "items");
        assertEquals(0, counters.abs().max().item(), "counters are ready for the next launch");
        return out;
    }

    // ---- prompts --------------------------------------------------------------------------------------------------------

    @ParameterizedTest(name = "{0} and {1} heads of {2}, pages of {3}")
    @CsvSource({"14, 2, 64, 64", "4, 4, 96, 16", "16, 8, 128, 64", "12, 2, 256, 16"})
    void prefills(int heads, int kvHeads, int headDim, int pageSize) {
        ModelConfig config = config(heads, kvHeads, headDim);
        Kernel kernel = load(config, GeneratorOptions.defaults().blockSize(pageSize), "prefill_attention.cu").getFirst()
                .kernel("prefillAttention");
        int[] starts = {0, 0, 0, 5, 100, 127, 1000, 32_700};
        int[] counts = {1, 17, 700, 1, 37, 129, 130, 68};
        int[] slots = {4, 2, 7, 0, 1, 3, 6, 5};
        int[] lengths = new int[slots.length];
        int[] firsts = new int[slots.length];
        int tokens = 0;
        for (int s = 0; s < slots.length; s++) {
            lengths[slots[s]] = starts[s] + counts[s];
            firsts[s] = tokens;
            tokens += counts[s] + 3; // between them tokens of others, which are left alone
        }
        Pages pages = new Pages(config, pageSize, lengths);
        Tensor query = normal(1, tokens, heads, headDim);
        Tensor out = poison(DType.BFLOAT16, query.shape());
        prefill(kernel, config, pages, query, out, slots, firsts, starts, counts);
        String what = "prefill attention of " + heads + " and " + kvHeads + " heads of " + headDim + ", pages of " + pageSize;
        for (int s = 0; s < slots.length; s++) {
            Tensor expected = attention(query.narrow(0, firsts[s], counts[s]), pages.tokens.get(slots[s]), starts[s]);
            compareHeads(what + ", " + counts[s] + " tokens after " + starts[s], out.narrow(0, firsts[s], counts[s]), expected);
            Tensor between = out.narrow(0, firsts[s] + counts[s], 3);
            assertSame(what + ": tokens of others", between, poison(DType.BFLOAT16, between.shape()));
        }
        for (int[] cut : new int[][] {{1, 1}, {2, 100}, {2, 699}, {6, 63}, {7, 67}}) {
            int s = cut[0];
            Tensor pieces = poison(DType.BFLOAT16, query.shape());
            for (int from = 0; from < counts[s]; from += cut[1]) {
                prefill(kernel, config, pages, query, pieces, new int[] {slots[s]}, new int[] {firsts[s] + from},
                        new int[] {starts[s] + from}, new int[] {Math.min(cut[1], counts[s] - from)});
            }
            assertSame(what + ": in chunks of " + cut[1], pieces.narrow(0, firsts[s], counts[s]), out.narrow(0, firsts[s], counts[s]));
        }
    }

    /** With a sequence without a slot and a tile without a sequence at the end. */
    private static void prefill(Kernel kernel, ModelConfig config, Pages pages, Tensor query, Tensor out, int[] slots, int[] firsts,
            int[] starts, int[] counts) {
        List<int[]> tiles = new ArrayList<>();
        for (int s = 0; s < slots.length; s++) {
            for (int first = 0; first < counts[s]; first += CudaDecoder.tileQueries(config)) {
                tiles.add(new int[] {s, first});
            }
        }
        tiles.add(new int[] {slots.length, 0});
        tiles.add(new int[] {-1, 0});
        Tensor[] sequences = {with(slots, -1), with(firsts, 0), with(starts, 0), with(counts, 5)};
        Tensor tileSequence = ints(tiles.stream().mapToInt(tile -> tile[0]).toArray());
        Tensor tileFirst = ints(tiles.stream().mapToInt(tile -> tile[1]).toArray());
        Grid grid = CudaDecoder.prefillGrid(config, tiles.size());
        kernel.sharedMemory(grid.sharedBytes()).launch(CUDA, grid, query.address(), out.address(), pages.memory.address(), LAYER, LAYERS,
                pages.tables.address(), pages.width, sequences[0].address(), sequences[1].address(), sequences[2].address(),
                sequences[3].address(), tileSequence.address(), tileFirst.address(), scale(config));
    }

    private static Tensor with(int[] values, int last) {
        int[] more = Arrays.copyOf(values, values.length + 1);
        more[values.length] = last;
        return ints(more);
    }
}
