package dev.tandem.generation;

import dev.tandem.device.CublasLt;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.StepLayout.Field;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.Positions;
import dev.tandem.model.RotaryTables;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * The decoder's forward pass on a GPU, from token ids to logits, in Tandem's kernels and products that are timed. It computes what
 * {@link dev.tandem.model.Decoder} computes, reads the same weights, and allocates nothing: every buffer is made once and used by all
 * steps, so that a pass can be captured as a graph.
 *
 * <p>Letters: T tokens of the step, E hidden size, H query heads, D head size. Confined to its rank's thread; the owner closes it.
 */
final class CudaDecoder implements AutoCloseable {
    private static final int WARPS = 4;
    private static final int TILE_ROWS = 128;
    private static final int MANY_ROWS = 512;

    /** One for each of the three blocks that a multiprocessor of an H100 runs: more balance better, but have more to merge. */
    private static final int WANTED_UNITS = 396;

    private final ModelConfig config;
    private final WeightArena arena;
    private final Device device;
    private final CudaStepInput input;
    private final long pages;

    private final CudaKernels kernels;
    private final Grid decodeGrid;
    private final int maxRows;
    private final int maxItems;
    private final CudaProducts products;

    /** Closed with this, or when it cannot be completed. */
    private final Deque<Runnable> owned = new ArrayDeque<>();

    private final Tensor residual;
    private final Tensor normed;
    private final Tensor qkv;
    private final Tensor query;
    private final Tensor attended;
    private final Tensor projected;
    private final Tensor widened;
    private final Tensor activated;
    private final Tensor hidden;
    /** Sums of squares of the residual stream's rows in a decoding step. */
    private final Tensor squares;
    private final Tensor logits;
    /** Of the tokens of a decoding step. */
    private final Rotation decodeRotation;
    /** Of the tokens of a step with prompts. */
    private final Rotation mixedRotation;

    private final Tensor work;
    private final Tensor partials;
    private final Tensor counters;
    private final Tensor lastToken;

    /** {@return what of a model these kernels do not compute, or null if they compute all of it} */
    static @Nullable String obstacle(ModelConfig config, DType dtype, GeneratorOptions options) {
        int group = config.heads() / config.kvHeads();
        int page = options.blockSize();
        if (dtype != DType.BFLOAT16) {
            return "weights are " + dtype + ", not BFLOAT16";
        }
        if (config.headDim() != 64 && config.headDim() != 96 && config.headDim() != 128 && config.headDim() != 256) {
            return "heads have " + config.headDim() + " channels, not 64, 96, 128 or 256";
        }
        if (group > 16) {
            return group + " query heads share a KV head, more than 16";
        }
        if (page < 16 || page > 128 || Integer.bitCount(page) != 1) {
            return "KV pages have " + page + " tokens, not 16, 32, 64 or 128";
        }
        if (!config.normFirst() || !config.finalNorm() || config.embeddingSize() != config.hiddenSize()) {
            return "norms follow their blocks, or embeddings are projected";
        }
        if (config.hiddenSize() % 8 != 0 || config.intermediateSize() % 8 != 0) {
            return "widths are no multiples of 8";
        }
        return null;
    }

    /** {@return tokens of a tile of the prefill attention} */
    static int tileQueries(ModelConfig config) {
        return TILE_ROWS / (config.heads() / config.kvHeads());
    }

