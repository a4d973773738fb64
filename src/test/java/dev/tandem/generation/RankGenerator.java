package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Safetensors;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightLayout;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.function.Consumer;

/** A generator on the calling thread, over a model folder or random weights. */
final class RankGenerator implements AutoCloseable {
    final ModelConfig config;
    final WeightArena arena;
    final DeviceMemory memory;
    final Generator generator;
    private final Decoder decoder;

    RankGenerator(Path folder, DType dtype, GeneratorOptions options, int blocks) {
        this(folder, Device.cpu(), dtype, options, blocks);
    }

    RankGenerator(Path folder, Device device, DType dtype, GeneratorOptions options, int blocks) {
        this(ModelConfig.read(folder), device, dtype, options, blocks, arena -> {
            try (Safetensors checkpoint = Safetensors.open(folder)) {
                arena.load(checkpoint);
            }
        });
    }

    RankGenerator(ModelConfig config, DType dtype, GeneratorOptions options, int blocks, Consumer<WeightArena> fill) {
        this(config, Device.cpu(), dtype, options, blocks, fill);
    }

    RankGenerator(ModelConfig config, Device device, DType dtype, GeneratorOptions options, int blocks,
            Consumer<WeightArena> fill) {
        this.config = config;
        memory = new DeviceMemory(device);
        arena = new WeightArena(new WeightLayout(config, 1), device, dtype);
        fill.accept(arena);
        decoder = new Decoder(config, device, dtype);
        generator = new Generator(arena, decoder, memory, options, blocks, RankGenerator::decode, config.eosTokenIds(), 7);
        generator.wake(blocks);
    }

    private static String decode(int[] tokens, int from, int to) {
        StringBuilder text = new StringBuilder();
        for (int i = from; i < to; i++) {
            text.append((char) ('a' + tokens[i] % 26));
        }
        return text.toString();
    }

    List<Completion> run(List<Prompt> prompts) {
        return run(generator, prompts);
    }

    /** Runs everything to its end; ordered by prompt and sample. */
    static List<Completion> run(Generator generator, List<Prompt> prompts) {
        prompts.forEach(prompt -> generator.submit(prompt, null));
        List<Completion> done = new ArrayList<>();
        while (generator.hasWork()) {
            generator.step(done::add);
        }
        done.sort(Comparator.comparingInt(Completion::prompt).thenComparingInt(Completion::sample));
        return done;
    }

    @Override
    public void close() {
        generator.close();
        decoder.close();
        arena.close();
    }
}
