package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.SymbolLookup;
import org.bytedeco.javacpp.Loader;
import org.bytedeco.pytorch.cuda.CUDAStream;
import org.bytedeco.pytorch.cuda.DeviceStats;
import org.bytedeco.pytorch.global.torch;
import org.bytedeco.pytorch.global.torch_cuda;
import org.jspecify.annotations.Nullable;

/**
 * The CUDA side of libtorch: whether it is there, which stream a thread works on, and what the caching allocator holds.
 *
 * <p>Each thread that works on a device calls {@link #use} first. It gets a stream of its own from libtorch's pool, because graphs
 * cannot be captured on the default stream, and everything that Tandem and libtorch launch from that thread is ordered on it.
 */
public final class Cuda {
    private static final ThreadLocal<@Nullable Current> CURRENT = new ThreadLocal<>();

    private static final @Nullable String OBSTACLE = obstacle();

    private record Current(Device device, long stream) {}

    private Cuda() {}

    /** {@return whether a GPU, its driver and the GPU build of libtorch are there} */
    public static boolean available() {
        return OBSTACLE == null;
    }

    /**
     * Checks that a CUDA device can be used.
     *
     * @throws TandemException in one sentence, with what to install
     */
    public static void require(Device device) {
        if (OBSTACLE != null) {
            throw new TandemException(device + " cannot be used: " + OBSTACLE);
        }
        int count = torch_cuda.device_count();
        if (device.index() >= count) {
            throw new TandemException(device + " cannot be used: this machine has " + count + " CUDA devices");
        }
        int major = CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MAJOR);
        int minor = CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MINOR);
        if (major < 8) {
            throw new TandemException(device + " cannot be used: it has compute capability " + major + "." + minor
                    + ", and 8.0 (Ampere) or newer is needed");
        }
    }

    private static @Nullable String obstacle() {
        try {
            SymbolLookup.libraryLookup("libcuda.so.1", Arena.global());
        } catch (IllegalArgumentException e) {
            return "there is no NVIDIA driver (libcuda.so.1): install driver 580 or newer";
        }
        Natives.load();
        if (!torch.hasCUDA()) {
            return "the natives of libtorch on the class path are the CPU build: build with -Pgpu, or depend on "
                    + "org.bytedeco:pytorch with the classifier " + Loader.getPlatform() + "-gpu instead";
        }
        try {
            Loader.load(torch_cuda.class);
        } catch (LinkageError e) {
            return "the CUDA libraries of libtorch could not be loaded (" + e.getMessage() + "): put CUDA 13 with cuBLAS, cuDNN, "
                    + "cuSPARSE, cuSOLVER, NCCL and NVRTC on LD_LIBRARY_PATH, or org.bytedeco:cuda-redist on the class path";
        }
        if (torch_cuda.device_count() == 0) {
            return "the driver sees no device: is it hidden by CUDA_VISIBLE_DEVICES?";
        }
        try (Scope scope = Scope.open()) {
            // Sums of products stay in float32 until they are complete, on both sides of the engine.
            torch.globalContext().lazyInitDevice(torch.DeviceType.CUDA);
            torch.globalContext().setAllowBF16ReductionCuBLAS(false);
        }
        return null;
    }

    /** Makes a device and a stream of its own current on the calling thread, for libtorch and for the driver's calls. */
    public static void use(Device device) {
        Current current = CURRENT.get();
        if (current != null && current.device.equals(device)) {
            return;
        }
        require(device);
        torch_cuda.set_device((byte) device.index());
        try (Scope scope = Scope.open()) {
            CUDAStream stream = torch_cuda.getStreamFromPool(false, (byte) device.index());
            torch_cuda.setCurrentCUDAStream(stream);
            CURRENT.set(new Current(device, stream.stream().address()));
        }
    }

    /** {@return the stream that the calling thread works on, a CUstream} */
    static long stream(Device device) {
        use(device);
        Current current = CURRENT.get();
        return current == null ? 0 : current.stream;
    }

    /** Waits until the device has done everything that was launched on it. */
    public static void synchronize(Device device) {
        use(device);
        CudaDriver.synchronize();
    }

    /** {@return how many multiprocessors a device has} */
    public static int multiprocessors(Device device) {
        use(device);
        return CudaDriver.attribute(device.index(), CudaDriver.MULTIPROCESSORS);
    }

    /** {@return whether a device has compute capability 9.0, with its asynchronous matrix products and copies of tiles} */
    public static boolean isHopper(Device device) {
        use(device);
        return CudaDriver.attribute(device.index(), CudaDriver.CAPABILITY_MAJOR) == 9;
    }

    /** Has libtorch give memory that it caches and nobody uses back to the driver. */
    public static void releaseCached(Device device) {
        use(device);
        torch_cuda.getAllocator().emptyCache();
    }

    /** {@return bytes of the device that are free for this and other processes} */
    public static long free(Device device) {
        use(device);
        return CudaDriver.memoryInfo()[0];
    }

    /** {@return bytes of the device} */
    public static long total(Device device) {
        use(device);
        return CudaDriver.memoryInfo()[1];
    }

    /**
     * What libtorch's caching allocator has on a device, in bytes.
     *
     * @param allocated in tensors
     * @param reserved from the driver, cached memory included
     * @param peakAllocated the most that was in tensors since {@link #resetPeak}
     * @param peakReserved the most that was reserved since {@link #resetPeak}
     */
    public record Allocator(long allocated, long reserved, long peakAllocated, long peakReserved) {}

    /** {@return what libtorch's caching allocator has} */
    public static Allocator allocator(Device device) {
        use(device);
        try (Scope scope = Scope.open()) {
            DeviceStats stats = torch_cuda.getAllocator().getDeviceStats((byte) device.index());
            return new Allocator(stats.allocated_bytes().current(), stats.reserved_bytes().current(),
                    stats.allocated_bytes().peak(), stats.reserved_bytes().peak());
        }
    }

    /** Begins to measure the allocator's peaks anew. */
    public static void resetPeak(Device device) {
        use(device);
        torch_cuda.getAllocator().resetPeakStats((byte) device.index());
    }
}
