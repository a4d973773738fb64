package dev.tandem;

import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.ProcessMemory;
import dev.tandem.device.TandemException;
import dev.tandem.generation.Generator;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightLayout;
import dev.tandem.training.MemoryNeeds;
import java.util.EnumMap;
import java.util.Map;

/**
 * What one rank will hold in each phase, computed from the config before anything is allocated.
 *
 * @param limit most bytes that the rank may hold
 * @param generation bytes of each use in the generation phase; of KV pages the most that will be mapped, as they are needed
 * @param training bytes of each use in the training phase
 * @param kvBlocks KV pages that the generation phase has room for
 * @param parked bytes of optimizer state that wait in page-locked host memory during the generation phase
 * @param activationBudget bytes of activations that training keeps rather than computes again
 */
public record MemoryPlan(long limit, Map<Use, Long> generation, Map<Use, Long> training, int kvBlocks, long parked,
        long activationBudget) {
    /** A rank that is told nothing takes this share of the available memory. */
    private static final double SHARE = 0.8;

    /** On a CPU, pages are only backed when they are used, but more than this is rarely wanted by default. */
    private static final long DEFAULT_KV_BYTES = 1L << 30;

    /** On a GPU, optimizer state makes way for the KV cache if that could not hold so many tokens of every running sample. */
    private static final int COMFORTABLE_TOKENS = 1024;

    /**
     * Plans a rank's memory. Where training does not fit, the engine can still generate, and no memory is set aside for training.
     *
     * @throws TandemException with the table when not even generation fits
     */
    static MemoryPlan of(ModelConfig config, EngineOptions options) {
        int ranks = options.devices().size();
        WeightLayout layout = new WeightLayout(config, ranks);
        long available = options.devices().stream().mapToLong(DeviceMemory::available).min().orElseThrow();
        boolean shared = options.devices().getFirst().isCpu();
        long limit = options.memoryLimit() > 0
                ? options.memoryLimit()
                : available == Long.MAX_VALUE ? Long.MAX_VALUE : (long) (available * SHARE / (shared ? ranks : 1));
        Device device = options.devices().getFirst();
        long weights = layout.length() * options.dtype().bytes();
        long workspace = Generator.workspaceBytes(config, device, options.dtype(), options.generation());
        long buffers = shared ? 0 : workspace; // a GPU's graphs keep them
        MemoryNeeds needs = MemoryNeeds.of(layout, options.dtype(), device, options.training(), limit - weights - buffers);
        Map<Use, Long> training = new EnumMap<>(Use.class);
        training.put(Use.WEIGHTS, weights);
        training.put(Use.OPTIMIZER, needs.optimizer());
        training.put(Use.GRADIENTS, needs.gradients());
        training.put(Use.ACTIVATIONS, needs.activations());
        training.put(Use.WORKSPACE, buffers);

        boolean trains = total(training) <= limit;
        long blockBytes = Generator.blockBytes(config, options.dtype(), options.generation());
        long useful = useful(config, options, blockBytes);
        long room = limit - weights - workspace;
        long beside = room - (trains ? needs.optimizer() : 0);
        boolean parks = trains && !shared && beside < (options.kvBytes() > 0 ? options.kvBytes() : comfortable(options, useful, blockBytes))
                && needs.optimizer() * ranks < ProcessMemory.available();
        long parked = parks ? needs.optimizer() : 0;
        Map<Use, Long> generation = new EnumMap<>(Use.class);
        generation.put(Use.WEIGHTS, weights);
        generation.put(Use.OPTIMIZER, trains ? needs.optimizer() - parked : 0);
        generation.put(Use.WORKSPACE, workspace);
        long kv = options.kvBytes() > 0
                ? options.kvBytes()
                : Math.min(shared ? Math.min(DEFAULT_KV_BYTES, useful) : useful, parks ? room : beside);
        int blocks = (int) Math.clamp(kv / blockBytes, 0, Integer.MAX_VALUE - 8);
        generation.put(Use.KV, Math.max(blocks, 2) * blockBytes);
        MemoryPlan plan = new MemoryPlan(limit, generation, training, blocks, parked, needs.activationBudget());
        if (blocks < 2 || total(generation) > limit) {
            throw new TandemException("generation does not fit into %.1f MiB a rank:%n%s".formatted(limit / 0x1p20, plan));
        }
        return plan;
    }

    /** Refuses training, with the table, when it does not fit. */
    void requireTraining() {
        if (total(training) > limit) {
            throw new TandemException("training does not fit into %.1f MiB a rank: %.1f MiB are missing%n%s"
                    .formatted(limit / 0x1p20, (total(training) - limit) / 0x1p20, this));
        }
    }

    /** More pages than all running samples can fill are of use only as prefix cache: as many again. */
    private static long useful(ModelConfig config, EngineOptions options, long blockBytes) {
        long tokens = 2L * options.generation().maxRunning() * config.maxPositions();
        return (tokens / options.generation().blockSize() + 2) * blockBytes;
    }

    private static long comfortable(EngineOptions options, long useful, long blockBytes) {
        long tokens = (long) options.generation().maxRunning() * COMFORTABLE_TOKENS;
        return Math.min(useful, tokens / options.generation().blockSize() * blockBytes);
    }

    private static long total(Map<Use, Long> phase) {
        return phase.values().stream().mapToLong(Long::longValue).sum();
    }

    /** {@return the bytes that the generation phase needs} */
    public long generationBytes() {
        return total(generation);
    }

    /** {@return the bytes that the training phase needs} */
    public long trainingBytes() {
        return total(training);
    }

    /** {@return a table of uses by phase, in MiB} */
    @Override
    public String toString() {
        StringBuilder text = new StringBuilder("%-12s %12s %12s%n".formatted("MiB a rank", "generation", "training"));
        for (Use use : Use.values()) {
            long g = generation.getOrDefault(use, 0L);
            long t = training.getOrDefault(use, 0L);
            if (g > 0 || t > 0) {
                text.append("%-12s %12.1f %12.1f%n".formatted(use, g / 0x1p20, t / 0x1p20));
            }
        }
        if (parked > 0) {
            text.append("%-12s %12.1f %12s   optimizer state, in host memory%n".formatted("parked", parked / 0x1p20, ""));
        }
        return text.append("%-12s %12.1f %12.1f   limit %.1f".formatted(
                "total", generationBytes() / 0x1p20, trainingBytes() / 0x1p20, limit / 0x1p20)).toString();
    }
}
