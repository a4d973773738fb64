package dev.tandem.generation;

import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_INT;

import dev.tandem.device.Cuda;
import dev.tandem.device.CudaEvent;
import dev.tandem.device.CudaGraph;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Gradients;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.TuningCache;
import dev.tandem.generation.StepLayout.Field;
import dev.tandem.generation.StepTimeline.Part;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;
import java.lang.foreign.MemorySegment;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import org.jspecify.annotations.Nullable;

/**
 * Runs steps on a GPU while the host plans the next one.
 *
 * <p>One stream carries everything: the copy of a step's input, its kernels, the copy of its results. The host runs one step ahead: it
 * names a token that it does not know yet by the pair of the step before that samples it, and reads results one step late.
 *
 * <p>Decoding steps are launched as CUDA graphs. A graph has a fixed number of rows, so there is one for each of a few sizes (a step takes
 * the next larger one; padding rows do nothing), captured when its size is met first. Where there are several ways to multiply, a graph of
 * each is timed then, unless the {@link TuningCache} knows which is the fastest for a size like it. All graphs share the buffers of
 * {@link CudaDecoder}. Graphs hold addresses, and those of weights, pages and buffers never change, so graphs survive sleep,
 * wake and optimizer steps. Sampling follows outside the graph, because which kernels it needs depends on the requests.
 */
final class CudaExecutor implements StepExecutor {
    private static final System.Logger LOG = System.getLogger(CudaExecutor.class.getName());
    private static final int DEPTH = 2;
    private static final int TILE = 512;
    /** How often the ways to multiply are timed. */
    private static final int TURNS = 3;
    private static final float NEARLY = 1.03f;

    /** Blocks that keep a GPU busy while it reads logits. */
    private static final int SAMPLING_BLOCKS = 1056;

    private final Device device;
    private final DeviceMemory memory;
    private final KvCache cache;
    private final ModelConfig config;
    private final CudaStepInput input;
    private final CudaDecoder decoder;
    private final int maxRows;

    /** Closed with this, or when it cannot be completed. */
    private final Deque<Runnable> owned = new ArrayDeque<>();

    private final TuningCache choices;
    private final CudaKernels kernels;
    private final Tensor scaledSums;
    private final Tensor rawSums;
    private final Tensor best;
    private final Tensor results;
    private final Tensor lastToken;
    private Tensor seen;

    private final Map<Integer, CudaGraph> graphs = new TreeMap<>();
    private final PinnedMemory[] resultHalves = new PinnedMemory[DEPTH];
    private final CudaEvent[] done = new CudaEvent[DEPTH];
    private int begun;
    private int ended;
    private @Nullable StepTimeline timeline;
    private boolean penalises;

    CudaExecutor(WeightArena arena, KvCache cache, DeviceMemory memory, GeneratorOptions options) {
        this.memory = memory;
        this.cache = cache;
        device = memory.device();
        config = arena.layout().config();
        choices = TuningCache.of(device);
        maxRows = options.maxRunning();
        int tiles = Math.ceilDiv(config.vocabSize(), TILE);
        try (Scope scope = Scope.open()) {
            kernels = new CudaKernels(device, config, options, CudaDecoder.split(config));
            owned.push(kernels::close);
            scaledSums = own(Tensor.empty(device, DType.FLOAT32, 2L * maxRows * tiles));
            rawSums = own(Tensor.empty(device, DType.FLOAT32, 2L * maxRows * tiles));
            best = own(Tensor.empty(device, DType.FLOAT32, 2L * (SAMPLING_BLOCKS + maxRows)));
            results = own(Tensor.zeros(device, DType.INT32, 2L * maxRows));
            lastToken = own(Tensor.zeros(device, DType.INT32, maxRows));
            seen = Tensor.zeros(device, DType.INT32, 1).keep();
            owned.push(() -> seen.close());
            input = new CudaStepInput(device, options, tableWidth(config, options), CudaDecoder.tileQueries(config), DEPTH);
            owned.push(input::close);
            decoder = new CudaDecoder(arena, cache, device, options, kernels, input, lastToken);
            owned.push(decoder::close);
            for (int i = 0; i < DEPTH; i++) {
                PinnedMemory half = new PinnedMemory(device, 8L * maxRows);
                owned.push(half::close);
                resultHalves[i] = half;
                CudaEvent event = new CudaEvent(device, false);
                owned.push(event::close);
                done[i] = event;
            }
        } catch (RuntimeException | Error e) {
            owned.forEach(Runnable::run);
            throw e;
        }
        memory.add(Use.WORKSPACE, bytes(config, options));
    }

    private Tensor own(Tensor made) {
        Tensor kept = made.keep();
        owned.push(kept::close);
        return kept;
    }

