package dev.tandem.rl;

import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import java.util.Locale;

/**
 * What one step of reinforcement learning did: one line of a log, or one object of a metrics file. A number that a step
 * does not have (the divergence when there is no reference) is NaN.
 *
 * @param step the step's number, from 0
 * @param rewardMean mean reward of the step's completions
 * @param rewardDeviation standard deviation of these rewards
 * @param loss the step's loss
 * @param kl mean divergence from the reference per token, in nats
 * @param entropy mean entropy per token, in nats
 * @param clipFraction fraction of tokens whose gradient was cut off by the bound on the ratio
 * @param gradientNorm norm of the whole gradient before it was clipped
 * @param responseLength mean tokens per completion
 * @param logprobGapMax largest |generation - training| log-prob of a token in the rollout
 * @param logprobGapMean mean of the same
 * @param rollout generating the completions
 * @param reward scoring them
 * @param train updating the weights
 * @param skipped whether the update was left out because loss or gradient was not finite
 */
public record StepMetrics(
        long step,
        double rewardMean,
        double rewardDeviation,
        double loss,
        double kl,
        double entropy,
        double clipFraction,
        double gradientNorm,
        double responseLength,
        double logprobGapMax,
        double logprobGapMean,
        Phase rollout,
        Phase reward,
        Phase train,
        boolean skipped) {

    /**
     * What one phase of a step took.
     *
     * @param seconds wall-clock time
     * @param tokens tokens that went through the phase
     * @param peakBytes most device memory in use at one time, over all devices
     */
    public record Phase(double seconds, long tokens, long peakBytes) {
        /** {@return tokens per second; NaN if the phase took no time} */
        public double tokensPerSecond() {
            return seconds > 0 ? tokens / seconds : Double.NaN;
        }

        private JsonObject json() {
            JsonObject json = new JsonObject();
            add(json, "seconds", seconds);
            json.addProperty("tokens", tokens);
            add(json, "tokensPerSecond", tokensPerSecond());
            json.addProperty("peakBytes", peakBytes);
            return json;
        }

        /** {@return for example {@code 1.25s 4096tok/s 1.5GiB}} */
        @Override
        public String toString() {
            return String.format(Locale.ROOT, "%.2fs %.0ftok/s %.2fGiB", seconds, tokensPerSecond(),
                    peakBytes / (double) (1L << 30));
        }
    }

    /** {@return one JSON object on one line, keys named as the components; numbers that are not finite are null} */
    public String toJson() {
        JsonObject json = new JsonObject();
        json.addProperty("step", step);
        add(json, "rewardMean", rewardMean);
        add(json, "rewardDeviation", rewardDeviation);
        add(json, "loss", loss);
        add(json, "kl", kl);
        add(json, "entropy", entropy);
        add(json, "clipFraction", clipFraction);
        add(json, "gradientNorm", gradientNorm);
        add(json, "responseLength", responseLength);
        add(json, "logprobGapMax", logprobGapMax);
        add(json, "logprobGapMean", logprobGapMean);
        json.add("rollout", rollout.json());
        json.add("reward", reward.json());
        json.add("train", train.json());
        json.addProperty("skipped", skipped);
        return json.toString();
    }

    /** {@return one line for a log} */
    @Override
    public String toString() {
        return String.format(Locale.ROOT,
                "step %d%s reward %.3f±%.3f loss %.4g kl %.3g entropy %.3f clip %.3f grad %.3g length %.1f"
                        + " gap %.2g/%.2g | rollout %s | reward %s | train %s",
                step, skipped ? " SKIPPED" : "", rewardMean, rewardDeviation, loss, kl, entropy, clipFraction,
                gradientNorm, responseLength, logprobGapMax, logprobGapMean, rollout, reward, train);
    }

    /** JSON has no NaN and no infinity. */
    private static void add(JsonObject json, String name, double value) {
        json.add(name, Double.isFinite(value) ? new JsonPrimitive(value) : JsonNull.INSTANCE);
    }
}
