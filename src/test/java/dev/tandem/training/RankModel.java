package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Safetensors;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import dev.tandem.parallel.Rank;
import dev.tandem.parallel.Ranks;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.function.Consumer;

/** A model folder opened for training on every rank. */
final class RankModel implements AutoCloseable {
    final Ranks ranks;
    final ModelConfig config;
    final List<WeightArena> arenas = new ArrayList<>();
    final List<DeviceMemory> memories = new ArrayList<>();
    final Trainer trainer;
    private final List<Decoder> decoders = new ArrayList<>();
    private final List<RankTrainer> trainers = new ArrayList<>();

    private record Parts(WeightArena arena, Decoder decoder, DeviceMemory memory, RankTrainer trainer) {}

    RankModel(Path folder, Ranks ranks, DType dtype, TrainerOptions options) {
        this(ModelConfig.read(folder), ranks, dtype, options, arena -> {
            try (Safetensors checkpoint = Safetensors.open(folder)) {
                arena.load(checkpoint);
            }
        });
    }

    RankModel(ModelConfig config, Ranks ranks, DType dtype, TrainerOptions options, Consumer<WeightArena> fill) {
        this.ranks = ranks;
        this.config = config;
        for (Parts p : ranks.onEach(rank -> open(rank, dtype, options, fill))) {
            arenas.add(p.arena);
            decoders.add(p.decoder);
            memories.add(p.memory);
            trainers.add(p.trainer);
        }
        trainer = new Trainer(ranks, trainers, options, config.vocabSize(), config.maxPositions());
    }

    private Parts open(Rank rank, DType dtype, TrainerOptions options, Consumer<WeightArena> fill) {
        WeightArena arena = new WeightArena(new WeightLayout(config, rank.count()), rank.device(), dtype);
        fill.accept(arena);
        Decoder decoder = new Decoder(config, rank.device(), dtype);
        DeviceMemory memory = new DeviceMemory(rank.device());
        return new Parts(arena, decoder, memory, new RankTrainer(arena, decoder, rank.collectives(), memory, options, Long.MAX_VALUE, 1, 0));
    }

    @Override
    public void close() {
        ranks.onEach(rank -> {
            trainers.get(rank.index()).close();
            decoders.get(rank.index()).close();
            arenas.get(rank.index()).close();
            return true;
        });
    }

    /** {@return the count of activations that goes by options with a budget; one that leaves it to the plan has all it wants} */
    static ActivationMemory activations(WeightArena arena, TrainerOptions options) {
        return new ActivationMemory(arena.layout().config(), arena.dtype(), arena.embedding().flat().device(), options, Long.MAX_VALUE);
    }

    /** {@return one micro-batch, for the innermost scope} */
    static PackedBatch packed(List<TrainingSequence> sequences, Device device) {
        try (BatchPacker packer = new BatchPacker(device)) {
            return packer.pack(List.of(sequences)).getFirst();
        }
    }
}
