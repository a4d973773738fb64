package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TrainingSequence;
import java.io.File;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

/** What must hold on a GPU when something goes wrong, or is scarce. */
@Gpu
class CudaFaultTest {
    private static final Device CUDA = Device.cuda(0);
    private static final SamplingParams GREEDY = SamplingParams.greedy().maxTokens(12).ignoreEos(true);
    private static final List<int[]> PROMPTS = List.of(new int[] {5, 6, 7}, IntStream.range(0, 300).toArray());

    private static int[] said(HybridEngine engine) {
        return said(engine, PROMPTS);
    }

    private static int[] said(HybridEngine engine, List<int[]> prompts) {
        return engine.generateTokens(prompts, GREEDY).stream().flatMapToInt(c -> IntStream.of(c.tokens())).toArray();
    }

    /** Takes all but some bytes of the device. */
    private static List<Tensor> ballast(HybridEngine engine, long leave) {
        return engine.onEachRank(rank -> {
            Cuda.releaseCached(CUDA);
            List<Tensor> taken = new ArrayList<>();
            for (long size = Cuda.free(CUDA) / 2; size >= 32 << 20; size /= 2) {
                while (Cuda.free(CUDA) > leave + size) {
                    taken.add(Tensor.empty(CUDA, DType.BFLOAT16, size / 2).keep());
                }
            }
            return taken;
        }).getFirst();
    }

    private static void drop(HybridEngine engine, List<Tensor> ballast) {
        engine.onEachRank(rank -> {
            ballast.forEach(Tensor::close);
            Cuda.releaseCached(CUDA);
            return true;
        });
    }

