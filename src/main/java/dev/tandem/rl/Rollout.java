package dev.tandem.rl;

import dev.tandem.HybridEngine;
import dev.tandem.device.ProcessMemory;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.generation.Completion;
import dev.tandem.generation.LogprobKind;
import dev.tandem.generation.SamplingParams;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * Completions sampled from the current weights, with their rewards: what one step of reinforcement learning learns from.
 *
 * @param groups the samples of each prompt
 * @param rewards the reward of each sample, same shape
 * @param temperature at which the samples were drawn
 * @param sampling time, generated tokens and peak memory of generating
 * @param scoring time that rewards took beyond generating
 */
public record Rollout(List<List<Completion>> groups, double[][] rewards, double temperature, StepMetrics.Phase sampling,
        StepMetrics.Phase scoring) {

    /**
     * Samples every prompt {@code params.n()} times and scores each completion as soon as it ends.
     *
     * <p>Completions carry the log-probs after temperature, as the training side computes them.
     *
     * @param params the temperature must be positive
     * @throws RewardException when the reward fails; the engine stays usable
     */
    public static Rollout sample(HybridEngine engine, List<String> prompts, SamplingParams params, Reward reward,
            RewardRunner runner) {
        if (params.isGreedy()) {
            throw new IllegalArgumentException("a rollout explores: its temperature must be positive");
        }
        int n = params.n();
        RewardRunner.Batch<Completion> scores = runner.begin(prompts.size() * n, reward::score);
        long start = System.nanoTime();
        ProcessMemory.resetPeak();
        List<Completion> completions;
        try {
            completions = engine.generate(prompts, params.logprobKind(LogprobKind.TEMPERATURE),
                    completion -> scores.add(completion.prompt() * n + completion.sample(), completion));
        } catch (RuntimeException | Error e) {
            scores.cancel();
            throw e;
        }
        long generated = System.nanoTime();
        long peak = ProcessMemory.peak();
        double[] flat;
        try (Span span = engine.activity("waiting for rewards")) {
            flat = scores.await();
        }
        double[][] rewards = new double[prompts.size()][];
        List<List<Completion>> groups = new ArrayList<>();
        for (int i = 0; i < rewards.length; i++) {
            rewards[i] = Arrays.copyOfRange(flat, i * n, (i + 1) * n);
            groups.add(completions.subList(i * n, (i + 1) * n));
        }
        long tokens = completions.stream().mapToLong(c -> c.tokens().length).sum();
        return new Rollout(groups, rewards, params.temperature(),
                new StepMetrics.Phase((generated - start) / 1e9, tokens, peak),
                new StepMetrics.Phase((System.nanoTime() - generated) / 1e9, flat.length, ProcessMemory.peak()));
    }

    /** {@return all completions, group by group} */
    public List<Completion> completions() {
        return groups.stream().flatMap(List::stream).toList();
    }

    /**
     * The completions as sequences to train on: responses are trained, prompts are not.
     *
     * @param advantages of each sample
     * @param aggregation weighs the tokens
     */
    public List<TrainingSequence> sequences(double[][] advantages, Aggregation aggregation) {
        List<Completion> completions = completions();
        float[] weights = aggregation.weights(completions.stream().mapToInt(c -> c.tokens().length).toArray());
        List<TrainingSequence> sequences = new ArrayList<>();
        int at = 0;
        for (int group = 0; group < groups.size(); group++) {
            for (int sample = 0; sample < groups.get(group).size(); sample++, at++) {
                sequences.add(sequence(completions.get(at), weights[at], (float) advantages[group][sample]));
            }
        }
        return sequences;
    }

    private static TrainingSequence sequence(Completion completion, float weight, float advantage) {
        int prompt = completion.promptTokens().length;
        int length = prompt + completion.tokens().length;
        int[] tokens = Arrays.copyOf(completion.promptTokens(), length);
        System.arraycopy(completion.tokens(), 0, tokens, prompt, completion.tokens().length);
        boolean[] trained = new boolean[length];
        float[] weights = new float[length];
        float[] old = new float[length];
        float[] advantages = new float[length];
        for (int i = prompt; i < length; i++) {
            trained[i] = true;
            weights[i] = weight;
            old[i] = completion.logprobs()[i - prompt];
            advantages[i] = advantage;
        }
        return new TrainingSequence(tokens, trained, weights, old, null, advantages);
    }
}
