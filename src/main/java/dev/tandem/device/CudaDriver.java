package dev.tandem.device;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.invoke.MethodHandle;

/**
 * The CUDA driver's functions that Tandem calls itself: virtual memory, kernels, graphs, pinned memory, events. Everything else on a GPU
 * goes through libtorch, whose primary context these calls share: a thread makes it current by {@link Cuda#use}.
 *
 * <p>Handles are plain addresses. A result other than success is a {@link CudaException} that names the call. Loading this class needs
 * the driver's library; ask {@link Cuda#available} first.
 */
final class CudaDriver {
    /** CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating. */
    private static final int CAPTURE_THREAD_LOCAL = 1;

    /** CU_MEMHOSTREGISTER_PORTABLE: page-locked for all contexts, as memory of cuMemHostAlloc is. */
    private static final int REGISTER_PORTABLE = 1;

    private static final int MEM_ALLOCATION_TYPE_PINNED = 1;
    private static final int MEM_LOCATION_TYPE_DEVICE = 1;
    private static final int MEM_ACCESS_READ_WRITE = 3;
    private static final long PROPERTIES_BYTES = 32;
    private static final long ACCESS_BYTES = 12;

    private static final Linker LINKER = Linker.nativeLinker();
    private static final SymbolLookup DRIVER = SymbolLookup.libraryLookup("libcuda.so.1", Arena.global());

    private static final MethodHandle GET_ERROR_NAME = function("cuGetErrorName", JAVA_INT, ADDRESS);
    private static final MethodHandle GET_VERSION = function("cuDriverGetVersion", ADDRESS);
    private static final MethodHandle GET_NAME = function("cuDeviceGetName", ADDRESS, JAVA_INT, JAVA_INT);
    private static final MethodHandle GET_DEVICE = function("cuDeviceGet", ADDRESS, JAVA_INT);
    private static final MethodHandle GET_ATTRIBUTE = function("cuDeviceGetAttribute", ADDRESS, JAVA_INT, JAVA_INT);
    private static final MethodHandle SYNCHRONIZE = function("cuCtxSynchronize");
    private static final MethodHandle MEMORY_INFO = function("cuMemGetInfo_v2", ADDRESS, ADDRESS);

    private static final MethodHandle RESERVE =
            function("cuMemAddressReserve", ADDRESS, JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG);
    private static final MethodHandle FREE_ADDRESSES = function("cuMemAddressFree", JAVA_LONG, JAVA_LONG);
    private static final MethodHandle CREATE = function("cuMemCreate", ADDRESS, JAVA_LONG, ADDRESS, JAVA_LONG);
    private static final MethodHandle RELEASE = function("cuMemRelease", JAVA_LONG);
    private static final MethodHandle MAP = function("cuMemMap", JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG);
    private static final MethodHandle UNMAP = function("cuMemUnmap", JAVA_LONG, JAVA_LONG);
    private static final MethodHandle SET_ACCESS = function("cuMemSetAccess", JAVA_LONG, JAVA_LONG, ADDRESS, JAVA_LONG);
    private static final MethodHandle GRANULARITY = function("cuMemGetAllocationGranularity", ADDRESS, ADDRESS, JAVA_INT);

    private static final MethodHandle HOST_ALLOC = function("cuMemHostAlloc", ADDRESS, JAVA_LONG, JAVA_INT);
    private static final MethodHandle HOST_FREE = function("cuMemFreeHost", JAVA_LONG);
    private static final MethodHandle HOST_REGISTER = function("cuMemHostRegister_v2", JAVA_LONG, JAVA_LONG, JAVA_INT);
    private static final MethodHandle HOST_UNREGISTER = function("cuMemHostUnregister", JAVA_LONG);
    private static final MethodHandle COPY = function("cuMemcpyAsync", JAVA_LONG, JAVA_LONG, JAVA_LONG, JAVA_LONG);

    private static final MethodHandle LOAD_MODULE = function("cuModuleLoadData", ADDRESS, ADDRESS);
    private static final MethodHandle UNLOAD_MODULE = function("cuModuleUnload", JAVA_LONG);
    private static final MethodHandle GET_FUNCTION = function("cuModuleGetFunction", ADDRESS, JAVA_LONG, ADDRESS);
    private static final MethodHandle SET_ATTRIBUTE = function("cuFuncSetAttribute", JAVA_LONG, JAVA_INT, JAVA_INT);
    private static final MethodHandle OCCUPANCY =
            function("cuOccupancyMaxActiveBlocksPerMultiprocessor", ADDRESS, JAVA_LONG, JAVA_INT, JAVA_LONG);
    private static final MethodHandle LAUNCH = function("cuLaunchKernelEx", ADDRESS, JAVA_LONG, ADDRESS, ADDRESS);