    @Test
    void aWakeWithoutMemorySaysWhatIsMissingAndCanBeTriedAgain() {
        EngineOptions options = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16)).kvBytes(2L << 30);
        try (HybridEngine engine = HybridEngine.create(TinyModels.published("llama"), null, options)) {
            int[] before = said(engine);
            engine.sleep();
            for (long leave : new long[] {64 << 20, 700 << 20, 1800 << 20}) {
                List<Tensor> ballast = ballast(engine, leave);
                long free = Cuda.free(CUDA);
                TandemException e = assertThrows(TandemException.class, engine::wake);
                assertTrue(e.getMessage().contains("more than cuda:0 has") && e.getMessage().contains("WEIGHTS"), e.getMessage());
                assertEquals(Phase.ASLEEP, engine.phase());
                assertEquals(free, Cuda.free(CUDA));
                drop(engine, ballast);
            }
            engine.wake();
            assertArrayEquals(before, said(engine));
        }
    }

    /** Others take the memory between wake and the moment when pages are needed. */
    @Test
    void aKvCacheThatCannotGrowSaysWhatIsMissingAndTheEngineGoesOn() {
        EngineOptions options = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16)).kvBytes(2L << 30);
        List<int[]> many = IntStream.range(0, 200).mapToObj(i -> new Random(i).ints(1000, 0, 5000).toArray()).toList();
        try (HybridEngine engine = HybridEngine.create(TinyModels.published("llama"), null, options)) {
            int[] small = said(engine);
            int[] before = said(engine, many);
            long most = held(engine, Use.KV);
            for (long leave : new long[] {1 << 20, 48 << 20, 160 << 20}) {
                engine.sleep();
                engine.wake();
                said(engine);
                engine.sleep();
                engine.wake();
                long first = held(engine, Use.KV);
                assertTrue(first < most / 4, first + " bytes are mapped, " + most + " before");
                List<Tensor> ballast = ballast(engine, leave);
                long free = Cuda.free(CUDA) + first;
                TandemException e = assertThrows(TandemException.class, () -> said(engine, many));
                assertTrue(e.getMessage().contains("KV pages") && e.getMessage().contains("WEIGHTS"), e.getMessage());
                assertEquals(Phase.GENERATION, engine.phase());
                assertEquals(free, Cuda.free(CUDA) + held(engine, Use.KV));
                assertArrayEquals(small, said(engine));
                drop(engine, ballast);
                assertArrayEquals(before, said(engine, many));
            }
            engine.sleep();
            assertEquals(0, held(engine, Use.KV));
        }
    }

    @Test
    void trainingWithoutMemoryNamesTheHoldersAndTheEngineGenerates() {
        EngineOptions options = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16));
        List<TrainingSequence> batch = List.of(TrainingSequence.of(IntStream.range(0, 2000).toArray(), 1, 1),
                TrainingSequence.of(IntStream.range(1000, 3000).toArray(), 1, 1));
        try (HybridEngine engine = HybridEngine.create(TinyModels.published("llama"), null, options);
                HybridEngine other = HybridEngine.create(TinyModels.published("llama"), null, options)) {
            int[] before = said(engine);
            engine.resizeKv(64 << 20); // maps all pages, so that training gets their memory and generation gets it back
            List<Tensor> ballast = ballast(engine, 64 << 20);
            TandemException e = assertThrows(TandemException.class, () -> engine.train(batch));
            assertTrue(e.getMessage().contains("out of memory in training on cuda:0") && e.getMessage().contains("WEIGHTS"), e.getMessage());
            assertEquals(0, engine.weightVersion());
            assertArrayEquals(before, said(engine));
            drop(engine, ballast);
            assertEquals(other.train(batch).loss(), engine.train(batch).loss(), 1e-3);
            assertEquals(1, engine.weightVersion());
            assertEquals(24, said(engine).length);
        }
    }

    /** The KV cache is planned so large that the optimizer must make way for it, when it really becomes so large. */
    @Test
    void aParkedOptimizerTrainsTheSame() {
        ModelConfig config = TinyModels.published("qwen3");
        EngineOptions roomy = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16));
        roomy = roomy.training(roomy.training().lr(1e-3));
        MemoryPlan plan = MemoryPlan.of(config, roomy);
        long optimizer = plan.generation().get(Use.OPTIMIZER);
        long limit = plan.trainingBytes() + (1L << 30);
        EngineOptions tight = roomy.memoryLimit(limit).kvBytes(limit - plan.generation().get(Use.WEIGHTS)
                - plan.generation().get(Use.WORKSPACE) - optimizer / 2);
        List<TrainingSequence> batch = List.of(TrainingSequence.of(IntStream.range(0, 200).toArray(), 1, 1));
        try (HybridEngine resident = HybridEngine.create(config, null, roomy); HybridEngine parked = HybridEngine.create(config, null, tight)) {
            assertEquals(0, resident.plan().parked());
            assertEquals(optimizer, parked.plan().parked());
            for (int i = 0; i < 4; i++) {
                assertEquals(resident.train(batch).loss(), parked.train(batch).loss(), 2e-3, "step " + i);
                assertEquals(optimizer, held(parked, Use.OPTIMIZER));
                assertArrayEquals(said(resident), said(parked), "after step " + i);
                assertEquals(optimizer, held(parked, Use.OPTIMIZER), "few pages leave it where it is");
                if (i % 2 == 1) {
                    parked.resizeKv(parked.plan().generation().get(Use.KV)); // maps all
                    assertEquals(0, held(parked, Use.OPTIMIZER));
                    assertArrayEquals(said(resident), said(parked), "after step " + i);
                }
                assertEquals(optimizer, held(resident, Use.OPTIMIZER));
            }
        }
    }

    /** So little memory that half of the optimizer's state has no room on the device. */
    @Test
    void anOptimizerThatDoesNotFitTrainsTheSame() {
        ModelConfig config = TinyModels.published("qwen3");
        EngineOptions roomy = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16)).kvBytes(64 << 20);
        roomy = roomy.training(roomy.training().lr(1e-3).memory(0, 64 << 20));
        MemoryPlan plan = MemoryPlan.of(config, roomy);
        long optimizer = plan.training().get(Use.OPTIMIZER);
        List<TrainingSequence> batch = List.of(TrainingSequence.of(IntStream.range(0, 200).toArray(), 1, 1));
        try (HybridEngine resident = HybridEngine.create(config, null, roomy);
                HybridEngine shared = HybridEngine.create(config, null, roomy.memoryLimit(plan.trainingBytes() - optimizer / 2))) {
            assertEquals(0, resident.plan().hostGroups());
            assertEquals(2, shared.plan().hostGroups(), shared.plan().toString());
            for (int i = 0; i < 4; i++) {
                assertEquals(resident.train(batch).loss(), shared.train(batch).loss(), 2e-3, "step " + i);
                assertEquals(optimizer - shared.plan().hostOptimizer(), held(shared, Use.OPTIMIZER));
                assertArrayEquals(said(resident), said(shared), "after step " + i);
            }
        }
    }

    private static long held(HybridEngine engine, Use use) {
        return engine.onEachRank(rank -> rank.memory().held(use)).getFirst();
    }

    /** A process whose class path has a broken kernel first. */
    @Test
    void aKernelThatDoesNotCompileIsReplacedByLibtorch(@TempDir Path folder) throws Exception {
        Path kernel = folder.resolve("classes/native/cuda/layer.cu");
        Files.createDirectories(kernel.getParent());
        Files.writeString(kernel, "this is no kernel\n");
        List<String> command = new ArrayList<>(List.of(Path.of(System.getProperty("java.home"), "bin", "java").toString(),
                "--enable-native-access=ALL-UNNAMED", "-Ddev.tandem.kernelCache=" + folder.resolve("kernels"), "-cp",
                folder.resolve("classes") + File.pathSeparator + System.getProperty("java.class.path"), Program.class.getName()));
        String nvrtc = System.getProperty("dev.tandem.nvrtc");
        if (nvrtc != null) {
            command.add(1, "-Ddev.tandem.nvrtc=" + nvrtc);
        }
        Process process = new ProcessBuilder(command).redirectErrorStream(true).start();
        String said = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        assertEquals(0, process.waitFor(), said);
        assertTrue(said.contains("WARNING") && said.contains("generating with operations of libtorch") && said.contains("layer.cu"), said);
        assertTrue(said.contains("kernels: false, tokens: 24"), said);
    }

    /** Generates, and tells how. */
    static final class Program {
        private Program() {}

        public static void main(String[] args) {
            EngineOptions options = CudaGenerationTest.options(GeneratorOptions.defaults().blockSize(16));
            try (HybridEngine engine = HybridEngine.create(TinyModels.published("llama"), null, options)) {
                boolean kernels = engine.onEachRank(rank -> rank.generator().runsKernels()).getFirst();
                System.out.println("kernels: " + kernels + ", tokens: " + said(engine).length);
            }
        }
    }
}
