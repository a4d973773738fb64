package dev.tandem.rl;

import java.time.Duration;
import java.util.ArrayList;
import java.util.BitSet;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.function.ToDoubleFunction;
import java.util.stream.Collectors;
import org.jspecify.annotations.Nullable;

/**
 * Scores completions with a reward function, every call on a virtual thread of its own, so that rewards which wait for
 * a sandbox, a judge or a file wait together. The reward is called from many threads at once and must not use tensors:
 * libtorch stays on the ranks' threads.
 *
 * <p>One failure ends the batch. The other calls are interrupted, and the exception is thrown when they have ended; a
 * call that ignores the interruption is waited for one second, then abandoned: its daemon thread runs on and its result
 * is dropped, since the JVM cannot stop it and a training run must not hang on it.
 *
 * @param timeLimit how long all calls together may take, or null for no limit
 */
public record RewardRunner(@Nullable Duration timeLimit) {
    private static final Duration GRACE = Duration.ofSeconds(1);
    private static final int MAX_DESCRIPTION = 120;
    private static final int MAX_NAMED = 8;

    private record Outcome(int index, double score, @Nullable Throwable failure) {}

    /** Checks the limit. */
    public RewardRunner {
        if (timeLimit != null && !timeLimit.isPositive()) {
            throw new IllegalArgumentException("timeLimit must be positive: " + timeLimit);
        }
    }

    /** {@return a runner that waits for as long as the calls take} */
    public static RewardRunner unlimited() {
        return new RewardRunner(null);
    }

    /** {@return a runner with this limit on the time of all calls together} */
    public RewardRunner timeLimit(Duration limit) {
        return new RewardRunner(limit);
    }

    /**
     * Scores all completions and waits for the results.
     *
     * @param completions what to score; {@code toString} names one in an error
     * @param reward gives a finite number
     * @return the scores, in the order of the completions
     * @throws RewardException if a call throws or gives NaN or an infinite number (the message names which, and the
     *     call's own exception is the cause), if the limit passes (it names those that have not ended), or if the
     *     caller is interrupted, which stays interrupted
     */
    public <T> double[] scores(List<T> completions, ToDoubleFunction<? super T> reward) {
        BlockingQueue<Outcome> outcomes = new LinkedBlockingQueue<>();
        List<Thread> calls = new ArrayList<>(completions.size());
        for (int i = 0; i < completions.size(); i++) {
            int index = i;
            T completion = completions.get(i);
            calls.add(Thread.ofVirtual().name("reward-", i).start(() -> outcomes.add(call(index, completion, reward))));
        }
        boolean complete = false;
        try {
            double[] scores = collect(completions, outcomes);
            complete = true;
            return scores;
        } finally {
            if (!complete) {
                cancel(calls);
            }
        }
    }

    private static <T> Outcome call(int index, T completion, ToDoubleFunction<? super T> reward) {
        try {
            return new Outcome(index, reward.applyAsDouble(completion), null);
        } catch (Throwable failure) { // errors too: an assertion or a stack overflow is the reward's failure
            return new Outcome(index, Double.NaN, failure);
        }
    }

    private double[] collect(List<?> completions, BlockingQueue<Outcome> outcomes) {
        long start = System.nanoTime();
        double[] scores = new double[completions.size()];
        BitSet missing = new BitSet();
        missing.set(0, scores.length);
        while (!missing.isEmpty()) {
            Outcome outcome = await(outcomes, start, missing, scores.length);
            if (outcome.failure() != null || !Double.isFinite(outcome.score())) {
                throw failed(outcome, completions);
            }
            scores[outcome.index()] = outcome.score();
            missing.clear(outcome.index());
        }
        return scores;
    }

    private Outcome await(BlockingQueue<Outcome> outcomes, long start, BitSet missing, int count) {
        try {
            if (timeLimit == null) {
                return outcomes.take();
            }
            // Saturates at 292 years, where Duration.toNanos would throw.
            long left = TimeUnit.NANOSECONDS.convert(timeLimit) - (System.nanoTime() - start);
            Outcome outcome = outcomes.poll(left, TimeUnit.NANOSECONDS);
            if (outcome == null) {
                String message = "the rewards were given " + timeLimit + ", and " + named(missing, count)
                        + " have not ended; raise the limit or bound the reward function";
                throw new RewardException(missing.nextSetBit(0), message, null);
            }
            return outcome;
        } catch (InterruptedException interruption) {
            Thread.currentThread().interrupt();
            throw new RewardException(missing.nextSetBit(0),
                    "interrupted while waiting for the rewards of " + named(missing, count), interruption);
        }
    }

    private static RewardException failed(Outcome outcome, List<?> completions) {
        int index = outcome.index();
        Throwable failure = outcome.failure();
        String happened = failure != null ? " threw " + failure : " is " + outcome.score() + ", not a finite number";
        String message = "the reward of completion " + index + " of " + completions.size() + happened + ": "
                + described(completions.get(index));
        return new RewardException(index, message, failure);
    }

    private static void cancel(List<Thread> calls) {
        calls.forEach(Thread::interrupt);
        long end = System.nanoTime() + GRACE.toNanos();
        boolean interrupted = Thread.interrupted();
        for (Thread call : calls) {
            try {
                call.join(Duration.ofNanos(Math.max(0, end - System.nanoTime())));
            } catch (InterruptedException interruption) {
                interrupted = true;
            }
        }
        if (interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    /** For example "completions 3, 7, 9 (3 of 64)". */
    private static String named(BitSet missing, int count) {
        int total = missing.cardinality();
        String indices =
                missing.stream().limit(MAX_NAMED).mapToObj(Integer::toString).collect(Collectors.joining(", "));
        return "completions " + indices + (total > MAX_NAMED ? ", …" : "") + " (" + total + " of " + count + ")";
    }

    private static String described(Object completion) {
        String text = completion.toString().replaceAll("\\s+", " ");
        return text.length() <= MAX_DESCRIPTION ? text : text.substring(0, MAX_DESCRIPTION) + "…";
    }
}
