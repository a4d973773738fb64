package dev.tandem.benchmarks;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_BYTE;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import dev.tandem.device.Cuda;
import dev.tandem.device.Device;
import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.invoke.MethodHandle;
import java.lang.invoke.MethodHandles;
import java.lang.invoke.MethodType;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.Deque;
import java.util.List;

/**
 * Every kernel, copy and fill of a GPU while something runs, with its times on the device, as CUPTI records them: {@code libcupti.so.13} of
 * the CUDA toolkit, which torch's packages bring, too, on {@code LD_LIBRARY_PATH}. One for a process, made before CUDA graphs are, so that
 * their kernels are recorded one by one.
 */
final class DeviceActivity {
    // Kinds of records, and where they have what is wanted (cupti_activity.h; the same in all its versions).
    private static final int COPY = 1;
    private static final int FILL = 2;
    private static final int KERNEL = 10;
    private static final long START = 16;
    private static final long END = 24;
    private static final long KERNEL_NAME = 104;
    private static final long COPY_KIND = 4;

    private static final long BUFFER_BYTES = 8 << 20;
    private static final int FORCED = 1;

    private final Arena arena = Arena.global(); // CUPTI may call until the process ends
    private final MethodHandle nextRecord;
    private final MethodHandle flush;
    private final Deque<MemorySegment> buffers = new ArrayDeque<>();
    private List<Interval> intervals = new ArrayList<>();

    /** What the device did, from when to when in nanoseconds of its clock. */
    record Interval(String name, long start, long end) {
        double seconds() {
            return (end - start) / 1e9;
        }
    }

    /** Starts to record. */
    DeviceActivity() {
        try {
            SymbolLookup cupti = SymbolLookup.libraryLookup("libcupti.so.13", arena);
            Linker linker = Linker.nativeLinker();
            MethodHandle register = linker.downcallHandle(
                    cupti.findOrThrow("cuptiActivityRegisterCallbacks"), FunctionDescriptor.of(JAVA_INT, ADDRESS, ADDRESS));
            MethodHandle enable = linker.downcallHandle(cupti.findOrThrow("cuptiActivityEnable"), FunctionDescriptor.of(JAVA_INT, JAVA_INT));
            flush = linker.downcallHandle(cupti.findOrThrow("cuptiActivityFlushAll"), FunctionDescriptor.of(JAVA_INT, JAVA_INT));
            nextRecord = linker.downcallHandle(cupti.findOrThrow("cuptiActivityGetNextRecord"),
                    FunctionDescriptor.of(JAVA_INT, ADDRESS, JAVA_LONG, ADDRESS));
            FunctionDescriptor request = FunctionDescriptor.ofVoid(ADDRESS, ADDRESS, ADDRESS);
            FunctionDescriptor completion = FunctionDescriptor.ofVoid(ADDRESS, JAVA_INT, ADDRESS, JAVA_LONG, JAVA_LONG);
            check("cuptiActivityRegisterCallbacks",
                    (int) register.invokeExact(callback(linker, "requested", request), callback(linker, "completed", completion)));
            for (int kind : new int[] {KERNEL, COPY, FILL}) {
                check("cuptiActivityEnable", (int) enable.invokeExact(kind));
            }
        } catch (Throwable e) {
            throw new IllegalStateException("CUPTI records nothing: " + e.getMessage(), e);
        }
    }

    private MemorySegment callback(Linker linker, String method, FunctionDescriptor type) throws ReflectiveOperationException {
        MethodType signature = type.toMethodType();
        return linker.upcallStub(MethodHandles.lookup().bind(this, method, signature), type, arena);
    }

    private static void check(String call, int result) {
        if (result != 0) {
            throw new IllegalStateException(call + " returned " + result);
        }
    }

    /** CUPTI asks for a buffer. */
    private synchronized void requested(MemorySegment buffer, MemorySegment size, MemorySegment mostRecords) {
        MemorySegment free = buffers.isEmpty() ? arena.allocate(BUFFER_BYTES, 8) : buffers.pop();
        buffer.reinterpret(ADDRESS.byteSize()).set(ADDRESS, 0, free);
        size.reinterpret(JAVA_LONG.byteSize()).set(JAVA_LONG, 0, BUFFER_BYTES);
        mostRecords.reinterpret(JAVA_LONG.byteSize()).set(JAVA_LONG, 0, 0); // as many as fit
    }

    /** CUPTI gives one back, on a thread of its own. */
    private synchronized void completed(MemorySegment context, int stream, MemorySegment buffer, long size, long used) {
        try (Arena own = Arena.ofConfined()) {
            MemorySegment at = own.allocate(ADDRESS);
            while ((int) nextRecord.invokeExact(buffer, used, at) == 0) {
                MemorySegment found = at.get(ADDRESS, 0).reinterpret(KERNEL_NAME + ADDRESS.byteSize());
                String name = switch (found.get(JAVA_INT, 0)) {
                    case KERNEL -> found.get(ADDRESS, KERNEL_NAME).reinterpret(Long.MAX_VALUE).getString(0);
                    case COPY -> "copy of kind " + found.get(JAVA_BYTE, COPY_KIND);
                    default -> "fill";
                };
                intervals.add(new Interval(name.intern(), found.get(JAVA_LONG, START), found.get(JAVA_LONG, END)));
            }
            buffers.push(buffer);
        } catch (Throwable e) {
            e.printStackTrace(); // an upcall must not throw
        }
    }

    /** {@return what the device does from now until all that {@code work} launches has ended, in the order of their starts} */
    List<Interval> during(Device device, Runnable work) {
        taken(device);
        work.run();
        List<Interval> found = taken(device);
        found.sort(Comparator.comparingLong(Interval::start));
        return found;
    }

    private List<Interval> taken(Device device) {
        Cuda.synchronize(device);
        try {
            check("cuptiActivityFlushAll", (int) flush.invokeExact(FORCED));
        } catch (RuntimeException | Error e) {
            throw e;
        } catch (Throwable e) {
            throw new IllegalStateException(e);
        }
        synchronized (this) {
            List<Interval> all = intervals;
            intervals = new ArrayList<>();
            return all;
        }
    }
}
