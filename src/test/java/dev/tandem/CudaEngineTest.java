package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.generation.Completion;
import dev.tandem.generation.SamplingParams;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainingSequence;
import java.util.List;
import java.util.stream.IntStream;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

@Gpu
class CudaEngineTest {
    private static final Device CUDA = Device.cuda(0);

    private static EngineOptions options(DType dtype) {
        return EngineOptions.defaults().devices(CUDA).dtype(dtype).kvBytes(64 << 20).memoryLimit(32L << 30);
    }

    /** Both sides share bytes: what was trained to certainty is what is generated next. */
    @ParameterizedTest
    @EnumSource(value = DType.class, names = {"FLOAT32", "BFLOAT16"})
    void learnsASequenceAndSaysIt(DType dtype) {
        int[] sequence = IntStream.range(0, 24).map(i -> 5 + 7 * i % 55).toArray();
        EngineOptions options = options(dtype);
        try (HybridEngine engine = HybridEngine.create(TinyModels.llama(), null, options.training(options.training().lr(3e-3)))) {
            TrainStep step = engine.train(List.of(TrainingSequence.of(sequence, 1, 1)));
            double first = step.loss();
            for (int i = 0; i < 80; i++) {
                step = engine.train(List.of(TrainingSequence.of(sequence, 1, 1)));
            }
            assertTrue(step.loss() < 0.1 * first, first + " became " + step.loss());
            List<Completion> said = engine.generateTokens(List.of(new int[] {sequence[0], sequence[1]}),
                    SamplingParams.greedy().maxTokens(20).ignoreEos(true));
            for (int i = 0; i < 20; i++) {
                assertEquals(sequence[i + 2], said.getFirst().tokens()[i], "token " + i);
            }
        }
    }

    @ParameterizedTest
    @EnumSource(value = DType.class, names = {"FLOAT32", "BFLOAT16"})
    void phaseSwitchesLeaveNothing(DType dtype) {
        int[] sequence = IntStream.range(0, 24).map(i -> 5 + 7 * i % 55).toArray();
        List<TrainingSequence> batch = List.of(TrainingSequence.of(sequence, 1, 1));
        SamplingParams params = SamplingParams.defaults().n(4).maxTokens(8);
        try (HybridEngine engine = HybridEngine.create(TinyModels.llama(), null, options(dtype))) {
            long free = 0;
            long objects = 0;
            for (int i = 0; i < 60; i++) {
                engine.train(batch);
                engine.generateTokens(List.of(sequence), params);
                engine.sleep();
                if (i == 9) {
                    free = Cuda.free(CUDA);
                    objects = Pointer.totalCount();
                }
                engine.wake();
            }
            engine.sleep();
            System.out.printf("%s: free %d MiB after 10 cycles, %d MiB after 60%n", dtype, free >> 20, Cuda.free(CUDA) >> 20);
            assertTrue(Cuda.free(CUDA) >= free, free + " free bytes became " + Cuda.free(CUDA));
            assertTrue(Pointer.totalCount() <= objects, objects + " native objects became " + Pointer.totalCount());
        }
    }
}