    /** {@return bytes that an executor holds on the device, known from the sizes alone} */
    static long bytes(ModelConfig config, GeneratorOptions options) {
        long rows = options.maxRunning();
        long sums = 4 * rows * Math.ceilDiv(config.vocabSize(), TILE) + 2 * (SAMPLING_BLOCKS + rows) + 3 * rows + 1;
        return CudaDecoder.bytes(config, options) + Float.BYTES * sums
                + new StepLayout(options, tableWidth(config, options), CudaDecoder.tileQueries(config)).bytes();
    }

    private static int tableWidth(ModelConfig config, GeneratorOptions options) {
        return Math.ceilDiv(config.maxPositions(), options.blockSize()) + 1;
    }

    /** A repetition penalty needs to know all tokens before, so such steps are planned when their tokens are known. */
    @Override
    public int depth() {
        return penalises ? 1 : DEPTH;
    }

    @Override
    public void validate(SamplingParams params, int stopTokens) {
        if (params.minTokens() > 0 && stopTokens > StepLayout.MAX_MASKED) {
            throw new IllegalArgumentException("sampling parameter minTokens is " + params.minTokens() + " with " + stopTokens
                    + " tokens that stop; on a GPU at most " + StepLayout.MAX_MASKED + " can be held back");
        }
    }

