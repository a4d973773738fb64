package dev.tandem.model;

import com.google.gson.JsonElement;
import com.google.gson.JsonPrimitive;
import java.io.IOException;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/**
 * The tensors of one safetensors file, or of a folder's, memory-mapped.
 *
 * <p>Opening checks everything that the header says against the file, so that no tensor handed out can reach outside
 * its bytes or share them with another. The data itself is not read; pages come in as they are touched, and a file
 * may be far larger than memory.
 *
 * <p>Safe for use by several threads. {@link #close} unmaps the files: every {@link TensorEntry#data} ends with it. A
 * file that is truncated while it is mapped makes the reading thread fail with an {@link InternalError}; Tandem
 * replaces files by renaming, which leaves mapped ones whole.
 *
 * <p>Format: <a href="https://huggingface.co/docs/safetensors">safetensors</a>.
 */
public final class Safetensors implements AutoCloseable {
    private static final String SINGLE = "model.safetensors";
    private static final String INDEX = "model.safetensors.index.json";

    private final Path source;
    private final Arena arena = Arena.ofShared();
    private final Map<String, TensorEntry> tensors = new LinkedHashMap<>();
    private final Map<String, Path> files = new LinkedHashMap<>();

    private Safetensors(Path source) {
        this.source = source;
    }

    /**
     * Opens a file, or the weights of a folder: {@code model.safetensors}, else the shards that {@code
     * model.safetensors.index.json} names, else the one file whose name ends in {@code .safetensors}.
     *
     * @param fileOrFolder what to open
     * @return the tensors; the caller closes them
     * @throws ModelFormatException naming the file and the tensor whose description is wrong
     */
    public static Safetensors open(Path fileOrFolder) {
        Safetensors opened = new Safetensors(fileOrFolder);
        try {
            opened.load();
            return opened;
        } catch (RuntimeException | Error e) {
            opened.close();
            throw e;
        }
    }

    private void load() {
        if (!Files.isDirectory(source)) {
            map(source);
        } else if (Files.exists(source.resolve(SINGLE))) {
            map(source.resolve(SINGLE));
        } else if (Files.exists(source.resolve(INDEX))) {
            mapShards(source.resolve(INDEX));
        } else {
            map(loneFile());
        }
    }

    private Path loneFile() {
        try (Stream<Path> listing = Files.list(source)) {
            List<String> names = listing.map(path -> path.getFileName().toString()).sorted().toList();
            List<String> candidates = names.stream().filter(name -> name.endsWith(".safetensors")).toList();
            if (candidates.size() == 1) {
                return source.resolve(candidates.getFirst());
            }
            String found = candidates.isEmpty() ? "none" + (names.stream().anyMatch(name -> name.endsWith(".bin"))
                    ? " (only PyTorch .bin files; save the model again with safe_serialization=True)" : "")
                    : "several without an index: " + String.join(", ", candidates);
            throw new ModelFormatException(source + ": expected weights in " + SINGLE + ", in shards named by " + INDEX
                    + ", or in one other .safetensors file, found " + found);
        } catch (IOException e) {
            throw new ModelFormatException(source + ": cannot be listed: " + e, e);
        }
    }

    private void mapShards(Path index) {
        JsonFields weightMap = JsonFields.read(index).fields("weight_map");
        if (weightMap == null) {
            throw JsonFields.read(index).wrong("weight_map", "an object from tensor names to file names");
        }
        Map<String, String> shardOf = new LinkedHashMap<>();
        for (Map.Entry<String, JsonElement> entry : weightMap.object().entrySet()) {
            // A shard is a neighbour of its index: a path could lead anywhere.
            if (!(entry.getValue() instanceof JsonPrimitive shard) || !shard.isString()
                    || !shard.getAsString().matches("[\\w.+-]{1,200}")
                            || !shard.getAsString().endsWith(".safetensors")) {
                throw weightMap.wrong(entry.getKey(), "the plain name of a .safetensors file");
            }
            shardOf.put(entry.getKey(), shard.getAsString());
        }
        for (String shard : new TreeSet<>(shardOf.values())) {
            if (!Files.exists(source.resolve(shard))) {
                throw new ModelFormatException(index + ": the shard " + shard
                        + " is missing from the folder; it should hold "
                        + Collections.frequency(shardOf.values(), shard) + " tensors");
            }
            map(source.resolve(shard));
        }
        shardOf.forEach((name, shard) -> {
            Path holder = files.get(name);
            if (holder == null || !holder.equals(source.resolve(shard))) {
                throw new ModelFormatException(index + ": says that tensor " + StrictJson.brief(name) + " is in "
                        + shard + ", found "
                        + (holder == null ? "it in no shard" : "it in " + holder.getFileName()));
            }
        });
    }

    private void map(Path file) {
        try (FileChannel channel = FileChannel.open(file, StandardOpenOption.READ)) {
            MemorySegment bytes = channel.map(FileChannel.MapMode.READ_ONLY, 0, channel.size(), arena);
            for (TensorEntry tensor : SafetensorsHeader.read(file, bytes)) {
                Path other = files.putIfAbsent(tensor.name(), file);
                if (other != null) {
                    throw new ModelFormatException(file + ": tensor " + StrictJson.brief(tensor.name())
                            + " is also in " + other.getFileName());
                }
                tensors.put(tensor.name(), tensor);
            }
        } catch (NoSuchFileException e) {
            throw new ModelFormatException(file + ": there is no such file", e);
        } catch (IOException e) {
            throw new ModelFormatException(file + ": cannot be mapped: " + e, e);
        }
    }

    /** {@return the file or folder that was opened} */
    public Path source() {
        return source;
    }

    /** {@return the names of all tensors, in file order} */
    public Set<String> names() {
        return Collections.unmodifiableSet(tensors.keySet());
    }

    /**
     * {@return whether there is such a tensor}
     *
     * @param name a tensor's name
     */
    public boolean contains(String name) {
        return tensors.containsKey(name);
    }

    /**
     * {@return the tensor}
     *
     * @param name a tensor's name
     * @throws ModelFormatException when there is no such tensor
     */
    public TensorEntry tensor(String name) {
        TensorEntry tensor = tensors.get(name);
        if (tensor == null) {
            throw new ModelFormatException(source + ": tensor " + name + " is missing; found " + tensors.size()
                    + " tensors"
                    + tensors.keySet().stream().limit(3).map(StrictJson::brief).collect(Collectors.joining(", ", " (",
                            ", …)")));
        }
        return tensor;
    }

    /**
     * {@return the file it lies in}
     *
     * @param name the name of one of these tensors
     */
    public Path file(String name) {
        Path file = files.get(name);
        if (file == null) {
            throw new IllegalArgumentException(source + ": there is no tensor " + name);
        }
        return file;
    }

    /** {@return the tensors in file order} */
    public List<TensorEntry> tensors() {
        return new ArrayList<>(tensors.values());
    }

    /** Unmaps the files. A second call does nothing. */
    @Override
    public void close() {
        if (arena.scope().isAlive()) {
            arena.close();
        }
    }
}
