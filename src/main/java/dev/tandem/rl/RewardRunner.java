package dev.tandem.rl;

import java.time.Duration;
import java.util.BitSet;
import java.util.List;
import java.util.Map;
import java.util.Queue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
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
        Batch<T> batch = begin(completions.size(), reward);
        for (int i = 0; i < completions.size(); i++) {
            batch.add(i, completions.get(i));
        }
        return batch.await();
    }

    /**
     * Begins a batch whose completions come one by one, as decoding ends them.
     *
     * @param count how many will come
     * @param reward gives a finite number
     */
    public <T> Batch<T> begin(int count, ToDoubleFunction<? super T> reward) {
        return new Batch<>(timeLimit, count, reward);
    }

    /** Completions that are scored while others are still to come. */
    public static final class Batch<T> {
        private final @Nullable Duration timeLimit;
        private final int count;
        private final ToDoubleFunction<? super T> reward;
        private final BlockingQueue<Outcome> outcomes = new LinkedBlockingQueue<>();
        private final Map<Integer, T> completions = new ConcurrentHashMap<>();
        private final Queue<Thread> calls = new ConcurrentLinkedQueue<>();

        private Batch(@Nullable Duration timeLimit, int count, ToDoubleFunction<? super T> reward) {
            this.timeLimit = timeLimit;
            this.count = count;
            this.reward = reward;
        }

        /**
         * Starts the call for one completion and returns at once. Any thread.
         *
         * @param index its place among the scores, each of 0 … count-1 once
         */
        public void add(int index, T completion) {
            completions.put(index, completion);
            calls.add(Thread.ofVirtual().name("reward-", index).start(() -> outcomes.add(call(index, completion, reward))));
        }

        /**
         * Waits for all calls; the limit counts from here.
         *
         * @return the scores by index
         * @throws RewardException as {@link RewardRunner#scores}
         */
        public double[] await() {
            boolean complete = false;
            try {
                double[] scores = collect();
                complete = true;
                return scores;
            } finally {
                if (!complete) {
                    cancel();
                }
            }
        }

        private double[] collect() {
            long start = System.nanoTime();
            double[] scores = new double[count];
            BitSet missing = new BitSet();
            missing.set(0, count);
            while (!missing.isEmpty()) {
                Outcome outcome = next(start, missing);
                if (outcome.failure() != null || !Double.isFinite(outcome.score())) {
                    throw failed(outcome);
                }
                scores[outcome.index()] = outcome.score();
                missing.clear(outcome.index());
            }
            return scores;
        }

        private Outcome next(long start, BitSet missing) {
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

        private RewardException failed(Outcome outcome) {
            int index = outcome.index();
            Throwable failure = outcome.failure();
            String happened = failure != null ? " threw " + failure : " is " + outcome.score() + ", not a finite number";
            String message = "the reward of completion " + index + " of " + count + happened + ": "
                    + described(completions.get(index));
            return new RewardException(index, message, failure);
        }

        /** Interrupts the calls that have not ended and waits a little for them, also when generation has failed. */
        public void cancel() {
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
    }

    private static <T> Outcome call(int index, T completion, ToDoubleFunction<? super T> reward) {
        try {
            return new Outcome(index, reward.applyAsDouble(completion), null);
        } catch (Throwable failure) { // errors too: an assertion or a stack overflow is the reward's failure
            return new Outcome(index, Double.NaN, failure);
        }
    }

    /** For example "completions 3, 7, 9 (3 of 64)". */
    private static String named(BitSet missing, int count) {
        int total = missing.cardinality();
        String indices =
                missing.stream().limit(MAX_NAMED).mapToObj(Integer::toString).collect(Collectors.joining(", "));
        return "completions " + indices + (total > MAX_NAMED ? ", …" : "") + " (" + total + " of " + count + ")";
    }

    private static String described(@Nullable Object completion) {
        String text = String.valueOf(completion).replaceAll("\\s+", " ");
        return text.length() <= MAX_DESCRIPTION ? text : text.substring(0, MAX_DESCRIPTION) + "…";
    }
}
