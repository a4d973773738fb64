package dev.tandem.rl;

import dev.tandem.HybridEngine;
import dev.tandem.device.ProcessMemory;
import dev.tandem.generation.SamplingParams;
import java.util.Arrays;
import java.util.List;
import java.util.function.Supplier;
import java.util.stream.Stream;
import org.apache.commons.math3.stat.descriptive.DescriptiveStatistics;

/**
 * The loop of reinforcement learning with any {@link Algorithm}. A step is three lines, which a researcher can as well write by hand:
 *
 * <pre>{@code
 * Rollout rollout = Rollout.sample(engine, prompts, sampling, reward, RewardRunner.unlimited());
 * double[][] advantages = algorithm.advantageEstimator().advantages(rollout.rewards());
 * PolicyUpdate update = PolicyUpdate.apply(engine, algorithm, rollout, advantages);
 * }</pre>
 *
 * <p>Old log-probs are those that generation sampled with, which saves a forward pass. Should the training side once find them further away
 * than {@link #logprobGapLimit} on average, it computes them itself from then on.
 *
 * <p>An algorithm with a KL term gets the weights at construction as its frozen reference. One thread at a time, as the engine.
 */
public final class PolicyTrainer {
    private static final System.Logger LOG = System.getLogger(PolicyTrainer.class.getName());

    private final HybridEngine engine;
    private final Algorithm algorithm;
    private final SamplingParams sampling;
    private final Reward reward;
    private final RewardRunner runner;
    private double logprobGapLimit = 0.05;
    private boolean rescores;
    private long steps;

    /**
     * @param sampling how to sample; {@code n} is the size of a group
     * @param reward scores each completion
     */
    public PolicyTrainer(HybridEngine engine, Algorithm algorithm, SamplingParams sampling, Reward reward) {
        this(engine, algorithm, sampling, reward, RewardRunner.unlimited());
    }

    /**
     * @param sampling how to sample; {@code n} is the size of a group
     * @param reward scores each completion
     * @param runner bounds the time of rewards
     */
    public PolicyTrainer(HybridEngine engine, Algorithm algorithm, SamplingParams sampling, Reward reward, RewardRunner runner) {
        this.engine = engine;
        this.algorithm = algorithm;
        this.sampling = sampling;
        this.reward = reward;
        this.runner = runner;
        if (algorithm.loss().needsReference()) {
            engine.freezeReference();
        }
    }

    /** Sets how far generation's log-probs may be from training's, as a step's mean in nats: 0.05 unless set; 0: they are not used. */
    public PolicyTrainer logprobGapLimit(double mean) {
        if (!(mean >= 0)) {
            throw new IllegalArgumentException("logprobGapLimit must be at least 0: " + mean);
        }
        logprobGapLimit = mean;
        rescores = mean == 0;
        return this;
    }

    /**
     * One step: rollout, advantages, update.
     *
     * @throws RewardException when the reward fails; no weight has changed then
     */
    public StepMetrics step(List<String> prompts) {
        Rollout rollout = Rollout.sample(engine, prompts, sampling, reward, runner);
        double[][] advantages = algorithm.advantageEstimator().advantages(rollout.rewards());
        ProcessMemory.resetPeak();
        long start = System.nanoTime();
        PolicyUpdate update = PolicyUpdate.apply(engine, algorithm, rollout, advantages, rescores);
        double gap = update.statistics().logprobGapMean();
        if (!rescores && gap > logprobGapLimit) {
            rescores = true;
            LOG.log(System.Logger.Level.WARNING, "log-probs of generation and training differ by {0} on average, more than {1}: the training "
                    + "side computes old log-probs from now on", gap, logprobGapLimit);
        }
        double seconds = (System.nanoTime() - start) / 1e9;
        var training = new StepMetrics.Phase(seconds, update.step().tokens(), ProcessMemory.peak());
        return metrics(rollout, update, training);
    }

    /** {@return an endless stream of steps, each run when it is asked for} */
    public Stream<StepMetrics> steps(Supplier<List<String>> prompts) {
        return Stream.generate(() -> step(prompts.get()));
    }

    private StepMetrics metrics(Rollout rollout, PolicyUpdate update, StepMetrics.Phase training) {
        var rewards = new DescriptiveStatistics(
                Arrays.stream(rollout.rewards()).flatMapToDouble(Arrays::stream).toArray());
        PolicyStatistics statistics = update.statistics();
        double length = rollout.completions().stream().mapToInt(c -> c.tokens().length).average().orElse(0);
        return new StepMetrics(steps++, rewards.getMean(), rewards.getStandardDeviation(), update.step().loss(),
                statistics.referenceKl(), statistics.entropy(), statistics.clipFraction(), update.step().gradientNorm(), length,
                statistics.logprobGapMax(), statistics.logprobGapMean(), rollout.sampling(), rollout.scoring(), training,
                update.step().skipped());
    }
}
