package dev.tandem.generation;

import dev.tandem.device.AheadCompiler;
import dev.tandem.device.Cuda;
import dev.tandem.device.CudaGraph;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.KernelModule.Source;
import dev.tandem.device.TensorMap;
import dev.tandem.device.TuningCache;
import dev.tandem.model.ModelConfig;
import java.lang.foreign.Arena;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.function.ObjIntConsumer;
import java.util.stream.IntStream;
import org.jspecify.annotations.Nullable;

/**
 * Products of some 8 to 256 rows with a weight matrix on a Hopper GPU: {@code decode_product.cu}, which starts to read the weights while
 * the kernel before it still runs, shares k among blocks where tiles are few, and can apply the activation, or rotate queries and keys.
 * Below some 200 rows it beats cuBLAS.
 *
 * <p>The kernel comes in variants. Of those that a rough count of cycles favours, each is timed once for a size, over weights that are not
 * in the cache, and the fastest is kept in the {@link TuningCache}. Confined to its rank's thread. The owner closes it.
 */
final class HopperProducts implements AutoCloseable {
    /** Rows of a tile, as the kernel knows them. */
    private static final int[] TILE_ROWS = {16, 32, 64, 96, 128, 192, 256};

    /** For these many rows, and beyond for multiples of 64, variants are chosen. */
    private static final int[] CLASSES = {16, 64, 128, 192, 256};

    private static final int CANDIDATES = 4;
    private static final int BLOCK = 64;
    private static final int MOST_STAGES = 8;
    private static final int SHARED_BYTES = 232448 - 256;
    /** Two blocks of so many bytes fit a multiprocessor: the next product's weights then arrive during this one. */
    private static final int HALF_SHARED_BYTES = 104000;

    private final Device device;
    private final int multiprocessors;
    private final TuningCache choices;
    private final Arena arena = Arena.ofShared();
    private final Map<Source, KernelModule> modules = new HashMap<>();
    private final int headDim;
    private final Map<String, String> shape;

    /** What a product's result is. */
    enum Kind {
        /** BFLOAT16. */
        PLAIN("multiply"),
        /** FLOAT32. */
        FLOAT("multiplyToFloat"),
        /** BFLOAT16, silu(gate) · up. */
        GATED("multiplyGated"),
        /** Nothing: queries, keys and values are rotated and written where attention reads them, as by {@code rotateAndWrite}. */
        ROTATED("multiplyRotated"),
        /** BFLOAT16, added to the residual stream, from which the rows of a norm are made for the next product. */
        ADDED("multiplyAdded");

        private final String kernel;

        Kind(String kernel) {
            this.kernel = kernel;
        }
    }

    /**
     * A way to cut the work.
     *
     * @param tile weight rows of a block
     * @param rows of the input in a block
     * @param split blocks that share k
     * @param stages of loads under way
     */
    record Variant(int tile, int rows, int split, int stages) {
        int threads() {
            return 2 * tile + 128;
        }

        int stageBytes() {
            return (tile + rows) * BLOCK * 2;
        }

        int sharedBytes(Kind kind) {
            int exchange = split > 1 ? split * finishedOctets() * 32 * tile : 0;
            return Math.max(stages * stageBytes(), exchange) + sharedBytesBesides(kind);
        }

        /** {@return bytes of shared memory that do not depend on how many loads are under way} */
        int sharedBytesBesides(Kind kind) {
            int ofOctet = kind == Kind.ROTATED ? 192 : kind == Kind.GATED ? 64 : 0;
            return 1024 + tile / 64 * 9216 + ofOctet * finishedOctets();
        }

        /** {@return eights of rows of which a block finishes the sums} */
        private int finishedOctets() {
            return Math.ceilDiv(rows / 8, split);
        }

        boolean possible(Kind kind, int headDim) {
            boolean fits = kind != Kind.ROTATED || tile % headDim == 0 && rotatesInRegisters();
            return fits && stages >= 2 && sharedBytes(kind) <= SHARED_BYTES;
        }

        /** Larger tiles need more registers to rotate in than there are beside the sums. */
        private boolean rotatesInRegisters() {
            return tile == 64 || rows <= 128 || rows <= 192 && split > 1 || tile == 128 && split >= 4;
        }
    }

