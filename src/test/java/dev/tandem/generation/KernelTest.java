package dev.tandem.generation;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.Tensor.RandomStream;
import dev.tandem.model.ModelConfig;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.stream.IntStream;
import java.util.stream.Stream;
import org.jspecify.annotations.Nullable;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;

/**
 * Frame of the tests that compare a kernel with libtorch's operations in float64: random tensors, outputs that are NaN before, comparisons
 * that print the largest difference.
 */
abstract class KernelTest {
    static final Device CUDA = Device.cuda(0);
    private final List<KernelModule> modules = new ArrayList<>();
    private final RandomStream random = new RandomStream(17);
    private Scope scope;

    @BeforeEach
    void begin() {
        Cuda.use(CUDA);
        scope = Scope.open();
    }

    @AfterEach
    void end() {
        Cuda.synchronize(CUDA);
        modules.forEach(KernelModule::close);
        scope.close();
        random.close();
    }

    /** Sources as they are compiled for a model, closed after the test. */
    List<KernelModule> load(ModelConfig config, GeneratorOptions options, String... files) {
        List<KernelModule> loaded = KernelModule.load(CUDA,
                Stream.of(files).map(file -> CudaKernels.source(file, config, options, CudaDecoder.split(config))).toList());
        modules.addAll(loaded);
        return loaded;
    }

    // ---- tensors --------------------------------------------------------------------------------------------------------

    /** Normally distributed, BFLOAT16. */
    Tensor normal(double deviation, long... shape) {
        return normalFloats(deviation, shape).to(DType.BFLOAT16);
    }

    Tensor normalFloats(double deviation, long... shape) {
        return Tensor.empty(CUDA, DType.FLOAT32, shape).normalInPlace(0, deviation, random);
    }

    /** NaN, which must be overwritten, or must not be. */
    static Tensor poison(DType dtype, long... shape) {
        return Tensor.full(CUDA, dtype, Double.NaN, shape);
    }

    static Tensor ints(int... values) {
        return Tensor.of(CUDA, values).to(DType.INT32);
    }

    /** {@return 0 … n-1 in some order} */
    static int[] shuffled(int n, long seed) {
        List<Integer> order = new ArrayList<>(IntStream.range(0, n).boxed().toList());
        Collections.shuffle(order, new Random(seed));
        return order.stream().mapToInt(Integer::intValue).toArray();
    }

    static Tensor exact(Tensor x) {
        return x.to(DType.FLOAT64);
    }

    /** What a float64 tensor is after a round trip through BFLOAT16: where libtorch's operations store a result, kernels round, too. */
    static Tensor rounded(Tensor x) {
        return x.to(DType.BFLOAT16).to(DType.FLOAT64);
    }

    static long address(@Nullable Tensor tensor) {
        return tensor == null ? 0 : tensor.address();
    }

    // ---- comparisons ----------------------------------------------------------------------------------------------------

    /** Elements differ by at most a share of the largest expected one; where NaN is expected, nothing has been written. */
    static void compare(String what, Tensor got, Tensor want, double tolerance) {
        try (Scope inner = Scope.open()) {
            Tensor x = exact(got);
            Tensor y = exact(want);
            assertNumbersAgree(what, x, y);
            Tensor number = y.equalTo(y);
            Tensor zero = Tensor.zeros(CUDA, DType.FLOAT64, 1);
            double scale = number.choose(y.abs(), zero).max().item();
            double difference = number.choose(x.sub(y).abs(), zero).max().item() / scale;
            System.out.printf("%s: largest difference %.1e of %.3g%n", what, difference, scale);
            assertTrue(difference <= tolerance, () -> what + ": largest difference " + difference + " of " + scale);
        }
    }

    /** Elements are equal, or NaN in both. */
    static void assertSame(String what, Tensor got, Tensor want) {
        try (Scope inner = Scope.open()) {
            assertNumbersAgree(what, got, want);
            assertEquals(0, count(want.equalTo(want)) - count(got.equalTo(want)), what + ": elements differ");
        }
    }

    private static void assertNumbersAgree(String what, Tensor got, Tensor want) {
        assertArrayEquals(want.shape(), got.shape(), what);
        Tensor agree = got.equalTo(got).equalTo(want.equalTo(want));
        assertEquals(0, agree.elements() - count(agree), what + ": elements are NaN or are none against expectation");
    }

    private static long count(Tensor truths) {
        return (long) truths.to(DType.INT64).sum().item();
    }
}
