package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.List;
import java.util.Map;
import java.util.function.UnaryOperator;
import org.junit.jupiter.api.Test;

class SamplingParamsTest {
    @Test
    void namesTheFieldThatIsWrong() {
        Map<String, List<UnaryOperator<SamplingParams>>> wrong = Map.of(
                "temperature", List.of(p -> p.temperature(-0.1), p -> p.temperature(Double.NaN), p -> p.temperature(1 / 0.0)),
                "topK", List.of(p -> p.topK(-1)),
                "topP", List.of(p -> p.topP(0), p -> p.topP(1.01), p -> p.topP(Double.NaN)),
                "minP", List.of(p -> p.minP(-0.1), p -> p.minP(1.1)),
                "repetitionPenalty", List.of(p -> p.repetitionPenalty(0), p -> p.repetitionPenalty(Double.NaN)),
                "n", List.of(p -> p.n(0)),
                "maxTokens", List.of(p -> p.maxTokens(0)),
                "minTokens", List.of(p -> p.minTokens(-1), p -> p.minTokens(257)),
                "stopTokenIds", List.of(p -> p.stopTokenIds(List.of(3, -1))),
                "stopStrings", List.of(p -> p.stopStrings(List.of(""))));
        wrong.forEach((name, changes) -> changes.forEach(change -> {
            var e = assertThrows(IllegalArgumentException.class, () -> change.apply(SamplingParams.defaults()));
            assertTrue(e.getMessage().contains("parameter " + name + " is "), e.getMessage());
        }));
    }

    @Test
    void withersChangeOneField() {
        SamplingParams params = SamplingParams.defaults().temperature(0.5).topK(3).topP(0.9).minP(0.1).repetitionPenalty(1.2).seed(7)
                .n(4).maxTokens(9).minTokens(2).stopTokenIds(List.of(5)).stopStrings(List.of("x")).ignoreEos(true)
                .logprobKind(LogprobKind.TRUNCATED);
        assertEquals(new SamplingParams(0.5, 3, 0.9, 0.1, 1.2, 7L, 4, 9, 2, List.of(5), List.of("x"), true, LogprobKind.TRUNCATED), params);
        assertEquals(SamplingParams.defaults().temperature(0), SamplingParams.greedy());
    }
}