    @Override
    public void begin(StepPlan plan, RequestTable requests, long seed) {
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            mark(Part.IDLE);
            cache.copy(plan.copySource, plan.copyTarget, plan.copyCount);
            input.fill(plan, requests, seed);
            mark(Part.INPUT);
            if (input.layout().decodesOnly()) {
                decode();
            } else {
                StepLayout step = input.layout();
                decoder.forward(step.tokenCount(), step.decodeRows(), step.tiles(), step.wantedCount());
            }
            mark(Part.FORWARD);
            if (plan.sampleCount > 0) {
                sample(plan, requests);
            }
            mark(Part.SAMPLING);
            int half = begun++ % DEPTH;
            resultHalves[half].copyFrom(device, results.address(), 8L * maxRows);
            mark(Part.READ_BACK);
            done[half].record();
        }
    }

    private void mark(Part part) {
        if (timeline != null) {
            timeline.ends(part);
        }
    }

    @Override
    public double[] measure(boolean on) {
        double[] seconds = new double[Part.values().length];
        if (timeline != null) {
            seconds = timeline.seconds();
            timeline.close();
        }
        timeline = on ? new StepTimeline(device, DEPTH) : null;
        return seconds;
    }

    private void decode() {
        int size = size(input.layout().rows());
        CudaGraph graph = graphs.get(size);
        if (graph == null) {
            // Once without a graph: then libtorch has allocated what it needs.
            decoder.decode(size, decoder.ways(size).getFirst());
            graph = fastest(size);
            graphs.put(size, graph);
        }
        graph.launch();
    }

    /** Captures a step of that many rows in the way to multiply that is the fastest. */
    private CudaGraph fastest(int size) {
        List<CudaProducts.Way> ways = decoder.ways(size);
        String question = "step of " + CudaProducts.like(size) + " of " + ways.size() + " " + config;
        int known = ways.size() == 1 ? 0 : known(choices.find(question), ways.size());
        if (known >= 0) {
            choices.save();
            return captured(size, ways.get(known));
        }
        List<CudaGraph> candidates = new ArrayList<>();
        try {
            ways.forEach(way -> candidates.add(captured(size, way)));
            int best = indexOfFastest(candidates);
            choices.keep(question, "" + best);
            choices.save();
            return candidates.remove(best);
        } finally {
            candidates.forEach(CudaGraph::close);
        }
    }

    /**
     * {@return the number of the graph that takes the least time} A step may be computed several times: its results depend on nothing that
     * it changes. Those that are nearly as fast as the fastest take turns, as the clock drifts by more than they may be apart.
     */
    private int indexOfFastest(List<CudaGraph> graphs) {
        float[] times = new float[graphs.size()];
        int best = 0;
        for (int turn = 0; turn < TURNS; turn++) {
            float bar = NEARLY * times[best];
            for (int i = 0; i < times.length; i++) {
                if (turn == 0 || times[i] <= bar) {
                    float time = graphs.get(i).milliseconds(device);
                    times[i] = turn == 0 ? time : Math.min(time, times[i]);
                }
            }
            for (int i = 0; i < times.length; i++) {
                best = times[i] < times[best] ? i : best;
            }
        }
        LOG.log(System.Logger.Level.DEBUG, "ms of a step in each way to multiply: {0}", Arrays.toString(times));
        return best;
    }

    /** {@return the number that was kept, or -1} */
    private static int known(@Nullable String kept, int count) {
        try {
            int number = kept == null ? -1 : Integer.parseInt(kept);
            return number < count ? number : -1;
        } catch (NumberFormatException e) {
            return -1;
        }
    }

    private CudaGraph captured(int size, CudaProducts.Way way) {
        return CudaGraph.capture(device, () -> decoder.decode(size, way));
    }

    /** The number of rows of the graph that serves a step: a power of two up to 8, then at most a quarter more, in units of 8. */
    private int size(int rows) {
        if (rows <= 8) {
            return Math.min(maxRows, Integer.highestOneBit(2 * rows - 1));
        }
        int unit = Math.max(8, Integer.highestOneBit(rows - 1) / 4);
        return Math.min(maxRows, Math.ceilDiv(rows, unit) * unit);
    }

    private void sample(StepPlan plan, RequestTable requests) {
        int pairs = plan.sampleCount;
        int slices = Math.clamp(SAMPLING_BLOCKS / pairs, 1, Math.ceilDiv(config.vocabSize(), 4 * TILE));
        penalises = input.layout().penalises();
        if (penalises) {
            mark(plan, requests);
        }
        Kernel partial = input.layout().edits() ? kernels.samplePartialEdited : kernels.samplePartial;
        int vocabulary = config.vocabSize();
        long tokens = results.address();
        long logprobs = results.address() + 4L * maxRows;
        partial.launch(device, new Grid(pairs, slices, 128, 1, 0), input.address(Field.PAIRS), input.countAddress(StepLayout.PAIRS),
                decoder.logitsAddress(), decoder.logitStride(), vocabulary, seen.address(), input.address(Field.MASKED),
                scaledSums.address(), rawSums.address(), best.address());
        if (input.layout().truncates()) {
            kernels.sampleTruncated.launch(device, Grid.of(pairs, 512), input.address(Field.PAIRS), input.countAddress(StepLayout.PAIRS),
                    decoder.logitsAddress(), decoder.logitStride(), vocabulary, seen.address(), input.address(Field.MASKED),
                    scaledSums.address(), rawSums.address(), tokens, logprobs, lastToken.address());
        }
        kernels.sampleFinish.launch(device, Grid.of(pairs, 128), input.address(Field.PAIRS), input.countAddress(StepLayout.PAIRS),
                decoder.logitsAddress(), decoder.logitStride(), vocabulary, seen.address(), scaledSums.address(), rawSums.address(),
                best.address(), slices, tokens, logprobs, lastToken.address());
    }

    /** Sets the bits of every token that a sample with a repetition penalty has seen; its slot is the pair's number. */
    private void mark(StepPlan plan, RequestTable requests) {
        int words = Math.ceilDiv(config.vocabSize(), Integer.SIZE);
        if (seen.elements() == 1) {
            seen.close();
            seen = Tensor.zeros(device, DType.INT32, (long) maxRows * words).keep();
            memory.add(Use.WORKSPACE, seen.elements() * Integer.BYTES);
        }
        int pairs = plan.sampleCount;
        int[] starts = new int[pairs + 1];
        for (int i = 0; i < pairs; i++) {
            boolean marked = requests.params[plan.sampleSlot[i]].repetitionPenalty() != 1;
            starts[i + 1] = starts[i] + (marked ? requests.tokenCount[plan.sampleSlot[i]] : 0);
        }
        // One vector: the number of pairs, their slots, where their tokens begin and end, the tokens.
        Tensor host = Tensor.empty(Device.cpu(), DType.INT32, 1 + pairs + pairs + 1 + starts[pairs]);
        MemorySegment list = host.memory();
        list.setAtIndex(JAVA_INT, 0, pairs);
        for (int i = 0; i < pairs; i++) {
            list.setAtIndex(JAVA_INT, 1 + i, i);
            int count = starts[i + 1] - starts[i];
            MemorySegment.copy(requests.tokens[plan.sampleSlot[i]], 0, list, JAVA_INT, 4L * (2 + 2 * pairs + starts[i]), count);
        }
        MemorySegment.copy(starts, 0, list, JAVA_INT, 4L * (1 + pairs), pairs + 1);
        Tensor marks = host.on(device);
        kernels.markSeen.launch(device, Grid.of(pairs, 256), seen.address(), config.vocabSize(), marks.address() + 4,
                marks.address() + 4L * (1 + pairs), marks.address() + 4L * (2 + 2 * pairs), marks.address());
    }

    @Override
    public void end(int count, int[] tokens, float[] logprobs) {
        int half = ended++ % DEPTH;
        done[half].await();
        if (timeline != null) {
            timeline.stepEnded();
        }
        MemorySegment found = resultHalves[half].segment();
        MemorySegment.copy(found, JAVA_INT, 0, tokens, 0, count);
        MemorySegment.copy(found, JAVA_FLOAT, 4L * maxRows, logprobs, 0, count);
    }

    @Override
    public void abandon() {
        Cuda.synchronize(device);
        ended = begun;
        if (timeline != null) {
            timeline.abandon();
        }
    }

    @Override
    public void close() {
        Cuda.synchronize(device);
        measure(false);
        graphs.values().forEach(CudaGraph::close);
        owned.forEach(Runnable::run);
        memory.add(Use.WORKSPACE, -memory.held(Use.WORKSPACE));
    }
}