    CudaDecoder(WeightArena arena, KvCache cache, Device device, GeneratorOptions options, CudaKernels kernels, CudaStepInput input,
            Tensor lastToken) {
        this.kernels = kernels;
        config = arena.layout().config();
        this.arena = arena;
        this.device = device;
        this.input = input;
        this.lastToken = lastToken;
        pages = cache.address();
        maxRows = options.maxRunning();
        int dim = config.headDim();
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        decodeGrid = decodeGrid(device, kernels.decodeAttention, config, options);
        kernels.prefillAttention.sharedMemory(prefillGrid(config, 1).sharedBytes());

        int tokens = options.tokenBudget();
        maxItems = maxItems(config, maxRows);
        try (Scope scope = Scope.open()) {
            residual = buffer(tokens, config.hiddenSize());
            normed = buffer(tokens, config.hiddenSize());
            qkv = buffer(tokens, (heads + 2L * kvHeads) * dim);
            query = buffer(tokens, (long) heads * dim);
            attended = buffer(tokens, (long) heads * dim);
            projected = buffer(tokens, config.hiddenSize());
            widened = buffer(tokens, config.intermediateSize() * (config.gatedMlp() ? 2L : 1L));
            activated = buffer(tokens, config.intermediateSize());
            hidden = buffer(maxRows, config.hiddenSize());
            squares = own(Tensor.empty(device, DType.FLOAT32, config.hiddenSize() / 64, squaresStride(maxRows)));
            logits = own(Tensor.zeros(device, DType.FLOAT32, maxRows, rowStride(config)));
            work = own(Tensor.zeros(device, DType.INT32, 8L * maxItems + 8));
            partials = own(Tensor.empty(device, DType.FLOAT32, (long) maxItems * heads * (dim + 4)));
            counters = own(Tensor.zeros(device, DType.INT32, (long) maxRows * kvHeads));
            RotaryTables tables = RotaryTables.of(config, device);
            if (tables != null) {
                owned.push(tables::close);
            }
            decodeRotation = rotation(tables, Field.ROW_POSITIONS, Field.ROW_SLOT);
            mixedRotation = rotation(tables, Field.POSITIONS, Field.TOKEN_SLOT);
            CudaProducts.Buffers buffers =
                    new CudaProducts.Buffers(residual, squares, normed, qkv, attended, projected, widened, activated, hidden, logits);
            products = new CudaProducts(device, arena, buffers, decodeRotation, options);
            owned.push(products::close);
        } catch (RuntimeException | Error e) {
            close();
            throw e;
        }
    }

    private Rotation rotation(@Nullable RotaryTables tables, Field positions, Field slots) {
        return new Rotation(arena, tables, input.address(positions), input.address(slots), input.address(Field.TABLES),
                input.layout().tableWidth(), pages, query.address(), input.countAddress(StepLayout.TOKENS));
    }

    private Tensor own(Tensor made) {
        Tensor kept = made.keep();
        owned.push(kept::close);
        return kept;
    }

    /** {@return how the decode attention is launched: as many blocks as are resident} Lets them have the shared memory they need. */
    static Grid decodeGrid(Device device, Kernel decodeAttention, ModelConfig config, GeneratorOptions options) {
        int dim = config.headDim();
        int group = config.heads() / config.kvHeads();
        int stages = dim <= 64 ? 4 : dim <= 96 ? 3 : 2;
        int shared = WARPS * stages * 64 * dim + 4 * WARPS * group * (dim + 6) + 4 * 8 * (8 + split(config) / options.blockSize()) + 16;
        decodeAttention.sharedMemory(shared);
        int resident = Math.max(1, decodeAttention.residentBlocks(32 * WARPS, shared));
        return new Grid(Cuda.multiprocessors(device) * resident, 1, 32 * WARPS, 1, shared);
    }

    /** {@return how the prefill attention is launched} */
    static Grid prefillGrid(ModelConfig config, int tiles) {
        boolean wide = config.headDim() > 128;
        int shared = (TILE_ROWS + 4 * (wide ? 32 : 64)) * (config.headDim() + 8) * 2;
        return new Grid(config.kvHeads(), tiles, wide ? 2 * TILE_ROWS : TILE_ROWS, 1, shared);
    }

    /** {@return one row of threads for each row of a matrix} Where a warp suffices and there are many, four rows a block. */
    static Grid rowGrid(int rows, int width) {
        int threads = 32 * Math.ceilDiv(width, 1024);
        int perBlock = threads == 32 && rows >= MANY_ROWS ? 4 : 1;
        return new Grid(Math.ceilDiv(rows, perBlock), 1, threads, perBlock, 0);
    }

