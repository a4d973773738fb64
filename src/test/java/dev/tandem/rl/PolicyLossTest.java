package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonObject;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.training.TokenValues;
import java.util.Arrays;
import java.util.Map;
import java.util.SplittableRandom;
import java.util.TreeMap;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class PolicyLossTest {
    /** GSPO's ratios are nearly 1, so its loss is what is left of a sum that cancels, and shows the inputs' rounding. */
    private static final double TOLERANCE = 5e-5;

    record Variant(PolicyLoss loss, Aggregation aggregation, double expected, double gradientNorm) {}

    /** The variants of a golden file, as values; their KL coefficient and length constant stand beside them. */
    static Map<String, Variant> variants(String family) {
        JsonObject policy = PolicyBatch.policy(family);
        Map<String, Variant> variants = new TreeMap<>();
        policy.getAsJsonObject("losses").asMap().forEach((name, element) -> {
            JsonObject v = element.getAsJsonObject();
            KlEstimator kl = switch (v.get("kl").getAsString()) {
                case "none" -> KlEstimator.NONE;
                case "k1" -> KlEstimator.K1;
                case "k2" -> KlEstimator.K2;
                case "k3" -> KlEstimator.K3;
                default -> throw new AssertionError("kl " + v);
            };
            Aggregation aggregation = switch (v.get("aggregation").getAsString()) {
                case "token-mean" -> new Aggregation.TokenMean();
                case "seq-mean-token-mean" -> new Aggregation.SequenceMeanTokenMean();
                case "seq-mean-token-sum" -> new Aggregation.SequenceMeanTokenSum();
                case "seq-mean-token-sum-norm" ->
                    new Aggregation.SequenceMeanTokenSumNorm(policy.get("max_tokens").getAsInt());
                default -> throw new AssertionError("aggregation " + v);
            };
            PolicyLoss loss = new PolicyLoss(v.get("clip_low").getAsDouble(), v.get("clip_high").getAsDouble(),
                    v.get("sequence_ratio").getAsBoolean(), kl,
                    kl == KlEstimator.NONE ? 0 : policy.get("kl_coef").getAsDouble(), 0);
            variants.put(name, new Variant(loss, aggregation, v.get("loss").getAsDouble(), v.get("grad_norm").getAsDouble()));
        });
        return variants;
    }

    private static double loss(PolicyBatch batch, PolicyLoss loss, float[] weights) {
        try (Scope scope = Scope.open()) {
            return loss.loss(batch.values(weights)).item();
        }
    }

    private static double loss(PolicyBatch batch, PolicyLoss loss, Aggregation aggregation) {
        return loss(batch, loss, aggregation.weights(batch.counts()));
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "qwen2", "qwen3", "opt"})
    void givesTheGoldenLosses(String family) {
        PolicyBatch batch = PolicyBatch.golden(family);
        Map<String, Variant> variants = variants(family);
        assertEquals(8, variants.size());
        double largest = 0;
        for (Map.Entry<String, Variant> entry : variants.entrySet()) {
            Variant v = entry.getValue();
            double found = loss(batch, v.loss(), v.aggregation());
            double difference = Math.abs(found - v.expected()) / Math.abs(v.expected());
            largest = Math.max(largest, difference);
            assertTrue(difference < TOLERANCE, family + " " + entry.getKey() + ": " + found + ", expected " + v.expected());
            assertEquals(v.expected(), batch.loss(v.loss(), v.aggregation(), null), 1e-12, "the test's own formula");
        }
        System.out.printf("%s: largest relative difference of a policy loss %.2g%n", family, largest);
    }

    @ParameterizedTest
    @ValueSource(strings = {"llama", "opt"})
    void presetsGiveTheGoldenLosses(String family) {
        PolicyBatch batch = PolicyBatch.golden(family);
        Map<String, Algorithm> presets = Map.of(
                "grpo", Algorithm.grpo().kl(KlEstimator.K3, 0.05),
                "dr-grpo", Algorithm.drGrpo(64),
                "dapo", Algorithm.dapo(),
                "ppo", Algorithm.reinforcePlusPlusBaseline(),
                "sum", Algorithm.rloo().kl(KlEstimator.K3, 0.05),
                "gspo", Algorithm.gspo());
        Map<String, Variant> variants = variants(family);
        presets.forEach((name, algorithm) -> {
            double expected = variants.get(name).expected();
            double found = loss(batch, algorithm.loss(), algorithm.aggregation());
            assertEquals(expected, found, TOLERANCE * Math.abs(expected), name);
        });
    }

    @Test
    void gradientsAreThoseOfTheFormula() {
        for (String family : new String[] {"llama", "qwen3"}) {
            PolicyBatch batch = PolicyBatch.golden(family);
            variants(family).forEach(
                    (name, v) -> checkGradient(family + " " + name, batch, v.loss(), v.aggregation(), batch.logprob()));
        }
        for (long seed = 0; seed < 10; seed++) {
            SplittableRandom random = new SplittableRandom(seed);
            PolicyBatch batch = PolicyBatch.random(random, 5);
            PolicyLoss loss = new PolicyLoss(0.1, 0.3, random.nextBoolean(), KlEstimator.values()[random.nextInt(1, 4)],
                    0.3, 0.02);
            checkGradient("seed " + seed, batch, loss, new Aggregation.SequenceMeanTokenSumNorm(7), batch.logprob());
        }
    }

    /**
     * With equal weights inside a sequence the stop-gradient form must be the derivative of the sequence-level
     * objective.
     */
    @Test
    void sequenceRatioHasTheGradientOfTheSequenceObjective() {
        PolicyLoss loss = new PolicyLoss(0.05, 0.05, true, KlEstimator.NONE, 0, 0);
        for (long seed = 0; seed < 10; seed++) {
            PolicyBatch random = PolicyBatch.random(new SplittableRandom(seed), 6);
            for (double[] advantages : random.advantage()) {
                Arrays.fill(advantages, advantages[0]);
            }
            checkGradient("seed " + seed, random, loss, new Aggregation.SequenceMeanTokenMean(), null);
        }
    }

    private static void checkGradient(
            String what, PolicyBatch batch, PolicyLoss loss, Aggregation aggregation, double[][] constant) {
        double[] found;
        double[] foundEntropy;
        try (Scope scope = Scope.open()) {
            TokenValues values = batch.values(aggregation.weights(batch.counts()));
            loss.loss(values).backward();
            found = gradient(values.logprob());
            foundEntropy = loss.entropyCoefficient() == 0 ? new double[0] : gradient(values.entropy());
        }
        double[] expected = new double[batch.tokens()];
        double h = 1e-6;
        int token = 0;
        for (int s = 0; s < batch.logprob().length; s++) {
            for (int t = 0; t < batch.logprob()[s].length; t++) {
                expected[token++] = (moved(batch, s, t, h).loss(loss, aggregation, constant)
                        - moved(batch, s, t, -h).loss(loss, aggregation, constant)) / (2 * h);
            }
        }
        double scale = Arrays.stream(expected).map(Math::abs).max().orElseThrow();
        for (int i = 0; i < expected.length; i++) {
            assertEquals(expected[i], found[i], 1e-4 * scale, what + ", " + loss + ", token " + i);
        }
        float[] weights = aggregation.weights(batch.counts());
        int i = 0;
        for (int s = 0; s < weights.length && foundEntropy.length > 0; s++) {
            for (int t = 0; t < batch.counts()[s]; t++) {
                assertEquals(-loss.entropyCoefficient() * weights[s], foundEntropy[i++], 1e-8, what);
            }
        }
    }

    private static double[] gradient(Tensor leaf) {
        Tensor gradient = leaf.gradient();
        assertNotNull(gradient);
        return gradient.toDoubles();
    }

    private static PolicyBatch moved(PolicyBatch batch, int sequence, int token, double by) {
        double[][] logprob = Arrays.stream(batch.logprob()).map(double[]::clone).toArray(double[][]::new);
        logprob[sequence][token] += by;
        return batch.logprob(logprob);
    }

    @Test
    void partsAddUpToTheStep() {
        PolicyBatch batch = PolicyBatch.random(new SplittableRandom(5), 9);
        PolicyLoss loss = PolicyLoss.clipped(0.2).sequenceRatio(true).kl(KlEstimator.K2, 0.1).entropy(0.01);
        for (Aggregation aggregation : new Aggregation[] {new Aggregation.TokenMean(),
                new Aggregation.SequenceMeanTokenMean(), new Aggregation.SequenceMeanTokenSum()}) {
            float[] weights = aggregation.weights(batch.counts());
            double parts = loss(batch.sequences(0, 2), loss, Arrays.copyOfRange(weights, 0, 2))
                    + loss(batch.sequences(2, 3), loss, Arrays.copyOfRange(weights, 2, 3))
                    + loss(batch.sequences(3, 9), loss, Arrays.copyOfRange(weights, 3, 9));
            assertEquals(loss(batch, loss, weights), parts, 1e-5, aggregation.toString());
        }
    }

    @Test
    void noBoundMeansImportanceWeighting() {
        PolicyBatch batch = PolicyBatch.random(new SplittableRandom(6), 3);
        PolicyLoss loss = PolicyLoss.clipped(0.2).clip(1, Double.POSITIVE_INFINITY);
        double expected = 0;
        for (int s = 0; s < 3; s++) {
            for (int t = 0; t < batch.counts()[s]; t++) {
                double ratio = Math.exp(batch.logprob()[s][t] - batch.old()[s][t]);
                expected -= batch.advantage()[s][t] * ratio / batch.tokens();
            }
        }
        assertEquals(expected, loss(batch, loss, new Aggregation.TokenMean()), 1e-5);
    }

    @Test
    void missingValuesAreNamed() {
        try (Scope scope = Scope.open()) {
            Tensor one = Tensor.of(Device.cpu(), 1f);
            TokenValues bare = new TokenValues(one, one, one, null, one, one, Tensor.of(Device.cpu(), 0), 1);
            PolicyLoss loss = PolicyLoss.clipped(0.2);
            assertEquals(-1, loss.loss(bare).item());
            PolicyLoss withKl = loss.kl(KlEstimator.K3, 0.1);
            String message = assertThrows(IllegalArgumentException.class, () -> withKl.loss(bare)).getMessage();
            assertTrue(message.contains("reference"), message);
            assertThrows(IllegalStateException.class, () -> KlEstimator.NONE.estimate(one, one));
        }
    }

    @Test
    void parametersAreChecked() {
        PolicyLoss loss = PolicyLoss.clipped(0.2);
        assertThrows(IllegalArgumentException.class, () -> loss.clip(-0.1, 0.2));
        assertThrows(IllegalArgumentException.class, () -> loss.clip(1.1, 0.2));
        assertThrows(IllegalArgumentException.class, () -> loss.clip(0.1, Double.NaN));
        assertThrows(IllegalArgumentException.class, () -> loss.kl(KlEstimator.NONE, 0.1));
        assertThrows(IllegalArgumentException.class, () -> loss.kl(KlEstimator.K1, Double.NaN));
        assertThrows(IllegalArgumentException.class, () -> loss.kl(KlEstimator.K1, -1));
        assertThrows(IllegalArgumentException.class, () -> loss.entropy(Double.POSITIVE_INFINITY));
    }
}
