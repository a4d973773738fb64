package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;

/** Every kernel is compiled for every architecture that is supported, without a GPU. */
class KernelSourceTest {
    private static final List<String> ARCHITECTURES = List.of("sm_80", "sm_90a", "sm_100");
    private static final Nvrtc COMPILER = new Nvrtc();

    @TempDir
    Path cache;

    @BeforeEach
    void ownCache() {
        System.setProperty("dev.tandem.kernelCache", cache.toString());
    }

    @AfterEach
    void usersCache() {
        System.clearProperty("dev.tandem.kernelCache");
    }

    static Stream<KernelSource> sources() {
        List<KernelSource> all = new ArrayList<>();
        int[][] shapes = {{16, 8, 128}, {14, 2, 64}, {12, 12, 96}, {16, 1, 256}};
        for (int[] shape : shapes) {
            Map<String, String> macros = new HashMap<>(Map.of("HEADS", "" + shape[0], "KV_HEADS", "" + shape[1], "HEAD_DIM", "" + shape[2],
                    "BLOCK_SIZE", shape[2] == 64 ? "16" : "64"));
            all.add(new KernelSource("decode_attention.cu", macros));
            all.add(new KernelSource("prefill_attention.cu", macros));
            boolean opt = shape[0] == shape[1];
            macros.putAll(Map.of("LAYER_NORM", opt ? "1" : "0", "POST_NORM", "0", "FINAL_NORM", "1", "GATED", opt ? "0" : "1",
                    "ACTIVATION", opt ? "1" : "0", "WRITE_BACK", "0"));
            all.add(new KernelSource("layer.cu", macros));
            if (shape[2] == 64 || shape[2] == 128) {
                for (String split : List.of("1", "2")) {
                    Map<String, String> rotated = new HashMap<>(macros);
                    rotated.putAll(Map.of("ROWS", "128", "TILE", shape[2] == 64 ? "192" : "128", "SPLIT", split));
                    all.add(new KernelSource("decode_product.cu", rotated));
                }
            }
            all.add(new KernelSource("train_norm.cu", Map.of("LAYER_NORM", opt ? "1" : "0")));
            all.add(new KernelSource("train_rotary.cu", Map.of("HEAD_DIM", "" + shape[2])));
        }
        for (String gated : List.of("0", "1")) {
            for (String activation : List.of("0", "1", "2", "3")) {
                all.add(new KernelSource("train_layer.cu", Map.of("GATED", gated, "ACTIVATION", activation)));
            }
        }
        all.add(new KernelSource("sampling.cu", Map.of()));
        all.add(new KernelSource("truncation.cu", Map.of()));
        all.add(new KernelSource("step.cu", Map.of()));
        all.add(new KernelSource("optimizer.cu", Map.of()));
        all.add(new KernelSource("optimizer.cu", Map.of("MOMENTS_BF16", "1")));
        all.add(new KernelSource("optimizer.cu", Map.of("WEIGHTS_FLOAT", "1")));
        for (String rows : List.of("1", "2", "4")) {
            all.add(new KernelSource("few_rows.cu", Map.of("ROWS", rows, "DEPENDENT_LAUNCH", "1")));
        }
        all.add(new KernelSource("decode_product.cu", Map.of("ROWS", "128", "TILE", "64", "SPLIT", "2")));
        all.add(new KernelSource("decode_product.cu", Map.of("ROWS", "256", "TILE", "192", "STAGES", "3")));
        for (String ctas : List.of("1", "2", "4", "8")) {
            all.add(new KernelSource("logprob.cu", Map.of("CTAS", ctas)));
        }
        return all.stream();
    }

    @ParameterizedTest
    @MethodSource("sources")
    void compiles(KernelSource source) {
        for (String architecture : ARCHITECTURES) {
            byte[] code = source.compile(COMPILER, architecture);
            assertEquals(0x7f, code[0], "not an ELF file"); // a cubin is one
            assertTrue(code.length > 1000, architecture + ": " + code.length + " bytes");
        }
    }

    /** The list above is all there is. */
    @Test
    void noSourceIsForgotten() throws IOException {
        List<String> tested = sources().map(KernelSource::name).distinct().sorted().toList();
        Path folder = Path.of(java.util.Objects.requireNonNull(KernelSource.class.getResource("/native/cuda/common.cuh")).getPath());
        try (Stream<Path> files = Files.list(java.util.Objects.requireNonNull(folder.getParent()))) {
            assertEquals(tested, files.map(f -> f.getFileName().toString()).filter(f -> f.endsWith(".cu")).sorted().toList());
        }
    }

    /**
     * Kernels run ahead of what writes their inputs, so none may promise that memory stays as it is: such loads are moved before the
     * wait. Only weights are read that way.
     */
    @Test
    void noKernelPromisesThatItsInputsStay() {
        sources().forEach(source -> {
            String code = source.text().replaceAll("//.*", "");
            assertFalse(code.contains("__restrict__") || code.contains("__ldg"), source.name());
            assertTrue(!code.contains("global.nc") || source.name().equals("few_rows.cu"), source.name());
        });
    }

    @Test
    void codeIsKeptUnderWhatItWasMadeFrom() throws IOException {
        KernelSource source = new KernelSource("step.cu", Map.of());
        byte[] first = source.compile(COMPILER, "sm_90a");
        List<Path> kept = kept();
        assertEquals(1, kept.size());
        assertArrayEquals(first, Files.readAllBytes(kept.getFirst()));
        Files.write(kept.getFirst(), new byte[] {1, 2, 3});
        assertArrayEquals(new byte[] {1, 2, 3}, source.compile(COMPILER, "sm_90a"), "the cache was not read");
        new KernelSource("step.cu", Map.of("OTHER", "1")).compile(COMPILER, "sm_90a");
        source.compile(COMPILER, "sm_80");
        assertEquals(3, kept().size());
    }

    private List<Path> kept() throws IOException {
        try (Stream<Path> files = Files.list(cache)) {
            return files.toList();
        }
    }

    @Test
    void aCacheThatCannotBeWrittenIsNoError() throws IOException {
        System.setProperty("dev.tandem.kernelCache", Files.createFile(cache.resolve("file")).resolve("below").toString());
        assertTrue(new KernelSource("step.cu", Map.of()).compile(COMPILER, "sm_90a").length > 0);
    }

    @Test
    void errorsNameTheKernelAndShowTheCompilersWords() {
        TandemException e = assertThrows(TandemException.class,
                () -> COMPILER.compile("bad.cu", "__global__ void f() { undeclared(); }", Map.of(), "sm_90a", List.of()));
        assertTrue(e.getMessage().contains("bad.cu") && e.getMessage().contains("undeclared"), e.getMessage());
        assertThrows(TandemException.class, () -> new KernelSource("absent.cu", Map.of()).compile(COMPILER, "sm_90a"));
    }
}