    /** {@return how tokens' queries and keys are rotated} */
    static Grid rotateGrid(ModelConfig config, int tokens) {
        int lanes = config.headDim() == 64 ? 4 : config.headDim() <= 128 ? 8 : 16;
        int units = (config.heads() + 2 * config.kvHeads() + 1) / 2;
        return Grid.of(Math.toIntExact(Math.ceilDiv((long) tokens * units * lanes, 256)), 256);
    }

    /** {@return how the activation of that many rows is launched} */
    static Grid activateGrid(int rows, int width) {
        return Grid.of(Math.toIntExact(Math.ceilDiv((long) rows * width, 4096)), 256);
    }

    private Tensor buffer(long rows, long width) {
        return own(Tensor.zeros(device, DType.BFLOAT16, rows, width));
    }

    /** Elements from one row of logits to the next. */
    private static long rowStride(ModelConfig config) {
        return (config.vocabSize() + 7L) / 8 * 8;
    }

    /** Few rows have sums of 8 columns each instead of 64, in the same place. */
    private static int squaresStride(int rows) {
        return Math.max(rows, 8 * FewRows.MOST);
    }

    /** {@return bytes of all buffers, known from the sizes alone} */
    static long bytes(ModelConfig config, GeneratorOptions options) {
        long tokens = options.tokenBudget();
        long rows = options.maxRunning();
        long attention = (long) config.heads() * config.headDim();
        long keys = 2L * config.kvHeads() * config.headDim();
        long wide = config.intermediateSize() * (config.gatedMlp() ? 3L : 2L);
        long activations = tokens * (3L * config.hiddenSize() + 3 * attention + keys + wide) + rows * config.hiddenSize();
        long items = maxItems(config, options.maxRunning());
        long floats = rows * rowStride(config) + items * config.heads() * (config.headDim() + 4L) + 8 * items + 8
                + rows * config.kvHeads() + (long) config.hiddenSize() / 64 * squaresStride(options.maxRunning());
        long tables = config.positions() instanceof Positions.Rope ? (long) config.maxPositions() * config.headDim() : 0;
        return activations * DType.BFLOAT16.bytes() + (floats + tables) * Float.BYTES + CublasLt.WORKSPACE;
    }

    /** {@return pieces of context in a step, for all heads, below which the pieces are made shorter} */
    static int wantedItems(ModelConfig config) {
        return WANTED_UNITS / config.kvHeads();
    }

    private static int maxItems(ModelConfig config, int rows) {
        return Math.max(Math.multiplyExact(rows, Math.ceilDiv(config.maxPositions(), split(config))), wantedItems(config) + rows);
    }

    /**
     * {@return tokens that one block attends to at most} Longer rows are cut; all rows into shorter pieces where these would be fewer than
     * {@link #wantedItems}.
     */
    static int split(ModelConfig config) {
        return config.kvHeads() <= 2 ? 2048 : 1024;
    }

    /** {@return the address of the logits, FLOAT32 [wanted rows, {@link #logitStride}]} */
    long logitsAddress() {
        return logits.address();
    }

    /** {@return elements from one row of logits to the next} */
    long logitStride() {
        return rowStride(config);
    }

    /**
     * {@return the ways in which a decoding step of that many rows can multiply} To be asked before the step whose input lies on the device
     * is computed: finding them overwrites buffers and what that step writes.
     */
    List<CudaProducts.Way> ways(int rows) {
        return products.ways(rows);
    }

    /**
     * Computes a step with prompts, whose input lies on the device.
     *
     * @param tokens of the step
     * @param decodeRows for how many rows the decode attention is launched
     * @param tiles of the prefill attention
     * @param wanted rows of logits
     */
    void forward(int tokens, int decodeRows, int tiles, int wanted) {
        forward(tokens, false, decodeRows, tiles, wanted, products.large(tokens, wanted));
    }

