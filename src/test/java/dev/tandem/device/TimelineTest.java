package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Timeline.Gap;
import dev.tandem.device.Timeline.Interval;
import java.util.List;
import org.junit.jupiter.api.Test;

class TimelineTest {
    private static final Timeline TIMELINE = new Timeline(
            List.of(new Interval("prefill", 2, 10), new Interval("decoding", 10.5, 12), new Interval("decoding", 12, 30),
                    new Interval("optimizer", 50, 58)),
            List.of(new Interval("tokenizing", 0, 2), new Interval("sleep", 28, 35), new Interval("packing", 36, 49)), 70);

    @Test
    void gapsAreNamedAfterWhatIsAroundThemAndWhatTheHostDid() {
        List<Gap> gaps = TIMELINE.gaps(5);
        assertEquals(2, gaps.size());
        Gap first = gaps.getFirst();
        assertEquals(30, first.start());
        assertEquals(50, first.end());
        assertEquals("decoding", first.after());
        assertEquals("optimizer", first.before());
        assertEquals(List.of(new Interval("packing", 36, 49), new Interval("sleep", 30, 35)), first.host());
        assertEquals(new Gap(58, 70, "optimizer", "the end", List.of()), gaps.getLast());
        assertEquals(4, TIMELINE.gaps(0.4).size());
    }

    @Test
    void textAddsUpWhatIsRepeated() {
        String text = TIMELINE.toString();
        assertEquals(35.5, TIMELINE.busy());
        assertTrue(text.contains("70.0 ms, of them 35.5 ms computing"), text);
        assertTrue(text.contains("10.5       19.5       2  decoding"), text);
        assertTrue(text.contains("idle 20.0 ms at 30.0 ms, between decoding and optimizer; the host: packing, sleep"), text);
        assertTrue(text.contains("between optimizer and the end; the host: nothing that is recorded"), text);
    }
}
