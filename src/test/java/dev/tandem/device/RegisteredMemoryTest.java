package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.condition.EnabledOnOs;
import org.junit.jupiter.api.condition.OS;

class RegisteredMemoryTest {
    @Test
    @EnabledOnOs(OS.LINUX)
    void moreThanTheMachineHasIsRefusedBeforeItIsTouched() {
        long more = ProcessMemory.available() + (4L << 30);
        TandemException e = assertThrows(TandemException.class, () -> new RegisteredMemory(more));
        assertTrue(String.valueOf(e.getMessage()).contains("MiB are available"), e.getMessage());
    }

    @Test
    void someBytesAreTaken() {
        assertThrows(IllegalArgumentException.class, () -> new RegisteredMemory(0));
        assertThrows(IllegalArgumentException.class, () -> new PinnedMemory(Device.cuda(0), -1));
    }
}
