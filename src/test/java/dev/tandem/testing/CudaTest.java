package dev.tandem.testing;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.Tensor.RandomStream;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.stream.IntStream;
import org.jspecify.annotations.Nullable;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;

/**
 * Frame of the tests that compare what a GPU computes: random tensors, outputs that are NaN before, comparisons in float64 that print the
 * largest difference.
 */
public abstract class CudaTest {
    public static final Device CUDA = Device.cuda(0);
    private final RandomStream random = new RandomStream(17);
    private Scope scope;

    @BeforeEach
    public void begin() {
        Cuda.use(CUDA);
        scope = Scope.open();
    }

    @AfterEach
    public void end() {
        Cuda.synchronize(CUDA);
        scope.close();
        random.close();
    }

    // ---- tensors --------------------------------------------------------------------------------------------------------

    /** Normally distributed, BFLOAT16. */
    public Tensor normal(double deviation, long... shape) {
        return normalFloats(deviation, shape).to(DType.BFLOAT16);
    }

    public Tensor normalFloats(double deviation, long... shape) {
        return Tensor.empty(CUDA, DType.FLOAT32, shape).normalInPlace(0, deviation, random);
    }

    /** NaN, which must be overwritten, or must not be. */
    public static Tensor poison(DType dtype, long... shape) {
        return Tensor.full(CUDA, dtype, Double.NaN, shape);
    }

    public static Tensor ints(int... values) {
        return Tensor.of(CUDA, values).to(DType.INT32);
    }

    /** {@return 0 … n-1 in some order} */
    public static int[] shuffled(int n, long seed) {
        List<Integer> order = new ArrayList<>(IntStream.range(0, n).boxed().toList());
        Collections.shuffle(order, new Random(seed));
        return order.stream().mapToInt(Integer::intValue).toArray();
    }

    public static Tensor exact(Tensor x) {
        return x.to(DType.FLOAT64);
    }

    /** What a float64 tensor is after a round trip through BFLOAT16: where libtorch's operations store a result, kernels round, too. */
    public static Tensor rounded(Tensor x) {
        return x.to(DType.BFLOAT16).to(DType.FLOAT64);
    }

    public static long address(@Nullable Tensor tensor) {
        return tensor == null ? 0 : tensor.address();
    }

    // ---- comparisons ----------------------------------------------------------------------------------------------------

    /** Elements differ by at most a share of the largest expected one; where NaN is expected, nothing has been written. */
    public static void compare(String what, Tensor got, Tensor want, double tolerance) {
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
    public static void assertSame(String what, Tensor got, Tensor want) {
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