    private record Choice(Variant variant, float milliseconds) {
        @Override
        public String toString() {
            return milliseconds + " " + variant.tile + " " + variant.rows + " " + variant.split + " " + variant.stages;
        }

        /** {@return what {@link #toString} wrote, or null} */
        static @Nullable Choice read(@Nullable String text, Kind kind, int headDim) {
            String[] parts = text == null ? new String[0] : text.split(" ");
            if (parts.length != 5) {
                return null;
            }
            try {
                Variant variant = new Variant(Integer.parseInt(parts[1]), Integer.parseInt(parts[2]), Integer.parseInt(parts[3]),
                        Integer.parseInt(parts[4]));
                return variant.possible(kind, headDim) ? new Choice(variant, Float.parseFloat(parts[0])) : null;
            } catch (NumberFormatException e) {
                return null;
            }
        }
    }

    /**
     * @param config whose heads are rotated
     * @param options that say how pages are cut
     */
    HopperProducts(Device device, ModelConfig config, GeneratorOptions options) {
        this.device = device;
        headDim = config.headDim();
        shape = CudaKernels.shape(config, options);
        multiprocessors = Cuda.multiprocessors(device);
        choices = TuningCache.of(device);
    }

    /** {@return whether a device has what the kernel needs} */
    static boolean runsOn(Device device) {
        return Cuda.isHopper(device);
    }

    /** {@return whether there is a product that rotates heads of that many channels: where tiles consist of whole heads} */
    static boolean rotates(int headDim) {
        return headDim == 64 || headDim == 128;
    }

    /** A product of fixed sizes. */
    final class Product {
        private final Choice choice;
        private final Kernel kernel;
        private final Kind kind;
        private final int rows;
        private final int n;
        private final int k;
        private final long stride;
        private final Grid grid;
        private final Map<Long, TensorMap> inputs = new HashMap<>();
        private final Map<Long, TensorMap> weights = new HashMap<>();

        private Product(Choice choice, Kind kind, int rows, int n, int k, long stride) {
            this.choice = choice;
            this.kind = kind;
            this.rows = rows;
            this.n = n;
            this.k = k;
            this.stride = stride;
            Variant variant = choice.variant;
            int shared = variant.sharedBytes(kind);
            kernel = module(variant, kind).kernel(kind.kernel).sharedMemory(shared);
            int tiles = tiles(variant, kind, rows, n);
            int resident = multiprocessors * Math.max(1, kernel.residentBlocks(variant.threads(), shared));
            int blocks = variant.split > 1 ? tiles * variant.split : Math.ceilDiv(tiles, Math.ceilDiv(tiles, resident));
            grid = new Grid(blocks, 1, variant.threads(), 1, shared);
        }

        /** Runs a product of the kinds PLAIN and FLOAT. */
        void run(long x, long weight, long out) {
            if (kind == Kind.FLOAT) {
                kernel.launch(device, grid, input(x), matrix(weight), out, rows, k, n, stride);
            } else {
                kernel.launch(device, grid, input(x), matrix(weight), out, rows, k, n, (int) stride);
            }
        }

        /** Runs a product of the kind GATED. */
        void activate(long x, long weight, long out, RowSquares squares) {
            kernel.launch(device, grid, input(x), matrix(weight), out, rows, k, n, (int) stride, squares.address(), squares.stride(),
                    squares.epsilon());
        }

        /**
         * Runs a product of the kind ADDED.
         *
         * @param residual address of [rows, n], which the product is added to
         * @param norm address of the next norm's weight [n], or 0 and nothing else is written
         * @param scaled address of [rows, n] for the new residual times that weight
         * @param squares where sums of its squares are written
         */
        void add(long x, long weight, long residual, long norm, long scaled, RowSquares squares) {
            kernel.launch(device, grid, input(x), matrix(weight), residual, rows, k, n, norm, scaled, squares.address(), squares.stride());
        }

