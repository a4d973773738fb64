package dev.tandem.rl;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import java.lang.reflect.RecordComponent;
import java.util.Arrays;
import java.util.Locale;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;

class StepMetricsTest {
    private static final StepMetrics METRICS = new StepMetrics(7, 0.5, 0.25, -0.0125, Double.NaN, 1.5, 0.0625, 2.5,
            33.5, 0.001, 1e-5, new StepMetrics.Phase(2, 4096, 3L << 29), new StepMetrics.Phase(0, 64, 0),
            new StepMetrics.Phase(4, 8192, 5L << 30), true);

    @Test
    void jsonHasEveryComponentAndNoNaN() throws ReflectiveOperationException {
        String text = METRICS.toJson();
        JsonObject json = JsonParser.parseString(text).getAsJsonObject();
        assertEquals(
                Arrays.stream(StepMetrics.class.getRecordComponents()).map(RecordComponent::getName)
                        .collect(Collectors.toSet()),
                json.keySet());
        for (RecordComponent component : StepMetrics.class.getRecordComponents()) {
            Object value = component.getAccessor().invoke(METRICS);
            if (component.getType() == double.class && Double.isFinite((double) value)) {
                assertEquals((double) value, json.get(component.getName()).getAsDouble(), component.getName());
            }
        }
        assertTrue(json.get("kl").isJsonNull());
        assertEquals(7, json.get("step").getAsLong());
        assertTrue(json.get("skipped").getAsBoolean());
        assertEquals(5L << 30, json.getAsJsonObject("train").get("peakBytes").getAsLong());
        assertEquals(2048, json.getAsJsonObject("rollout").get("tokensPerSecond").getAsDouble());
        assertTrue(json.getAsJsonObject("reward").get("tokensPerSecond").isJsonNull());
        assertTrue(!text.contains("\n") && !text.contains("NaN"), text);
    }

    @Test
    void lineIsTheSameInEveryLocale() {
        Locale before = Locale.getDefault();
        try {
            Locale.setDefault(Locale.GERMANY);
            assertEquals("step 7 SKIPPED reward 0.500±0.250 loss -0.01250 kl NaN entropy 1.500 clip 0.063 grad 2.50"
                    + " length 33.5 gap 0.0010/1.0e-05 | rollout 2.00s 2048tok/s 1.50GiB"
                    + " | reward 0.00s NaNtok/s 0.00GiB | train 4.00s 2048tok/s 5.00GiB", METRICS.toString());
        } finally {
            Locale.setDefault(before);
        }
    }
}
