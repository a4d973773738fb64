package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.TandemException;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.TimelineRecorder;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.device.VirtualMemory;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;
import java.lang.foreign.MemorySegment;
import java.util.Arrays;
import java.util.List;
import java.util.function.Consumer;
import org.jspecify.annotations.Nullable;

/**
 * Generates on one rank: continuous batching over a paged KV cache, one {@link #step} at a time.
 *
 * <p>A step asks the {@link Scheduler} which tokens to compute, lays them out ({@link StepBatch}), runs the decoder over the arena's
 * weights, samples from the last row of each sequence that is complete so far, and hands the tokens back. Prefill and decoding are not
 * told apart: any step may hold chunks of prompts beside single tokens. Samples that end become {@link Completion}s.
 *
 * <p>What is sampled depends on the weights, the prompt, the parameters and the seed, and not on what else is in the batch, up to how
 * libtorch rounds for other shapes. Confined to its rank's thread. The owner closes it.
 */
public final class Generator implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(Generator.class.getName());

    private final ModelConfig config;
    private final TokenDecoder text;
    private final KvCache cache;
    private final BlockPool pool;
    private final Scheduler scheduler;
    /** Plans of the steps that run, {@code running} of them from {@code oldest} on, and of those to come. */
    private final StepPlan[] plans;

    private int oldest;
    private int running;
    private final StepExecutor executor;
    private final int[] sampled;
    private final float[] sampledLogprobs;
    private @Nullable Output[] outputs = new Output[0];
    private @Nullable TimelineRecorder recorder;
    private long submitted;
    private long seed;
    private long weightVersion;
    private long generatedTokens;
    private long computedTokens;
    private long steps;
    private long planNanos;
    private long beginNanos;
    private long waitNanos;
    private long acceptNanos;

    /** What is known of a sample beside the scheduler's table. */
    private final class Output {
        final Prompt prompt;
        final int sample;
        final float[] logprobs;
        final @Nullable TokenListener listener;
        final IncrementalDetokenizer detokenizer;
        final StopStrings stops;
        final StringBuilder shown = new StringBuilder();
        final boolean incremental;
        String unsent = "";
        int count;
        long firstVersion = -1;
        long lastVersion;

        Output(Prompt prompt, int sample, int capacity, @Nullable TokenListener listener) {
            this.prompt = prompt;
            this.sample = sample;
            this.listener = listener;
            logprobs = new float[capacity];
            detokenizer = new IncrementalDetokenizer(text, prompt.tokens().length);
            stops = new StopStrings(prompt.params().stopStrings());
            incremental = listener != null || !prompt.params().stopStrings().isEmpty();
        }

        /** Shows new text; true when a stop string is complete. */
        boolean show(int[] tokens, int tokenCount) {
            append(stops.append(detokenizer.append(tokens, tokenCount)));
            return stops.matched() != null;
        }

        void append(String piece) {
            shown.append(piece);
            unsent += listener == null ? "" : piece;
        }

        /** Tells the listener of the token before the latest, or at the end of the latest, which may bring held back text. */
        void send(int[] tokens, int index) {
            if (listener != null && index >= 0) {
                listener.accept(tokens[prompt.tokens().length + index], logprobs[index], unsent);
                unsent = "";
            }
        }

        String wholeText(int[] tokens, int tokenCount) {
            if (!incremental) {
                return text.decode(tokens, prompt.tokens().length, tokenCount);
            }
            if (stops.matched() == null) {
                append(stops.append(detokenizer.flush(tokens, tokenCount)));
                append(stops.flush());
            }
            return shown.toString();
        }
    }

    /**
     * Makes a generator whose KV cache sleeps.
     *
     * @param arena the weights, read in place
     * @param decoder of the model
     * @param memory the device's ledger
     * @param maxBlocks for how many KV pages addresses are reserved
     * @param text decodes tokens, special ones left out
     * @param seed of requests that bring none
     */
    public Generator(WeightArena arena, Decoder decoder, DeviceMemory memory, GeneratorOptions options, int maxBlocks,
            TokenDecoder text, List<Integer> eosTokenIds, long seed) {
        this(arena, decoder, memory, options, maxBlocks, text, eosTokenIds, seed, VirtualMemory.reserve(memory.device(),
                Math.multiplyExact(blockBytes(arena.layout().config(), arena.dtype(), options), maxBlocks)));
    }

    /** @param pages addresses for the KV pages; closed with this */
    Generator(WeightArena arena, Decoder decoder, DeviceMemory memory, GeneratorOptions options, int maxBlocks,
            TokenDecoder text, List<Integer> eosTokenIds, long seed, VirtualMemory pages) {
        this.config = arena.layout().config();
        this.text = text;
        this.seed = seed;
        cache = new KvCache(config, arena.dtype(), options.blockSize(), maxBlocks, pages, memory);
        pool = new BlockPool(options.blockSize(), 1);
        scheduler = new Scheduler(
                new SchedulerOptions(options.tokenBudget(), options.maxRunning(), options.prefillThreshold(), config.maxPositions(),
                        config.vocabSize(), 1, options.reserveFull(), options.prefixCaching(), eosTokenIds),
                pool);
        executor = executor(arena, decoder, memory, options);
        if (runsKernels()) {
            cache.readersSkipUnwritten();
        }
        plans = new StepPlan[executor.depth()];
        Arrays.setAll(plans, i -> new StepPlan(options.maxRunning()));
        sampled = new int[options.maxRunning()];
        sampledLogprobs = new float[options.maxRunning()];
    }

    /**
     * {@return bytes of buffers that a generator holds beside its KV pages; on the CPU an estimate}
     *
     * @param dtype of the weights
     */
    public static long workspaceBytes(ModelConfig config, Device device, DType dtype, GeneratorOptions options) {
        if (!device.isCpu() && CudaDecoder.obstacle(config, dtype, options) == null) {
            return CudaExecutor.bytes(config, options);
        }
        // Hidden states of a step and their widest products, and logits of all samples.
        long width = 4L * config.hiddenSize() + 3L * config.intermediateSize();
        return options.tokenBudget() * width * dtype.bytes() + 2L * Float.BYTES * options.maxRunning() * config.vocabSize();
    }

    /** Tandem's kernels where they can compute the model, else libtorch's operations. */
    private StepExecutor executor(WeightArena arena, Decoder decoder, DeviceMemory memory, GeneratorOptions options) {
        if (!memory.device().isCpu()) {
            String obstacle = CudaDecoder.obstacle(config, arena.dtype(), options);
            if (obstacle == null) {
                try {
                    return new CudaExecutor(arena, cache, memory, options);
                } catch (TandemException e) {
                    LOG.log(System.Logger.Level.WARNING, "generating with operations of libtorch, which is slower: {0}", e.getMessage());
                }
            } else {
                LOG.log(System.Logger.Level.INFO, "generating with operations of libtorch, which is slower: {0}", obstacle);
            }
        }
        return new LaneExecutor(arena, decoder, cache, memory.device(), options);
    }

    /** {@return the bytes of one KV page} */
    public static long blockBytes(ModelConfig config, DType dtype, GeneratorOptions options) {
        return KvCache.blockBytes(config, dtype, options.blockSize());
    }

    /**
     * Makes room for {@code blocks} KV pages. As many are backed with memory as were used before the last {@link #sleep}, the others when
     * a step needs them.
     *
     * @param blocks page 0 included, which pads
     * @throws TandemException when there is not enough memory; the KV cache sleeps on then
     */
    public void wake(int blocks) {
        cache.wake(blocks);
        pool.grow(blocks);
    }

    /** Tells how many KV pages the next {@link #wake} backs at once, whatever was used before. */
    public void expectBlocks(int blocks) {
        cache.expect(blocks);
    }

    /**
     * Has memory made free before KV pages need it.
     *
     * @param free bytes of KV pages that there is memory for as things are
     * @param makeRoom called on the rank's thread, once between a {@link #wake} and the next {@link #sleep}, before more are backed
     */
    public void askForRoom(long free, Runnable makeRoom) {
        cache.askForRoom(free, makeRoom);
    }

    /** Gives the KV memory back. Unfinished samples keep their tokens and are computed again after the next {@link #wake}. */
    public void sleep() {
        abandon();
        pool.shrink(1);
        cache.sleep();
    }

    /** {@return whether the KV cache is backed by memory} */
    public boolean awake() {
        return cache.blocks() > 0;
    }

    /** {@return the address of the first KV page} */
    public long kvAddress() {
        return cache.address();
    }

    /** Tells that the weights have changed: keys and values that older weights computed are not found any more. */
    public void weightVersion(long version) {
        if (version != weightVersion) {
            weightVersion = version;
            pool.setNamespace(version);
        }
    }

    /** Tells that the weights have changed within their version. Unfinished samples keep their tokens and are computed again. */
    public void forgetPrefixes() {
        abandon();
    }

    /** Sets the seed of requests that bring none. */
    public void seed(long value) {
        seed = value;
    }

    /**
     * Queues a prompt.
     *
     * @param listener told of the first sample's tokens one by one, or null
     * @return the request's number, for {@link #abort}
     * @throws IllegalArgumentException when the prompt can never run; the message has the numbers
     */
    public long submit(Prompt prompt, @Nullable TokenListener listener) {
        cache.requireAwake();
        SamplingParams params = prompt.params();
        requireComputable(params);
        long[] keys = new long[params.n()];
        for (int i = 0; i < keys.length; i++) {
            keys[i] = CounterRandom.bits(prompt.index(), i, 0);
        }
        long request = ++submitted;
        int slot = scheduler.submit(request, prompt.tokens(), params, keys);
        RequestTable requests = scheduler.requests();
        outputs = requests.capacity() > outputs.length ? Arrays.copyOf(outputs, requests.capacity()) : outputs;
        for (int i = 0; slot != RequestTable.NONE; i++) {
            int capacity = requests.limit[slot] - prompt.tokens().length;
            outputs[slot] = new Output(prompt, i, capacity, i == 0 ? listener : null);
            slot = requests.nextSibling[slot];
        }
        return request;
    }

    /**
     * Checks that a prompt can run.
     *
     * @throws IllegalArgumentException when it never can; the message has the numbers
     */
    public void validate(Prompt prompt) {
        SamplingParams params = prompt.params();
        scheduler.validate(prompt.index(), prompt.tokens(), prompt.tokens().length, params);
        requireComputable(params);
    }

    private void requireComputable(SamplingParams params) {
        executor.validate(params, params.stopTokenIds().size() + (params.ignoreEos() ? 0 : config.eosTokenIds().size()));
    }

    /** Ends a request; its samples come out of the next step with what they have. */
    public void abort(long request) {
        scheduler.abort(request);
    }

    /** {@return whether a sample waits, runs, or has ended and was not handed out} */
    public boolean hasWork() {
        return scheduler.hasWork() || scheduler.requests().used() > 0;
    }

    /**
     * One step: computes, samples, and hands out the samples that ended.
     *
     * <p>When memory for KV pages that there should be room for cannot be had, the step fails. To make do with the pages that there are
     * would be quieter, but samples that do not fit would end early, and who else uses the device would decide which.
     *
     * @param finished receives completions on this thread; it may submit new prompts
     * @throws TandemException when there is no memory for KV pages; the samples keep their tokens and are computed again by the next step
     */
    public void step(Consumer<Completion> finished) {
        cache.requireAwake();
        try {
            while (running < executor.depth() && schedule()) {
                StepPlan plan = plans[(oldest + running++) % plans.length];
                computedTokens += plan.totalTokens;
                long start = System.nanoTime();
                cache.require(pool.extent());
                try (Span span = recorder == null ? Span.NONE : recorder.device(plan.decodesOnly() ? "decoding" : "prefill")) {
                    executor.begin(plan, scheduler.requests(), seed);
                }
                beginNanos += System.nanoTime() - start;
            }
            if (running > 0) {
                long start = System.nanoTime();
                executor.end(plans[oldest].sampleCount, sampled, sampledLogprobs);
                waitNanos += System.nanoTime() - start;
                steps++;
            }
        } catch (RuntimeException | Error e) {
            abandon();
            throw e;
        }
        if (running > 0) {
            StepPlan plan = plans[oldest];
            oldest = (oldest + 1) % plans.length;
            running--;
            long start = System.nanoTime();
            scheduler.complete(plan, sampled);
            accept(plan);
            acceptNanos += System.nanoTime() - start;
        }
        for (int slot = scheduler.pollFinished(); slot != RequestTable.NONE; slot = scheduler.pollFinished()) {
            Completion completion = completion(slot);
            scheduler.release(slot);
            finished.accept(completion);
        }
    }

    /** Records the steps from now on, or no longer; on the rank's thread. */
    public void record(@Nullable TimelineRecorder into) {
        recorder = into;
    }

    private boolean schedule() {
        long start = System.nanoTime();
        boolean some = scheduler.schedule(plans[(oldest + running) % plans.length]);
        planNanos += System.nanoTime() - start;
        return some;
    }

    /** After a failure: no step runs any more, and what they computed is not used. */
    private void abandon() {
        running = 0;
        executor.abandon();
        scheduler.abandonSteps();
    }

    private void accept(StepPlan plan) {
        RequestTable requests = scheduler.requests();
        boolean nonFinite = false;
        for (int i = 0; i < plan.sampleCount; i++) {
            nonFinite |= sampled[i] == Sampler.NON_FINITE;
            if (!plan.accepted[i]) {
                continue;
            }
            int slot = plan.sampleSlot[i];
            Output output = output(slot);
            output.send(requests.tokens[slot], output.count - 1);
            output.logprobs[output.count++] = sampledLogprobs[i];
            output.lastVersion = weightVersion;
            output.firstVersion = output.firstVersion < 0 ? weightVersion : output.firstVersion;
            generatedTokens++;
            if (output.incremental && output.show(requests.tokens[slot], requests.tokenCount[slot])) {
                String stop = output.stops.matched();
                scheduler.finish(slot, requests.epoch[slot], new Finish.StopString(stop == null ? "" : stop));
            }
        }
        if (nonFinite) {
            // Keys and values that are not finite would spoil later users of their pages, even behind a mask.
            abandon();
            cache.clear();
        }
    }

    private Completion completion(int slot) {
        RequestTable requests = scheduler.requests();
        Output output = output(slot);
        outputs[slot] = null;
        int[] tokens = requests.tokens[slot];
        int count = requests.tokenCount[slot];
        Finish finish = requests.finish[slot];
        String whole = output.wholeText(tokens, count);
        output.send(tokens, output.count - 1);
        return new Completion(output.prompt.index(), output.sample, output.prompt.text(), output.prompt.tokens(),
                Arrays.copyOfRange(tokens, output.prompt.tokens().length, count), Arrays.copyOf(output.logprobs, output.count),
                whole, finish == null ? new Finish.Aborted() : finish,
                Math.max(0, requests.cachedTokens[slot]),
                new Completion.WeightVersions(output.firstVersion, output.lastVersion));
    }

    private Output output(int slot) {
        Output output = outputs[slot];
        if (output == null) {
            throw new IllegalStateException("slot " + slot + " has no output");
        }
        return output;
    }

    /** {@return tokens sampled so far} */
    public long generatedTokens() {
        return generatedTokens;
    }

    /** {@return tokens run through the model so far, prompts and recomputed ones included} */
    public long computedTokens() {
        return computedTokens;
    }

    /** {@return whether steps run in Tandem's own kernels, and not in libtorch's operations} */
    public boolean runsKernels() {
        return executor instanceof CudaExecutor;
    }

    /**
     * Where this rank's thread spent its time in steps, since the generator was made.
     *
     * @param steps that have ended
     * @param plan seconds in the scheduler
     * @param begin seconds mapping pages, laying out and launching; on the CPU also computing
     * @param waiting seconds waiting for the device's results
     * @param accept seconds taking tokens in
     */
    public record StepTimes(long steps, double plan, double begin, double waiting, double accept) {
        /** {@return what was spent since {@code earlier}} */
        public StepTimes since(StepTimes earlier) {
            return new StepTimes(steps - earlier.steps, plan - earlier.plan, begin - earlier.begin, waiting - earlier.waiting,
                    accept - earlier.accept);
        }
    }

    /** {@return where time went} */
    public StepTimes times() {
        return new StepTimes(steps, planNanos / 1e9, beginNanos / 1e9, waitNanos / 1e9, acceptNanos / 1e9);
    }

    /**
     * Where a GPU's time went in steps; zeros where the host computes.
     *
     * @param idle seconds in which it had nothing to do between two steps
     * @param input seconds copying what steps need to the device
     * @param forward seconds from embeddings to logits
     * @param sampling seconds drawing tokens and computing their log-probs
     * @param readBack seconds copying tokens and log-probs to the host
     */
    public record DeviceTimes(double idle, double input, double forward, double sampling, double readBack) {}

    /**
     * Measures where the device's time goes, which costs a few microseconds a step, or no longer does. No sample may be under way.
     *
     * @return where it went since measuring began
     */
    public DeviceTimes measureDevice(boolean on) {
        double[] seconds = executor.measure(on);
        return new DeviceTimes(seconds[0], seconds[1], seconds[2], seconds[3], seconds[4]);
    }

    /** {@return how often a sample lost its KV pages to others} */
    public long preemptions() {
        return scheduler.preemptionCount();
    }

    /** Drops all requests and samples, after a failure. */
    public void reset() {
        RequestTable requests = scheduler.requests();
        for (int slot = 0; slot < requests.capacity(); slot++) {
            if (requests.state[slot] != RequestTable.State.FREE && requests.state[slot] != RequestTable.State.FINISHED) {
                scheduler.finish(slot, requests.epoch[slot], new Finish.Aborted());
            }
        }
        for (int slot = scheduler.pollFinished(); slot != RequestTable.NONE; slot = scheduler.pollFinished()) {
            outputs[slot] = null;
            scheduler.release(slot);
        }
    }

    @Override
    public void close() {
        executor.close();
        cache.close();
    }
}
