package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;

class GaeTest {
    private static double[] numbers(JsonObject from, String name) {
        return new Gson().fromJson(from.get(name), double[].class);
    }

    @Test
    void givesTheFixturesAdvantages() {
        var cases = PolicyBatch.json("/fixtures/advantages.json").getAsJsonObject().getAsJsonArray("gae");
        assertEquals(3, cases.size());
        for (JsonElement element : cases) {
            JsonObject one = element.getAsJsonObject();
            Gae gae = new Gae(one.get("gamma").getAsDouble(), one.get("lambda").getAsDouble());
            Gae.Estimate found = gae.estimate(numbers(one, "rewards"), numbers(one, "values"));
            assertArrayEquals(numbers(one, "advantages"), found.advantages(), 1e-9, gae.toString());
            assertArrayEquals(numbers(one, "returns"), found.returns(), 1e-9, gae.toString());
        }
    }

    /** The definition: a sum of discounted one-step errors over all later tokens. */
    @Test
    void equalsTheSum() {
        for (long seed = 0; seed < 10; seed++) {
            SplittableRandom random = new SplittableRandom(seed);
            int n = random.nextInt(1, 30);
            double[] rewards = random.doubles(n, -1, 1).toArray();
            double[] values = random.doubles(n, -1, 1).toArray();
            Gae gae = new Gae(random.nextDouble(), random.nextDouble());
            double[] found = gae.estimate(rewards, values).advantages();
            for (int t = 0; t < n; t++) {
                double sum = 0;
                for (int k = t; k < n; k++) {
                    double delta = rewards[k] + (k + 1 < n ? gae.gamma() * values[k + 1] : 0) - values[k];
                    sum += Math.pow(gae.gamma() * gae.lambda(), k - t) * delta;
                }
                assertEquals(sum, found[t], 1e-12, "seed " + seed);
            }
        }
    }

    @Test
    void misuseIsNamed() {
        assertThrows(IllegalArgumentException.class, () -> new Gae(1.1, 1));
        assertThrows(IllegalArgumentException.class, () -> new Gae(1, Double.NaN));
        Gae gae = new Gae(1, 1);
        assertEquals(0, gae.estimate(new double[0], new double[0]).advantages().length);
        assertThrows(IllegalArgumentException.class, () -> gae.estimate(new double[2], new double[3]));
        double[] rewards = {0, Double.NaN};
        String message = assertThrows(
                IllegalArgumentException.class, () -> gae.estimate(rewards, new double[2])).getMessage();
        assertTrue(message.contains("token 1"), message);
    }
}
