package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.lang.invoke.MethodHandles;
import java.lang.invoke.MethodType;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Optional;
import org.bytedeco.javacpp.Loader;
import org.bytedeco.pytorch.global.torch;
import org.jspecify.annotations.Nullable;

/**
 * FLOAT32 products of a few rows with a large weight matrix on the CPU, the work of a decoding step.
 *
 * <p>The BLAS in libtorch packs the weights into a buffer before it multiplies. With many rows that is paid back; with 32 rows it
 * takes longer than the arithmetic. The micro-kernel of oneDNN that libtorch's attention uses reads a row-major left matrix as it lies,
 * so the product is turned around: with the weights [n, k] on the left and the transposed rows [k, m] on the right, each weight is read
 * once and used m times, and nothing is packed. Measured on a Zen 4 core with n = 3072, k = 576, m = 32: 1.2 ms against 2.2 ms.
 *
 * <p>The micro-kernel is {@code at::native::cpublas::brgemm}, a C++ symbol of libtorch without a Java mapping; it is called through
 * FFM, from the threads of OpenMP that libtorch uses for everything else. Where the symbols or AVX-512 are missing, or the user set
 * {@code dev.tandem.skinnyMatmul=false}, {@link #applies} says no and the BLAS does the work.
 */
final class SkinnyMatmul {
    private static final System.Logger LOG = System.getLogger(SkinnyMatmul.class.getName());
    private static final String BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb";
    private static final ValueLayout.OfLong LONG = ValueLayout.JAVA_LONG;

    /** More rows than this are packed with profit. */
    private static final long MAX_ROWS = 128;

    /** Fewer operations than this are not worth two transpositions. */
    private static final long MIN_WEIGHTS = 1 << 14;

    /** The right matrix is padded to whole vectors. */
    private static final long LANES = 16;

    /** Rows of weights that one call of the micro-kernel takes. */
    private static final long PANEL = 64;

    private static final @Nullable Kernel KERNEL = load();

    /** The native functions, and the Java method that each thread runs. */
    private record Kernel(MethodHandle brgemm, MethodHandle parallel, MethodHandle thread, MethodHandle threads, MemorySegment part) {}

    private SkinnyMatmul() {}

    /** Whether {@link #multiply} can and should compute {@code x} [.., k] times the transpose of {@code weight} [n, k]. */
    static boolean applies(org.bytedeco.pytorch.Tensor x, org.bytedeco.pytorch.Tensor weight) {
        if (KERNEL == null || Gradients.areEnabled()) {
            return false;
        }
        return x.dim() == 2
                && x.size(0) <= MAX_ROWS
                && weight.numel() >= MIN_WEIGHTS
                && x.is_cpu()
                && x.scalar_type().intern() == torch.ScalarType.Float
                && weight.scalar_type().intern() == torch.ScalarType.Float
                && weight.is_contiguous()
                && x.size(1) == weight.size(1);
    }

