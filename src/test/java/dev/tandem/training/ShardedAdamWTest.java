package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.parallel.Ranks;
import dev.tandem.testing.NativeObjects;
import dev.tandem.testing.TinyModels;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.SplittableRandom;
import java.util.stream.IntStream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

@ExtendWith(NativeObjects.class)
class ShardedAdamWTest {
    /** The loss for each token that a small model has of four sequences after 150 steps. */
    private static double trained(DType weights, DType moments, int ranks) {
        List<TrainingSequence> batch = new ArrayList<>();
        for (int i = 0; i < 4; i++) {
            int step = 7 + 2 * i;
            batch.add(TrainingSequence.of(IntStream.range(0, 24).map(t -> 3 + step * t % 59).toArray(), 1, 1f / 92));
        }
        TrainerOptions options = TrainerOptions.defaults().lr(5e-3).betas(0.9, 0.999).weightDecay(0.01, false).moments(moments);
        List<Device> devices = IntStream.range(0, ranks).mapToObj(Device::cpu).toList();
        try (Ranks group = new Ranks(devices, Duration.ofSeconds(20));
                RankModel model = new RankModel(TinyModels.llama(), group, weights, options, arena -> arena.initialize(1, 0.1))) {
            double loss = 0;
            for (int i = 0; i < 150; i++) {
                loss = model.trainer.step(batch, t -> t.logprob().mul(t.weight()).sum().neg(), 1).loss();
            }
            return loss;
        }
    }

    @ParameterizedTest
    @EnumSource(value = DType.class, names = {"FLOAT32", "BFLOAT16"})
    void roundedMomentsTrainAsWell(DType weights) {
        double exact = trained(weights, DType.FLOAT32, 1);
        double rounded = trained(weights, DType.BFLOAT16, 1);
        double shared = trained(weights, DType.BFLOAT16, 2);
        System.out.printf("%s weights: loss %.4f with FLOAT32 moments, %.4f with BFLOAT16 moments, %.4f on two ranks%n", weights, exact,
                rounded, shared);
        assertTrue(exact < 0.5, "loss " + exact);
        assertEquals(exact, rounded, 0.1 * exact);
        assertEquals(exact, shared, 0.1 * exact);
        assertEquals(rounded, trained(weights, DType.BFLOAT16, 1), "the same bits again");
    }

    /** What RandomRounding makes of moments that begin at an element. */
    private static short[][] rounded(float[] first, float[] second, long seed, long step, long element) {
        try (Scope scope = Scope.open()) {
            Tensor kept = Tensor.empty(Device.cpu(), DType.BFLOAT16, 2, first.length);
            new RandomRounding(seed, step).round(Tensor.of(Device.cpu(), first), Tensor.of(Device.cpu(), second), kept.select(0, 0),
                    kept.select(0, 1), element);
            return new short[][] {kept.select(0, 0).memory().toArray(ValueLayout.JAVA_SHORT),
                    kept.select(0, 1).memory().toArray(ValueLayout.JAVA_SHORT)};
        }
    }

    /** In units of the last place, masters lie evenly over what rounds to their weights. */
    @Test
    void mastersRoundToTheirWeights() {
        int n = 200_000;
        Random random = new Random(4);
        try (Scope scope = Scope.open()) {
            float[] numbers = new float[n];
            for (int i = 0; i < n; i++) {
                numbers[i] = (float) (random.nextGaussian() * Math.exp(-20 * random.nextDouble()));
            }
            System.arraycopy(new float[] {0, -0.0f, 1, -2, Float.POSITIVE_INFINITY, Float.NaN}, 0, numbers, 0, 6);
            Tensor weights = Tensor.of(Device.cpu(), numbers).to(DType.BFLOAT16);
            Tensor masters = drawn(weights, 1000);
            // None lies half-way between two weights.
            assertArrayEquals(weights.memory().toArray(ValueLayout.JAVA_SHORT),
                    masters.to(DType.BFLOAT16).memory().toArray(ValueLayout.JAVA_SHORT));
            int[] from = weights.to(DType.FLOAT32).memory().toArray(ValueLayout.JAVA_INT);
            int[] drawn = masters.memory().toArray(ValueLayout.JAVA_INT);
            assertEquals(from[0], drawn[0]);
            assertEquals(from[1], drawn[1]);
            double[] units = IntStream.range(6, n).mapToDouble(i -> (drawn[i] - from[i]) / 65536.0).toArray();
            double mean = Arrays.stream(units).average().orElseThrow();
            double square = Arrays.stream(units).map(x -> x * x).average().orElseThrow();
            System.out.printf("masters: mean %.5f of the last place, mean square %.5f (1/12 expected)%n", mean, square);
            assertEquals(0, mean, 5 * Math.sqrt(1.0 / 12 / n));
            assertEquals(1.0 / 12, square, 5 * Math.sqrt(1.0 / 180 / n));
            Tensor later = drawn(weights.narrow(0, 100, n - 100), 1100);
            assertArrayEquals(Arrays.copyOfRange(drawn, 100, n), later.memory().toArray(ValueLayout.JAVA_INT));
        }
    }

    private static Tensor drawn(Tensor weights, long element) {
        Tensor masters = Tensor.empty(Device.cpu(), DType.FLOAT32, weights.elements());
        MemorySegment remainders = MemorySegment.ofArray(new short[(int) weights.elements()]);
        RandomRounding.draw(9, weights, remainders, element);
        SplitMasters.join(weights, remainders, masters);
        return masters;
    }

