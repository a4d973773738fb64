package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.condition.EnabledOnOs;
import org.junit.jupiter.api.condition.OS;

class RegisteredMemoryTest {
    private static final long BYTES = 10L << 20;

    @Test
    @EnabledOnOs(OS.LINUX)
    void moreThanTheMachineHasIsRefusedBeforeItIsTouched() {
        long more = ProcessMemory.available() + (4L << 30);
        TandemException e = assertThrows(TandemException.class, () -> new RegisteredMemory(more, 2, Long.MAX_VALUE));
        assertTrue(String.valueOf(e.getMessage()).contains("MiB are available"), e.getMessage());
    }

    @Test
    void partsAreWholePages() {
        assertThrows(IllegalArgumentException.class, () -> new RegisteredMemory(BYTES, 2, 0));
        assertThrows(IllegalArgumentException.class, () -> new RegisteredMemory(BYTES, 2, (1L << 20) + 1));
        assertThrows(IllegalArgumentException.class, () -> new RegisteredMemory(0, 2, 1L << 20));
        assertThrows(IllegalArgumentException.class, () -> new PinnedMemory(Device.cuda(0), -1));
    }
}