    /** {@return x [m, k] times the transpose of weight [n, k]: [m, n], contiguous} */
    static Tensor multiply(Tensor x, Tensor weight) {
        long m = x.size(0);
        long k = x.size(1);
        long n = weight.size(0);
        long columns = (m + LANES - 1) / LANES * LANES;
        try (Scope scope = Scope.open(); Arena arena = Arena.ofConfined()) {
            Tensor right;
            if (columns == m) {
                right = x.transpose(0, 1).contiguous();
            } else {
                right = Tensor.zeros(Device.cpu(), DType.FLOAT32, k, columns);
                right.narrow(1, 0, m).copyInPlace(x.transpose(0, 1));
            }
            Tensor product = Tensor.empty(Device.cpu(), DType.FLOAT32, n, columns);
            MemorySegment task = arena.allocate(LONG, 6);
            task.setAtIndex(LONG, 0, weight.address());
            task.setAtIndex(LONG, 1, right.address());
            task.setAtIndex(LONG, 2, product.address());
            task.setAtIndex(LONG, 3, n);
            task.setAtIndex(LONG, 4, k);
            task.setAtIndex(LONG, 5, columns);
            int threads = Threads.perOperation();
            if (threads == 1) {
                part(task, 0, 1);
            } else {
                kernel().parallel.invokeExact(kernel().part, task, threads, 0);
            }
            return scope.escape(product.narrow(1, 0, m).transpose(0, 1).contiguous());
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /** One thread's share of the rows of weights. Runs on a thread of OpenMP. */
    private static void part(MemorySegment address) {
        try {
            long thread = (int) kernel().thread.invokeExact();
            long threads = (int) kernel().threads.invokeExact();
            part(address.reinterpret(6 * LONG.byteSize()), thread, threads);
        } catch (Throwable e) {
            // Nothing may leave an upcall; nothing here can fail but for an error of the JVM itself.
            LOG.log(System.Logger.Level.ERROR, "matrix product failed", e);
        }
    }

    private static void part(MemorySegment task, long thread, long threads) throws Throwable {
        long weights = task.getAtIndex(LONG, 0);
        long right = task.getAtIndex(LONG, 1);
        long product = task.getAtIndex(LONG, 2);
        long n = task.getAtIndex(LONG, 3);
        long k = task.getAtIndex(LONG, 4);
        long columns = task.getAtIndex(LONG, 5);
        long panels = (n + PANEL - 1) / PANEL;
        long end = panels * (thread + 1) / threads;
        for (long panel = panels * thread / threads; panel < end; panel++) {
            long row = panel * PANEL;
            kernel().brgemm.invokeExact(Math.min(PANEL, n - row), columns, k, k, columns, columns, false,
                    MemorySegment.ofAddress(weights + row * k * Float.BYTES), MemorySegment.ofAddress(right),
                    MemorySegment.ofAddress(product + row * columns * Float.BYTES), false);
        }
    }

    private static Kernel kernel() {
        return java.util.Objects.requireNonNull(KERNEL);
    }

    private static @Nullable Kernel load() {
        Natives.load();
        String wanted = System.getProperty("dev.tandem.skinnyMatmul", "true");
        if (!Boolean.parseBoolean(wanted) || !avx512()) {
            return null;
        }
        try {
            Path folder = java.util.Objects.requireNonNull(Path.of(Loader.load(torch.class)).getParent());
            SymbolLookup libtorch = SymbolLookup.libraryLookup(folder.resolve("libtorch_cpu.so"), Arena.global());
            SymbolLookup openMp = SymbolLookup.libraryLookup(folder.resolve("libgomp.so.1"), Arena.global());
            Optional<MemorySegment> brgemm = libtorch.find(BRGEMM);
            Optional<MemorySegment> parallel = openMp.find("GOMP_parallel");
            if (brgemm.isEmpty() || parallel.isEmpty()) {
                LOG.log(System.Logger.Level.INFO, "this libtorch has no brgemm: decoding on the CPU uses the BLAS");
                return null;
            }
            Linker linker = Linker.nativeLinker();
            var address = ValueLayout.ADDRESS;
            var flag = ValueLayout.JAVA_BOOLEAN;
            MethodHandle self = MethodHandles.lookup()
                    .findStatic(SkinnyMatmul.class, "part", MethodType.methodType(void.class, MemorySegment.class));
            return new Kernel(
                    linker.downcallHandle(brgemm.get(), FunctionDescriptor.ofVoid(
                            LONG, LONG, LONG, LONG, LONG, LONG, flag, address, address, address, flag)),
                    linker.downcallHandle(parallel.get(), FunctionDescriptor.ofVoid(
                            address, address, ValueLayout.JAVA_INT, ValueLayout.JAVA_INT)),
                    count(linker, openMp, "omp_get_thread_num"),
                    count(linker, openMp, "omp_get_num_threads"),
                    linker.upcallStub(self, FunctionDescriptor.ofVoid(address), Arena.global()));
        } catch (IllegalArgumentException | ReflectiveOperationException e) {
            LOG.log(System.Logger.Level.INFO, "decoding on the CPU uses the BLAS: {0}", e.getMessage());
            return null;
        }
    }

    private static MethodHandle count(Linker linker, SymbolLookup library, String name) {
        return linker.downcallHandle(library.findOrThrow(name), FunctionDescriptor.of(ValueLayout.JAVA_INT),
                Linker.Option.critical(false));
    }

    /** The micro-kernel throws where there is no kernel for the processor, and a C++ exception cannot be caught here. */
    private static boolean avx512() {
        try {
            return Files.readAllLines(Path.of("/proc/cpuinfo")).stream()
                    .filter(line -> line.startsWith("flags"))
                    .findFirst()
                    .map(flags -> flags.contains(" avx512f ") && flags.contains(" avx512bw ") && flags.contains(" avx512vl ")
                            && flags.contains(" avx512dq "))
                    .orElse(false);
        } catch (java.io.IOException e) {
            return false;
        }
    }
}
