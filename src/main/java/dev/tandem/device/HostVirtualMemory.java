package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.StructLayout;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.lang.invoke.VarHandle;

/**
 * Host memory by mmap, mprotect and madvise. Reserved pages are inaccessible and cost nothing; committed pages are made
 * accessible and appear when they are first written; released pages are dropped by MADV_DONTNEED and made inaccessible again.
 */
final class HostVirtualMemory implements VirtualMemory {
    private static final int PROT_NONE = 0;
    private static final int PROT_READ_WRITE = 3;
    private static final int MAP_PRIVATE = 2;
    private static final boolean MAC = System.getProperty("os.name").startsWith("Mac");
    private static final int MAP_ANONYMOUS = MAC ? 0x1000 : 0x20;
    private static final int MAP_NORESERVE = MAC ? 0x40 : 0x4000;
    private static final int MADV_DONTNEED = 4;
    /** Of Linux. */
    private static final int MADV_HUGEPAGE = 14;
    private static final long PAGE = 1L << 16;
    /** The smallest page of any platform. */
    private static final long LEAST_PAGE = 1L << 12;
    /** What a thread touches before it takes the next piece: whole huge pages, and milliseconds. */
    private static final long PIECE = 1L << 26;

    private static final StructLayout CALL_STATE = Linker.Option.captureStateLayout();
    private static final VarHandle ERRNO = CALL_STATE.varHandle(MemoryLayout.PathElement.groupElement("errno"));
    private static final MethodHandle MMAP = function("mmap", FunctionDescriptor.of(ValueLayout.JAVA_LONG, ValueLayout.JAVA_LONG,
            ValueLayout.JAVA_LONG, ValueLayout.JAVA_INT, ValueLayout.JAVA_INT, ValueLayout.JAVA_INT, ValueLayout.JAVA_LONG));
    private static final MethodHandle MUNMAP =
            function("munmap", FunctionDescriptor.of(ValueLayout.JAVA_INT, ValueLayout.JAVA_LONG, ValueLayout.JAVA_LONG));
    private static final MethodHandle MPROTECT = function("mprotect", FunctionDescriptor.of(ValueLayout.JAVA_INT,
            ValueLayout.JAVA_LONG, ValueLayout.JAVA_LONG, ValueLayout.JAVA_INT));
    private static final MethodHandle MADVISE = function("madvise", FunctionDescriptor.of(ValueLayout.JAVA_INT,
            ValueLayout.JAVA_LONG, ValueLayout.JAVA_LONG, ValueLayout.JAVA_INT));

    private final long address;
    private final long reserved;
    private long committed;
    private boolean closed;

    HostVirtualMemory(long bytes) {
        if (bytes <= 0) {
            throw new IllegalArgumentException("bytes to reserve must be positive: " + bytes);
        }
        reserved = (bytes + PAGE - 1) / PAGE * PAGE;
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment state = arena.allocate(CALL_STATE);
            address = (long) MMAP.invokeExact(
                    state, 0L, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
            if (address == -1) {
                throw new TandemException("could not reserve " + reserved + " bytes of addresses: errno " + ERRNO.get(state, 0L));
            }
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    @Override
    public Tensor tensor(DType dtype, long... shape) {
        return Tensor.at(Device.cpu(), address, dtype, shape);
    }

    @Override
    public long address() {
        return address;
    }

    @Override
    public long reserved() {
        return reserved;
    }

    @Override
    public long committed() {
        return committed;
    }

    @Override
    public long granularity() {
        return PAGE;
    }

    @Override
    public void commit(long offset, long bytes) {
        check(offset, bytes);
        call("commit", MPROTECT, offset, bytes, PROT_READ_WRITE);
        committed += bytes;
    }

    /**
     * Commits the whole range and has its pages there at once, zero and as large as the system gives them. The kernel clears a page on the
     * thread that touches it first, so this takes as many cores as there are lanes.
     */
    void populate(Lanes lanes) {
        if (committed != 0) {
            throw new IllegalStateException("part of this virtual memory is committed already");
        }
        commit(0, reserved);
        if (!MAC) {
            adviseHugePages();
        }
        MemorySegment all = MemorySegment.ofAddress(address).reinterpret(reserved);
        lanes.share(Math.toIntExact(Math.ceilDiv(reserved, PIECE)), piece -> {
            long end = Math.min(reserved, (piece + 1) * PIECE);
            for (long at = piece * PIECE; at < end; at += LEAST_PAGE) {
                all.set(ValueLayout.JAVA_BYTE, at, (byte) 0);
            }
        });
    }

    /** A kernel without huge pages refuses, and small pages do as well. */
    private void adviseHugePages() {
        try {
            call("advise huge pages for", MADVISE, 0, reserved, MADV_HUGEPAGE);
        } catch (TandemException e) {
            System.getLogger(HostVirtualMemory.class.getName()).log(System.Logger.Level.DEBUG, e.getMessage());
        }
    }

    @Override
    public void release(long offset, long bytes) {
        check(offset, bytes);
        call("release", MADVISE, offset, bytes, MADV_DONTNEED);
        call("protect", MPROTECT, offset, bytes, PROT_NONE);
        committed -= bytes;
    }

    @Override
    public void close() {
        if (closed) {
            return;
        }
        closed = true;
        committed = 0;
        try (Arena arena = Arena.ofConfined()) {
            int result = (int) MUNMAP.invokeExact(arena.allocate(CALL_STATE), address, reserved);
            if (result != 0) {
                throw new TandemException("could not unmap " + reserved + " bytes");
            }
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private void check(long offset, long bytes) {
        if (closed) {
            throw new IllegalStateException("this virtual memory is closed");
        }
        if (offset < 0 || bytes < 0 || offset % PAGE != 0 || bytes % PAGE != 0 || offset + bytes > reserved) {
            throw new IllegalArgumentException("range [" + offset + ", +" + bytes + ") does not lie on " + PAGE
                    + "-byte units within " + reserved + " reserved bytes");
        }
    }

    private void call(String what, MethodHandle function, long offset, long bytes, int argument) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment state = arena.allocate(CALL_STATE);
            int result = (int) function.invokeExact(state, address + offset, bytes, argument);
            if (result != 0) {
                throw new TandemException("could not " + what + " " + bytes + " bytes of host memory: errno "
                        + ERRNO.get(state, 0L));
            }
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private static MethodHandle function(String name, FunctionDescriptor descriptor) {
        Linker linker = Linker.nativeLinker();
        return linker.downcallHandle(
                linker.defaultLookup().find(name).orElseThrow(() -> new TandemException(
                        "this platform has no " + name + "(): KV pages need a POSIX system")),
                descriptor,
                Linker.Option.captureCallState("errno"));
    }
}
