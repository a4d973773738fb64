package dev.tandem;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.generation.Generator;
import dev.tandem.generation.TokenDecoder;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Rank;
import dev.tandem.training.RankTrainer;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.List;
import java.util.function.Consumer;
import org.jspecify.annotations.Nullable;

/**
 * What one rank owns: its copy of the weights and what works on them. {@link HybridEngine#onEachRank} hands it to a user's function,
 * on the rank's thread, where alone it may be used.
 */
public final class ModelRank implements AutoCloseable {
    private final Rank rank;
    private final DeviceMemory memory;
    private final WeightArena arena;
    private final Decoder decoder;
    private final Generator generator;
    private final RankTrainer trainer;
    private @Nullable WeightArena reference;

    ModelRank(Rank rank, ModelConfig config, EngineOptions options, MemoryPlan plan, TokenDecoder text, List<Integer> eosTokenIds,
            Consumer<WeightArena> fill) {
        this.rank = rank;
        memory = new DeviceMemory(rank.device());
        Deque<Runnable> made = new ArrayDeque<>();
        try {
            arena = new WeightArena(new WeightLayout(config, rank.count()), rank.device(), options.dtype());
            made.push(arena::close);
            fill.accept(arena);
            memory.add(Use.WEIGHTS, arena.bytes());
            decoder = new Decoder(config, rank.device(), options.dtype());
            made.push(decoder::close);
            generator = new Generator(arena, decoder, memory, options.generation(), plan.kvBlocks(), text, eosTokenIds, options.seed());
            made.push(generator::close);
            trainer = new RankTrainer(arena, decoder, rank.collectives(), memory, options.training(),
                    plan.training().getOrDefault(Use.ACTIVATIONS, 0L), options.seed(), plan.hostGroups());
            if (plan.parked() > 0) {
                generator.askForRoom(plan.kvBytesBesideOptimizer(), () -> {
                    trainer.park();
                    Cuda.releaseCached(rank.device());
                });
            }
        } catch (RuntimeException | Error e) {
            made.forEach(Runnable::run);
            throw e;
        }
    }

    /** {@return the rank's number, device and collectives} */
    public Rank rank() {
        return rank;
    }

    /** {@return the one copy of the weights on this rank} */
    public WeightArena arena() {
        return arena;
    }

    /** {@return the decoder over the weights} */
    public Decoder decoder() {
        return decoder;
    }

    /** {@return the rank's generator} */
    public Generator generator() {
        return generator;
    }

    /** {@return the rank's part of training} */
    public RankTrainer trainer() {
        return trainer;
    }

    /** {@return the ledger of the rank's memory} */
    public DeviceMemory memory() {
        return memory;
    }

    /** {@return the frozen reference weights, or null if there are none} */
    public @Nullable WeightArena reference() {
        return reference;
    }

    /**
     * Takes note that the weights were written by other hands than the trainer's: keys and values in the prefix cache are forgotten,
     * and FLOAT32 masters are taken from the weights again.
     */
    public void weightsReplaced() {
        generator.forgetPrefixes();
        trainer.weightsReplaced();
    }

    /** Keeps a copy of the weights as they are. */
    void freezeReference() {
        DType dtype = arena.dtype();
        WeightArena frozen = reference == null ? new WeightArena(arena.layout(), rank.device(), dtype) : reference;
        frozen.copyFrom(arena);
        if (reference == null) {
            memory.add(Use.REFERENCE, frozen.bytes());
            reference = frozen;
        }
    }

    @Override
    public void close() {
        if (reference != null) {
            reference.close();
        }
        trainer.close();
        generator.close();
        decoder.close();
        arena.close();
    }
}
