package dev.tandem.benchmarks;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.generation.Completion;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import org.apache.commons.math3.random.MersenneTwister;

/**
 * Generation on a GPU, random weights, the workloads that the peers are measured on. One line for each figure.
 *
 * <pre>
 * GpuGeneration SHAPE nano     256 requests, prompts and outputs uniform 100–1,024 tokens, temperature 0.6: output tokens/s
 * GpuGeneration SHAPE tpot     milliseconds a token at batch 1
 * GpuGeneration SHAPE long     256 requests of 1,024 tokens in and 1,024 out: output tokens/s
 * GpuGeneration SHAPE step     a decoding step at short contexts, where attention costs nothing: what everything else costs
 * GpuGeneration SHAPE timeline what the device does in a step: idle, input, forward, sampling, read-back
 * GpuGeneration SHAPE profile1, profile256   a few such steps, to run under a profiler
 * GpuGeneration SHAPE switch   sleep and wake with 8, 32, 64 GiB of KV mapped, and with what 256 short requests use
 * </pre>
 */
final class GpuGeneration {
    private static final int REQUESTS = 256;
    private static final int CYCLES = 1000;

    private GpuGeneration() {}

    public static void main(String[] args) {
        long start = System.nanoTime();
        String shape = args[0];
        List<String> what = Arrays.asList(args).subList(1, args.length);
        try (HybridEngine engine = HybridEngine.create(Shapes.config(shape).withMaxPositions(4096), null, options())) {
            say("%s start: engine %.1f s", shape, seconds(start));
            run(engine, List.of(prompt(0, new int[] {1, 2, 3}, 4)));
            say("%s first token after %.1f s", shape, seconds(start));
            for (String workload : what) {
                switch (workload) {
                    case "nano" -> nano(engine, shape);
                    case "tpot" -> tpot(engine, shape);
                    case "long" -> longOutputs(engine, shape);
                    case "switch" -> phases(engine, shape);
                    case "step" -> step(engine, shape);
                    case "timeline" -> timelines(engine, shape);
                    case "profile1" -> run(engine, shortRequests(1, 12));
                    case "profile256" -> run(engine, shortRequests(REQUESTS, 12));
                    default -> throw new IllegalArgumentException("unknown workload " + workload);
                }
            }
            say("%s", engine.memory());
        }
    }

    static EngineOptions options() {
        return EngineOptions.defaults().devices(Device.cuda(0)).dtype(DType.BFLOAT16)
                .generation(GeneratorOptions.forGpu().prefixCaching(false));
    }

    private static void nano(HybridEngine engine, String shape) {
        List<Prompt> requests = nanoRequests();
        report(engine, shape + " nano", requests, requests.stream().mapToLong(request -> request.params().maxTokens()).sum(), 4);
    }

    static List<Prompt> nanoRequests() {
        PythonRandom random = new PythonRandom(0);
        List<int[]> prompts = new ArrayList<>();
        for (int i = 0; i < REQUESTS; i++) {
            int[] tokens = new int[random.between(100, 1024)];
            for (int t = 0; t < tokens.length; t++) {
                tokens[t] = random.between(0, 10_000);
            }
            prompts.add(tokens);
        }
        List<Prompt> requests = new ArrayList<>();
        for (int i = 0; i < REQUESTS; i++) {
            requests.add(prompt(i, prompts.get(i), random.between(100, 1024)));
        }
        return requests;
    }

    private static void longOutputs(HybridEngine engine, String shape) {
        report(engine, shape + " 256 x 1,024/1,024", requests(REQUESTS, 1024, 1024), REQUESTS * 1024L, 2);
    }

