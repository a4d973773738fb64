package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.device.TimelineRecorder;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.model.Decoder;
import dev.tandem.model.WeightArena;
import dev.tandem.parallel.Collectives;
import java.util.List;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/** One rank's part of training: its model, its gradients, its slice of the optimizer. Confined to the rank's thread. */
public final class RankTrainer implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(RankTrainer.class.getName());

    private final WeightArena arena;
    private final Collectives collectives;
    private final DeviceMemory memory;
    private final TrainerOptions options;
    private final ActivationMemory activations;
    private final long seed;
    private final int hostGroups;
    private final Decoder decoder;
    /** Its kernels may have to be compiled, so it is made when training begins: who only generates does not wait for it. */
    private @Nullable TrainingModel model;
    private final GradientShard gradients;
    private final BatchPacker packer;
    private @Nullable ShardedAdamW optimizer;
    private @Nullable TimelineRecorder recorder;

    /**
     * @param arena the weights that are read and written
     * @param decoder of the model
     * @param collectives of this rank
     * @param memory the device's ledger
     * @param room for activations, where the options leave it to the memory plan
     * @param seed by which masters are drawn and BFLOAT16 moments rounded
     * @param hostGroups of how many groups a GPU's optimizer state stays in host memory
     */
    public RankTrainer(WeightArena arena, Decoder decoder, Collectives collectives, DeviceMemory memory, TrainerOptions options,
            long room, long seed, int hostGroups) {
        this.seed = seed;
        this.hostGroups = hostGroups;
        this.arena = arena;
        this.collectives = collectives;
        this.memory = memory;
        this.options = options;
        this.decoder = decoder;
        activations = new ActivationMemory(arena.layout().config(), arena.dtype(), memory.device(), options, room);
        gradients = new GradientShard(arena.layout(), collectives, memory);
        packer = new BatchPacker(memory.device());
    }

    private TrainingModel model() {
        TrainingModel current = model;
        if (current == null) {
            current = make();
            model = current;
        }
        return current;
    }

    private TrainingModel make() {
        if (ManualModel.obstacle(arena.layout().config(), arena.dtype(), memory.device()) == null) {
            try {
                return new ManualModel(arena, decoder, memory, activations);
            } catch (TandemException e) {
                LOG.log(System.Logger.Level.WARNING, "training by automatic differentiation, which is slower: {0}", e.getMessage());
            }
        }
        return new LayerwiseModel(arena, decoder, memory, activations);
    }

    /** {@return of how many tokens this rank's micro-batches should be when the longest sequence is of that many} */
    int microBatchTokens(int longest) {
        return activations.microBatchTokens(longest);
    }

    /**
     * The log-probability of every trained token under the arena or other weights of the same model.
     *
     * @return for each sequence an array as long as its tokens, zero where nothing is trained
     */
    float[][] logprobs(List<TrainingSequence> sequences, @Nullable WeightArena other, double temperature) {
        try (Scope scope = Scope.open()) {
            PackedBatch batch = packer.pack(List.of(sequences)).getFirst();
            Tensor found;
            try (Span span = recorded("log-probs")) {
                found = model().forward(batch, other == null ? arena : other, temperature).logprob();
            }
            float[] flat = found.toFloats();
            float[][] result = new float[sequences.size()][];
            int n = 0;
            for (int s = 0; s < result.length; s++) {
                boolean[] trained = sequences.get(s).trained();
                result[s] = new float[trained.length];
                for (int i = 0; i < trained.length; i++) {
                    result[s][i] = trained[i] ? flat[n++] : 0;
                }
            }
            return result;
        } catch (RuntimeException e) {
            throw memory.explained("computing log-probabilities", e);
        }
    }

    /**
     * Accumulates gradients over micro-batches and, if they are finite, updates the weights.
     *
     * @param microBatches this rank's; every rank takes part in {@code rounds} rounds of reductions
     * @return what the step will have come to, to be asked on this thread before the next but one is begun
     */
    Supplier<Outcome> step(List<List<TrainingSequence>> microBatches, int rounds, TokenLoss loss, double temperature, double lr) {
        try (Scope step = Scope.open()) {
            List<PackedBatch> batches;
            try (Span span = recorder == null ? Span.NONE : recorder.host("packing")) {
                batches = packer.pack(microBatches);
            }
            gradients.clear();
            Tensor total = Tensor.zeros(memory.device(), DType.FLOAT64, 1);
            for (int i = 0; i < rounds; i++) {
                try (Scope scope = Scope.open(); Span span = recorded("forward and backward")) {
                    model().forwardBackward(i < batches.size() ? batches.get(i) : null, loss, temperature, gradients, total);
                }
            }
            try (Span span = recorded("optimizer")) {
                return optimizer().step(gradients, total, lr);
            }
        } catch (RuntimeException e) {
            throw memory.explained("training", e);
        } finally {
            releaseBuckets();
        }
    }

    private void releaseBuckets() {
        if (model != null) {
            model.releaseBuckets();
        }
    }

    private Span recorded(String name) {
        return recorder == null ? Span.NONE : recorder.device(name);
    }

    /** Records the steps from now on, or no longer; on the rank's thread. */
    public void record(@Nullable TimelineRecorder into) {
        recorder = into;
    }

    /**
     * What all ranks agree on after a step.
     *
     * @param loss summed over the ranks
     * @param norm of the gradients before clipping
     * @param applied whether the weights were updated
     */
    record Outcome(double loss, double norm, boolean applied) {}

    private ShardedAdamW optimizer() {
        ShardedAdamW current = optimizer;
        if (current == null) {
            current = new ShardedAdamW(arena, collectives, memory, options, seed, hostGroups);
            optimizer = current;
        }
        return current;
    }

    /** Takes note that the arena's weights were replaced from outside. */
    public void weightsReplaced() {
        if (optimizer != null) {
            optimizer.refreshMaster();
        }
    }

    /** Gives back what only a training phase needs; moments and masters stay. */
    public void rest() {
        gradients.release();
        releaseBuckets();
    }

    /** Moves the optimizer's state that is on the device to host memory, where it waits for the next step. */
    public void park() {
        if (optimizer != null) {
            optimizer.park();
        }
    }

    @Override
    public void close() {
        if (model != null) {
            model.close();
        }
        packer.close();
        gradients.close();
        if (optimizer != null) {
            optimizer.close();
        }
    }
}