        /**
         * Runs a product of the kind ROTATED.
         *
         * @param rotation the arguments of {@code rotateAndWrite} after its first, which is the product's result
         */
        void rotate(long x, long weight, RowSquares squares, Object... rotation) {
            List<Object> arguments = new ArrayList<>(List.of(input(x), matrix(weight), rows, k, n));
            arguments.addAll(List.of(rotation));
            arguments.addAll(List.of(squares.address(), squares.stride(), squares.epsilon()));
            kernel.launch(device, grid, arguments.toArray());
        }

        private TensorMap input(long x) {
            return inputs.computeIfAbsent(x, address -> new TensorMap(arena, address, new long[] {k, rows}, new long[] {2L * k},
                    new int[] {BLOCK, choice.variant.rows}));
        }

        private TensorMap matrix(long weight) {
            return weights.computeIfAbsent(weight, this::map);
        }

        private TensorMap map(long address) {
            int tile = choice.variant.tile;
            return kind == Kind.GATED
                    ? new TensorMap(arena, address, new long[] {k, 8, 2, n / 8}, new long[] {2L * k, 2L * k * n, 16L * k},
                            new int[] {BLOCK, 8, 2, tile / 16})
                    : new TensorMap(arena, address, new long[] {k, n}, new long[] {2L * k}, new int[] {BLOCK, tile});
        }

        /** {@return what the product took when its variant was timed} */
        float milliseconds() {
            return choice.milliseconds;
        }
    }

    /** The sizes of a weight that products of one kind multiply with, as {@link #tune} takes them. */
    record Size(Kind kind, int n, int k) {}

    /** {@return what compiles in the background the variants that products of these sizes with up to so many rows will be timed with} */
    AheadCompiler compileAhead(List<Size> sizes, int maxRows) {
        Set<Source> sources = new LinkedHashSet<>();
        // The largest first: a rollout begins with them.
        for (int rows : IntStream.iterate(maxRows, i -> i - 1).limit(maxRows).map(HopperProducts::like).distinct().toArray()) {
            for (Size size : sizes) {
                if (choices.find(question(size, rows)) == null) {
                    candidates(size.kind, rows, size.n, size.k).forEach(variant -> sources.add(source(variant, size.kind)));
                }
            }
        }
        return new AheadCompiler(device, List.copyOf(sources));
    }

    /** {@return under what the fastest variant is kept} */
    private String question(Size size, int rows) {
        String heads = size.kind == Kind.ROTATED ? " " + new TreeMap<>(shape) : "";
        return "product " + size.kind + " " + rows + " " + size.n + " " + size.k + heads;
    }

    /**
     * {@return a product of a size, by the variant that is fastest} What it writes is overwritten with numbers of no meaning; of the kind
     * ROTATED this is what the step at hand writes, so that step is yet to be computed then.
     *
     * @param size of which n are the columns of the result, a multiple of 8 when gated and of 64 when added, and k is a multiple of 8
     * @param stride elements from one row of the result to the next
     * @param weights how many weights [n, k], [2 n, k] when gated, are used in turn
     * @param launch runs the product with one of them
     */
    Product tune(Size size, int rows, long stride, int weights, ObjIntConsumer<Product> launch) {
        Kind kind = size.kind;
        int n = size.n;
        int k = size.k;
        String question = question(size, like(rows));
        Choice known = Choice.read(choices.find(question), kind, headDim);
        if (known != null) {
            return new Product(known, kind, rows, n, k, stride);
        }
        List<Variant> candidates = candidates(kind, like(rows), n, k);
        compile(candidates.stream().map(variant -> source(variant, kind)).toList());
        Choice best = null;
        for (Variant variant : candidates) {
            Product product = product(variant, kind, rows, n, k, stride);
            launch.accept(product, 0);
            try (CudaGraph graph = CudaGraph.capture(device, () -> {
                for (int i = 0; i < weights; i++) {
                    launch.accept(product, i);
                }
            })) {
                float time = graph.milliseconds(device) / weights;
                if (best == null || time < best.milliseconds) {
                    best = new Choice(variant, time);
                }
            }
        }
        choices.keep(question, Objects.requireNonNull(best).toString());
        return new Product(best, kind, rows, n, k, stride);
    }

