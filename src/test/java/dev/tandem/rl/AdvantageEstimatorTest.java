package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.Gson;
import com.google.gson.JsonObject;
import java.util.Arrays;
import java.util.Map;
import java.util.Set;
import java.util.SplittableRandom;
import java.util.TreeSet;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

class AdvantageEstimatorTest {
    private static final Map<String, AdvantageEstimator> NAMES = Map.of(
            "grpo", AdvantageEstimator.GRPO,
            "dr_grpo", AdvantageEstimator.DR_GRPO,
            "rloo", AdvantageEstimator.RLOO,
            "reinforce_pp_baseline", AdvantageEstimator.REINFORCE_PLUS_PLUS_BASELINE);

    @Test
    void givesTheFixturesAdvantages() {
        JsonObject group = PolicyBatch.json("/fixtures/advantages.json").getAsJsonObject().getAsJsonObject("group");
        Set<String> tested = new TreeSet<>(NAMES.keySet());
        tested.addAll(Set.of("rewards", "note"));
        assertEquals(group.keySet(), tested);
        double[][] rewards = new Gson().fromJson(group.get("rewards"), double[][].class);
        NAMES.forEach((name, estimator) -> {
            double[][] expected = new Gson().fromJson(group.get(name), double[][].class);
            double[][] found = estimator.advantages(rewards);
            assertEquals(expected.length, found.length);
            for (int i = 0; i < expected.length; i++) {
                assertArrayEquals(expected[i], found[i], 1e-9, name);
            }
        });
    }

    @ParameterizedTest
    @EnumSource
    void equalRewardsGiveExactlyZero(AdvantageEstimator estimator) {
        // 0.1 summed seven times and divided by seven is not 0.1.
        double[][] rewards = {new double[7], {5}, {0.3, 0.3, 0.3}};
        Arrays.fill(rewards[0], 0.1);
        for (double[] group : estimator.advantages(rewards)) {
            assertArrayEquals(new double[group.length], group);
        }
        assertEquals(0, estimator.advantages(new double[0][]).length);
        assertArrayEquals(new double[][] {{0}}, estimator.advantages(new double[][] {{3}}));
    }

    @ParameterizedTest
    @EnumSource
    void groupsOfDifferentSizesFollowTheDefinitions(AdvantageEstimator estimator) {
        for (long seed = 0; seed < 20; seed++) {
            SplittableRandom random = new SplittableRandom(seed);
            double[][] rewards = new double[random.nextInt(2, 6)][];
            for (int g = 0; g < rewards.length; g++) {
                rewards[g] = random.doubles(random.nextInt(2, 9), -3, 3).toArray();
            }
            double[][] found = estimator.advantages(rewards);
            double[] all = Arrays.stream(found).flatMapToDouble(Arrays::stream).toArray();
            for (int g = 0; g < rewards.length; g++) {
                double[] group = rewards[g];
                int n = group.length;
                double sum = Arrays.stream(group).sum();
                double squares = Arrays.stream(group).map(r -> (r - sum / n) * (r - sum / n)).sum();
                for (int i = 0; i < n; i++) {
                    double expected = switch (estimator) {
                        case GRPO -> (group[i] - sum / n) / (Math.sqrt(squares / (n - 1)) + 1e-6);
                        case DR_GRPO -> group[i] - sum / n;
                        case RLOO -> group[i] - (sum - group[i]) / (n - 1);
                        case REINFORCE_PLUS_PLUS_BASELINE ->
                            found[0][0] + slope(rewards, found)
                                    * (group[i] - sum / n - (rewards[0][0] - mean(rewards[0])));
                    };
                    assertEquals(expected, found[g][i], 1e-9, "seed " + seed + ", group " + g + ", sample " + i);
                }
            }
            if (estimator == AdvantageEstimator.REINFORCE_PLUS_PLUS_BASELINE) {
                assertEquals(0, mean(all), 1e-9, "seed " + seed);
                assertEquals(all.length - 1, Arrays.stream(all).map(a -> a * a).sum(), 1e-5, "seed " + seed);
            }
        }
    }

    private static double mean(double[] values) {
        return Arrays.stream(values).sum() / values.length;
    }

    /** What the whole step's normalisation multiplies differences by, read off two samples. */
    private static double slope(double[][] rewards, double[][] found) {
        return (found[0][1] - found[0][0]) / (rewards[0][1] - rewards[0][0]);
    }

    @Test
    void badRewardsAreNamed() {
        for (double bad : new double[] {Double.NaN, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY}) {
            double[][] rewards = {{1, 2}, {3, 4, bad}};
            String message = assertThrows(
                    IllegalArgumentException.class, () -> AdvantageEstimator.GRPO.advantages(rewards)).getMessage();
            assertTrue(message.contains("prompt 1, sample 2 is " + bad), message);
        }
        String message = assertThrows(IllegalArgumentException.class,
                () -> AdvantageEstimator.RLOO.advantages(new double[][] {{1}, {}})).getMessage();
        assertTrue(message.contains("prompt 1"), message);
    }
}
