package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/**
 * The kernels of one source file, compiled for a device and loaded on it. The owner closes it, after the device has finished with them.
 */
public final class KernelModule implements AutoCloseable {
    private static final Object LOCK = new Object();
    private static @org.jspecify.annotations.Nullable Nvrtc compiler;

    private final long module;
    /**
     * From Hopper on, kernels wait for their predecessor themselves: see followPredecessor in common.cuh. To look for an error, it may help
     * that they run one after the other.
     */
    private final boolean early;

    private boolean closed;

    private KernelModule(byte[] code, boolean early) {
        this.early = early;
        try (Arena arena = Arena.ofConfined()) {
            module = CudaDriver.loadModule(arena.allocateFrom(ValueLayout.JAVA_BYTE, code));
        }
    }

    /**
     * A file of Tandem's kernels, specialised.
     *
     * @param file such as {@code decode_attention.cu}
     * @param macros defined for it
     */
    public record Source(String file, Map<String, String> macros) {}

    /** {@return the kernels of one source, as {@link #load(Device, List)}} */
    public static KernelModule load(Device device, Source source) {
        return load(device, List.of(source)).getFirst();
    }

    /**
     * Compiles sources at the same time, or takes their machine code from the cache, and loads them.
     *
     * @return a module for each source, in their order; all or none
     * @throws TandemException when NVRTC is missing or a source cannot be compiled
     */
    public static List<KernelModule> load(Device device, List<Source> sources) {
        Cuda.use(device);
        List<byte[]> codes = sources.parallelStream().map(source -> compile(device, source)).toList();
        boolean early = CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MAJOR) >= 9
                && Boolean.parseBoolean(System.getProperty("dev.tandem.earlyLaunches", "true"));
        List<KernelModule> modules = new ArrayList<>();
        try {
            codes.forEach(code -> modules.add(new KernelModule(code, early)));
            return modules;
        } catch (RuntimeException | Error e) {
            modules.forEach(KernelModule::close);
            throw e;
        }
    }

    /** {@return the machine code of a source for a device} */
    static byte[] compile(Device device, Source source) {
        return new KernelSource(source.file, source.macros).compile(compiler(), architecture(device));
    }

    private static Nvrtc compiler() {
        synchronized (LOCK) {
            Nvrtc made = compiler == null ? new Nvrtc() : compiler;
            compiler = made;
            return made;
        }
    }

    /** Hopper's own instructions need the architecture's own variant. */
    static String architecture(Device device) {
        int major = CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MAJOR);
        int minor = CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MINOR);
        return "sm_" + major + minor + (major == 9 ? "a" : "");
    }

    /** {@return a kernel by its name, valid until this module is closed} */
    public Kernel kernel(String name) {
        return new Kernel(CudaDriver.function(module, name), name, early);
    }

    /**
     * How many threads run a kernel.
     *
     * @param x blocks in the first dimension; 0 launches nothing
     * @param y blocks in the second
     * @param threads of a block, in the first dimension
     * @param rows of threads in a block, the second dimension
     * @param sharedBytes of dynamic shared memory of a block
     */
    public record Grid(int x, int y, int threads, int rows, int sharedBytes) {
        /** {@return blocks in one dimension, without dynamic shared memory} */
        public static Grid of(int blocks, int threads) {
            return new Grid(blocks, 1, threads, 1, 0);
        }
    }

    /** A kernel that can be launched on the calling thread's stream. */
    public static final class Kernel {
        private final long function;
        private final String name;
        private final boolean early;

        private Kernel(long function, String name, boolean early) {
            this.function = function;
            this.name = name;
            this.early = early;
        }

        /** {@return the same kernel, launched only when the one before it has ended} */
        public Kernel afterPredecessor() {
            return new Kernel(function, name, false);
        }

        /** Lets each block have that many bytes of dynamic shared memory. */
        public Kernel sharedMemory(int bytes) {
            CudaDriver.allowSharedMemory(function, bytes);
            return this;
        }

        /** {@return how many blocks one multiprocessor holds at a time} */
        public int residentBlocks(int threads, int sharedBytes) {
            return CudaDriver.residentBlocks(function, threads, sharedBytes);
        }

        /**
         * Launches the kernel.
         *
         * @param arguments Long for pointers and 64-bit integers, Integer, Float, Double, TensorMap; in the order and of the types of the source
         */
        public void launch(Device device, Grid grid, Object... arguments) {
            if (grid.x == 0 || grid.y == 0) {
                return;
            }
            try (Arena arena = Arena.ofConfined()) {
                MemorySegment values = arena.allocate(ValueLayout.JAVA_LONG, arguments.length);
                MemorySegment addresses = arena.allocate(ValueLayout.JAVA_LONG, arguments.length);
                for (int i = 0; i < arguments.length; i++) {
                    long at = 8L * i;
                    if (arguments[i] instanceof TensorMap map) {
                        addresses.setAtIndex(ValueLayout.JAVA_LONG, i, map.address());
                        continue;
                    }
                    switch (arguments[i]) {
                        case Long x -> values.set(ValueLayout.JAVA_LONG, at, x);
                        case Integer x -> values.set(ValueLayout.JAVA_INT, at, x);
                        case Float x -> values.set(ValueLayout.JAVA_FLOAT, at, x);
                        case Double x -> values.set(ValueLayout.JAVA_DOUBLE, at, x);
                        default -> throw new IllegalArgumentException(name + ": argument " + i + " is a " + arguments[i].getClass());
                    }
                    addresses.setAtIndex(ValueLayout.JAVA_LONG, i, values.address() + at);
                }
                CudaDriver.launch(function, grid.x, grid.y, grid.threads, grid.rows, grid.sharedBytes, Cuda.stream(device), early,
                        addresses);
            }
        }

        @Override
        public String toString() {
            return name;
        }
    }

    @Override
    public void close() {
        if (!closed) {
            closed = true;
            CudaDriver.unloadModule(module);
        }
    }
}
