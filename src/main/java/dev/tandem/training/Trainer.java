package dev.tandem.training;

import dev.tandem.parallel.Ranks;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.stream.IntStream;
import org.jspecify.annotations.Nullable;

/**
 * Training over all ranks: cuts a step's sequences into micro-batches, shares them out, and lets every rank run its own forward and
 * backward passes and update its slice of the weights. Called from one thread at a time.
 */
public final class Trainer {
    private static final int MOST_BEGUN = 2;

    private final Ranks ranks;
    private final List<RankTrainer> trainers;
    private final TrainerOptions options;
    private final int vocabSize;
    private final int maxPositions;
    private long steps;
    private long skipped;
    /** Steps that may not have ended, the earliest first. */
    private final Deque<PendingStep> begun = new ArrayDeque<>();

    /**
     * @param ranks where to train
     * @param trainers one for each rank
     * @param vocabSize token ids are below it
     * @param maxPositions no sequence is longer
     */
    public Trainer(Ranks ranks, List<RankTrainer> trainers, TrainerOptions options, int vocabSize, int maxPositions) {
        this.ranks = ranks;
        this.trainers = List.copyOf(trainers);
        this.options = options;
        this.vocabSize = vocabSize;
        this.maxPositions = maxPositions;
    }

    /**
     * One optimizer step on one batch.
     *
     * @param sequences everything that the step's gradient is made of; those without a trained token are left out
     * @param loss of per-token values, called once for each micro-batch on its rank's thread
     * @param temperature by which logits are divided, as when the tokens were sampled
     * @return what happened; a step whose loss or gradient is not finite is skipped and leaves weights and moments alone
     */
    public TrainStep step(List<TrainingSequence> sequences, TokenLoss loss, double temperature) {
        return begin(sequences, loss, temperature, step -> {}).await();
    }

    /**
     * Begins a step as {@link #step}, without waiting until a GPU has computed it; waits for the step before the last one, though, so that
     * no more than two are on their way.
     *
     * @param ended told what the step did as soon as that is known, by the thread that waits for it
     * @return what will have happened
     */
    public PendingStep begin(List<TrainingSequence> sequences, TokenLoss loss, double temperature, Consumer<TrainStep> ended) {
        long start = System.nanoTime();
        checkTemperature(temperature);
        List<TrainingSequence> used = checked(sequences);
        int longest = used.stream().mapToInt(TrainingSequence::inputTokens).max().orElseThrow();
        List<List<List<Integer>>> shares = MicroBatches.cut(used, trainers.getFirst().microBatchTokens(longest), ranks.count());
        int rounds = shares.stream().mapToInt(List::size).max().orElse(0);
        double lr = options.lr().at(steps);
        if (begun.size() == MOST_BEGUN) {
            begun.poll().await();
        }
        List<Supplier<RankTrainer.Outcome>> outcomes = ranks.onEach(rank -> trainers.get(rank.index())
                .step(batches(used, shares.get(rank.index())), rounds, loss, temperature, lr));
        long number = ++steps;
        long tokens = used.stream().mapToLong(TrainingSequence::inputTokens).sum();
        PendingStep next = new PendingStep(() -> {
            RankTrainer.Outcome outcome = ranks.onEach(rank -> outcomes.get(rank.index()).get()).getFirst();
            skipped += outcome.applied() ? 0 : 1;
            TrainStep step = new TrainStep(number, outcome.loss(), outcome.norm(), lr, !outcome.applied(), tokens,
                    (System.nanoTime() - start) / 1e9);
            ended.accept(step);
            return step;
        });
        begun.add(next);
        return next;
    }

    /**
     * Log-probabilities of the trained tokens, without gradients.
     *
     * @param reference the weights to use on each rank instead of the trained ones, or null
     * @return for each sequence an array as long as its tokens, zero where nothing is trained
     */
    public float[][] logprobs(List<TrainingSequence> sequences, @Nullable List<dev.tandem.model.WeightArena> reference,
            double temperature) {
        checkTemperature(temperature);
        List<TrainingSequence> used = checked(sequences);
        if (used.size() != sequences.size()) {
            throw new IllegalArgumentException("a sequence to score has no scored token");
        }
        List<List<List<Integer>>> shares = MicroBatches.cut(used, options.microBatchTokens(), ranks.count());
        float[][] result = new float[used.size()][];
        ranks.onEach(rank -> {
            for (List<Integer> batch : shares.get(rank.index())) {
                float[][] part = trainers.get(rank.index()).logprobs(
                        batch.stream().map(used::get).toList(), reference == null ? null : reference.get(rank.index()), temperature);
                IntStream.range(0, part.length).forEach(i -> result[batch.get(i)] = part[i]);
            }
            return true;
        });
        return result;
    }

    /** Waits for all steps that were begun. */
    public void settle() {
        for (PendingStep step = begun.poll(); step != null; step = begun.poll()) {
            step.await();
        }
    }

    private static List<List<TrainingSequence>> batches(List<TrainingSequence> sequences, List<List<Integer>> share) {
        return share.stream().map(batch -> batch.stream().map(sequences::get).toList()).toList();
    }

    private List<TrainingSequence> checked(List<TrainingSequence> sequences) {
        List<TrainingSequence> used = new ArrayList<>();
        for (int s = 0; s < sequences.size(); s++) {
            TrainingSequence sequence = sequences.get(s);
            if (sequence.inputTokens() > maxPositions) {
                throw new IllegalArgumentException("sequence " + s + " has " + sequence.tokens().length
                        + " tokens, the model's context is " + maxPositions);
            }
            for (int token : sequence.tokens()) {
                if (token < 0 || token >= vocabSize) {
                    throw new IllegalArgumentException(
                            "sequence " + s + " holds token id " + token + ", the vocabulary has " + vocabSize);
                }
            }
            if (sequence.trainedTokens() > 0) {
                used.add(sequence);
            }
        }
        if (used.isEmpty()) {
            throw new IllegalArgumentException("a batch needs at least one sequence with a trained token");
        }
        return used;
    }

    private static void checkTemperature(double temperature) {
        if (!(temperature > 0) || Double.isInfinite(temperature)) {
            throw new IllegalArgumentException("the temperature of training must be positive: " + temperature);
        }
    }

    /** {@return how many steps were taken, skipped ones included} */
    public long steps() {
        return steps;
    }

    /** {@return how many steps were skipped because loss or gradient was not finite; waits for those that were begun} */
    public long skipped() {
        settle();
        return skipped;
    }
}