    /**
     * Computes a decoding step, whose input lies on the device: row i is token i.
     *
     * @param rows for how many kernels are launched: at least those of the step
     * @param by one of the {@link #ways} for that many
     */
    void decode(int rows, CudaProducts.Way by) {
        forward(rows, true, rows, 0, rows, by);
    }

    /**
     * Rows of a step's matrices.
     *
     * @param count for how many kernels are launched
     * @param address of how many there are
     */
    private record Rows(int count, long address) {}

    private void forward(int tokens, boolean decodes, int decodeRows, int tiles, int wanted, CudaProducts.Way by) {
        try (Scope scope = Scope.open()) {
            Rows rows = new Rows(tokens, input.countAddress(StepLayout.TOKENS));
            embed(rows, decodes);
            if (decodeRows > 0) {
                kernels.planDecode.launch(device, Grid.of(1, 256), input.address(Field.ROW_SLOT), input.address(Field.ROW_LENGTH),
                        input.countAddress(StepLayout.DECODE_ROWS), maxRows, maxItems, wantedItems(config), work.address(), workCount());
            }
            boolean all = wanted == tokens;
            int last = config.layers() - 1;
            for (int layer = 0; layer <= last; layer++) {
                try (Scope inner = Scope.open()) {
                    if (layer == 0) {
                        norm(rows, 0, 0, arena.layer(0), ParameterRole.ATTENTION_NORM_WEIGHT, ParameterRole.ATTENTION_NORM_BIAS, normed);
                    } else if (!by.adds()) {
                        norm(rows, projected.address(), narrowBias(layer - 1), arena.layer(layer), ParameterRole.ATTENTION_NORM_WEIGHT,
                                ParameterRole.ATTENTION_NORM_BIAS, normed);
                    }
                    project(layer, arena.layer(layer).weight(ParameterRole.Q_WEIGHT), tokens, decodes ? decodeRotation : mixedRotation, by);
                    attend(layer, decodeRows, tiles);
                    if (layer < last || all) {
                        feedForward(layer, attended, rows, by);
                    }
                }
            }
            if (all) {
                head(wanted, by);
            } else if (wanted > 0) {
                finish(wanted);
            }
        }
    }

    /** The rest of the last layer, and logits, for the rows that these are wanted of: the others leave no more than keys and values. */
    private void finish(int wanted) {
        Rows rows = new Rows(wanted, input.countAddress(StepLayout.WANTED));
        CudaProducts.Way by = products.large(wanted, wanted);
        Tensor chosen = input.wanted();
        residual.narrow(0, 0, wanted).copyInPlace(residual.indexSelect(0, chosen));
        int last = config.layers() - 1;
        feedForward(last, attended.indexSelect(0, chosen), rows, by);
        norm(rows, projected.address(), narrowBias(last), arena.head(), ParameterRole.FINAL_NORM_WEIGHT, ParameterRole.FINAL_NORM_BIAS,
                hidden);
        by.head().run(0, hidden, arena.logitMatrix(), logits);
    }

    private void embed(Rows rows, boolean decodes) {
        long ids = input.address(decodes ? Field.ROW_TOKENS : Field.TOKENS);
        long positions = input.address(decodes ? Field.ROW_POSITIONS : Field.POSITIONS);
        kernels.resolveTokens.launch(device, Grid.of(Math.ceilDiv(rows.count, 256), 256), ids, lastToken.address(), rows.address);
        WeightGroup embedding = arena.embedding();
        int offset = config.positions() instanceof Positions.Learned learned ? learned.offset() : 0;
        int width = config.hiddenSize();
        kernels.embed.launch(device, rowGrid(rows.count, width), ids, positions, address(embedding.find(ParameterRole.EMBED_TOKENS)),
                address(embedding.find(ParameterRole.EMBED_POSITIONS)), offset, residual.address(), width, rows.address);
    }

    private void norm(Rows rows, long addend, long addendBias, WeightGroup w, ParameterRole weight, ParameterRole bias, Tensor out) {
        int width = config.hiddenSize();
        kernels.residualNorm.launch(device, rowGrid(rows.count, width), residual.address(), addend, addendBias, address(w.find(weight)),
                address(w.find(bias)), out.address(), width, (float) config.normEps(), rows.address);
    }

