package dev.tandem.rl;

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import dev.tandem.training.TokenValues;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Objects;
import java.util.random.RandomGenerator;

/** The per-token values of some sequences, and the policy loss of them written out in double precision. */
record PolicyBatch(
        double[][] logprob, double[][] old, double[][] reference, double[][] entropy, double[][] advantage) {
    /** The batch that a family's golden file holds. */
    static PolicyBatch golden(String family) {
        JsonObject policy = policy(family);
        Gson gson = new Gson();
        double[][] logprob = gson.fromJson(policy.get("logprobs"), double[][].class);
        double[] perSequence = gson.fromJson(policy.get("advantages"), double[].class);
        double[][] advantage = new double[logprob.length][];
        for (int i = 0; i < logprob.length; i++) {
            advantage[i] = new double[logprob[i].length];
            Arrays.fill(advantage[i], perSequence[i]);
        }
        double[][] entropy = Arrays.stream(logprob).map(values -> new double[values.length]).toArray(double[][]::new);
        return new PolicyBatch(logprob, gson.fromJson(policy.get("old_logprobs"), double[][].class),
                gson.fromJson(policy.get("ref_logprobs"), double[][].class), entropy, advantage);
    }

    static JsonObject policy(String family) {
        return json("/fixtures/" + family + "/golden.json").getAsJsonObject().getAsJsonObject("policy");
    }

    static JsonElement json(String resource) {
        try (InputStream in = Objects.requireNonNull(PolicyBatch.class.getResourceAsStream(resource), resource)) {
            return JsonParser.parseReader(new InputStreamReader(in, StandardCharsets.UTF_8));
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** Sequences of random lengths; ratios are spread so that a bound of 0.2 binds for about a third of the tokens. */
    static PolicyBatch random(RandomGenerator random, int sequences) {
        double[][][] values = new double[5][sequences][];
        for (int s = 0; s < sequences; s++) {
            int length = random.nextInt(1, 20);
            for (double[][] kind : values) {
                kind[s] = new double[length];
            }
            for (int t = 0; t < length; t++) {
                values[1][s][t] = -random.nextExponential();
                values[0][s][t] = values[1][s][t] + 0.2 * random.nextGaussian();
                values[2][s][t] = values[0][s][t] + 0.3 * random.nextGaussian();
                values[3][s][t] = 3 * random.nextDouble();
                values[4][s][t] = random.nextGaussian();
            }
        }
        return new PolicyBatch(values[0], values[1], values[2], values[3], values[4]);
    }

    int[] counts() {
        return Arrays.stream(logprob).mapToInt(values -> values.length).toArray();
    }

    int tokens() {
        return Arrays.stream(counts()).sum();
    }

    /** The same batch with other log-probs. */
    PolicyBatch logprob(double[][] other) {
        return new PolicyBatch(other, old, reference, entropy, advantage);
    }

    /** Sequences {@code from … to-1}. */
    PolicyBatch sequences(int from, int to) {
        return new PolicyBatch(Arrays.copyOfRange(logprob, from, to), Arrays.copyOfRange(old, from, to),
                Arrays.copyOfRange(reference, from, to), Arrays.copyOfRange(entropy, from, to),
                Arrays.copyOfRange(advantage, from, to));
    }

    /** What the loss sees, with a leaf that is differentiated for each of log-prob and entropy. */
    TokenValues values(float[] sequenceWeights) {
        float[] weights = new float[tokens()];
        long[] sequence = new long[tokens()];
        int token = 0;
        for (int s = 0; s < logprob.length; s++) {
            for (int t = 0; t < logprob[s].length; t++, token++) {
                weights[token] = sequenceWeights[s];
                sequence[token] = s;
            }
        }
        Device cpu = Device.cpu();
        return new TokenValues(vector(logprob).requireGradient(), vector(entropy).requireGradient(), vector(old),
                vector(reference), vector(advantage), Tensor.of(cpu, weights), Tensor.of(cpu, sequence),
                logprob.length);
    }

    private static Tensor vector(double[][] values) {
        double[] flat = Arrays.stream(values).flatMapToDouble(Arrays::stream).toArray();
        float[] floats = new float[flat.length];
        for (int i = 0; i < flat.length; i++) {
            floats[i] = (float) flat[i];
        }
        return Tensor.of(Device.cpu(), floats);
    }

    /**
     * The loss in plain doubles.
     *
     * @param constant where stop-gradient is meant, the log-probs that stay as they are; null differentiates the
     *     sequence ratio itself
     */
    double loss(PolicyLoss loss, Aggregation aggregation, double[][] constant) {
        double sum = 0;
        for (int s = 0; s < logprob.length; s++) {
            int length = logprob[s].length;
            double weight = switch (aggregation) {
                case Aggregation.TokenMean() -> 1.0 / tokens();
                case Aggregation.SequenceMeanTokenMean() -> 1.0 / logprob.length / length;
                case Aggregation.SequenceMeanTokenSum() -> 1.0 / logprob.length;
                case Aggregation.SequenceMeanTokenSumNorm(int maxTokens) -> 1.0 / logprob.length / maxTokens;
            };
            for (int t = 0; t < length; t++) {
                double logRatio = logRatio(loss, s, t, constant);
                double ratio = Math.exp(logRatio);
                double bounded = Math.max(1 - loss.clipLow(), Math.min(1 + loss.clipHigh(), ratio));
                double a = advantage[s][t];
                double d = logprob[s][t] - reference[s][t];
                double kl = switch (loss.klEstimator()) {
                    case NONE -> 0;
                    case K1 -> d;
                    case K2 -> d * d / 2;
                    case K3 -> Math.exp(-d) - 1 + d;
                };
                sum += weight * (Math.max(-a * ratio, -a * bounded) + loss.klCoefficient() * kl
                        - loss.entropyCoefficient() * entropy[s][t]);
            }
        }
        return sum;
    }

    private double logRatio(PolicyLoss loss, int s, int t, double[][] constant) {
        if (!loss.sequenceRatio()) {
            return logprob[s][t] - old[s][t];
        }
        double[] values = constant == null ? logprob[s] : constant[s];
        double sum = 0;
        for (int k = 0; k < values.length; k++) {
            sum += values[k] - old[s][k];
        }
        double own = constant == null ? 0 : logprob[s][t] - constant[s][t];
        return own + sum / values.length;
    }
}
