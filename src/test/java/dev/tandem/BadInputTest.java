package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeFalse;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.generation.Completion;
import dev.tandem.generation.Finish;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelFormatException;
import dev.tandem.testing.Fixture;
import dev.tandem.testing.NativeObjects;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicReference;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Whatever is asked wrongly is named, and afterwards the engine generates what it generated before. */
@ExtendWith(NativeObjects.class)
class BadInputTest {
    private static final SamplingParams GREEDY = SamplingParams.greedy().maxTokens(10).ignoreEos(true);
    private static final List<int[]> PROMPTS = List.of(new int[] {10, 20, 30, 40}, new int[] {50}, new int[] {60, 61,
            62, 63, 64, 65, 66});
    private static final TrainingSequence SEQUENCE = TrainingSequence.of(new int[] {5, 6, 7, 8, 9}, 1, 1);

    private HybridEngine engine;
    private List<Completion> before;

    @BeforeEach
    void open() {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).training(TrainerOptions.defaults().lr(1e-3));
        engine = HybridEngine.open(Fixture.of("llama").folder(), options);
        before = engine.generateTokens(PROMPTS, GREEDY);
    }

    @AfterEach
    void stillGenerates() {
        try (HybridEngine same = engine) {
            if (same.phase() != Phase.CLOSED) {
                HybridEngineTest.assertSame(same.generateTokens(PROMPTS, GREEDY), before, 1e-5);
            }
        }
    }

    private static String message(Class<? extends RuntimeException> type, Executable call, String... parts) {
        String message = assertThrows(type, call).getMessage();
        for (String part : parts) {
            assertTrue(message.contains(part), "\"" + message + "\" does not name \"" + part + "\"");
        }
        return message;
    }

    private void generate(int... prompt) {
        engine.generateTokens(List.of(new int[] {1}, prompt), GREEDY);
    }

    @Test
    void prompts() {
        message(IllegalArgumentException.class, () -> generate(), "request 1", "prompt is empty");
        message(IllegalArgumentException.class, () -> engine.generate("", GREEDY), "request 0", "prompt is empty");
        message(IllegalArgumentException.class, () -> engine.stream("", GREEDY), "prompt is empty");
        message(IllegalArgumentException.class, () -> generate(5, 512), "request 1", "token id 512 at position 1",
                "512 tokens");
        message(IllegalArgumentException.class, () -> generate(5, 6, -1), "request 1", "token id -1 at position 2");
        message(IllegalArgumentException.class, () -> generate(new int[1024]), "request 1", "1024 tokens",
                "context of 1024");
        message(IllegalArgumentException.class, () -> engine.generateTokens(PROMPTS, GREEDY.stopTokenIds(List.of(600))),
                "request 0", "stop token id 600");
        assertEquals(List.of(), engine.generateTokens(List.of(), GREEDY));
    }

    @Test
    void requestLargerThanThePool() {
        long page = engine.plan().generation().get(Use.KV) / engine.plan().kvBlocks();
        engine.resizeKv(4 * page);
        message(IllegalArgumentException.class, () -> generate(new int[60]), "request 1", "60 prompt tokens",
                "10 generated",
                "5 KV blocks of 16 tokens", "the pool has 3", "maxTokens");
        engine.resizeKv(engine.plan().kvBlocks() * page);
        message(TandemException.class, () -> HybridEngine.create(TinyModels.llama(), null,
                EngineOptions.defaults().memoryLimit(10_000)),
                "does not fit", "WEIGHTS");
        message(TandemException.class, () -> HybridEngine.create(TinyModels.llama(), null,
                EngineOptions.defaults().kvBytes(1)),
                "generation does not fit");
    }

    @ParameterizedTest
    @ValueSource(floats = {Float.NaN, Float.POSITIVE_INFINITY})
    void weightsInAFileThatAreNotFinite(float value, @TempDir Path folder) throws IOException {
        try (Stream<Path> files = Files.list(Fixture.of("qwen3").folder())) {
            for (Path file : files.toList()) {
                Files.copy(file, folder.resolve(file.getFileName().toString()));
            }
        }
        Path weights = folder.resolve("model.safetensors");
        byte[] bytes = Files.readAllBytes(weights);
        ByteBuffer buffer = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN);
        String header = new String(bytes, 8, (int) buffer.getLong(0), java.nio.charset.StandardCharsets.UTF_8);
        String dtype = header.replaceAll("(?s).*?\"dtype\":\\s*\"(\\w+)\".*", "$1");
        switch (dtype) {
            case "F32" -> buffer.putFloat(bytes.length - 4, value);
            case "BF16" -> buffer.putShort(bytes.length - 2, (short) (Float.floatToRawIntBits(value) >>> 16));
            case "F16" -> buffer.putShort(bytes.length - 2, Float.floatToFloat16(value));
            default -> throw new AssertionError(dtype);
        }
        Files.write(weights, bytes);
        message(ModelFormatException.class, () -> HybridEngine.open(folder), folder.toString(), "tensor model.",
                "NaN or an infinity");
    }

    @Test
    void weightsInMemoryThatAreNotFinite() {
        engine.generateTokens(List.of(new int[] {90, 91, 92}), GREEDY);
        List<float[]> weights = engine.onEachRank(HybridEngineTest::weights);
        engine.onEachRank(model -> {
            arena(model).asSlice(4L * 1000).fill((byte) 0xff); // every pattern of ones is a NaN
            return true;
        });
        for (Completion completion : engine.generateTokens(PROMPTS, GREEDY)) {
            assertInstanceOf(Finish.NonFinite.class, completion.finish());
            assertEquals(0, completion.tokens().length);
            assertEquals(0, completion.logprobs().length);
        }
        TrainStep step = engine.train(List.of(SEQUENCE));
        assertTrue(step.skipped());
        assertEquals(0, engine.weightVersion());
        engine.generateTokens(PROMPTS, GREEDY);
        engine.onEachRank(model -> {
            MemorySegment.copy(MemorySegment.ofArray(weights.get(model.rank().index())), 0, arena(model), 0,
                    model.arena().bytes());
            return true;
        });
    }

    /** One bad row of the logit matrix is enough, whatever is sampled. */
    @Test
    void oneTokenWhoseLogitIsNotFinite() {
        float[] weights = engine.onEachRank(HybridEngineTest::weights).getFirst();
        engine.onEachRank(model -> {
            model.arena().logitMatrix().select(0, 77).fillInPlace(Double.NaN);
            return true;
        });
        for (SamplingParams params : List.of(GREEDY, GREEDY.temperature(1), GREEDY.temperature(0.5).topK(3),
                GREEDY.repetitionPenalty(2))) {
            engine.generateTokens(PROMPTS, params).forEach(c -> assertInstanceOf(Finish.NonFinite.class, c.finish()));
        }
        engine.onEachRank(model -> {
            MemorySegment.copy(MemorySegment.ofArray(weights), 0, arena(model), 0, model.arena().bytes());
            return true;
        });
    }

    private static MemorySegment arena(ModelRank model) {
        return MemorySegment.ofAddress(model.arena().address()).reinterpret(model.arena().bytes());
    }

    @Test
    void closedEngine() {
        engine.close();
        engine.close();
        List<Executable> uses = List.of(() -> engine.generateTokens(PROMPTS, GREEDY), () -> engine.generate("a",
                GREEDY),
                () -> engine.generate("a"), () -> engine.stream("a", GREEDY), () -> engine.train(List.of(SEQUENCE)),
                () -> engine.streamTokens(new int[] {1}, GREEDY), () -> engine.logprobs(List.of(SEQUENCE), 1),
                        () -> engine.freezeReference(), () -> engine.sleep(), () -> engine.wake(),
                () -> engine.resizeKv(1 << 20), () -> engine.onEachRank(model -> 1),
                        () -> engine.save(Path.of("never")),
                () -> engine.tokenizer(), () -> engine.chatPrompt(List.of()));
        uses.forEach(use -> message(IllegalStateException.class, use, "the engine is closed"));
        assertFalse(Files.exists(Path.of("never")));
        assertEquals(Phase.CLOSED, engine.phase());
    }

    @Test
    void wrongPhase() {
        engine.sleep();
        message(IllegalStateException.class, () -> engine.generateTokens(PROMPTS, GREEDY), "sleeps", "wake()");
        message(IllegalStateException.class, () -> engine.train(List.of(SEQUENCE)), "sleeps", "wake()");
        engine.wake();
        message(IllegalStateException.class, () -> engine.referenceLogprobs(List.of(SEQUENCE), 1), "freezeReference()");
    }

    @Test
    void twoThreadsAtOnce() throws InterruptedException {
        CountDownLatch entered = new CountDownLatch(1);
        CountDownLatch leave = new CountDownLatch(1);
        AtomicReference<Throwable> failure = new AtomicReference<>();
        Thread first = Thread.ofPlatform().name("first-user").start(() -> {
            try {
                engine.onEachRank(model -> {
                    entered.countDown();
                    await(leave);
                    return true;
                });
            } catch (Throwable e) {
                failure.set(e);
            }
        });
        await(entered);
        for (Executable use : List.<Executable>of(() -> engine.generateTokens(PROMPTS, GREEDY),
                () -> engine.train(List.of(SEQUENCE)),
                () -> engine.sleep(), () -> engine.stream("a", GREEDY), () -> engine.close())) {
            message(IllegalStateException.class, use, "engine.onEachRank", "\"first-user\"", "one call at a time");
        }
        leave.countDown();
        first.join();
        assertEquals(null, failure.get());
        assertEquals(Phase.GENERATION, engine.phase());
    }

    private static void await(CountDownLatch latch) {
        try {
            latch.await();
        } catch (InterruptedException e) {
            throw new AssertionError(e);
        }
    }

    @Test
    void callbacksThatCallTheEngineOrThrow() {
        List<String> prompts = List.of("one", "two", "three");
        for (Executable use : List.<Executable>of(
                () -> engine.generate(prompts, GREEDY, completion -> engine.generate("again", GREEDY)),
                () -> engine.generate(prompts, GREEDY, completion -> engine.train(List.of(SEQUENCE))),
                () -> engine.generate(prompts, GREEDY, completion -> engine.close()))) {
            message(IllegalStateException.class, use, "was called while engine.generate", "has not ended");
        }
        message(IllegalStateException.class, () -> engine.train(List.of(SEQUENCE), t -> {
            engine.generate("again", GREEDY);
            return t.logprob().sum();
        }, 1), "engine.generate was called while engine.train");
        message(ArithmeticException.class, () -> engine.generate(prompts, GREEDY, completion -> {
            throw new ArithmeticException("my own");
        }), "my own");
    }

    @ParameterizedTest
    @ValueSource(doubles = {Double.NaN, Double.POSITIVE_INFINITY, 1e38})
    void lossesThatAreNotFinite(double factor) {
        TokenLoss good = t -> t.logprob().sum().neg();
        EngineOptions options = engine.options().training(engine.options().training().weightDecay(0.1, true));
        try (HybridEngine spoiled = HybridEngine.open(Fixture.of("llama").folder(), options);
                HybridEngine clean = HybridEngine.open(Fixture.of("llama").folder(), options)) {
            spoiled.train(List.of(SEQUENCE), good, 1);
            clean.train(List.of(SEQUENCE), good, 1);
            float[] weights = spoiled.onEachRank(HybridEngineTest::weights).getFirst();
            TrainStep step = spoiled.train(List.of(SEQUENCE), t -> good.loss(t).mul(factor).mul(factor), 1);
            assertTrue(step.skipped());
            assertEquals(2, step.step());
            assertFalse(Double.isFinite(step.loss()) && Double.isFinite(step.gradientNorm()), step.toString());
            assertEquals(1, spoiled.weightVersion());
            assertArrayEquals(weights, spoiled.onEachRank(HybridEngineTest::weights).getFirst());
            // Had a moment changed, the next step would lead elsewhere.
            spoiled.train(List.of(SEQUENCE), good, 1);
            clean.train(List.of(SEQUENCE), good, 1);
            assertArrayEquals(clean.onEachRank(HybridEngineTest::weights).getFirst(),
                    spoiled.onEachRank(HybridEngineTest::weights).getFirst());
        }
    }

    @Test
    void lossesThatFail() {
        long activations = engine.onEachRank(model -> model.memory().held(Use.ACTIVATIONS)).getFirst();
        message(ArithmeticException.class, () -> engine.train(List.of(SEQUENCE), t -> {
            throw new ArithmeticException("my own");
        }, 1), "my own");
        message(IllegalArgumentException.class, () -> engine.train(List.of(SEQUENCE),
                t -> t.logprob().mul(t.advantage()).sum(), 1),
                "advantages");
        message(IllegalArgumentException.class, () -> engine.train(List.of(SEQUENCE), t -> t.logprob(), 1),
                "one number", "[4]");
        message(IllegalArgumentException.class,
                () -> engine.train(List.of(SEQUENCE), t -> Tensor.of(t.logprob().device(), 1f), 1), "constant");
        assertEquals(0, engine.weightVersion());
        assertEquals(activations, engine.onEachRank(model -> model.memory().held(Use.ACTIVATIONS)).getFirst());
    }

    @Test
    void trainingSequences() {
        int[] three = {1, 2, 3};
        boolean[] trained = {false, true, true};
        float[] weight = {0, 1, 1};
        message(IllegalArgumentException.class, () -> new TrainingSequence(three, new boolean[2], weight, null, null,
                null),
                "trained has 2 values for 3 tokens");
        message(IllegalArgumentException.class, () -> new TrainingSequence(three, trained, new float[4], null, null,
                null), "weight has 4");
        message(IllegalArgumentException.class, () -> new TrainingSequence(three, trained, weight, new float[1], null,
                null), "old has 1");
        message(IllegalArgumentException.class, () -> new TrainingSequence(three, trained, weight, null, new float[9],
                null), "reference");
        message(IllegalArgumentException.class, () -> new TrainingSequence(three, trained, weight, null, null,
                new float[0]), "advantage");
        message(IllegalArgumentException.class, () -> TrainingSequence.of(new int[] {1}, 0, 1), "at least two tokens");
        message(IllegalArgumentException.class,
                () -> new TrainingSequence(three, new boolean[] {true, true, true}, weight, null, null, null),
                        "first token");
        TrainingSequence unknown = TrainingSequence.of(new int[] {1, 2, 512}, 1, 1);
        message(IllegalArgumentException.class, () -> engine.train(List.of(SEQUENCE, unknown)), "sequence 1", "512");
        TrainingSequence negative = TrainingSequence.of(new int[] {1, -2, 5}, 1, 1);
        message(IllegalArgumentException.class, () -> engine.logprobs(List.of(SEQUENCE, negative), 1), "sequence 1",
                "-2");
        TrainingSequence longer = TrainingSequence.of(new int[1026], 1, 1);
        message(IllegalArgumentException.class, () -> engine.train(List.of(longer)), "sequence 0", "1026 tokens",
                "1024");
        TrainingSequence untrained = TrainingSequence.of(three, 3, 1);
        message(IllegalArgumentException.class, () -> engine.train(List.of(untrained)), "trained token");
        message(IllegalArgumentException.class, () -> engine.train(List.of()), "trained token");
        message(IllegalArgumentException.class, () -> engine.logprobs(List.of(SEQUENCE, untrained), 1),
                "no scored token");
        TrainingSequence withOld = new TrainingSequence(three, trained, weight, new float[3], null, null);
        message(IllegalArgumentException.class, () -> engine.train(List.of(SEQUENCE, withOld)), "old log-probs");
        message(IllegalArgumentException.class, () -> engine.train(List.of(withOld, SEQUENCE)), "old log-probs");
        for (double temperature : new double[] {0, -1, Double.NaN, Double.POSITIVE_INFINITY}) {
            message(IllegalArgumentException.class, () -> engine.logprobs(List.of(SEQUENCE), temperature),
                    "temperature");
        }
        assertEquals(0, engine.weightVersion());
    }

    @Test
    void momentsOfAnotherType() {
        message(IllegalArgumentException.class, () -> TrainerOptions.defaults().moments(DType.FLOAT16), "moments", "FLOAT32", "BFLOAT16",
                "not FLOAT16");
    }

    @Test
    void engineWithoutATokenizer() {
        try (HybridEngine bare = HybridEngine.create(TinyModels.llama(), null,
                EngineOptions.defaults().kvBytes(1 << 20))) {
            message(IllegalStateException.class, () -> bare.generate("a", GREEDY), "no tokenizer");
            message(IllegalStateException.class, () -> bare.stream("a", GREEDY), "no tokenizer");
            assertEquals(10, bare.generateTokens(List.of(new int[] {1}), GREEDY).getFirst().tokens().length);
        }
        message(IllegalArgumentException.class, () -> HybridEngine.create(TinyModels.llama(), engine.tokenizer(),
                engine.options()),
                "511", "64");
    }

    @Test
    void aGpuThatIsNotThere() {
        assumeFalse(Cuda.available(), "there is a GPU");
        EngineOptions options = EngineOptions.defaults().devices(Device.cuda(0));
        String message = assertThrows(TandemException.class, () -> HybridEngine.create(TinyModels.llama(), null, options)).getMessage();
        assertTrue(message.startsWith("cuda:0 cannot be used: ") && !message.contains("\n"), message);
        assertTrue(message.contains("install") || message.contains("class path"), message);
    }
}
