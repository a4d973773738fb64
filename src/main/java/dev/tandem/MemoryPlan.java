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
 * @param hostGroups of how many groups, from the arena's first, a GPU's optimizer state stays in page-locked host memory
 * @param hostOptimizer bytes of that
 * @param parked bytes of the device's optimizer state that make way to page-locked host memory when the KV cache grows so large
 * @param hostLimit most bytes that the rank may hold in host memory beside a GPU's
 */
public record MemoryPlan(long limit, Map<Use, Long> generation, Map<Use, Long> training, int kvBlocks, int hostGroups,
        long hostOptimizer, long parked, long hostLimit) {
    /** A rank that is told nothing takes this share of the available memory; other programs live in the machine's too. */
    private static final double CPU_SHARE = 0.8;

    private static final double GPU_SHARE = 0.9;

    /** On a CPU, pages are only backed when they are used, but more than this is rarely wanted by default. */
    private static final long DEFAULT_KV_BYTES = 1L << 30;

    /** On a GPU, optimizer state makes way for the KV cache if that could not hold so many tokens of every running sample. */
    private static final int COMFORTABLE_TOKENS = 1024;

    /**
     * Plans a rank's memory, as an engine of these options does before it allocates anything. Where training does not fit, the engine can
     * still generate, and no memory is set aside for training.
     *
     * @param config such as {@link ModelConfig#read} finds in a folder
     * @throws TandemException with the table when not even generation fits
     */
    public static MemoryPlan of(ModelConfig config, EngineOptions options) {
        long available = options.devices().stream().mapToLong(DeviceMemory::available).min().orElseThrow();
        return of(config, options, available, ProcessMemory.available());
    }

    /**
     * Plans as {@link #of(ModelConfig, EngineOptions)}.
     *
     * @param available bytes that each device has available
     * @param host bytes that the machine has available
     */
    static MemoryPlan of(ModelConfig config, EngineOptions options, long available, long host) {
        int ranks = options.devices().size();
        WeightLayout layout = new WeightLayout(config, ranks);
        boolean shared = options.devices().getFirst().isCpu();
        long limit = options.memoryLimit() > 0
                ? options.memoryLimit()
                : available == Long.MAX_VALUE ? Long.MAX_VALUE : (long) (shared ? available * CPU_SHARE / ranks : available * GPU_SHARE);
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

        long hostLimit = host / ranks;
        boolean trains = total(training) <= limit && needs.hostOptimizer() <= hostLimit;
        long blockBytes = Generator.blockBytes(config, options.dtype(), options.generation());
        long useful = useful(config, options, blockBytes);
        long room = limit - weights - workspace;
        long beside = room - (trains ? needs.optimizer() : 0);
        boolean parks = trains && !shared && beside < (options.kvBytes() > 0 ? options.kvBytes() : comfortable(options, useful, blockBytes))
                && needs.hostOptimizer() + needs.optimizer() < hostLimit;
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
        MemoryPlan plan = new MemoryPlan(limit, generation, training, blocks, needs.hostGroups(), needs.hostOptimizer(), parked, hostLimit);
        if (blocks < 2 || total(generation) > limit) {
            throw new TandemException("generation does not fit into %.1f MiB a rank:%n%s".formatted(limit / 0x1p20, plan));
        }
        return plan;
    }

    /** {@return whether training fits} */
    public boolean trains() {
        return total(training) <= limit && hostOptimizer <= hostLimit;
    }

    /** Refuses training, with the table, when it does not fit. */
    void requireTraining() {
        if (total(training) > limit) {
            throw new TandemException("training does not fit into %.1f MiB a rank: %.1f MiB are missing%n%s"
                    .formatted(limit / 0x1p20, (total(training) - limit) / 0x1p20, this));
        }
        if (hostOptimizer > hostLimit) {
            throw new TandemException(("training needs %.1f MiB of host memory a rank, for the optimizer state of %d groups that has no "
                    + "room on the device; %.1f MiB are available%n%s")
                    .formatted(hostOptimizer / 0x1p20, hostGroups, hostLimit / 0x1p20, this));
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

    /** {@return bytes of KV pages for which there is room while all of the optimizer's state is on the device} */
    long kvBytesBesideOptimizer() {
        return limit - parked - (generationBytes() - generation.getOrDefault(Use.KV, 0L));
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
        text.append("%-12s %12.1f %12.1f   limit %.1f".formatted(
                "total", generationBytes() / 0x1p20, trainingBytes() / 0x1p20, limit / 0x1p20));
        if (hostOptimizer + parked > 0) {
            text.append("%n%-12s %12.1f %12.1f   limit %.1f: optimizer state of %s groups while training%s".formatted("on the host",
                    (hostOptimizer + parked) / 0x1p20, hostOptimizer / 0x1p20, hostLimit / 0x1p20, hostGroups == 0 ? "no" : hostGroups,
                    parked > 0 ? ", of all when the KV cache needs its room" : ""));
        }
        return text.toString();
    }
}
