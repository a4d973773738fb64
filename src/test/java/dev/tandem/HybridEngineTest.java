package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.ProcessMemory;
import dev.tandem.device.Timeline;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import dev.tandem.training.PendingStep;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.SplittableRandom;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.stream.Stream;
import jdk.jfr.consumer.RecordingStream;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The engine as a user sees it: phases, one copy of the weights, streams. */
@ExtendWith(NativeObjects.class)
class HybridEngineTest {
    private static final SamplingParams GREEDY = SamplingParams.greedy().maxTokens(12).ignoreEos(true);

    private static EngineOptions options() {
        return EngineOptions.defaults().kvBytes(4 << 20).training(TrainerOptions.defaults().lr(1e-2));
    }

    private static HybridEngine fixture(String family) {
        return HybridEngine.open(Fixture.of(family).folder(), options());
    }

    private static List<int[]> prompts(int count, long seed) {
        SplittableRandom random = new SplittableRandom(seed);
        List<int[]> prompts = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            prompts.add(random.ints(random.nextInt(20, 60), 4, 500).toArray());
        }
        return prompts;
    }

    private static List<TrainingSequence> batch(long seed) {
        return prompts(5, seed).stream().map(tokens -> TrainingSequence.of(tokens, 3, 1)).toList();
    }

    @Test
    void stepsCanBeReadLate() {
        try (HybridEngine one = fixture("qwen3"); HybridEngine late = fixture("qwen3")) {
            List<TrainStep> expected = new ArrayList<>();
            List<PendingStep> begun = new ArrayList<>();
            for (int i = 0; i < 5; i++) {
                TokenLoss loss = i == 2 ? t -> t.logprob().sum().mul(Double.NaN) : t -> t.logprob().sum().mul(-0.01);
                expected.add(one.train(batch(i), loss, 1));
                begun.add(late.beginTraining(batch(i), loss, 1));
                assertTrue(late.weightVersion() >= Math.max(0, i - 2), "no more than two steps are on their way");
            }
            assertEquals(Phase.TRAINING, late.phase());
            assertEquals(one.generateTokens(prompts(2, 3), GREEDY).getFirst().tokens().length,
                    late.generateTokens(prompts(2, 3), GREEDY).getFirst().tokens().length);
            assertEquals(4, late.weightVersion(), "four of five steps, though nobody has asked");
            for (int i = 0; i < 5; i++) {
                TrainStep step = begun.get(i).await();
                assertEquals(expected.get(i).step(), step.step());
                assertEquals(expected.get(i).loss(), step.loss());
                assertEquals(expected.get(i).gradientNorm(), step.gradientNorm());
                assertEquals(i == 2, step.skipped());
                assertEquals(step, begun.get(i).await());
            }
        }
    }

    @Test
    void timelineNamesWhatDeviceAndHostDid() throws IOException, InterruptedException {
        try (HybridEngine engine = fixture("llama"); RecordingStream events = new RecordingStream()) {
            assertThrows(IllegalStateException.class, engine::timeline);
            List<String> gaps = new CopyOnWriteArrayList<>();
            events.enable("dev.tandem.IdleGap");
            events.onEvent("dev.tandem.IdleGap", event -> gaps.add(event.getString("host")));
            events.startAsync();
            engine.recordTimeline();
            engine.generateTokens(prompts(3, 1), GREEDY);
            try (var activity = engine.activity("thinking")) {
                Thread.sleep(30);
            }
            engine.train(batch(2));
            Timeline timeline = engine.timeline();
            events.stop();
            List<String> device = timeline.device().stream().map(Timeline.Interval::name).distinct().toList();
            assertEquals(List.of("prefill", "decoding", "forward and backward", "optimizer"), device);
            assertEquals(List.of("thinking", "sleep", "packing"), timeline.host().stream().map(Timeline.Interval::name).toList());
            assertTrue(timeline.busy() > 0 && timeline.busy() < timeline.end() - 30, timeline.toString());
            Timeline.Gap gap = timeline.gaps(5).stream().filter(g -> g.after().equals("decoding")).findFirst().orElseThrow();
            assertEquals("forward and backward", gap.before());
            assertTrue(gap.milliseconds() >= 30, gap.toString());
            assertEquals("thinking", gap.host().getFirst().name());
            assertTrue(gaps.stream().anyMatch(host -> host.startsWith("thinking")), gaps.toString());
            // Nothing is recorded any more.
            engine.generateTokens(prompts(1, 1), GREEDY);
            assertThrows(IllegalStateException.class, engine::timeline);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void generatorSeesAStepAtOnce(String family, @TempDir Path folder) {
        List<int[]> prompts = prompts(3, 1);
        try (HybridEngine engine = fixture(family)) {
            long[] addresses = addresses(engine);
            List<Completion> before = engine.generateTokens(prompts, GREEDY);
            List<Completion> again = engine.generateTokens(prompts, GREEDY);
            assertEquals(0, engine.weightVersion());
            assertEquals(new Completion.WeightVersions(0, 0), before.getFirst().weightVersions());
            assertTrue(again.stream().allMatch(c -> c.cachedTokens() >= 16), "a known prompt is in the prefix cache");

            TrainStep step = engine.train(batch(2));
            assertEquals(1, step.step());
            assertEquals(1, engine.weightVersion());
            assertEquals(Phase.TRAINING, engine.phase());
            List<Completion> after = engine.generateTokens(prompts, GREEDY);
            assertEquals(Phase.GENERATION, engine.phase());
            assertEquals(new Completion.WeightVersions(1, 1), after.getFirst().weightVersions());
            assertTrue(after.stream().allMatch(c -> c.cachedTokens() == 0), "keys of older weights are not found");
            assertTrue(Math.abs(before.getFirst().logprobs()[0] - after.getFirst().logprobs()[0]) > 1e-3);
            assertArrayEquals(addresses, addresses(engine));
            assertEquals(engine.onEachRank(model -> model.arena().bytes()),
                    engine.onEachRank(model -> model.memory().held(Use.WEIGHTS)));

            engine.save(folder);
            try (HybridEngine opened = HybridEngine.open(folder, options())) {
                assertSame(opened.generateTokens(prompts, GREEDY), after, 1e-5);
                assertLogprobs(opened.logprobs(batch(3), 1), engine.logprobs(batch(3), 1), 1e-5);
            }
        }
    }

    /** Where the weights lie, each group and the KV cache. */
    private static long[] addresses(HybridEngine engine) {
        return engine.onEachRank(model -> Stream.concat(
                Stream.of(model.arena().address(), model.arena().logitMatrix().address(), model.generator().kvAddress(),
                        model.arena().layer(0).weight(ParameterRole.Q_WEIGHT).address()),
                model.arena().groups().stream().map(group -> group.flat().address()))
                .mapToLong(Long::longValue).toArray()).getFirst();
    }

    @Test
    void bothSidesReadTheSameBytes() {
        int[] prompt = prompts(1, 4).getFirst();
        try (HybridEngine engine = fixture("llama")) {
            float[] both = bothLogprobs(engine, prompt);
            assertEquals(both[0], both[1], 1e-5);
            // The first norm's scale is doubled byte by byte, at the address that the arena tells.
            engine.onEachRank(model -> {
                var norm = model.arena().layer(0).weight(ParameterRole.ATTENTION_NORM_WEIGHT);
                MemorySegment bytes = MemorySegment.ofAddress(norm.address()).reinterpret(4 * norm.elements());
                for (long i = 0; i < norm.elements(); i++) {
                    bytes.setAtIndex(ValueLayout.JAVA_FLOAT, i, 2 * bytes.getAtIndex(ValueLayout.JAVA_FLOAT, i));
                }
                model.weightsReplaced();
                return true;
            });
            float[] doubled = bothLogprobs(engine, prompt);
            assertEquals(doubled[0], doubled[1], 1e-5);
            assertTrue(Math.abs(doubled[0] - both[0]) > 1e-2, "the generator did not see the change");
        }
    }

    /** The log-prob of the first greedy token, by the generator and by the trainer. */
    private static float[] bothLogprobs(HybridEngine engine, int[] prompt) {
        Completion completion = engine.generateTokens(List.of(prompt), GREEDY.maxTokens(1)).getFirst();
        int[] whole = java.util.Arrays.copyOf(prompt, prompt.length + 1);
        whole[prompt.length] = completion.tokens()[0];
        float[][] scored = engine.logprobs(List.of(TrainingSequence.of(whole, prompt.length, 1)), 1);
        return new float[] {completion.logprobs()[0], scored[0][prompt.length]};
    }

    @Test
    void savedWeightsAreTheWeights(@TempDir Path folder) {
        EngineOptions options = options().dtype(DType.BFLOAT16);
        try (HybridEngine engine = HybridEngine.open(Fixture.of("qwen2").folder(), options)) {
            engine.train(batch(5));
            List<Completion> expected = engine.generateTokens(prompts(4, 6), GREEDY);
            engine.save(folder);
            try (HybridEngine opened = HybridEngine.open(folder, options)) {
                assertSame(opened.generateTokens(prompts(4, 6), GREEDY), expected, 0);
                assertEquals(engine.config(), opened.config());
            }
        }
    }

    @Test
    void sleepsAndWakes() {
        List<int[]> prompts = prompts(3, 7);
        try (HybridEngine engine = fixture("qwen3")) {
            List<Completion> expected = engine.generateTokens(prompts, GREEDY);
            engine.train(batch(1), t -> t.logprob().sum().mul(0), 1);
            long[] addresses = addresses(engine);
            long optimizer = held(engine, Use.OPTIMIZER);
            for (int i = 0; i < 3; i++) {
                engine.sleep();
                engine.sleep();
                assertEquals(Phase.ASLEEP, engine.phase());
                assertEquals(0, held(engine, Use.KV));
                assertEquals(0, held(engine, Use.GRADIENTS));
                assertEquals(optimizer, held(engine, Use.OPTIMIZER));
                assertAsleep(() -> engine.generateTokens(prompts, GREEDY));
                assertAsleep(() -> engine.stream("a", GREEDY));
                assertAsleep(() -> engine.train(batch(1)));
                assertAsleep(() -> engine.logprobs(batch(1), 1));
                assertEquals("the KV cache sleeps: wake the engine before generating",
                        assertThrows(IllegalStateException.class, () -> engine.onEachRank(model -> {
                            model.generator().step(c -> {});
                            return true;
                        })).getMessage());
                engine.wake();
                assertEquals(Phase.GENERATION, engine.phase());
                assertArrayEquals(addresses, addresses(engine));
                assertSame(engine.generateTokens(prompts, GREEDY), expected, 1e-5);
            }
        }
    }

    private static void assertAsleep(org.junit.jupiter.api.function.Executable use) {
        String message = assertThrows(IllegalStateException.class, use).getMessage();
        assertTrue(message.contains("sleeps") && message.contains("wake()"), message);
    }

    private static long held(HybridEngine engine, Use use) {
        return engine.onEachRank(model -> model.memory().held(use)).getFirst();
    }

    @Test
    void kvCacheChangesSize() {
        List<int[]> prompts = prompts(3, 8);
        try (HybridEngine engine = fixture("llama")) {
            List<Completion> expected = engine.generateTokens(prompts, GREEDY);
            long whole = engine.plan().generation().get(Use.KV);
            engine.resizeKv(whole / 4);
            assertMapped(whole / 4, engine);
            assertSame(engine.generateTokens(prompts, GREEDY), expected, 1e-5);
            engine.resizeKv(whole);
            assertMapped(whole, engine);
            engine.sleep();
            engine.wake();
            assertMapped(whole, engine);
            assertSame(engine.generateTokens(prompts, GREEDY), expected, 1e-5);
            engine.sleep();
            engine.resizeKv(whole / 2);
            assertEquals(0, held(engine, Use.KV));
            engine.wake();
            assertMapped(whole / 2, engine);
            assertThrows(IllegalArgumentException.class, () -> engine.resizeKv(1));
            assertThrows(IllegalArgumentException.class, () -> engine.resizeKv(2 * whole));
        }
    }

    /** All of a KV cache of {@code bytes}, in whole pages and whole units of virtual memory. */
    private static void assertMapped(long bytes, HybridEngine engine) {
        long page = engine.plan().generation().get(Use.KV) / engine.plan().kvBlocks();
        long unit = 1 << 16;
        assertEquals((bytes / page * page + unit - 1) / unit * unit, held(engine, Use.KV));
    }

    @Test
    void pagesAreMappedAsTheyAreNeeded() {
        List<int[]> prompts = prompts(15, 10);
        for (Device[] devices : new Device[][] {{Device.cpu(0)}, {Device.cpu(0), Device.cpu(1)}}) {
            try (HybridEngine engine = HybridEngine.open(Fixture.of("qwen3").folder(), options().devices(devices));
                    HybridEngine mapped = HybridEngine.open(Fixture.of("qwen3").folder(), options().devices(devices))) {
                long whole = engine.plan().generation().get(Use.KV);
                mapped.resizeKv(whole);
                long opened = held(engine, Use.KV);
                assertTrue(opened <= whole / 16, "opened with " + opened + " of " + whole + " bytes");
                assertSame(engine.generateTokens(prompts, GREEDY), mapped.generateTokens(prompts, GREEDY), 0);
                long many = held(engine, Use.KV);
                assertTrue(opened < many && many < whole, many + " bytes are mapped, at first " + opened + ", at most " + whole);
                engine.train(batch(1), t -> t.logprob().sum().mul(0), 1);
                assertEquals(0, held(engine, Use.KV));
                engine.generateTokens(prompts.subList(0, 2), GREEDY);
                long again = held(engine, Use.KV);
                assertTrue(opened < again && again <= many, "woke with " + again + " bytes, " + many + " were mapped before");
                engine.sleep();
                engine.wake();
                assertTrue(held(engine, Use.KV) < again, "the last rollout used less");
            }
        }
    }

    @Test
    void streamsWhatItGenerates() {
        String prompt = "Hello, world";
        try (HybridEngine engine = fixture("llama")) {
            for (SamplingParams params : List.of(GREEDY, GREEDY.temperature(1.2).seed(5),
                    GREEDY.stopStrings(List.of("e", "a")))) {
                Completion whole = engine.generate(prompt, params);
                List<Token> tokens;
                try (Stream<Token> stream = engine.stream(prompt, params)) {
                    tokens = stream.toList();
                }
                assertArrayEquals(whole.tokens(), tokens.stream().mapToInt(Token::id).toArray());
                assertEquals(whole.text(), String.join("", tokens.stream().map(Token::text).toList()));
                for (int i = 0; i < tokens.size(); i++) {
                    assertEquals(whole.logprobs()[i], tokens.get(i).logprob(), 1e-5);
                }
                assertEquals(whole.tokens().length, engine.generate(prompt, params).tokens().length,
                        "an ended stream frees the engine");
            }
            Completion expected = engine.generate(prompt, GREEDY);
            try (Stream<Token> stream = engine.stream(prompt, GREEDY)) {
                assertEquals(expected.tokens()[0], stream.iterator().next().id());
                String message = assertThrows(IllegalStateException.class, () -> engine.generate(prompt,
                        GREEDY)).getMessage();
                assertTrue(message.contains("engine.generate") && message.contains("engine.stream"), message);
            }
            assertArrayEquals(expected.tokens(), engine.generate(prompt, GREEDY).tokens());
            assertThrows(IllegalArgumentException.class, () -> engine.stream(prompt, GREEDY.n(2)));
            assertThrows(ArithmeticException.class, () -> {
                try (Stream<Token> stream = engine.stream(prompt, GREEDY)) {
                    stream.forEach(token -> {
                        throw new ArithmeticException("from the consumer");
                    });
                }
            });
            assertArrayEquals(expected.tokens(), engine.generate(prompt, GREEDY).tokens());
        }
    }

    @ParameterizedTest
    @EnumSource(value = DType.class, names = {"FLOAT32", "BFLOAT16"})
    void thousandPhaseSwitchesLeaveNothing(DType dtype) throws IOException {
        ModelConfig config = ModelConfig.qwen3(1024, 64, 2, 4, 2, 128, 64);
        List<int[]> prompt = List.of(new int[] {1, 2, 3, 4, 5, 6, 7});
        List<TrainingSequence> batch = List.of(TrainingSequence.of(new int[] {3, 1, 4, 1, 5, 9, 2, 6}, 2, 1));
        EngineOptions options = EngineOptions.defaults().kvBytes(8 << 20).dtype(dtype);
        try (HybridEngine engine = HybridEngine.create(config, null, options)) {
            long pointers = 0;
            long resident = 0;
            int switches = dtype == DType.FLOAT32 ? 1000 : 200;
            for (int i = -150; i < switches; i += 3) {
                if (i == 0) {
                    pointers = Pointer.totalCount();
                    resident = residentBesideHeap();
                }
                engine.generateTokens(prompt, GREEDY.maxTokens(2));
                engine.train(batch);
                engine.sleep();
                engine.wake();
            }
            long grown = residentBesideHeap() - resident;
            System.out.printf("%s: after %d phase switches %d native objects and %.1f MiB resident more%n", dtype,
                    switches,
                    Pointer.totalCount() - pointers, grown / 0x1p20);
            NativeObjects.check(pointers);
            // Gradients, moments or pages left over by each step would be 150 MiB by now; the compiler takes a little.
            assertTrue(grown < 32 << 20, "resident memory grew by " + grown + " bytes");
        }
    }

    /**
     * Resident bytes outside the Java heap, which breathes with the collector: HotSpot keeps a heap of this size below
     * 32 GiB, and what libtorch and mmap give lies above. Where the system does not tell, all resident bytes after a collection.
     */
    private static long residentBesideHeap() throws IOException {
        System.gc();
        Path maps = Path.of("/proc/self/smaps");
        if (!Files.isReadable(maps)) {
            return ProcessMemory.resident();
        }
        long bytes = 0;
        boolean heap = false;
        for (String line : Files.readAllLines(maps)) {
            if (line.matches("[0-9a-f]+-[0-9a-f]+ .*")) {
                heap = Long.parseUnsignedLong(line.substring(0, line.indexOf('-')), 16) < 32L << 30;
            } else if (line.startsWith("Rss:") && !heap) {
                bytes += Long.parseLong(line.replaceAll("\\D", "")) << 10;
            }
        }
        return bytes;
    }

    @Test
    void twoRanksGenerateWhatOneDoes() {
        List<int[]> prompts = prompts(9, 9);
        SamplingParams sampled = GREEDY.temperature(0.9).topP(0.9).n(3);
        // Adam's first steps follow the sign of gradients that may be rounding alone, hence a small rate.
        EngineOptions options = options().training(TrainerOptions.defaults().lr(1e-5));
        try (HybridEngine one = HybridEngine.open(Fixture.of("qwen3").folder(), options);
                HybridEngine two = HybridEngine.open(Fixture.of("qwen3").folder(), options.devices(Device.cpu(0),
                        Device.cpu(1)))) {
            assertSame(two.generateTokens(prompts, GREEDY), one.generateTokens(prompts, GREEDY), 1e-5);
            assertSame(two.generateTokens(prompts, sampled), one.generateTokens(prompts, sampled), 1e-5);
            for (int i = 0; i < 3; i++) {
                TrainStep a = one.train(batch(i));
                TrainStep b = two.train(batch(i));
                assertEquals(a.loss(), b.loss(), 1e-5 * Math.abs(a.loss()));
                assertEquals(a.gradientNorm(), b.gradientNorm(), 1e-5 * a.gradientNorm());
            }
            for (Use use : List.of(Use.OPTIMIZER, Use.GRADIENTS)) {
                double whole = held(one, use);
                assertTrue(whole > 0);
                two.onEachRank(model -> model.memory().held(use)).forEach(part -> assertEquals(0.5, part / whole,
                        0.01, use.toString()));
                two.onEachRank(model -> model.memory().peak(use)).forEach(part -> assertTrue(part < one.onEachRank(
                        model -> model.memory().peak(use)).getFirst(), use + " at its peak"));
            }
            assertEquals(held(one, Use.WEIGHTS), held(two, Use.WEIGHTS), 0.01 * held(one, Use.WEIGHTS));
            List<float[]> weights = two.onEachRank(model -> weights(model));
            assertArrayEquals(weights.get(0), weights.get(1), "both arenas are complete");
            assertLogprobs(two.logprobs(batch(9), 1), one.logprobs(batch(9), 1), 1e-4);
            assertSame(two.generateTokens(prompts, GREEDY), one.generateTokens(prompts, GREEDY), 1e-3);
        }
    }

    static float[] weights(ModelRank model) {
        return MemorySegment.ofAddress(model.arena().address()).reinterpret(model.arena().bytes())
                .toArray(ValueLayout.JAVA_FLOAT);
    }

    @Test
    void runsAFunctionOnEachRank() {
        try (HybridEngine engine = HybridEngine.open(Fixture.of("opt").folder(), options().devices(Device.cpu(0),
                Device.cpu(1)))) {
            assertEquals(List.of("rank-0 of 2", "rank-1 of 2"), engine.onEachRank(
                    model -> Thread.currentThread().getName() + " of " + model.rank().count()));
            List<Double> sums = engine.onEachRank(model -> {
                try (dev.tandem.device.Scope scope = dev.tandem.device.Scope.open()) {
                    var value = dev.tandem.device.Tensor.of(model.rank().device(), 1.0 + model.rank().index());
                    model.rank().collectives().allReduce(value);
                    return value.item();
                }
            });
            assertEquals(List.of(3.0, 3.0), sums);
            List<Long> addresses = engine.onEachRank(model -> model.arena().address());
            assertNotEquals(addresses.get(0), addresses.get(1));
        }
    }

    static void assertSame(List<Completion> found, List<Completion> expected, double tolerance) {
        assertEquals(expected.size(), found.size());
        for (int i = 0; i < found.size(); i++) {
            assertEquals(expected.get(i).prompt(), found.get(i).prompt());
            assertEquals(expected.get(i).sample(), found.get(i).sample());
            assertArrayEquals(expected.get(i).tokens(), found.get(i).tokens(), "completion " + i);
            assertArrayEquals(expected.get(i).logprobs(), found.get(i).logprobs(), (float) tolerance);
            assertEquals(expected.get(i).text(), found.get(i).text());
            assertEquals(expected.get(i).finish(), found.get(i).finish());
        }
    }

    private static void assertLogprobs(float[][] found, float[][] expected, double tolerance) {
        assertEquals(expected.length, found.length);
        for (int i = 0; i < found.length; i++) {
            assertArrayEquals(expected[i], found[i], (float) tolerance);
        }
    }
}
