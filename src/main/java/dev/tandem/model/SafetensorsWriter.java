package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import dev.tandem.device.DType;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Stream;

/**
 * Writes tensors as safetensors: one {@code model.safetensors}, or shards with an index when they exceed a size,
 * named as transformers names them. Tensors are streamed, so no more than one piece of one tensor is held here.
 *
 * <p>Every file is written under a temporary name. Only when all are whole on disk are they renamed into place, the
 * index last, and files of an earlier save that no longer belong are removed; a failure before that leaves the
 * earlier save as it was.
 */
public final class SafetensorsWriter {
    private static final String INDEX = "model.safetensors.index.json";
    private static final String OWN_FILES =
            "model(-\\d{5}-of-\\d{5})?\\.safetensors|model\\.safetensors\\.index\\.json";

    /** Gives a tensor's elements. */
    @FunctionalInterface
    public interface Source {
        /**
         * Writes all bytes of a tensor.
         *
         * @param name the tensor's name
         * @param sink takes the bytes, in one or more calls
         * @throws IOException from the sink
         */
        void write(String name, TensorSink sink) throws IOException;
    }

    /**
     * A tensor to be written.
     *
     * @param name its name
     * @param dtype its element type
     * @param shape its sizes
     */
    @SuppressWarnings("ArrayRecordComponent")
    public record Tensor(String name, DType dtype, long[] shape) {
        long bytes() {
            long bytes = dtype.bytes();
            for (long dimension : shape) {
                if (dimension < 0) {
                    throw new IllegalArgumentException("Writing tensor " + name + ": negative dimension " + dimension);
                }
                bytes = Math.multiplyExact(bytes, dimension);
            }
            return bytes;
        }
    }

    private SafetensorsWriter() {}

    /**
     * Writes one file.
     *
     * @param file the file, replaced if it exists
     * @param tensors what it shall hold
     * @param source gives the elements; called once per tensor, on the calling thread
     * @throws ModelFormatException when the file cannot be written
     */
    public static void writeFile(Path file, List<Tensor> tensors, Source source) {
        AtomicFile.write(file, channel -> write(channel, tensors, source));
    }

    /**
     * Writes a folder's weights.
     *
     * @param folder an existing folder
     * @param tensors what it shall hold, in file order
     * @param maxShardBytes start a new shard rather than exceed this; one tensor that is larger has a shard of its own
     * @param source gives the elements; called once per tensor, on the calling thread
     * @throws ModelFormatException when a file cannot be written
     */
    public static void writeFolder(Path folder, List<Tensor> tensors, long maxShardBytes, Source source) {
        List<List<Tensor>> shards = shards(tensors, maxShardBytes);
        Map<Path, Path> prepared = new LinkedHashMap<>();
        try {
            JsonObject weightMap = new JsonObject();
            for (int i = 0; i < shards.size(); i++) {
                String name = shards.size() == 1 ? "model.safetensors"
                        : "model-%05d-of-%05d.safetensors".formatted(i + 1, shards.size());
                List<Tensor> shard = shards.get(i);
                Path file = folder.resolve(name);
                prepared.put(AtomicFile.prepare(file, channel -> write(channel, shard, source)), file);
                shard.forEach(tensor -> weightMap.addProperty(tensor.name, name));
            }
            prepared.forEach(AtomicFile::publish);
            if (shards.size() > 1) {
                AtomicFile.write(folder.resolve(INDEX), index(tensors, weightMap));
            }
            removeOthers(folder, prepared, shards.size() > 1);
        } finally {
            prepared.keySet().forEach(AtomicFile::discard);
        }
    }

    private static List<List<Tensor>> shards(List<Tensor> tensors, long maxShardBytes) {
        List<List<Tensor>> shards = new ArrayList<>(List.of(new ArrayList<>()));
        long filled = 0;
        for (Tensor tensor : tensors) {
            if (filled > 0 && filled + tensor.bytes() > maxShardBytes) {
                shards.add(new ArrayList<>());
                filled = 0;
            }
            shards.getLast().add(tensor);
            filled += tensor.bytes();
        }
        return shards;
    }

    private static String index(List<Tensor> tensors, JsonObject weightMap) {
        JsonObject metadata = new JsonObject();
        metadata.addProperty("total_size", tensors.stream().mapToLong(Tensor::bytes).sum());
        JsonObject index = new JsonObject();
        index.add("metadata", metadata);
        index.add("weight_map", weightMap);
        return StrictJson.print(index);
    }

    /** transformers prefers a single file to an index, so a left-over one would hide the new weights. */
    private static void removeOthers(Path folder, Map<Path, Path> prepared, boolean indexed) {
        try (Stream<Path> listing = Files.list(folder)) {
            for (Path file : listing.filter(path -> path.getFileName().toString().matches(OWN_FILES)).toList()) {
                boolean current = prepared.containsValue(file)
                        || (indexed && file.getFileName().toString().equals(INDEX));
                if (!current) {
                    Files.delete(file);
                }
            }
        } catch (IOException e) {
            throw new ModelFormatException(folder + ": files of an earlier save cannot be removed: " + e, e);
        }
    }

    private static void write(FileChannel channel, List<Tensor> tensors, Source source) throws IOException {
        byte[] header = header(tensors);
        ByteBuffer start = ByteBuffer.allocate(8 + header.length).order(ByteOrder.LITTLE_ENDIAN);
        start.putLong(header.length).put(header).flip();
        while (start.hasRemaining()) {
            channel.write(start);
        }
        for (Tensor tensor : tensors) {
            TensorSink sink = new TensorSink(channel, tensor.name, tensor.bytes());
            source.write(tensor.name, sink);
            sink.finish();
        }
    }

    private static byte[] header(List<Tensor> tensors) {
        JsonObject metadata = new JsonObject();
        metadata.addProperty("format", "pt");
        JsonObject header = new JsonObject();
        header.add("__metadata__", metadata);
        Set<String> names = new HashSet<>(Set.of("__metadata__"));
        long position = 0;
        for (Tensor tensor : tensors) {
            if (!names.add(tensor.name)) {
                throw new IllegalArgumentException("Writing safetensors: the name " + tensor.name
                        + " is given twice or reserved");
            }
            JsonArray shape = new JsonArray();
            for (long dimension : tensor.shape) {
                shape.add(dimension);
            }
            JsonArray offsets = new JsonArray();
            offsets.add(position);
            position += tensor.bytes();
            offsets.add(position);
            JsonObject entry = new JsonObject();
            entry.addProperty("dtype", tensor.dtype.safetensorsName());
            entry.add("shape", shape);
            entry.add("data_offsets", offsets);
            header.add(tensor.name, entry);
        }
        String text = header.toString();
        // Spaces at the end bring the data to a multiple of 8, which keeps mapped tensors aligned.
        int length = text.getBytes(StandardCharsets.UTF_8).length;
        return (text + " ".repeat(-length & 7)).getBytes(StandardCharsets.UTF_8);
    }
}
