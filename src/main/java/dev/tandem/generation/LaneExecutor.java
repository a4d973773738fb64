package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Gradients;
import dev.tandem.device.Lanes;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.Threads;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;
import java.lang.foreign.MemorySegment;
import org.jspecify.annotations.Nullable;

/**
 * Runs steps with libtorch's operations, on the CPU and as the reference for other devices.
 *
 * <p>On the CPU the rows of a step are shared out over {@link Lanes}, about the same number of tokens to each core, a long chunk cut in
 * two where needed. Lanes meet once in each layer, when all keys and values are written and before any row attends. A step of a few
 * tokens is not cut: then the weights are what is read, and the cores share out each operation.
 */
final class LaneExecutor implements StepExecutor {
    /** Steps of fewer tokens are computed operation by operation on all cores. */
    private static final int MIN_TOKENS_PER_LANE = 4;

    private static final int[] NONE_MASKED = new int[0];

    private final ModelConfig config;
    private final WeightArena arena;
    private final Decoder decoder;
    private final KvCache cache;
    private final Device device;
    private final Lanes lanes;
    private final Lane[] shares;
    private final Lane whole;
    private final int[] sampled;
    private final float[] sampledLogprobs;

    LaneExecutor(WeightArena arena, Decoder decoder, KvCache cache, Device device, GeneratorOptions options) {
        config = arena.layout().config();
        this.arena = arena;
        this.decoder = decoder;
        this.cache = cache;
        this.device = device;
        lanes = new Lanes(device.isCpu() ? Threads.perOperation() : 1);
        shares = new Lane[lanes.count()];
        for (int i = 0; i < shares.length; i++) {
            shares[i] = new Lane(options);
        }
        whole = shares[0];
        sampled = new int[options.maxRunning()];
        sampledLogprobs = new float[options.maxRunning()];
    }

    @Override
    public int depth() {
        return 1;
    }

    @Override
    public void end(int count, int[] tokens, float[] logprobs) {
        System.arraycopy(sampled, 0, tokens, 0, count);
        System.arraycopy(sampledLogprobs, 0, logprobs, 0, count);
    }

    @Override
    public void abandon() {}

    @Override
    public void begin(StepPlan plan, RequestTable requests, long seed) {
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            cache.copy(plan.copySource, plan.copyTarget, plan.copyCount);
            if (shares.length == 1 || plan.totalTokens < MIN_TOKENS_PER_LANE * shares.length) {
                whole.prepare(plan, requests);
                whole.run(plan, requests, seed, () -> {});
                return;
            }
            for (int i = 0; i < shares.length; i++) {
                plan.share(shares[i].part, i, shares.length);
                shares[i].prepare(shares[i].part, requests);
            }
            lanes.run(i -> {
                try (Gradients none = Gradients.disabled(); Scope own = Scope.open()) {
                    shares[i].run(shares[i].part, requests, seed, lanes::meet);
                }
            });
        }
    }

    /** One core's part of a step. */
    private final class Lane implements AutoCloseable {
        final StepPlan part;
        final StepBatch batch;
        final Sampler sampler = new Sampler(config.vocabSize());
        Decoder.@Nullable Placement placement;

        Lane(GeneratorOptions options) {
            part = new StepPlan(options.maxRunning());
            batch = new StepBatch(options.tokenBudget(), options.maxRunning(), options.blockSize());
        }

        /** What all lanes share the tables of, on the rank's thread. */
        void prepare(StepPlan plan, RequestTable requests) {
            batch.fill(plan, requests);
            placement = decoder.place(batch.positions(device), batch.limit());
        }

        void run(StepPlan plan, RequestTable requests, long seed, Runnable written) {
            Tensor hidden = forward(plan, requests, written);
            if (hidden != null) {
                sample(hidden, plan, requests, seed);
            }
        }

        /** The states of the rows to sample, [wanted, embedding size], or null when no row is sampled in this step. */
        private @Nullable Tensor forward(StepPlan plan, RequestTable requests, Runnable written) {
            Decoder.Placement places = java.util.Objects.requireNonNull(placement);
            PagedAttention attention =
                    new PagedAttention(config, cache, plan, batch, requests, device, arena.dtype(), written);
            boolean some = batch.wantedCount() > 0;
            Tensor wanted = some && batch.wantedCount() < batch.tokenCount() ? batch.wanted(device) : null;
            Tensor x = decoder.embed(arena.embedding(), batch.tokens(device), places);
            for (int layer = 0; layer < config.layers(); layer++) {
                try (Scope inner = Scope.open()) {
                    boolean last = layer == config.layers() - 1;
                    x = inner.escape(decoder.layer(layer, arena.layer(layer), x, places, attention, last ? wanted : null));
                }
            }
            if (!some) {
                return null;
            }
            // With every token wanted the rows are still in the batch's order, and not in the order of the plan's rows.
            return decoder.finish(arena.head(), wanted == null ? x.indexSelect(0, batch.wanted(device)) : x);
        }

        private void sample(Tensor hidden, StepPlan plan, RequestTable requests, long seed) {
            Tensor logits = hidden.linearInFloat(arena.logitMatrix());
            double[] logSums = logits.logSumExp(-1).toDoubles();
            MemorySegment rows = logits.on(Device.cpu()).memory();
            for (int i = 0; i < plan.sampleCount; i++) {
                int slot = plan.sampleSlot[i];
                SamplingParams params = requests.params[slot];
                int row = batch.wantedIndex(plan.sampleRow[i]);
                int generated = plan.samplePosition[i] - requests.promptLength[slot];
                int[] masked = generated < params.minTokens() ? requests.stopIds[slot] : NONE_MASKED;
                Long own = params.seed();
                double uniform = CounterRandom.uniform(own == null ? seed : own, requests.sampleKey[slot], plan.samplePosition[i]);
                int pair = plan.samplePair[i];
                sampled[pair] = sampler.sample(rows, 4L * config.vocabSize() * row, params, requests.tokens[slot],
                        plan.samplePosition[i], masked, uniform, logSums[row]);
                sampledLogprobs[pair] = (float) sampler.logprob();
            }
        }

        @Override
        public void close() {
            batch.close();
        }
    }

    @Override
    public void close() {
        lanes.close();
        for (Lane share : shares) {
            share.close();
        }
    }
}
