package dev.tandem.model;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.model.SafetensorsWriter.Tensor;
import java.io.IOException;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Arrays;
import java.util.List;
import java.util.function.UnaryOperator;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class SafetensorsTest {
    @TempDir
    Path folder;

    private Path file(String header, int data) throws IOException {
        return file(header.getBytes(StandardCharsets.UTF_8).length, header, data);
    }

    private Path file(long length, String header, int data) throws IOException {
        byte[] text = header.getBytes(StandardCharsets.UTF_8);
        ByteBuffer bytes = ByteBuffer.allocate(8 + text.length
                + data).order(ByteOrder.LITTLE_ENDIAN).putLong(length).put(text);
        return Files.write(folder.resolve("x.safetensors"), bytes.array());
    }

    private static String refusal(Path path) {
        return assertThrows(ModelFormatException.class, () -> Safetensors.open(path).close()).getMessage();
    }

    private static final String GOOD = "{'a':{'dtype':'F32','shape':[2],'data_offsets':[0,8]},'b':{'dtype':'BF16','shape':[],'data_offsets':[8,10]}}";

    @Test
    void readsWhatIsThere() throws IOException {
        try (Safetensors opened = Safetensors.open(file(GOOD.replace('\'', '"') + "   ", 10))) {
            assertEquals(List.of("a", "b"), List.copyOf(opened.names()));
            assertEquals(DType.BFLOAT16, opened.tensor("b").dtype());
            assertEquals(2, opened.tensor("b").data().byteSize());
            assertThrows(UnsupportedOperationException.class, () -> opened.names().clear());
            assertTrue(opened.tensor("a").data().isReadOnly());
            assertTrue(assertThrows(ModelFormatException.class, () ->
                    opened.tensor("c")).getMessage().contains("tensor c is missing"));
        }
    }

    @ParameterizedTest
    @CsvSource(delimiter = '#', quoteCharacter = '`', value = {
        "'F32' # 'F33' # tensor a: field \"dtype\": expected one of F32",
        "'F32' # 32 # tensor a: field \"dtype\"",
        "'dtype':'F32', # # tensor a: field \"dtype\"",
        "[2] # [3] # tensor a: shape [3] of F32 needs 12 bytes, data_offsets span 8",
        "[2] # [-2] # tensor a: field \"shape\"",
        "[2] # [2.0] # tensor a: field \"shape\"",
        "[2] # 2 # tensor a: field \"shape\"",
        "[2] # [4294967296,4294967296] # tensor a: shape [4294967296, 4294967296] has more bytes",
        "[2] # [0,99999999999999999999] # tensor a: field \"shape\"",
        "[0,8] # [0,80] # tensor a: data_offsets [0, 80] do not lie in order",
        "[0,8] # [8,0] # tensor a: data_offsets [8, 0] do not lie in order",
        "[0,8] # [0] # tensor a: field \"data_offsets\"",
        "[0,8] # [-8,0] # tensor a: field \"data_offsets\"",
        "[8,10] # [7,9] # tensor b begins at byte 7 and overlaps",
        "[0,8] # [0,8],'extra':1 # tensor a: field \"extra\"",
        "'b' # 'a' # stands twice",
        "'b':{ # 'b':[ # malformed JSON",
        "{'a' # [1,{'a' # expected the header to start with {",
        "'shape':[] # 'shape':NaN # malformed JSON",
        "{'a' # {'__metadata__':{'format':3},'a' # __metadata__: field \"format\"",
    })
    void liesAreRefused(String truth, String lie, String problem) throws IOException {
        String header = GOOD.replace(truth, lie == null ? "" : lie).replace('\'', '"');
        String message = refusal(file(header, 10));
        assertTrue(message.contains("x.safetensors") && message.contains(problem), message);
    }

    @Test
    void lengthsAreChecked() throws IOException {
        String good = GOOD.replace('\'', '"');
        for (long length : new long[] {0, 1, -1, Long.MAX_VALUE, Long.MIN_VALUE, 1L << 40, 99_999_999_999L,
                good.length() + 11}) {
            String message = refusal(file(length, good, 10));
            assertTrue(message.contains("x.safetensors: the header's length is " + Long.toUnsignedString(length)),
                    message);
        }
        assertTrue(refusal(file(good, 9)).contains("tensor b: data_offsets [8, 10]"));
        assertTrue(refusal(file(good, 11)).contains("the tensors take 10 bytes, the file has 11"));
        assertTrue(refusal(file(good.replace("[8,10]", "[9,11]"), 11)).contains("leaves a hole"));
        byte[] whole = Files.readAllBytes(file(good, 10));
        for (int size = 0; size < whole.length; size++) {
            refusal(Files.write(folder.resolve("cut.safetensors"), Arrays.copyOf(whole, size)));
        }
        assertTrue(refusal(folder.resolve("nowhere.safetensors")).contains("there is no such file"));
        assertTrue(refusal(file("{\"a\":" + "[".repeat(100_000), 0)).contains("malformed JSON"));
        Files.write(folder.resolve("x.safetensors"), new byte[] {2, 0, 0, 0, 0, 0, 0, 0, '{', (byte) 0xff});
        assertTrue(refusal(folder.resolve("x.safetensors")).contains("UTF-8"));
    }

    @Test
    void filesBeyondTwoGibibytesAreMapped() throws IOException {
        String header = "{\"a\":{\"dtype\":\"F32\",\"shape\":[800000000],\"data_offsets\":[0,3200000000]},"
                + "\"b\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[3200000000,3200000001]}}";
        Path file = file(header, 0);
        // A sparse file: the hole takes no disk.
        try (FileChannel channel = FileChannel.open(file, StandardOpenOption.WRITE)) {
            channel.write(ByteBuffer.wrap(new byte[] {77}), channel.size() + 3_200_000_000L);
        }
        try (Safetensors opened = Safetensors.open(file)) {
            assertEquals(3_200_000_000L, opened.tensor("a").data().byteSize());
            assertEquals(77, opened.tensor("b").data().get(ValueLayout.JAVA_BYTE, 0));
        }
    }

    private static final List<Tensor> TENSORS = List.of(new Tensor("w", DType.FLOAT32, new long[] {3, 2}),
            new Tensor("é\"\n", DType.INT64, new long[] {1}), new Tensor("empty", DType.FLOAT16, new long[] {0, 4}),
            new Tensor("scalar", DType.BOOL, new long[0]), new Tensor("last", DType.BFLOAT16, new long[] {5}));

    private static void fill(String name, TensorSink sink) throws IOException {
        Tensor tensor = TENSORS.stream().filter(t -> t.name().equals(name)).findFirst().orElseThrow();
        byte[] bytes = new byte[(int) tensor.bytes()];
        Arrays.fill(bytes, (byte) name.length());
        int half = bytes.length / 2;
        sink.write(MemorySegment.ofArray(bytes).asSlice(0, half));
        sink.write(MemorySegment.ofArray(bytes).asSlice(half));
    }

    private static void checkAll(Path path) {
        try (Safetensors opened = Safetensors.open(path)) {
            assertEquals(TENSORS.stream().map(Tensor::name).collect(Collectors.toSet()), opened.names());
            for (Tensor tensor : TENSORS) {
                TensorEntry entry = opened.tensor(tensor.name());
                assertArrayEquals(tensor.shape(), entry.shape());
                assertEquals(tensor.dtype(), entry.dtype());
                assertEquals(tensor.bytes(), entry.data().byteSize());
                for (byte b : entry.data().toArray(ValueLayout.JAVA_BYTE)) {
                    assertEquals(tensor.name().length(), b);
                }
            }
        }
    }

    private List<String> listing() throws IOException {
        try (Stream<Path> files = Files.list(folder)) {
            return files.map(path -> path.getFileName().toString()).sorted().toList();
        }
    }

    @Test
    void writesOneFileOrShardsAndTidiesUp() throws IOException {
        SafetensorsWriter.writeFolder(folder, TENSORS, 30, SafetensorsTest::fill);
        assertEquals(List.of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                "model.safetensors.index.json"),
                listing());
        checkAll(folder);
        SafetensorsWriter.writeFolder(folder, TENSORS, 1 << 20, SafetensorsTest::fill);
        assertEquals(List.of("model.safetensors"), listing());
        checkAll(folder);
        long header = ByteBuffer.wrap(Files.readAllBytes(folder.resolve("model.safetensors"))).order(ByteOrder.LITTLE_ENDIAN).getLong();
        assertEquals(0, header % 8);
        SafetensorsWriter.writeFolder(folder, TENSORS, 1, SafetensorsTest::fill);
        checkAll(folder);
        assertFalse(Files.exists(folder.resolve("model.safetensors")));
    }

    @Test
    void aFailedWriteLeavesWhatWasThere() throws IOException {
        SafetensorsWriter.writeFolder(folder, TENSORS, 1 << 20, SafetensorsTest::fill);
        assertThrows(IllegalStateException.class, () -> SafetensorsWriter.writeFolder(folder, TENSORS, 30, (name, sink) ->
                {
            if (name.equals("last")) {
                throw new IllegalStateException("no more");
            }
            fill(name, sink);
        }));
        assertEquals(List.of("model.safetensors"), listing());
        checkAll(folder);
        Path other = folder.resolve("other.safetensors");
        assertTrue(assertThrows(IllegalArgumentException.class, () -> SafetensorsWriter.writeFile(other, TENSORS,
                (name, sink) -> { }))
                .getMessage().contains("tensor w: its source ended 24 bytes early"));
        assertTrue(assertThrows(IllegalArgumentException.class, () -> SafetensorsWriter.writeFile(other, TENSORS,
                (name, sink) -> sink.write(MemorySegment.ofArray(new byte[25])))).getMessage().contains("25 bytes given where 24"));
        assertEquals(List.of("model.safetensors"), listing());
    }

    @Test
    void anIndexMustBeTrue() throws IOException {
        SafetensorsWriter.writeFolder(folder, TENSORS, 30, SafetensorsTest::fill);
        Path index = folder.resolve("model.safetensors.index.json");
        String good = Files.readString(index);
        Files.writeString(index, good.replace("\"last\": \"model-00002", "\"lost\": \"model-00002"));
        assertTrue(refusal(folder).contains("tensor lost is in model-00002-of-00002.safetensors, found it in no shard"),
                refusal(folder));
        Files.writeString(index, good.replace("\"last\": \"model-00002", "\"last\": \"model-00001"));
        assertTrue(refusal(folder).contains("tensor last is in model-00001-of-00002.safetensors, found it in model-00002"), refusal(folder));
        Files.writeString(index, good.replace("\"last\": \"model-00002-of-00002", "\"last\": \"../model"));
        assertTrue(refusal(folder).contains("field \"last\": expected the plain name"), refusal(folder));
        Files.writeString(index, "{\"metadata\": {}}");
        assertTrue(refusal(folder).contains("weight_map"));
        Files.writeString(index, good);
        Files.copy(folder.resolve("model-00002-of-00002.safetensors"), folder.resolve("spare"));
        Files.delete(folder.resolve("model-00002-of-00002.safetensors"));
        assertTrue(refusal(folder).contains("the shard model-00002-of-00002.safetensors is missing"));
        Files.delete(index);
        Files.move(folder.resolve("model-00001-of-00002.safetensors"), folder.resolve("adapter.safetensors"));
        assertEquals("adapter.safetensors", openLone());
        Files.move(folder.resolve("spare"), folder.resolve("second.safetensors"));
        assertTrue(refusal(folder).contains("several without an index: adapter.safetensors, second.safetensors"),
                refusal(folder));
    }

    private String openLone() {
        try (Safetensors opened = Safetensors.open(folder)) {
            return opened.file("w").getFileName().toString();
        }
    }

    private static Path copy(Safetensors from, Path to, UnaryOperator<String> rename, Tensor... more) {
        List<Tensor> tensors = Stream.concat(from.tensors().stream().map(t ->
                new Tensor(rename.apply(t.name()), t.dtype(), t.shape())),
                Arrays.stream(more)).filter(t -> !t.name().isEmpty()).toList();
        SafetensorsWriter.writeFile(to, tensors, (name, sink) -> {
            for (TensorEntry tensor : from.tensors()) {
                if (rename.apply(tensor.name()).equals(name)) {
                    sink.write(tensor.data());
                    return;
                }
            }
            for (Tensor tensor : more) {
                if (tensor.name().equals(name)) {
                    sink.write(MemorySegment.ofArray(new byte[(int) tensor.bytes()]));
                }
            }
        });
        return to;
    }

    private static String mismatch(ModelConfig config, Path path) {
        try (Safetensors weights = Safetensors.open(path)) {
            return assertThrows(ModelFormatException.class, () -> CheckpointTensors.check(config.parameters(),
                    weights)).getMessage();
        }
    }

    private static void matches(ModelConfig config, Path path) {
        try (Safetensors weights = Safetensors.open(path)) {
            assertEquals(config.parameters().stream().map(ParameterSpec::name).toList(),
                    List.copyOf(CheckpointTensors.match(config.parameters(), weights).keySet()));
        }
    }

    @Test
    void configAndWeightsMustBelongTogether() {
        Path fixture = TestFiles.resource("fixtures/qwen3");
        ModelConfig config = ModelConfig.read(fixture);
        Path file = folder.resolve("m.safetensors");
        Tensor head = new Tensor("lm_head.weight", DType.BFLOAT16, new long[] {512, 128});
        try (Safetensors weights = Safetensors.open(fixture)) {
            String missing = mismatch(config, copy(weights, file, n -> n.equals("model.norm.weight") ? "" : n));
            assertTrue(missing.contains("tensor model.norm.weight is missing"), missing);
            String extra = mismatch(config, copy(weights, file, n -> n,
                    new Tensor("model.more", DType.FLOAT32, new long[] {1})));
            assertTrue(extra.contains("m.safetensors: tensor model.more is in the files but not part"), extra);
            String shape = mismatch(config.withVocabSize(513), copy(weights, file, n -> n));
            assertTrue(shape.contains("tensor model.embed_tokens.weight: config.json asks for shape [513, 128], found [512, 128]"), shape);
            String dtype = mismatch(config, copy(weights, file, n -> n.equals("model.norm.weight") ? "" : n,
                    new Tensor("model.norm.weight", DType.INT32, new long[] {128})));
            assertTrue(dtype.contains("tensor model.norm.weight: expected weights in F32, BF16 or F16, found I32"),
                    dtype);
            String badHead = mismatch(config, copy(weights, file, n -> n,
                    new Tensor("lm_head.weight", DType.FLOAT32, new long[] {512, 64})));
            assertTrue(badHead.contains("lm_head.weight"), badHead);
            assertTrue(mismatch(config.withTiedEmbeddings(false), copy(weights, file, n ->
                    n)).contains("lm_head.weight is missing"));

            matches(config, copy(weights, file, n -> n, head,
                    new Tensor("model.layers.0.self_attn.rotary_emb.inv_freq", DType.FLOAT32, new long[] {64})));
            matches(config, copy(weights, file, n -> n.replace("model.", "")));
            matches(config, copy(weights, file, n -> n.equals("model.embed_tokens.weight") ? "lm_head.weight" : n));
        }
        Path opt = TestFiles.resource("fixtures/opt");
        try (Safetensors weights = Safetensors.open(opt)) {
            matches(ModelConfig.read(opt), copy(weights, file, n -> n.replace("model.decoder", "decoder")));
        }
    }
}