    /** {@return so many requests of equal lengths} */
    static List<Prompt> requests(int count, int tokens, int answer) {
        PythonRandom random = new PythonRandom(1);
        List<Prompt> requests = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            int[] prompt = new int[tokens];
            Arrays.setAll(prompt, t -> random.between(0, 10_000));
            requests.add(prompt(i, prompt, answer));
        }
        return requests;
    }

    private static void report(HybridEngine engine, String name, List<Prompt> requests, long tokens, int runs) {
        double[] speeds = new double[runs];
        for (int run = 0; run < runs; run++) {
            long start = System.nanoTime();
            run(engine, requests);
            speeds[run] = tokens / seconds(start);
        }
        double[] warm = Arrays.copyOfRange(speeds, 1, runs);
        Arrays.sort(warm);
        say("%s: %d tokens, median %.0f tokens/s, runs %s", name, tokens, warm[warm.length / 2], Arrays.toString(speeds));
    }

    private static void tpot(HybridEngine engine, String shape) {
        int[] tokens = new int[128];
        Arrays.setAll(tokens, i -> i);
        double[] times = new double[3];
        for (int run = 0; run < times.length; run++) {
            long start = System.nanoTime();
            run(engine, List.of(prompt(0, tokens, 1)));
            double first = seconds(start);
            start = System.nanoTime();
            run(engine, List.of(prompt(0, tokens, 513)));
            times[run] = (seconds(start) - first) / 512 * 1e3;
        }
        say("%s: ms a token at batch 1: %s", shape, Arrays.toString(times));
    }

    /** Sleep and wake at three sizes of the KV cache, all mapped; what a thousand cycles leave behind; and after a rollout. */
    private static void phases(HybridEngine engine, String shape) {
        Device device = Device.cuda(0);
        long blockBytes = engine.plan().generation().get(Use.KV) / engine.plan().kvBlocks();
        engine.sleep();
        long asleep = Cuda.free(device);
        for (int gib : new int[] {8, 32, 64}) {
            if ((gib * (1L << 30)) / blockBytes > engine.plan().kvBlocks()) {
                say("%s: %d GiB of KV are more than the plan's %d pages", shape, gib, engine.plan().kvBlocks());
                continue;
            }
            engine.wake();
            engine.resizeKv(gib * (1L << 30));
            cycles(engine, "%s, %d GiB of KV".formatted(shape, gib), 0);
            cycles(engine, "%s, %d GiB of KV".formatted(shape, gib), 500);
            engine.sleep();
        }
        engine.wake();
        engine.resizeKv(8L << 30);
        engine.sleep();
        long start = System.nanoTime();
        for (int i = 0; i < CYCLES; i++) {
            engine.wake();
            engine.sleep();
        }
        say("%s: %d cycles of 8 GiB in %.1f s, asleep %d MiB free before and %d MiB after; in use beside weights %.2f GiB", shape, CYCLES,
                seconds(start), asleep >> 20, Cuda.free(device) >> 20,
                (Cuda.total(device) - Cuda.free(device) - engine.plan().generation().get(Use.WEIGHTS)) / 0x1p30);
        engine.wake();
        engine.resizeKv(engine.plan().generation().get(Use.KV));
        run(engine, shortRequests(REQUESTS, 200));
        engine.sleep();
        engine.wake();
        long used = engine.onEachRank(rank -> rank.memory().held(Use.KV)).getFirst();
        cycles(engine, "%s, %.2f GiB of KV after a rollout, room for %.1f".formatted(shape, used / 0x1p30,
                engine.plan().generation().get(Use.KV) / 0x1p30), 0);
    }

    private static void cycles(HybridEngine engine, String name, int pause) {
        Device device = Device.cuda(0);
        double[] sleeps = new double[5];
        double[] wakes = new double[5];
        long returned = 0;
        for (int i = 0; i < sleeps.length; i++) {
            long before = Cuda.free(device);
            long start = System.nanoTime();
            engine.sleep();
            sleeps[i] = seconds(start) * 1e3;
            returned = Cuda.free(device) - before;
            sleepFor(pause);
            start = System.nanoTime();
            engine.wake();
            Cuda.synchronize(device);
            wakes[i] = seconds(start) * 1e3;
        }
        Arrays.sort(sleeps);
        Arrays.sort(wakes);
        say("%s: sleep %.1f ms (%.1f–%.1f), wake %d ms later %.1f ms (%.1f–%.1f), %.2f GiB returned", name, sleeps[2], sleeps[0], sleeps[4],
                pause, wakes[2], wakes[0], wakes[4], returned / 0x1p30);
    }

    /** As long as training would take: the driver clears memory that was given back meanwhile. */
    private static void sleepFor(int milliseconds) {
        try {
            Thread.sleep(milliseconds);
        } catch (InterruptedException e) {
            throw new IllegalStateException(e);
        }
    }

    private static List<Prompt> shortRequests(int rows, int tokens) {
        List<Prompt> requests = new ArrayList<>();
        for (int i = 0; i < rows; i++) {
            requests.add(prompt(i, new int[] {1 + i, 2, 3}, tokens));
        }
        return requests;
    }

    private static void step(HybridEngine engine, String shape) {
        for (int rows : new int[] {1, 8, 64, 256}) {
            List<Prompt> requests = shortRequests(rows, 200);
            run(engine, requests);
            var before = engine.onEachRank(rank -> rank.generator().times()).getFirst();
            long start = System.nanoTime();
            run(engine, requests);
            double whole = seconds(start);
            var times = engine.onEachRank(rank -> rank.generator().times()).getFirst().since(before);
            double each = 1e6 / times.steps();
            say("%s step of %d rows: %.1f µs; host: plan %.1f, begin %.1f, wait %.1f, accept %.1f µs", shape, rows, whole * each,
                    times.plan() * each, times.begin() * each, times.waiting() * each, times.accept() * each);
            timeline(engine, shape + ", short contexts", requests);
        }
    }

    /** What the device does in a step, on average. */
    private static void timeline(HybridEngine engine, String name, List<Prompt> requests) {
        var before = engine.onEachRank(rank -> {
            rank.generator().measureDevice(true);
            return rank.generator().times();
        }).getFirst();
        run(engine, requests);
        double each = 1e6 / engine.onEachRank(rank -> rank.generator().times()).getFirst().since(before).steps();
        var device = engine.onEachRank(rank -> rank.generator().measureDevice(false)).getFirst();
        say("%s, %d requests, device: idle %.1f, input %.1f, forward %.1f, sampling %.1f, read-back %.1f µs a step", name, requests.size(),
                device.idle() * each, device.input() * each, device.forward() * each, device.sampling() * each, device.readBack() * each);
    }

    /** A decoding step in the middle of long answers, on the host and on the device. */
    private static void timelines(HybridEngine engine, String shape) {
        for (int rows : new int[] {1, 64, REQUESTS}) {
            List<Prompt> requests = requests(rows, 512, 256);
            run(engine, requests);
            timeline(engine, shape + ", contexts of 512 to 768", requests);
        }
    }

    private static Prompt prompt(int index, int[] tokens, int length) {
        return new Prompt(index, "", tokens, SamplingParams.defaults().temperature(0.6).ignoreEos(true).maxTokens(length));
    }

    static void run(HybridEngine engine, List<Prompt> prompts) {
        List<Completion> done = engine.rollout(prompts, completion -> {});
        for (Completion completion : done) {
            if (completion.tokens().length != prompts.get(completion.prompt()).params().maxTokens()) {
                throw new IllegalStateException("prompt " + completion.prompt() + " ended early: " + completion.finish());
            }
        }
        Cuda.synchronize(Device.cuda(0));
    }

    private static double seconds(long start) {
        return (System.nanoTime() - start) / 1e9;
    }

    private static void say(String format, Object... values) {
        System.out.printf(Locale.ROOT, format + "%n", values);
    }

    /** The numbers of Python's random module, so that peers written in Python get the very same workload. */
    private static final class PythonRandom {
        private final MersenneTwister twister = new MersenneTwister();

        PythonRandom(int seed) {
            twister.setSeed(new int[] {seed});
        }

        int between(int low, int high) {
            int n = high - low + 1;
            int bits = 32 - Integer.numberOfLeadingZeros(n);
            int value = twister.nextInt() >>> (32 - bits);
            while (value >= n) {
                value = twister.nextInt() >>> (32 - bits);
            }
            return low + value;
        }
    }
}