    private static final MethodHandle ENCODE_TENSOR_MAP = function("cuTensorMapEncodeTiled", ADDRESS, JAVA_INT, JAVA_INT, JAVA_LONG, ADDRESS,
            ADDRESS, ADDRESS, ADDRESS, JAVA_INT, JAVA_INT, JAVA_INT, JAVA_INT);

    private static final MethodHandle BEGIN_CAPTURE = function("cuStreamBeginCapture_v2", JAVA_LONG, JAVA_INT);
    private static final MethodHandle END_CAPTURE = function("cuStreamEndCapture", JAVA_LONG, ADDRESS);
    private static final MethodHandle INSTANTIATE = function("cuGraphInstantiateWithFlags", ADDRESS, JAVA_LONG, JAVA_LONG);
    private static final MethodHandle LAUNCH_GRAPH = function("cuGraphLaunch", JAVA_LONG, JAVA_LONG);
    private static final MethodHandle DESTROY_GRAPH = function("cuGraphDestroy", JAVA_LONG);
    private static final MethodHandle DESTROY_EXECUTABLE = function("cuGraphExecDestroy", JAVA_LONG);

    private static final MethodHandle CREATE_STREAM = function("cuStreamCreate", ADDRESS, JAVA_INT);
    private static final MethodHandle DESTROY_STREAM = function("cuStreamDestroy_v2", JAVA_LONG);
    private static final MethodHandle SYNCHRONIZE_STREAM = function("cuStreamSynchronize", JAVA_LONG);
    private static final MethodHandle CREATE_EVENT = function("cuEventCreate", ADDRESS, JAVA_INT);
    private static final MethodHandle RECORD_EVENT = function("cuEventRecord", JAVA_LONG, JAVA_LONG);
    private static final MethodHandle WAIT_EVENT = function("cuEventSynchronize", JAVA_LONG);
    private static final MethodHandle ELAPSED = function("cuEventElapsedTime_v2", ADDRESS, JAVA_LONG, JAVA_LONG);
    private static final MethodHandle DESTROY_EVENT = function("cuEventDestroy_v2", JAVA_LONG);
    private static final MethodHandle STREAM_WAITS = function("cuStreamWaitEvent", JAVA_LONG, JAVA_LONG, JAVA_INT);

    private CudaDriver() {}

    // ---- devices and memory ---------------------------------------------------------------------------------------------

    /** Attributes of a device, by the driver's numbers. */
    static final int MULTIPROCESSORS = 16;
    private static final int NAME_BYTES = 256;
    static final int CAPABILITY_MAJOR = 75;
    static final int CAPABILITY_MINOR = 76;
    static final int SHARED_MEMORY_PER_BLOCK = 97;