    /** From what the heads attended to; unless the products add, {@link #projected} is left to be added, with {@link #narrowBias}. */
    private void feedForward(int layer, Tensor heads, Rows rows, CudaProducts.Way by) {
        WeightGroup w = arena.layer(layer);
        by.output().run(layer, heads, w.weight(ParameterRole.O_WEIGHT), projected);
        if (!by.adds()) {
            norm(rows, projected.address(), address(w.find(ParameterRole.O_BIAS)), w, ParameterRole.MLP_NORM_WEIGHT,
                    ParameterRole.MLP_NORM_BIAS, normed);
        }
        by.widen().run(layer, normed, w.weight(CudaProducts.widenRole(config)), widened);
        if (!by.activates()) {
            activate(w, rows);
        }
        by.narrow().run(layer, activated, w.weight(ParameterRole.DOWN_WEIGHT), projected);
    }

    private long narrowBias(int layer) {
        return address(arena.layer(layer).find(ParameterRole.DOWN_BIAS));
    }

    /** Queries, keys and values, from the normed states to where attention reads them. */
    private void project(int layer, Tensor weight, int tokens, Rotation rotation, CudaProducts.Way by) {
        by.qkv().run(layer, normed, weight, qkv);
        if (!by.rotates()) {
            kernels.rotateAndWrite.launch(device, rotateGrid(config, tokens), rotation.arguments(layer, qkv.address()));
        }
    }

    private void attend(int layer, int decodeRows, int tiles) {
        float scale = (float) (1 / Math.sqrt(config.headDim()));
        long tables = input.address(Field.TABLES);
        int width = input.layout().tableWidth();
        if (decodeRows > 0) {
            kernels.decodeAttention.launch(device, decodeGrid, query.address(), attended.address(), pages, layer, config.layers(),
                    tables, width, work.address(), workCount(), maxItems, partials.address(), counters.address(), scale,
                    input.layout().readsNew() ? 0 : 1);
        }
        if (tiles > 0) {
            kernels.prefillAttention.launch(device, prefillGrid(config, tiles), query.address(), attended.address(), pages, layer,
                    config.layers(), tables, width, input.address(Field.SEQUENCE_SLOT), input.address(Field.SEQUENCE_FIRST),
                    input.address(Field.SEQUENCE_START), input.address(Field.SEQUENCE_TOKENS), input.address(Field.TILE_SEQUENCE),
                    input.address(Field.TILE_FIRST), scale);
        }
    }

    private void activate(WeightGroup w, Rows rows) {
        ParameterRole bias = config.gatedMlp() ? ParameterRole.GATE_BIAS : ParameterRole.UP_BIAS;
        int width = config.intermediateSize();
        kernels.activate.launch(device, activateGrid(rows.count, width), widened.address(), address(w.find(bias)), activated.address(),
                width, rows.address);
    }

    private void head(int wanted, CudaProducts.Way by) {
        WeightGroup head = arena.head();
        int width = config.hiddenSize();
        long addend = by.adds() ? 0 : projected.address();
        kernels.gatherNorm.launch(device, rowGrid(wanted, width), residual.address(), addend, narrowBias(config.layers() - 1),
                address(head.find(ParameterRole.FINAL_NORM_WEIGHT)), address(head.find(ParameterRole.FINAL_NORM_BIAS)),
                hidden.address(), width, (float) config.normEps(), input.address(Field.WANTED), input.countAddress(StepLayout.WANTED));
        by.head().run(0, hidden, arena.logitMatrix(), logits);
    }

    private long workCount() {
        return work.address() + 32L * maxItems;
    }

    private static long address(@Nullable Tensor tensor) {
        return tensor == null ? 0 : tensor.address();
    }

    @Override
    public void close() {
        owned.forEach(Runnable::run);
        owned.clear();
    }
}
