package dev.tandem.rl;

import dev.tandem.HybridEngine;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.IntStream;

/**
 * One update of the policy from a rollout.
 *
 * @param step what the optimizer did
 * @param statistics of the tokens under the weights before the update
 */
public record PolicyUpdate(TrainStep step, PolicyStatistics statistics) {
    /**
     * Updates the weights once.
     *
     * @param advantages of each sample of the rollout
     * @throws IllegalStateException when the algorithm has a KL term and the engine has no frozen reference
     */
    public static PolicyUpdate apply(HybridEngine engine, Algorithm algorithm, Rollout rollout, double[][] advantages) {
        return apply(engine, algorithm, rollout, advantages, false);
    }

    /**
     * Updates the weights once.
     *
     * @param advantages of each sample of the rollout
     * @param rescores whether the training side computes the old log-probs, by a forward pass more, instead of taking generation's
     * @throws IllegalStateException when the algorithm has a KL term and the engine has no frozen reference
     */
    public static PolicyUpdate apply(HybridEngine engine, Algorithm algorithm, Rollout rollout, double[][] advantages, boolean rescores) {
        List<TrainingSequence> sequences;
        try (Span span = engine.activity("making sequences")) {
            sequences = rollout.sequences(advantages, algorithm.aggregation());
        }
        if (rescores) {
            float[][] old = engine.logprobs(sequences, rollout.temperature());
            sequences = with(sequences, (s, i) -> new TrainingSequence(s.tokens(), s.trained(), s.weight(), old[i], null, s.advantage()));
        }
        if (algorithm.loss().needsReference()) {
            float[][] reference = engine.referenceLogprobs(sequences, rollout.temperature());
            sequences = with(sequences,
                    (s, i) -> new TrainingSequence(s.tokens(), s.trained(), s.weight(), s.old(), reference[i], s.advantage()));
        }
        try (Statistics statistics = new Statistics()) {
            TokenLoss loss = tokens -> {
                statistics.add(PolicyStatistics.measured(algorithm.loss(), tokens));
                return algorithm.loss().loss(tokens);
            };
            TrainStep step = engine.train(sequences, loss, rollout.temperature());
            return new PolicyUpdate(step, statistics.total());
        }
    }

    private static List<TrainingSequence> with(List<TrainingSequence> sequences, Change change) {
        return IntStream.range(0, sequences.size()).mapToObj(i -> change.of(sequences.get(i), i)).toList();
    }

    private interface Change {
        TrainingSequence of(TrainingSequence sequence, int index);
    }

    /** Of all micro-batches, which several ranks compute at a time; read when the step is over, so that no micro-batch waits for them. */
    private static final class Statistics implements AutoCloseable {
        private final List<PolicyStatistics.Pending> parts = new ArrayList<>();

        synchronized void add(PolicyStatistics.Pending part) {
            parts.add(part);
        }

        synchronized PolicyStatistics total() {
            return parts.stream().map(PolicyStatistics.Pending::read).reduce(PolicyStatistics.NONE, PolicyStatistics::add);
        }

        @Override
        public synchronized void close() {
            parts.forEach(PolicyStatistics.Pending::close);
        }
    }
}
