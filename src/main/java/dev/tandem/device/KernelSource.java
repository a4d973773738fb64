package dev.tandem.device;

import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.regex.Pattern;

/**
 * A .cu file of Tandem's, specialised by macros.
 *
 * <p>Machine code is kept on disk under a hash of the source, the macros, the architecture and the compiler's version, so a second process
 * compiles nothing: in {@code dev.tandem.kernelCache} if that system property names a folder, else in {@code ~/.cache/tandem/kernels}. A
 * cache that cannot be written is no error.
 *
 * @param name of the resource under {@code native/cuda}, such as {@code decode_attention.cu}
 * @param macros defined for this specialisation
 */
record KernelSource(String name, Map<String, String> macros) {
    private static final System.Logger LOG = System.getLogger(KernelSource.class.getName());
    /** For each file of machine code a lock, so that two who want it compile it once. */
    private static final Map<Path, Object> LOCKS = new ConcurrentHashMap<>();
    private static final Pattern INCLUDE = Pattern.compile("(?m)^#include \"([^\"]+)\"");

    private static final List<String> TIMED = List.of("common.cuh", "hopper.cuh", "vectors.cuh", "rotation.cuh", "decode_product.cu",
            "few_rows.cu", "layer.cu", "decode_attention.cu");

    KernelSource {
        macros = Map.copyOf(macros);
    }

    /** {@return the file's text} */
    String text() {
        return resource(name);
    }

    private static String resource(String name) {
        try (InputStream in = KernelSource.class.getResourceAsStream("/native/cuda/" + name)) {
            if (in == null) {
                throw new TandemException("the kernel source " + name + " is not packaged with this build");
            }
            return new String(in.readAllBytes(), StandardCharsets.UTF_8);
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /**
     * {@return machine code for an architecture, from the cache or compiled now}
     *
     * @throws TandemException with the compiler's messages
     */
    byte[] compile(Nvrtc compiler, String architecture) {
        String text = text();
        Map<String, String> headers = new TreeMap<>();
        include(text, headers);
        List<String> options = new TreeMap<>(macros).entrySet().stream().map(e -> "-D" + e.getKey() + "=" + e.getValue()).toList();
        Path file = cache().resolve(hash(text, headers.toString(), architecture, compiler.version(), options.toString()) + ".cubin");
        synchronized (LOCKS.computeIfAbsent(file, absent -> new Object())) {
            try {
                return Files.readAllBytes(file);
            } catch (IOException e) {
                LOG.log(System.Logger.Level.DEBUG, "compiling {0} {1} for {2}", name, options, architecture);
            }
            byte[] code = compiler.compile(name, text, headers, architecture, options);
            keep(code, file);
            return code;
        }
    }

    private static void keep(byte[] code, Path file) {
        try {
            Files.createDirectories(file.getParent());
            Path part = Files.createTempFile(file.getParent(), "kernel", ".part");
            Files.write(part, code);
            Files.move(part, file, java.nio.file.StandardCopyOption.REPLACE_EXISTING, java.nio.file.StandardCopyOption.ATOMIC_MOVE);
        } catch (IOException e) {
            LOG.log(System.Logger.Level.DEBUG, "compiled kernels cannot be kept in {0}: {1}", file.getParent(), e.getMessage());
        }
    }

    /** Collects the headers that a text includes, and those that they include. */
    private static void include(String text, Map<String, String> headers) {
        INCLUDE.matcher(text).results().map(found -> found.group(1)).forEach(header -> {
            if (!headers.containsKey(header)) {
                headers.put(header, resource(header));
                include(headers.get(header), headers);
            }
        });
    }

    /** {@return the folder where machine code is kept} */
    static Path cache() {
        String folder = System.getProperty("dev.tandem.kernelCache");
        return folder != null ? Path.of(folder) : Path.of(System.getProperty("user.home"), ".cache", "tandem", "kernels");
    }

    /** {@return the texts of all kernels and headers that generation times} */
    static String everything() {
        return String.join("\n", TIMED.stream().map(KernelSource::resource).toList());
    }

    /** {@return a hash of texts, in hexadecimal digits} */
    static String hash(String... parts) {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            for (String part : parts) {
                digest.update(part.getBytes(StandardCharsets.UTF_8));
                digest.update((byte) 0);
            }
            return HexFormat.of().formatHex(digest.digest());
        } catch (NoSuchAlgorithmException e) {
            throw new IllegalStateException(e);
        }
    }
}
