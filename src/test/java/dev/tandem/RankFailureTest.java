package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.parallel.RankException;
import dev.tandem.testing.NativeObjects;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainerOptions;
import dev.tandem.training.TrainingSequence;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;

/** A rank that fails or stays away is named within the time limit, and the engine goes on as if nothing had happened. */
@ExtendWith(NativeObjects.class)
class RankFailureTest {
    private static final Duration LIMIT = Duration.ofSeconds(1);
    private static final SamplingParams SAMPLED = SamplingParams.defaults().maxTokens(10);
    private static final List<int[]> PROMPTS = List.of(new int[] {3, 4, 5}, new int[] {6, 7}, new int[] {8});
    private static final List<TrainingSequence> BATCH = List.of(TrainingSequence.of(new int[] {1, 5, 6, 7, 8}, 1, 1),
            TrainingSequence.of(new int[] {9, 8, 7}, 1, 1));

    private HybridEngine engine;
    private List<Completion> before;
    private TrainStep step;

    @BeforeEach
    void open() {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20).timeLimit(LIMIT).devices(Device.cpu(0), Device.cpu(1))
                .training(TrainerOptions.defaults().lr(0));
        engine = HybridEngine.create(TinyModels.llama(), null, options);
        before = engine.generateTokens(PROMPTS, SAMPLED);
        step = engine.train(BATCH);
    }

    /** Generation needs no collectives and training needs all of them. */
    @AfterEach
    void worksAfterwards() {
        try (HybridEngine again = engine) {
            HybridEngineTest.assertSame(again.generateTokens(PROMPTS, SAMPLED), before, 1e-5);
            TrainStep after = engine.train(BATCH);
            assertEquals(step.loss(), after.loss(), 1e-6);
            assertEquals(step.gradientNorm(), after.gradientNorm(), 1e-6);
            List<float[]> weights = engine.onEachRank(HybridEngineTest::weights);
            assertArrayEquals(weights.get(0), weights.get(1));
            assertEquals(List.of(3.0, 3.0), engine.onEachRank(RankFailureTest::sum), "a function's collectives work again");
        }
    }

    private static double sum(ModelRank model) {
        try (Scope scope = Scope.open()) {
            Tensor value = Tensor.of(model.rank().device(), 1.0 + model.rank().index());
            model.rank().collectives().allReduce(value);
            return value.item();
        }
    }

    @Test
    void aRankThatThrowsIsNamed() {
        IllegalStateException cause = new IllegalStateException("no more apples");
        RankException e = assertThrows(RankException.class, () -> engine.onEachRank(model -> {
            if (model.rank().index() == 1) {
                throw cause;
            }
            return sum(model);
        }));
        assertEquals(1, e.rank());
        assertSame(cause, e.getCause());
        assertTrue(e.getMessage().contains("rank 1 (cpu:1)") && e.getMessage().contains("no more apples"), e.getMessage());
    }

    @Test
    void aRankThatNeverArrivesIsNamed() {
        long start = System.nanoTime();
        RankException e = assertThrows(RankException.class, () -> engine.onEachRank(model -> model.rank().index() == 0 ? sum(model) : 0));
        double seconds = (System.nanoTime() - start) / 1e9;
        assertEquals(1, e.rank());
        assertTrue(e.getMessage().contains("rank 1 did not arrive at all-reduce") && e.getMessage().contains("rank 0"), e.getMessage());
        assertTrue(seconds < 3 * LIMIT.toSeconds(), "named after " + seconds + " s");
    }

    @Test
    void ranksAtDifferentCollectivesAreNamed() {
        RankException e = assertThrows(RankException.class, () -> engine.onEachRank(model -> {
            if (model.rank().index() == 0) {
                model.rank().collectives().barrier();
                return 0.0;
            }
            return sum(model);
        }));
        assertTrue(e.getMessage().contains("barrier") && e.getMessage().contains("all-reduce"), e.getMessage());
    }

    @Test
    void aRankThatHangsIsNamed() throws InterruptedException {
        CountDownLatch release = new CountDownLatch(1);
        RankException e = assertThrows(RankException.class, () -> engine.onEachRank(model -> {
            if (model.rank().index() == 0) {
                return sum(model);
            }
            awaitUninterruptibly(release);
            return 0.0;
        }));
        assertTrue(e.getMessage().contains("rank 1"), e.getMessage());
        RankException busy = assertThrows(RankException.class, () -> engine.generateTokens(PROMPTS, SAMPLED));
        assertEquals(1, busy.rank());
        assertTrue(busy.getMessage().contains("busy"), busy.getMessage());
        release.countDown();
        Thread.sleep(100);
    }

    @Test
    void aLossThatThrowsOnOneRankIsNamed() {
        RankException e = assertThrows(RankException.class, () -> engine.train(BATCH, tokens -> {
            if (Thread.currentThread().getName().equals("rank-1")) {
                throw new ArithmeticException("the loss fails here");
            }
            return tokens.logprob().sum();
        }, 1));
        assertEquals(1, e.rank());
        assertTrue(e.getMessage().contains("the loss fails here"), e.getMessage());
    }

    private static void awaitUninterruptibly(CountDownLatch latch) {
        try {
            latch.await();
        } catch (InterruptedException e) {
            throw new AssertionError(e);
        }
    }
}
