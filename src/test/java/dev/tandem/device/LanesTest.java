package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTimeoutPreemptively;

import java.time.Duration;
import java.util.concurrent.atomic.AtomicIntegerArray;
import org.junit.jupiter.api.Test;

class LanesTest {
    @Test
    void everyLaneSeesWhatTheOthersWroteBeforeTheyMet() {
        try (Lanes lanes = new Lanes(3)) {
            int rounds = 200;
            AtomicIntegerArray written = new AtomicIntegerArray(lanes.count());
            AtomicIntegerArray late = new AtomicIntegerArray(lanes.count());
            for (int call = 0; call < 20; call++) {
                int base = call * rounds;
                lanes.run(lane -> {
                    for (int round = 1; round <= rounds; round++) {
                        written.set(lane, base + round);
                        lanes.meet();
                        for (int other = 0; other < lanes.count(); other++) {
                            if (written.get(other) < base + round) {
                                late.incrementAndGet(lane);
                            }
                        }
                    }
                });
            }
            for (int lane = 0; lane < lanes.count(); lane++) {
                assertEquals(20 * rounds, written.get(lane));
                assertEquals(0, late.get(lane));
            }
        }
    }

    @Test
    void aLaneThatFailsFreesTheOthersAndTheNextCallWorks() {
        int cores = Threads.perOperation();
        try (Lanes lanes = new Lanes(2)) {
            for (int bad = 0; bad < 2; bad++) {
                int failing = bad;
                IllegalStateException thrown = assertTimeoutPreemptively(Duration.ofSeconds(20),
                        () -> assertThrows(IllegalStateException.class, () -> lanes.run(lane -> {
                            lanes.meet();
                            if (lane == failing) {
                                throw new IllegalStateException("lane " + lane);
                            }
                            lanes.meet();
                        })));
                assertEquals("lane " + failing, thrown.getMessage());
                AtomicIntegerArray seen = new AtomicIntegerArray(2);
                lanes.run(lane -> {
                    lanes.meet();
                    seen.set(lane, Threads.perOperation());
                });
                assertEquals(1, seen.get(0));
                assertEquals(1, seen.get(1));
            }
        }
        assertEquals(cores, Threads.perOperation());
    }
}
