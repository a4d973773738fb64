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
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;

/**
 * NVIDIA's run-time compiler for CUDA C++, through FFM. It needs neither a GPU nor a driver, so kernels can be compiled anywhere.
 *
 * <p>The library is looked for in the folder that the system property {@code dev.tandem.nvrtc} names, where the system finds libraries
 * ({@code LD_LIBRARY_PATH}), and in {@code /usr/local/cuda}. Version 12 or newer will do.
 */
final class Nvrtc {
    /** Where to look for the library; a folder. */
    static final String FOLDER_PROPERTY = "dev.tandem.nvrtc";

    private static final List<String> NAMES = List.of("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so");

    private final MethodHandle version;
    private final MethodHandle create;
    private final MethodHandle compile;
    private final MethodHandle logSize;
    private final MethodHandle log;
    private final MethodHandle cubinSize;
    private final MethodHandle cubin;
    private final MethodHandle destroy;

    /** @throws TandemException when the library is not found, with where it was looked for */
    Nvrtc() {
        SymbolLookup library = library();
        version = function(library, "nvrtcVersion", ADDRESS, ADDRESS);
        create = function(library, "nvrtcCreateProgram", ADDRESS, ADDRESS, ADDRESS, JAVA_INT, ADDRESS, ADDRESS);
        compile = function(library, "nvrtcCompileProgram", JAVA_LONG, JAVA_INT, ADDRESS);
        logSize = function(library, "nvrtcGetProgramLogSize", JAVA_LONG, ADDRESS);
        log = function(library, "nvrtcGetProgramLog", JAVA_LONG, ADDRESS);
        cubinSize = function(library, "nvrtcGetCUBINSize", JAVA_LONG, ADDRESS);
        cubin = function(library, "nvrtcGetCUBIN", JAVA_LONG, ADDRESS);
        destroy = function(library, "nvrtcDestroyProgram", ADDRESS);
    }

    private static SymbolLookup library() {
        List<String> candidates = new ArrayList<>();
        String folder = System.getProperty(FOLDER_PROPERTY);
        if (folder != null) {
            preloadBuiltins(Path.of(folder));
            NAMES.forEach(name -> candidates.add(Path.of(folder, name).toString()));
        }
        candidates.addAll(NAMES);
        candidates.add("/usr/local/cuda/lib64/libnvrtc.so");
        for (String candidate : candidates) {
            try {
                return SymbolLookup.libraryLookup(candidate, Arena.global());
            } catch (IllegalArgumentException e) {
                System.getLogger(Nvrtc.class.getName()).log(System.Logger.Level.DEBUG, "no {0}", candidate);
            }
        }
        throw new TandemException("NVRTC, CUDA's run-time compiler, was not found as any of " + candidates
                + ": install CUDA 13 (or pip's nvidia-cuda-nvrtc) and put it on LD_LIBRARY_PATH, or name its folder with -D"
                + FOLDER_PROPERTY);
    }

    /** NVRTC opens a second library by its plain name; loaded before, it is found wherever it lies. */
    private static void preloadBuiltins(Path folder) {
        try (Stream<Path> files = Files.list(folder)) {
            files.filter(file -> file.getFileName().toString().startsWith("libnvrtc-builtins.so"))
                    .forEach(file -> SymbolLookup.libraryLookup(file, Arena.global()));
        } catch (java.io.IOException | IllegalArgumentException e) {
            System.getLogger(Nvrtc.class.getName()).log(System.Logger.Level.DEBUG, "{0} has no NVRTC builtins", folder);
        }
    }

    private static MethodHandle function(SymbolLookup library, String name, MemoryLayout... parameters) {
        return Linker.nativeLinker().downcallHandle(library.findOrThrow(name), FunctionDescriptor.of(JAVA_INT, parameters));
    }

    /** {@return the library's version, such as 13.0} */
    String version() {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment out = arena.allocate(JAVA_INT, 2);
            check("nvrtcVersion", (int) version.invokeExact(out, out.asSlice(4)));
            return out.getAtIndex(JAVA_INT, 0) + "." + out.getAtIndex(JAVA_INT, 1);
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    /**
     * Compiles a program to machine code.
     *
     * @param name of the program, for messages
     * @param headers by the name under which the source includes them
     * @param architecture such as sm_90a
     * @throws TandemException with the compiler's messages
     */
    byte[] compile(String name, String source, Map<String, String> headers, String architecture, List<String> options) {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment bodies = arena.allocate(ADDRESS, headers.size());
            MemorySegment names = arena.allocate(ADDRESS, headers.size());
            int i = 0;
            for (Map.Entry<String, String> header : headers.entrySet()) {
                names.setAtIndex(ADDRESS, i, arena.allocateFrom(header.getKey()));
                bodies.setAtIndex(ADDRESS, i++, arena.allocateFrom(header.getValue()));
            }
            MemorySegment handle = arena.allocate(JAVA_LONG);
            check("nvrtcCreateProgram", (int) create.invokeExact(
                    handle, arena.allocateFrom(source), arena.allocateFrom(name), headers.size(), bodies, names));
            try {
                return compile(arena, name, handle.get(JAVA_LONG, 0), architecture, options);
            } finally {
                check("nvrtcDestroyProgram", (int) destroy.invokeExact(handle));
            }
        } catch (Throwable e) {
            throw ForeignCalls.rethrown(e);
        }
    }

    private byte[] compile(Arena arena, String name, long program, String architecture, List<String> options) throws Throwable {
        List<String> all = new ArrayList<>(List.of("--gpu-architecture=" + architecture, "--std=c++17", "-lineinfo"));
        all.addAll(options);
        MemorySegment list = arena.allocate(ADDRESS, all.size());
        for (int i = 0; i < all.size(); i++) {
            list.setAtIndex(ADDRESS, i, arena.allocateFrom(all.get(i)));
        }
        int result = (int) compile.invokeExact(program, all.size(), list);
        MemorySegment size = arena.allocate(JAVA_LONG);
        if (result != 0) {
            check("nvrtcGetProgramLogSize", (int) logSize.invokeExact(program, size));
            MemorySegment text = arena.allocate(size.get(JAVA_LONG, 0) + 1);
            check("nvrtcGetProgramLog", (int) log.invokeExact(program, text));
            throw new TandemException("kernel " + name + " could not be compiled for " + architecture + " with " + options + ":\n"
                    + text.getString(0));
        }
        check("nvrtcGetCUBINSize", (int) cubinSize.invokeExact(program, size));
        MemorySegment code = arena.allocate(size.get(JAVA_LONG, 0));
        check("nvrtcGetCUBIN", (int) cubin.invokeExact(program, code));
        return code.toArray(ValueLayout.JAVA_BYTE);
    }

    private static void check(String call, int result) {
        if (result != 0) {
            throw new CudaException(result, call + " failed: NVRTC error " + result);
        }
    }
}
