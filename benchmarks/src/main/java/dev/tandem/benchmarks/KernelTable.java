package dev.tandem.benchmarks;

import dev.tandem.HybridEngine;
import dev.tandem.benchmarks.DeviceActivity.Interval;
import dev.tandem.device.Cuda;
import dev.tandem.device.CudaEvent;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.Prompt;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;

/**
 * What every kernel of a whole run takes on a GPU, and the rate at which those move their bytes that are most of it, beside that of a plain
 * copy.
 *
 * <pre>
 * KernelTable generation SHAPE   GpuGeneration's nano
 * KernelTable attention SHAPE    the decode attention of 256 requests at contexts of 700 and 4,000 and of one at both, in 4 layers
 * KernelTable training SHAPE     GpuTraining's step on 8 sequences of 4,096 tokens
 * </pre>
 */
final class KernelTable {
    private static final Device CUDA = Device.cuda(0);
    private static final int ROWS = 30;
    private static final int LAYERS = 4;
    /** In which all requests decode. */
    private static final int STEPS = 32;
    private static final long COPIED_BYTES = 1L << 30;
    private static final int COPIES = 10;

    private final DeviceActivity activity;
    private final double copyRate;

    private KernelTable(DeviceActivity activity) {
        this.activity = activity;
        copyRate = copyRate();
        System.out.printf(Locale.ROOT, "a copy of 1 GiB moves %.0f GB/s, read and written%n", copyRate / 1e9);
    }

    public static void main(String[] args) {
        Cuda.require(CUDA);
        KernelTable table = new KernelTable(new DeviceActivity());
        String shape = args[1];
        switch (args[0]) {
            case "generation" -> table.generation(shape);
            case "attention" -> table.attention(shape);
            case "training" -> table.training(shape);
            default -> throw new IllegalArgumentException("unknown table " + args[0]);
        }
    }

    /** Not of a copy in a CUDA graph, which moves little more than half as much. */
    private static double copyRate() {
        Cuda.use(CUDA);
        try (Scope scope = Scope.open(); CudaEvent start = new CudaEvent(CUDA, true); CudaEvent end = new CudaEvent(CUDA, true)) {
            Tensor from = Tensor.zeros(CUDA, DType.FLOAT32, COPIED_BYTES / 4);
            Tensor to = Tensor.zeros(CUDA, DType.FLOAT32, COPIED_BYTES / 4);
            to.copyInPlace(from);
            start.record();
            for (int i = 0; i < COPIES; i++) {
                to.copyInPlace(from);
            }
            end.record();
            end.await();
            return 2.0 * COPIED_BYTES * COPIES / (end.millisecondsSince(start) / 1e3);
        } finally {
            Cuda.releaseCached(CUDA);
        }
    }

    private void generation(String shape) {
        ModelConfig config = Shapes.config(shape).withMaxPositions(4096);
        List<Prompt> requests = GpuGeneration.nanoRequests();
        try (HybridEngine engine = HybridEngine.create(config, null, GpuGeneration.options())) {
            GpuGeneration.run(engine, requests);
            List<Interval> all = activity.during(CUDA, () -> GpuGeneration.run(engine, requests));
            report(all);
            // The first token of an answer comes from its prompt's own step.
            long contexts = requests.stream().mapToLong(request -> {
                long decoded = request.params().maxTokens() - 1;
                return decoded * request.tokens().length + decoded * (decoded + 1) / 2;
            }).sum();
            attention("nano", config, kernels(all, "decodeAttention"), contexts);
        }
    }

    private void attention(String shape) {
        ModelConfig config = Shapes.config(shape, LAYERS).withMaxPositions(4096);
        int budget = GpuGeneration.options().generation().tokenBudget();
        try (HybridEngine engine = HybridEngine.create(config, null, GpuGeneration.options())) {
            for (int[] each : new int[][] {{256, 700}, {256, 4000}, {1, 700}, {1, 4000}}) {
                int rows = each[0];
                int prompts = Math.ceilDiv(rows * each[1], budget) + 1;
                List<Prompt> requests = GpuGeneration.requests(rows, each[1], prompts + STEPS);
                GpuGeneration.run(engine, requests);
                List<Interval> all = activity.during(CUDA, () -> GpuGeneration.run(engine, requests));
                List<Interval> prefills = kernels(all, "prefillAttention");
                List<Interval> decodes = kernels(all, "decodeAttention").stream()
                        .filter(i -> i.start() > prefills.getLast().end()).limit((long) STEPS * LAYERS).toList();
                // By then a request has been decoding for half as many steps as had prompts, on average.
                double before = prefills.size() / (2.0 * LAYERS);
                double contexts = rows * STEPS * (each[1] + before + (STEPS + 1) / 2.0);
                attention(rows + " at contexts from " + each[1] + " on", config, decodes, contexts);
            }
        }
    }

    private static List<Interval> kernels(List<Interval> intervals, String name) {
        return intervals.stream().filter(i -> i.name().equals(name)).toList();
    }

    /** @param contexts of all rows and steps, tokens */
    private void attention(String name, ModelConfig config, List<Interval> kernels, double contexts) {
        double bytes = contexts * config.layers() * config.kvHeads() * config.headDim() * 2 * DType.BFLOAT16.bytes();
        double seconds = kernels.stream().mapToDouble(Interval::seconds).sum();
        System.out.printf(Locale.ROOT, "decode attention, %s: %d times %.1f µs, %.0f GB/s, %.1f %% of the copy%n", name, kernels.size(),
                seconds / kernels.size() * 1e6, bytes / seconds / 1e9, 100 * bytes / seconds / copyRate);
    }

    private void training(String shape) {
        try (HybridEngine engine = GpuTraining.engine(shape, DType.FLOAT32)) {
            List<TrainingSequence> batch = GpuTraining.batch();
            engine.train(batch);
            engine.train(batch);
            report(activity.during(CUDA, () -> engine.train(batch)));
        }
    }

    private record Sum(String name, int count, double seconds) {}

    private static void report(List<Interval> intervals) {
        Map<String, List<Interval>> byName = new TreeMap<>();
        double idle = 0;
        long busyUntil = intervals.getFirst().start();
        for (Interval each : intervals) {
            byName.computeIfAbsent(each.name(), name -> new ArrayList<>()).add(each);
            idle += Math.max(0, each.start() - busyUntil) / 1e9;
            busyUntil = Math.max(busyUntil, each.end());
        }
        double span = (busyUntil - intervals.getFirst().start()) / 1e9;
        System.out.printf(Locale.ROOT, "%.1f ms, of which idle %.1f; %d launches%n", span * 1e3, idle * 1e3, intervals.size());
        byName.entrySet().stream()
                .map(e -> new Sum(e.getKey(), e.getValue().size(), e.getValue().stream().mapToDouble(Interval::seconds).sum()))
                .sorted(Comparator.comparingDouble(Sum::seconds).reversed()).limit(ROWS)
                .forEach(sum -> System.out.printf(Locale.ROOT, "%9.2f ms %5.1f %% %7d times %8.1f µs  %.100s%n", sum.seconds * 1e3,
                        100 * sum.seconds / span, sum.count, sum.seconds / sum.count * 1e6, sum.name));
    }
}
