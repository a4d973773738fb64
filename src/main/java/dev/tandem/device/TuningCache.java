package dev.tandem.device;

import java.io.IOException;
import java.io.Reader;
import java.io.Writer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.ConcurrentHashMap;
import org.jspecify.annotations.Nullable;

/**
 * What was found to be fastest on a device: questions and their answers, for this process and those after it, so that only the first one
 * that meets a size times its candidates, and equal inputs go on giving equal results.
 *
 * <p>Answers are kept beside the compiled kernels ({@link KernelSource}), in a file for each kind of device, driver, cuBLAS and set of
 * kernels. Deleting it has everything timed anew. A file that cannot be read or written is no error. Thread-safe.
 */
public final class TuningCache {
    private static final System.Logger LOG = System.getLogger(TuningCache.class.getName());
    private static final Map<Path, TuningCache> OPEN = new ConcurrentHashMap<>();

    private final Path file;
    private final Map<String, String> answers = new ConcurrentHashMap<>();
    private boolean changed;

    /** Opens a file, or begins one. */
    TuningCache(Path file) {
        this.file = file;
        read().forEach((question, answer) -> answers.put((String) question, (String) answer));
    }

    /** {@return what is known about a CUDA device} */
    public static TuningCache of(Device device) {
        String kind = KernelSource.hash(CudaDriver.name(device.index()), KernelModule.architecture(device), "" + CudaDriver.version(),
                "" + CublasLt.version(), KernelSource.everything());
        return OPEN.computeIfAbsent(KernelSource.cache().resolve(kind + ".tuning"), TuningCache::new);
    }

    private Properties read() {
        Properties kept = new Properties();
        try (Reader in = Files.newBufferedReader(file)) {
            kept.load(in);
        } catch (IOException | IllegalArgumentException e) {
            LOG.log(System.Logger.Level.DEBUG, "nothing is known from {0}: {1}", file, e.getMessage());
        }
        return kept;
    }

    /** {@return the answer to a question, or null when it is not known} */
    public @Nullable String find(String question) {
        return answers.get(question);
    }

    /** Takes note of an answer. */
    public synchronized void keep(String question, String answer) {
        changed |= !answer.equals(answers.put(question, answer));
    }

    /** Writes what is new to the file, beside what other processes have written there meanwhile. */
    public synchronized void save() {
        if (!changed) {
            return;
        }
        changed = false;
        Properties all = read();
        all.putAll(answers);
        try {
            Files.createDirectories(file.getParent());
            Path part = Files.createTempFile(file.getParent(), "tuning", ".part");
            try (Writer out = Files.newBufferedWriter(part)) {
                all.store(out, null);
            }
            Files.move(part, file, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE);
        } catch (IOException e) {
            LOG.log(System.Logger.Level.DEBUG, "what is fastest cannot be kept in {0}: {1}", file, e.getMessage());
        }
    }
}
