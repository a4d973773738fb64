package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.time.Duration;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(20)
class RewardRunnerTest {
    private static final RewardRunner UNLIMITED = RewardRunner.unlimited();

    private static void park() {
        try {
            Thread.sleep(Duration.ofMinutes(5));
        } catch (InterruptedException interruption) {
            throw new IllegalStateException(interruption);
        }
    }

    /** Each call waits for all others, so that they pass only if they all run at once, and end in any order. */
    @Test
    void callsRunTogetherAndKeepTheirOrder() {
        int count = 2000;
        CountDownLatch together = new CountDownLatch(count);
        double[] scores = UNLIMITED.timeLimit(Duration.ofSeconds(15)).scores(
                IntStream.range(0, count).boxed().toList(), completion -> {
                    together.countDown();
                    try {
                        together.await();
                    } catch (InterruptedException interruption) {
                        throw new IllegalStateException(interruption);
                    }
                    assertTrue(Thread.currentThread().isVirtual());
                    return completion * 0.5;
                });
        assertArrayEquals(IntStream.range(0, count).mapToDouble(i -> i * 0.5).toArray(), scores);
        assertEquals(0, UNLIMITED.scores(List.of(), completion -> 1).length);
    }

    @Test
    void throwingRewardIsNamedAndTheOthersAreInterrupted() {
        AtomicInteger interrupted = new AtomicInteger();
        CountDownLatch started = new CountDownLatch(2);
        AssertionError cause = new AssertionError("no answer");
        RewardException failure = assertThrows(RewardException.class, () -> UNLIMITED.scores(
                List.of("aaa", "the answer\n\n is " + "x".repeat(1000), "ccc"), completion -> {
                    if (completion.startsWith("the")) {
                        try {
                            started.await();
                        } catch (InterruptedException interruption) {
                            throw new IllegalStateException(interruption);
                        }
                        throw cause;
                    }
                    started.countDown();
                    try {
                        park();
                    } finally {
                        interrupted.incrementAndGet();
                    }
                    return 0;
                }));
        assertSame(cause, failure.getCause());
        assertEquals(1, failure.index());
        assertEquals(2, interrupted.get(), "the calls must have ended when the exception comes");
        String message = failure.getMessage();
        assertTrue(message.startsWith("the reward of completion 1 of 3 threw java.lang.AssertionError: no answer: the"),
                message);
        assertTrue(message.contains("the answer is xxx") && message.endsWith("…") && message.length() < 250, message);
    }

    @Test
    void scoreThatIsNotFiniteIsNamed() {
        for (double bad : new double[] {Double.NaN, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY}) {
            RewardException failure = assertThrows(RewardException.class,
                    () -> UNLIMITED.scores(List.of("a", "b", "c"), completion -> completion.equals("c") ? bad : 1));
            assertEquals(2, failure.index());
            assertEquals(
                    "the reward of completion 2 of 3 is " + bad + ", not a finite number: c", failure.getMessage());
        }
        assertArrayEquals(new double[] {1}, UNLIMITED.scores(List.of("a"), completion -> 1), "still usable");
    }

    @Test
    void limitNamesTheMissing() {
        RewardException failure = assertThrows(RewardException.class, () -> UNLIMITED.timeLimit(Duration.ofMillis(200))
                .scores(IntStream.range(0, 30).boxed().toList(), completion -> {
                    if (completion % 3 == 1) {
                        park();
                    }
                    return completion;
                }));
        assertEquals(1, failure.index());
        assertTrue(failure.getMessage().contains("PT0.2S")
                && failure.getMessage().contains("completions 1, 4, 7, 10, 13, 16, 19, 22, … (10 of 30)"),
                failure.getMessage());
        assertThrows(IllegalArgumentException.class, () -> UNLIMITED.timeLimit(Duration.ZERO));
        Duration longest = Duration.ofSeconds(Long.MAX_VALUE);
        assertArrayEquals(new double[] {1}, UNLIMITED.timeLimit(longest).scores(List.of("a"), completion -> 1));
    }

    @Test
    void callThatIgnoresInterruptionIsAbandoned() {
        CountDownLatch release = new CountDownLatch(1);
        long start = System.nanoTime();
        assertThrows(RewardException.class, () -> UNLIMITED.timeLimit(Duration.ofMillis(50)).scores(
                List.of("stubborn"), completion -> {
                    while (release.getCount() > 0) {
                        try {
                            release.await();
                        } catch (InterruptedException ignored) {
                            Thread.interrupted();
                        }
                    }
                    return 1;
                }));
        assertTrue(System.nanoTime() - start < 10e9);
        release.countDown();
    }

    @Test
    void interruptedCallerStaysInterrupted() {
        Thread.currentThread().interrupt();
        RewardException failure = assertThrows(RewardException.class,
                () -> UNLIMITED.scores(List.of("a"), completion -> {
                    park();
                    return 1;
                }));
        assertTrue(Thread.interrupted());
        assertInstanceOf(InterruptedException.class, failure.getCause());
        assertFalse(Thread.currentThread().isInterrupted());
    }
}