    static int attribute(int device, int attribute) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_INT, 2);
            check("cuDeviceGet", (int) GET_DEVICE.invokeExact(out, device));
            int handle = out.get(JAVA_INT, 0);
            check("cuDeviceGetAttribute", (int) GET_ATTRIBUTE.invokeExact(out, attribute, handle));
            return out.get(JAVA_INT, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return the driver's version, such as 13000} */
    static int version() {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_INT);
            check("cuDriverGetVersion", (int) GET_VERSION.invokeExact(out));
            return out.get(JAVA_INT, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return a device's name, such as NVIDIA H200} */
    static String name(int device) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment handle = arena.allocate(JAVA_INT);
            check("cuDeviceGet", (int) GET_DEVICE.invokeExact(handle, device));
            MemorySegment name = arena.allocate(NAME_BYTES);
            check("cuDeviceGetName", (int) GET_NAME.invokeExact(name, NAME_BYTES, handle.get(JAVA_INT, 0)));
            return name.getString(0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Waits until the current context's device has done everything it was given. */
    static void synchronize() {
        try {
            check("cuCtxSynchronize", (int) SYNCHRONIZE.invokeExact());
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return free and total bytes of the current context's device} */
    static long[] memoryInfo() {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG, 2);
            check("cuMemGetInfo", (int) MEMORY_INFO.invokeExact(out, out.asSlice(8)));
            return new long[] {out.getAtIndex(JAVA_LONG, 0), out.getAtIndex(JAVA_LONG, 1)};
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** CUmemAllocationProp: device memory that only this process uses. */
    private static MemorySegment properties(Arena arena, int device) {
        MemorySegment properties = arena.allocate(PROPERTIES_BYTES, 8);
        properties.set(JAVA_INT, 0, MEM_ALLOCATION_TYPE_PINNED);
        properties.set(JAVA_INT, 8, MEM_LOCATION_TYPE_DEVICE);
        properties.set(JAVA_INT, 12, device);
        return properties;
    }

    /** {@return the unit in which the device's memory can be mapped} */
    static long granularity(int device) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuMemGetAllocationGranularity", (int) GRANULARITY.invokeExact(out, properties(arena, device), 1));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static long reserveAddresses(long bytes) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuMemAddressReserve", (int) RESERVE.invokeExact(out, bytes, 0L, 0L, 0L));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void freeAddresses(long address, long bytes) {
        try {
            check("cuMemAddressFree", (int) FREE_ADDRESSES.invokeExact(address, bytes));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return the handle of new physical memory} */
    static long createMemory(int device, long bytes) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuMemCreate", (int) CREATE.invokeExact(out, bytes, properties(arena, device), 0L));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void releaseMemory(long handle) {
        try {
            check("cuMemRelease", (int) RELEASE.invokeExact(handle));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void map(long address, long bytes, long handle) {
        try {
            check("cuMemMap", (int) MAP.invokeExact(address, bytes, 0L, handle, 0L));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void unmap(long address, long bytes) {
        try {
            check("cuMemUnmap", (int) UNMAP.invokeExact(address, bytes));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void allowAccess(int device, long address, long bytes) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment access = arena.allocate(ACCESS_BYTES, 4);
            access.set(JAVA_INT, 0, MEM_LOCATION_TYPE_DEVICE);
            access.set(JAVA_INT, 4, device);
            access.set(JAVA_INT, 8, MEM_ACCESS_READ_WRITE);
            check("cuMemSetAccess", (int) SET_ACCESS.invokeExact(address, bytes, access, 1L));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return the address of host memory that the device copies from and to without help} */
    static long allocatePinned(long bytes) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuMemHostAlloc", (int) HOST_ALLOC.invokeExact(out, bytes, 0));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void freePinned(long address) {
        try {
            check("cuMemFreeHost", (int) HOST_FREE.invokeExact(address));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Page-locks memory that is there already. */
    static void registerHost(long address, long bytes) {
        try {
            check("cuMemHostRegister", (int) HOST_REGISTER.invokeExact(address, bytes, REGISTER_PORTABLE));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Undoes a registration that began at {@code address}. */
    static void unregisterHost(long address) {
        try {
            check("cuMemHostUnregister", (int) HOST_UNREGISTER.invokeExact(address));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Copies between any two kinds of memory, in the stream's order. */
    static void copy(long target, long source, long bytes, long stream) {
        try {
            check("cuMemcpyAsync", (int) COPY.invokeExact(target, source, bytes, stream));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    // ---- kernels --------------------------------------------------------------------------------------------------------

    static long loadModule(MemorySegment image) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuModuleLoadData", (int) LOAD_MODULE.invokeExact(out, image));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void unloadModule(long module) {
        try {
            check("cuModuleUnload", (int) UNLOAD_MODULE.invokeExact(module));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static long function(long module, String name) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuModuleGetFunction(" + name + ")", (int) GET_FUNCTION.invokeExact(out, module, arena.allocateFrom(name)));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Lets a kernel's blocks have that much dynamic shared memory, and gives it all that the L1 cache can spare. */
    static void allowSharedMemory(long function, int bytes) {
        try {
            check("cuFuncSetAttribute", (int) SET_ATTRIBUTE.invokeExact(function, 8, bytes));
            check("cuFuncSetAttribute", (int) SET_ATTRIBUTE.invokeExact(function, 9, 100));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return how many blocks of a kernel one multiprocessor holds at a time} */
    static int residentBlocks(long function, int threads, long sharedBytes) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_INT);
            check("cuOccupancyMaxActiveBlocksPerMultiprocessor",
                    (int) OCCUPANCY.invokeExact(out, function, threads, sharedBytes));
            return out.get(JAVA_INT, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private static final int TENSOR_MAP_BFLOAT16 = 9;
    private static final int TENSOR_MAP_SWIZZLE_128 = 3;
    private static final int TENSOR_MAP_PROMOTION_128 = 2;

    /** Not interleaved, and zeros where an element lies outside. */
    static void encodeTensorMap(MemorySegment map, int dimensions, long address, MemorySegment sizes, MemorySegment strides, MemorySegment box,
            MemorySegment steps) {
        try {
            check("cuTensorMapEncodeTiled", (int) ENCODE_TENSOR_MAP.invokeExact(map, TENSOR_MAP_BFLOAT16, dimensions, address, sizes,
                    strides, box, steps, 0, TENSOR_MAP_SWIZZLE_128, TENSOR_MAP_PROMOTION_128, 0));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private static final long CONFIG_BYTES = 56;
    private static final long ATTRIBUTE_BYTES = 72;
    private static final int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

    /**
     * Launches a kernel.
     *
     * @param early whether it may be launched while the one before still runs: it must wait for that one itself
     * @param arguments an array of the addresses of the kernel's arguments
     */
    static void launch(long function, int gridX, int gridY, int blockX, int blockY, int sharedBytes, long stream, boolean early,
            MemorySegment arguments) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment config = arena.allocate(CONFIG_BYTES, 8);
            config.set(JAVA_INT, 0, gridX);
            config.set(JAVA_INT, 4, gridY);
            config.set(JAVA_INT, 8, 1);
            config.set(JAVA_INT, 12, blockX);
            config.set(JAVA_INT, 16, blockY);
            config.set(JAVA_INT, 20, 1);
            config.set(JAVA_INT, 24, sharedBytes);
            config.set(JAVA_LONG, 32, stream);
            if (early) {
                MemorySegment attribute = arena.allocate(ATTRIBUTE_BYTES, 8);
                attribute.set(JAVA_INT, 0, PROGRAMMATIC_STREAM_SERIALIZATION);
                attribute.set(JAVA_INT, 8, 1);
                config.set(ADDRESS, 40, attribute);
                config.set(JAVA_INT, 48, 1);
            }
            check("cuLaunchKernelEx", (int) LAUNCH.invokeExact(config, function, arguments, MemorySegment.NULL));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    // ---- graphs, streams, events ----------------------------------------------------------------------------------------

    static void beginCapture(long stream) {
        try {
            check("cuStreamBeginCapture", (int) BEGIN_CAPTURE.invokeExact(stream, CAPTURE_THREAD_LOCAL));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return the captured graph} */
    static long endCapture(long stream) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuStreamEndCapture", (int) END_CAPTURE.invokeExact(stream, out));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return an executable of a graph, which may be destroyed then} */
    static long instantiate(long graph) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuGraphInstantiate", (int) INSTANTIATE.invokeExact(out, graph, 0L));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void launchGraph(long executable, long stream) {
        try {
            check("cuGraphLaunch", (int) LAUNCH_GRAPH.invokeExact(executable, stream));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroyGraph(long graph) {
        try {
            check("cuGraphDestroy", (int) DESTROY_GRAPH.invokeExact(graph));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroyExecutable(long executable) {
        try {
            check("cuGraphExecDestroy", (int) DESTROY_EXECUTABLE.invokeExact(executable));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return a stream that does not wait for the default stream} */
    static long createStream() {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuStreamCreate", (int) CREATE_STREAM.invokeExact(out, 1));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroyStream(long stream) {
        try {
            check("cuStreamDestroy", (int) DESTROY_STREAM.invokeExact(stream));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void synchronizeStream(long stream) {
        try {
            check("cuStreamSynchronize", (int) SYNCHRONIZE_STREAM.invokeExact(stream));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** @param timed whether {@link #elapsed} will be asked; without it events are cheaper */
    static long createEvent(boolean timed) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_LONG);
            check("cuEventCreate", (int) CREATE_EVENT.invokeExact(out, timed ? 0 : 2));
            return out.get(JAVA_LONG, 0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void recordEvent(long event, long stream) {
        try {
            check("cuEventRecord", (int) RECORD_EVENT.invokeExact(event, stream));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void waitEvent(long event) {
        try {
            check("cuEventSynchronize", (int) WAIT_EVENT.invokeExact(event));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** Makes a stream wait for an event that was recorded in another one. */
    static void streamWaits(long stream, long event) {
        try {
            check("cuStreamWaitEvent", (int) STREAM_WAITS.invokeExact(stream, event, 0));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** {@return milliseconds between two timed events that have happened} */
    static float elapsed(long start, long end) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_INT);
            check("cuEventElapsedTime", (int) ELAPSED.invokeExact(out, start, end));
            return Float.intBitsToFloat(out.get(JAVA_INT, 0));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    static void destroyEvent(long event) {
        try {
            check("cuEventDestroy", (int) DESTROY_EVENT.invokeExact(event));
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    // ---- calling --------------------------------------------------------------------------------------------------------

    private static MethodHandle function(String name, MemoryLayout... parameters) {
        return LINKER.downcallHandle(
                DRIVER.find(name).or(() -> DRIVER.find(name.replaceFirst("_v\\d$", "")))
                        .orElseThrow(() -> new TandemException("the CUDA driver has no " + name + ": it is too old, install 580 or newer")),
                FunctionDescriptor.of(JAVA_INT, parameters));
    }

    private static void check(String call, int result) {
        if (result != 0) {
            throw new CudaException(result, call + " failed: " + errorName(result));
        }
    }

    private static String errorName(int result) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(ADDRESS);
            int found = (int) GET_ERROR_NAME.invokeExact(result, out);
            return found != 0 ? "error " + result : out.get(ADDRESS, 0).reinterpret(256).getString(0);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }
}