    @Test
    void splitMastersLoseNothing() {
        int[] special = {0, 0x80000000, 0x3f808000, 0x3f818000, 0xbf808000, 0x3f80ffff, 0x3f807fff, 0x7f7fffff, 0xff7fffff, 0x7f800000,
                0xff800000, 0x7fc00000, 0x7fffffff, 0x7f800001, 0x00008000, 0x80018000};
        int n = 300_000;
        int[] bits = IntStream.concat(Arrays.stream(special), new Random(6).ints(n - special.length)).toArray();
        MemorySegment remainders = MemorySegment.ofArray(new short[n]);
        try (Scope scope = Scope.open()) {
            Tensor masters = Tensor.empty(Device.cpu(), DType.FLOAT32, n);
            masters.memory().copyFrom(MemorySegment.ofArray(bits));
            Tensor weights = Tensor.empty(Device.cpu(), DType.BFLOAT16, n);
            SplitMasters.split(masters, weights, remainders);
            short[] rounded = weights.memory().toArray(ValueLayout.JAVA_SHORT);
            short[] toEven = masters.to(DType.BFLOAT16).memory().toArray(ValueLayout.JAVA_SHORT);
            Tensor joined = Tensor.empty(Device.cpu(), DType.FLOAT32, n);
            SplitMasters.join(weights, remainders, joined);
            int[] found = joined.memory().toArray(ValueLayout.JAVA_INT);
            for (int i = 0; i < n; i++) {
                String what = Integer.toHexString(bits[i]);
                if (Float.isNaN(Float.intBitsToFloat(bits[i]))) {
                    assertTrue(Float.isNaN(Float.intBitsToFloat(rounded[i] << 16)) && Float.isNaN(Float.intBitsToFloat(found[i])), what);
                    continue;
                }
                boolean half = (bits[i] & 0xffff) == 0x8000;
                assertEquals(half ? (short) ((bits[i] >>> 16) + 1) : toEven[i], rounded[i], what);
                assertEquals((rounded[i] & 0x7fff) == 0 ? rounded[i] << 16 : bits[i], found[i], what);
            }
        }
    }

    @Test
    void roundingKeepsTheMean() {
        int n = 1_000_000;
        Random random = new Random(4);
        float[] first = new float[n];
        float[] second = new float[n];
        for (int i = 0; i < n; i++) {
            first[i] = (float) (random.nextGaussian() * Math.exp(-20 * random.nextDouble()));
            second[i] = (float) Math.exp(-40 * random.nextDouble());
        }
        for (long[] seedStepElement : new long[][] {{0, 1, 0}, {-7, 1_000_000, (1L << 34) + 3}}) {
            short[][] kept = rounded(first, second, seedStepElement[0], seedStepElement[1], seedStepElement[2]);
            for (float[] exact : List.of(first, second)) {
                short[] found = kept[exact == first ? 0 : 1];
                double sum = 0;
                for (int i = 0; i < n; i++) {
                    int below = Float.floatToRawIntBits(exact[i]) >>> 16;
                    assertTrue(found[i] == (short) below || found[i] == (short) (below + 1), "a neighbour");
                    double unit = Math.scalb(1.0, Math.getExponent(exact[i]) - 7);
                    sum += (Float.intBitsToFloat(found[i] << 16) - exact[i]) / unit;
                }
                // In units of the last place kept, errors have mean 0 and at most 1/2 as deviation.
                assertTrue(Math.abs(sum / n) < 5 * 0.5 / Math.sqrt(n), "mean error " + sum / n);
            }
        }
    }

    private static long mix(long word) {
        return new SplittableRandom(word).nextLong();
    }

    @Test
    void noiseIsAFunctionOfSeedStepAndElement() {
        float[] values = new float[1000];
        for (int i = 0; i < values.length; i++) {
            values[i] = (i - 500) * 1.2345678e-4f;
        }
        values[3] = Float.POSITIVE_INFINITY;
        values[4] = Float.NaN;
        long element = (1L << 40) + 5;
        short[][] kept = rounded(values, values, 11, 17, element);
        for (int i = 0; i < values.length; i++) {
            long four = mix(mix(mix(11) ^ 17) ^ (element + i) / 4);
            int noise = (int) (four >>> (element + i) % 4 * 16) & 0xffff;
            int bits = Float.floatToRawIntBits(values[i]);
            short expected = (short) ((Float.isFinite(values[i]) ? bits + noise : bits) >>> 16);
            assertEquals(expected, kept[0][i]);
            assertEquals(expected, kept[1][i]);
        }
        assertArrayEquals(kept, rounded(values, values, 11, 17, element));
        short[][] rest = rounded(Arrays.copyOfRange(values, 301, 1000), new float[699], 11, 17, element + 301);
        assertArrayEquals(Arrays.copyOfRange(kept[0], 301, 1000), rest[0]);
        for (short[][] other : List.of(rounded(values, values, 12, 17, element), rounded(values, values, 11, 18, element),
                rounded(values, values, 11, 17, element + 1))) {
            int same = (int) IntStream.range(0, values.length).filter(i -> other[0][i] == kept[0][i]).count();
            assertTrue(same < 900, same + " of 1000 alike");
        }
    }
}
