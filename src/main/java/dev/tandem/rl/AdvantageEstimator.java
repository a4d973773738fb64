package dev.tandem.rl;

import java.util.Arrays;
import org.apache.commons.math3.stat.descriptive.moment.Mean;
import org.apache.commons.math3.stat.descriptive.moment.StandardDeviation;
import org.apache.commons.math3.util.MathArrays;

/**
 * How much better each sample of a prompt is than its siblings, from rewards alone: one advantage per sample, which
 * every token of the sample shares. The samples of one prompt are a group; groups may differ in size.
 *
 * <p>A group whose rewards are all equal says nothing about which sample is better: its advantages are zero under every
 * estimator (for {@link #REINFORCE_PLUS_PLUS_BASELINE} before the batch's mean, itself zero up to rounding, is taken
 * off). A group of one is such a group.
 */
public enum AdvantageEstimator {
    /**
     * (reward - group mean) / (group standard deviation + 1e-6), the deviation with n - 1. Shao et al. 2024,
     * DeepSeekMath, arXiv:2402.03300.
     */
    GRPO {
        @Override
        double[] ofGroup(double[] rewards) {
            double deviation = new StandardDeviation().evaluate(rewards);
            return MathArrays.scale(1 / (deviation + GROUP_EPSILON), centred(rewards));
        }
    },
    /**
     * Reward - group mean: without the deviation, which favours prompts that are nearly always or nearly never solved.
     * Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783.
     */
    DR_GRPO {
        @Override
        double[] ofGroup(double[] rewards) {
            return centred(rewards);
        }
    },
    /**
     * Reward - mean of the other samples of the group. Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740; Kool et
     * al. 2019.
     */
    RLOO {
        @Override
        double[] ofGroup(double[] rewards) {
            // r - (sum - r) / (n - 1) = n / (n - 1) * (r - mean)
            double n = rewards.length;
            return rewards.length == 1 ? new double[1] : MathArrays.scale(n / (n - 1), centred(rewards));
        }
    },
    /**
     * Reward - group mean, then normalised over all samples of the step by their mean and standard deviation (n - 1) +
     * 1e-8. Hu et al. 2025, REINFORCE++, arXiv:2501.03262, the variant with a baseline.
     */
    REINFORCE_PLUS_PLUS_BASELINE {
        @Override
        double[] ofGroup(double[] rewards) {
            return centred(rewards);
        }

        @Override
        void normalise(double[][] advantages) {
            double[] all = Arrays.stream(advantages).flatMapToDouble(Arrays::stream).toArray();
            double mean = new Mean().evaluate(all);
            double deviation = new StandardDeviation().evaluate(all);
            for (double[] group : advantages) {
                Arrays.setAll(group, i -> (group[i] - mean) / (deviation + BATCH_EPSILON));
            }
        }
    };

    private static final double GROUP_EPSILON = 1e-6;
    private static final double BATCH_EPSILON = 1e-8;

    /** The advantages of one prompt's samples, a new array. */
    abstract double[] ofGroup(double[] rewards);

    /** What is done, in place, to the advantages of all groups together. */
    void normalise(double[][] advantages) {}

    /**
     * Computes the advantages of all samples of a step, which must come in one call: some estimators normalise over the
     * step.
     *
     * @param groupRewards per prompt the rewards of its samples
     * @return advantages in the same shape, a new array
     * @throws IllegalArgumentException if a group is empty or a reward is not finite; the message names prompt and
     *     sample
     */
    public double[][] advantages(double[][] groupRewards) {
        double[][] advantages = new double[groupRewards.length][];
        for (int prompt = 0; prompt < groupRewards.length; prompt++) {
            requireFinite(groupRewards[prompt], prompt);
            advantages[prompt] = ofGroup(groupRewards[prompt]);
        }
        normalise(advantages);
        return advantages;
    }

    private static void requireFinite(double[] rewards, int prompt) {
        if (rewards.length == 0) {
            throw new IllegalArgumentException(
                    "prompt " + prompt + " has no rewards; give one per sample, at least one");
        }
        for (int sample = 0; sample < rewards.length; sample++) {
            if (!Double.isFinite(rewards[sample])) {
                throw new IllegalArgumentException("the reward of prompt " + prompt + ", sample " + sample + " is "
                        + rewards[sample] + "; a reward must be a finite number");
            }
        }
    }

    /** Rewards minus their mean; exactly zero if all are equal, where the mean's rounding would leave a residue. */
    private static double[] centred(double[] rewards) {
        double[] centred = new double[rewards.length];
        if (Arrays.stream(rewards).anyMatch(reward -> reward != rewards[0])) {
            double mean = new Mean().evaluate(rewards);
            Arrays.setAll(centred, i -> rewards[i] - mean);
        }
        return centred;
    }
}
