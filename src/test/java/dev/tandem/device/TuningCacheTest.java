package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class TuningCacheTest {
    private static final String QUESTION = "step of 8 of 3 ModelConfig[hidden = 7, a: b]\\\u00fc";

    @Test
    void answersOutliveTheProcess(@TempDir Path folder) throws IOException {
        Path file = folder.resolve("deeper/device.tuning");
        TuningCache first = new TuningCache(file);
        assertNull(first.find(QUESTION));
        first.keep(QUESTION, "2");
        assertEquals("2", first.find(QUESTION));
        TuningCache meanwhile = new TuningCache(file);
        assertNull(meanwhile.find(QUESTION), "not saved yet");
        first.save();
        meanwhile.keep("product PLAIN 16 8 8", "0.1 64 16 1 4");
        meanwhile.save();
        TuningCache later = new TuningCache(file);
        assertEquals("2", later.find(QUESTION));
        assertEquals("0.1 64 16 1 4", later.find("product PLAIN 16 8 8"));
        try (Stream<Path> files = Files.list(file.getParent())) {
            assertEquals(List.of(file), files.toList());
        }
    }

    @Test
    void kernelsThatAreTimedAreAllThere() {
        assertTrue(KernelSource.everything().contains("multiplyGated"));
    }

    @Test
    void nothingIsWrittenWhereNothingIsNew(@TempDir Path folder) throws IOException {
        Path file = folder.resolve("device.tuning");
        TuningCache cache = new TuningCache(file);
        cache.keep("a", "1");
        cache.save();
        Files.delete(file);
        cache.keep("a", "1");
        cache.save();
        assertTrue(Files.notExists(file));
    }

    @Test
    void aFileThatCannotBeReadOrWrittenIsNoError(@TempDir Path folder) throws IOException {
        Path broken = Files.writeString(folder.resolve("broken.tuning"), "a=\\u00zz");
        assertNull(new TuningCache(broken).find("a"));
        Path blocked = Files.writeString(folder.resolve("file"), "").resolve("device.tuning");
        TuningCache cache = new TuningCache(blocked);
        cache.keep("a", "1");
        cache.save();
        assertEquals("1", cache.find("a"));
    }
}
