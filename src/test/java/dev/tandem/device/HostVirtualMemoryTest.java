package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.condition.EnabledOnOs;
import org.junit.jupiter.api.condition.OS;

class HostVirtualMemoryTest {
    /** Neither a multiple of what a lane takes at a time nor of a huge page. */
    private static final long BYTES = (200L << 20) + (3L << 16);

    @Test
    void populatedPagesAreZeroAndWritable() {
        try (HostVirtualMemory memory = new HostVirtualMemory(BYTES - 1); Lanes lanes = new Lanes(3)) {
            memory.populate(lanes);
            assertEquals(BYTES, memory.reserved());
            assertEquals(BYTES, memory.committed());
            MemorySegment all = MemorySegment.ofAddress(memory.address()).reinterpret(BYTES);
            for (long at = 0; at < BYTES; at += Long.BYTES) {
                if (all.get(ValueLayout.JAVA_LONG, at) != 0) {
                    throw new AssertionError("not zero at " + at);
                }
            }
            all.set(ValueLayout.JAVA_LONG, BYTES - Long.BYTES, 7);
            assertThrows(IllegalStateException.class, () -> memory.populate(lanes));
            assertEquals(7, all.get(ValueLayout.JAVA_LONG, BYTES - Long.BYTES));
        }
    }

    @Test
    @EnabledOnOs(OS.LINUX)
    void pagesAreThereAtOnceAndGoWithTheRange() throws IOException {
        HostVirtualMemory memory = new HostVirtualMemory(BYTES);
        try (Lanes lanes = new Lanes(2)) {
            assertEquals(0, resident(memory.address(), BYTES));
            memory.populate(lanes);
            assertEquals(BYTES, resident(memory.address(), BYTES));
        } finally {
            memory.close();
            memory.close();
        }
        assertTrue(resident(memory.address(), BYTES) < BYTES / 2); // the virtual machine may have mapped something there since
    }

    /** {@return resident bytes of the mappings that a range lies in} */
    private static long resident(long address, long bytes) throws IOException {
        long sum = 0;
        boolean inside = false;
        try (Stream<String> lines = Files.lines(Path.of("/proc/self/smaps"))) {
            for (String line : (Iterable<String>) lines::iterator) {
                if (line.matches("[0-9a-f]+-[0-9a-f]+ .*")) {
                    String[] ends = line.substring(0, line.indexOf(' ')).split("-", 2);
                    inside = Long.parseUnsignedLong(ends[0], 16) < address + bytes && Long.parseUnsignedLong(ends[1], 16) > address;
                } else if (inside && line.startsWith("Rss:")) {
                    sum += Long.parseLong(line.replaceAll("\\D", "")) << 10;
                }
            }
        }
        return sum;
    }
}
