package dev.tandem.device;

import com.sun.management.OperatingSystemMXBean;
import java.io.IOException;
import java.lang.management.ManagementFactory;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;

/** The resident memory of this process as the operating system counts it; on Linux, zero elsewhere. */
public final class ProcessMemory {
    private static final Path STATUS = Path.of("/proc/self/status");
    private static final Path CLEAR = Path.of("/proc/self/clear_refs");
    private static final Path MACHINE = Path.of("/proc/meminfo");
    /** What a container's memory is used for; under the first name or, in older systems, the second. */
    private static final List<Path> CONTAINER = List.of(Path.of("/sys/fs/cgroup/memory.stat"), Path.of("/sys/fs/cgroup/memory/memory.stat"));

    private ProcessMemory() {}

    /** {@return resident bytes now} */
    public static long resident() {
        return number(STATUS, "VmRSS:") << 10;
    }

    /** {@return the most resident bytes since the start or the last {@link #resetPeak}} */
    public static long peak() {
        return number(STATUS, "VmHWM:") << 10;
    }

    /** {@return bytes that the machine could still give out, or {@link Long#MAX_VALUE} when that is not known} */
    public static long available() {
        long known = number(MACHINE, "MemAvailable:") << 10;
        return known == 0 ? Long.MAX_VALUE : known;
    }

    /**
     * {@return bytes of ordinary memory that this process could still touch before the system ends a process for want of memory, or
     * {@link Long#MAX_VALUE} when that is not known} Unlike {@link #available}, it counts the limit of a container, to which memory of
     * the GPU's driver is not subject.
     */
    static long touchable() {
        long machine = number(MACHINE, "MemTotal:") << 10;
        OperatingSystemMXBean system = ManagementFactory.getPlatformMXBean(OperatingSystemMXBean.class);
        if (system.getTotalMemorySize() >= machine) {
            return available();
        }
        // What a container has free leaves out the files that are cached for it, which make way.
        long cached = CONTAINER.stream().mapToLong(file -> number(file, "active_file ") + number(file, "inactive_file ")).max().orElse(0);
        return Math.min(available(), system.getFreeMemorySize() + cached);
    }

    /** Begins to measure the peak anew, where the system allows it. */
    public static void resetPeak() {
        try {
            Files.writeString(CLEAR, "5");
        } catch (IOException | SecurityException e) {
            System.getLogger(ProcessMemory.class.getName())
                    .log(System.Logger.Level.DEBUG, "the peak of resident memory cannot be reset: {0}", e.getMessage());
        }
    }

    /** {@return the number behind a word, or 0 when there is none} */
    private static long number(Path file, String key) {
        try {
            List<String> lines = Files.readAllLines(file);
            for (String line : lines) {
                if (line.startsWith(key)) {
                    return Long.parseLong(line.substring(key.length()).replace("kB", "").strip());
                }
            }
            return 0;
        } catch (IOException e) {
            return 0;
        }
    }
}