    /** {@return a product of these sizes by a certain variant} */
    Product product(Variant variant, Kind kind, int rows, int n, int k, long stride) {
        return new Product(new Choice(variant, 0), kind, rows, n, k, stride);
    }

    private List<Variant> candidates(Kind kind, int rows, int n, int k) {
        List<Variant> found = new ArrayList<>();
        TreeSet<Integer> parts = new TreeSet<>(List.of(next(TILE_ROWS, rows), next(TILE_ROWS, Math.max(32, Math.ceilDiv(rows, 2)))));
        for (int tile : new int[] {64, 128, 192}) {
            for (int part : parts) {
                int stageBytes = new Variant(tile, part, 1, 1).stageBytes();
                for (int split = 1; split <= 8; split *= 2) {
                    int besides = new Variant(tile, part, split, 0).sharedBytesBesides(kind);
                    int stages = Math.min(MOST_STAGES, (SHARED_BYTES - besides) / stageBytes);
                    found.add(new Variant(tile, part, split, stages));
                    if (tile == 64 && part <= 128 && HALF_SHARED_BYTES / stageBytes < stages) {
                        found.add(new Variant(tile, part, split, HALF_SHARED_BYTES / stageBytes));
                    }
                }
            }
        }
        found.removeIf(variant -> !variant.possible(kind, headDim));
        found.sort(Comparator.comparingDouble(variant -> cycles(variant, kind, rows, n, k)));
        return found.subList(0, Math.min(CANDIDATES, found.size()));
    }

    /** {@return the number of rows, at least these, whose products are the model for those of these} */
    static int like(int rows) {
        return rows <= CLASSES[CLASSES.length - 1] ? next(CLASSES, rows) : Math.ceilDiv(rows, 64) * 64;
    }

    private static int next(int[] values, int least) {
        for (int value : values) {
            if (value >= least) {
                return value;
            }
        }
        return values[values.length - 1];
    }

    private static int tiles(Variant variant, Kind kind, int rows, int n) {
        return Math.ceilDiv(n, kind == Kind.GATED ? variant.tile / 2 : variant.tile) * Math.ceilDiv(rows, variant.rows);
    }

    /** Roughly, to say what is worth timing: waves of blocks, the slowest of tensor cores, caches and memory in each step, the ends. */
    private double cycles(Variant variant, Kind kind, int rows, int n, int k) {
        int tile = variant.tile;
        int waves = Math.ceilDiv(tiles(variant, kind, rows, n) * variant.split, multiprocessors / variant.split * variant.split);
        double multiplying = tile / 64 * 2.0 * Math.max(variant.rows, 32);
        double fromCache = (tile + variant.rows) * 128 / 34.0;
        double fromMemory = tile * 128 / 19.0;
        double step = Math.max(multiplying, Math.max(fromCache, fromMemory));
        double results = tile * variant.rows * (kind == Kind.FLOAT ? 4 : 2) / 40.0;
        double exchange = variant.split > 1 ? 800 + tile * variant.rows * 4.0 * (variant.split - 1) / variant.split / 16 : 0;
        return waves * (Math.ceilDiv(Math.ceilDiv(k, BLOCK), variant.split) * step + results + 300) + exchange;
    }

    private Source source(Variant variant, Kind kind) {
        Map<String, String> macros = Map.of("TILE", "" + variant.tile, "ROWS", "" + variant.rows, "SPLIT", "" + variant.split, "STAGES",
                "" + variant.stages);
        return new Source("decode_product.cu", kind == Kind.ROTATED ? CudaKernels.both(macros, shape) : macros);
    }

    private void compile(List<Source> sources) {
        List<Source> missing = sources.stream().filter(source -> !modules.containsKey(source)).toList();
        List<KernelModule> loaded = KernelModule.load(device, missing);
        for (int i = 0; i < loaded.size(); i++) {
            modules.put(missing.get(i), loaded.get(i));
        }
    }

    private KernelModule module(Variant variant, Kind kind) {
        Source source = source(variant, kind);
        compile(List.of(source));
        return Objects.requireNonNull(modules.get(source));
    }

    @Override
    public void close() {
        modules.values().forEach(KernelModule::close);
        arena.close();
    }
}
