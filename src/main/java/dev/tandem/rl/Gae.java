package dev.tandem.rl;

/**
 * Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438): advantages per token from rewards per
 * token and a critic's values, A[t] = Σ (γλ)^k δ[t+k] with δ[t] = reward[t] + γ value[t+1] - value[t]. The value after
 * the last token is zero: a completion is an episode that ends.
 *
 * @param gamma discount γ per token, from 0 to 1
 * @param lambda λ from 0 (one-step, leans on the critic) to 1 (the whole return, no bias)
 */
public record Gae(double gamma, double lambda) {
    /**
     * What a completion's tokens were worth.
     *
     * @param advantages one per token
     * @param returns what the critic should have said, advantage + value, one per token
     */
    @SuppressWarnings("ArrayRecordComponent") // a pair of results, never compared
    public record Estimate(double[] advantages, double[] returns) {}

    /** Checks the ranges. */
    public Gae {
        requireFraction("gamma", gamma);
        requireFraction("lambda", lambda);
    }

    /**
     * Estimates the advantages of one completion's tokens.
     *
     * @param rewards one per token; a reward for the whole completion stands at its last token
     * @param values the critic's value before each token
     * @return advantages and returns
     * @throws IllegalArgumentException if the lengths differ or a number is not finite
     */
    public Estimate estimate(double[] rewards, double[] values) {
        if (rewards.length != values.length) {
            throw new IllegalArgumentException("there are " + rewards.length + " rewards and " + values.length
                    + " values; give one of each per token");
        }
        double[] advantages = new double[rewards.length];
        double[] returns = new double[rewards.length];
        double nextValue = 0;
        double nextAdvantage = 0;
        for (int token = rewards.length - 1; token >= 0; token--) {
            if (!Double.isFinite(rewards[token]) || !Double.isFinite(values[token])) {
                throw new IllegalArgumentException("token " + token + " has reward " + rewards[token] + " and value "
                        + values[token] + "; both must be finite numbers");
            }
            double delta = rewards[token] + gamma * nextValue - values[token];
            nextAdvantage = delta + gamma * lambda * nextAdvantage;
            nextValue = values[token];
            advantages[token] = nextAdvantage;
            returns[token] = nextAdvantage + nextValue;
        }
        return new Estimate(advantages, returns);
    }

    private static void requireFraction(String name, double value) {
        if (!(value >= 0 && value <= 1)) {
            throw new IllegalArgumentException(name + " must be from 0 to 1: " + value);
        }
    }
}
