package dev.tandem.generation;

import static dev.tandem.testing.CudaTest.CUDA;
import static dev.tandem.testing.CudaTest.ints;
import static dev.tandem.testing.CudaTest.poison;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.util.Arrays;
import java.util.List;
import java.util.stream.IntStream;

/** Launches the kernels that sample as a step does. */
record SamplingLaunches(KernelModule sampling, KernelModule truncation) {
    private static final int[] NONE = {};
    private static final int TILE = 512;
    private static final int UNTOUCHED = -77;

    /** A sample that is due; {@code seen} are the tokens that its penalty is for. */
    record Sample(int row, SamplingParams params, long seed, long key, int position, int[] seen, int[] masked) {}

    /** What came of it; the bits of the tokens seen are then those of each sample. */
    record Draws(int[] tokens, float[] logprobs, int[] seen) {}

    /** Two pairs of padding follow the samples, which must be left alone: their rows do not exist. */
    Draws draw(float[][] rows, int slices, List<Sample> samples) {
        int vocabulary = rows[0].length;
        int pairs = samples.size();
        int all = pairs + 2;
        int tiles = Math.ceilDiv(vocabulary, TILE);
        Tensor logits = logits(rows);
        Tensor host = Tensor.zeros(Device.cpu(), DType.INT32, all, StepLayout.PAIR_BYTES / 4);
        MemorySegment memory = host.memory();
        int[] masked = new int[all * StepLayout.MAX_MASKED];
        int[] starts = new int[pairs + 1];
        for (int i = 0; i < pairs; i++) {
            Sample each = samples.get(i);
            StepLayout.pair(memory, (long) i * StepLayout.PAIR_BYTES, each.row, i, each.position, each.params, each.seed, each.key,
                    each.masked.length);
            System.arraycopy(each.masked, 0, masked, i * StepLayout.MAX_MASKED, each.masked.length);
            starts[i + 1] = starts[i] + each.seen.length;
        }
        for (int i = pairs; i < all; i++) {
            SamplingParams any = SamplingParams.defaults().topK(5);
            StepLayout.pair(memory, (long) i * StepLayout.PAIR_BYTES, 1 << 30, i == pairs ? -1 : i, 0, any, 0, 0, 0);
        }
        long pair = host.on(CUDA).address();
        long count = ints(pairs + 1).address(); // one padding sample is within it, the other beyond
        long mask = ints(masked).address();
        boolean penalises = samples.stream().anyMatch(each -> each.params.repetitionPenalty() != 1);
        Tensor seen = Tensor.full(CUDA, DType.INT32, -1, penalises ? pairs : 1, Math.ceilDiv(vocabulary, Integer.SIZE));
        if (penalises) {
            int[] tokens = samples.stream().flatMapToInt(each -> Arrays.stream(each.seen)).toArray();
            Tensor list = ints(Arrays.copyOf(tokens, tokens.length + 1)); // never empty
            sampling.kernel("markSeen").launch(CUDA, Grid.of(pairs, 256), seen.address(), vocabulary,
                    ints(IntStream.range(0, pairs).toArray()).address(), ints(starts).address(), list.address(), ints(pairs).address());
        }
        Tensor scaled = poison(DType.FLOAT32, all, tiles, 2);
        Tensor raw = poison(DType.FLOAT32, all, tiles, 2);
        Tensor best = poison(DType.FLOAT32, all, slices, 2);
        Tensor tokens = Tensor.full(CUDA, DType.INT32, UNTOUCHED, all);
        Tensor logprobs = Tensor.full(CUDA, DType.FLOAT32, UNTOUCHED, all);
        Tensor last = Tensor.full(CUDA, DType.INT32, UNTOUCHED, all);
        boolean edits = penalises || samples.stream().anyMatch(each -> each.masked.length > 0);
        sampling.kernel(edits ? "samplePartialEdited" : "samplePartial").launch(CUDA, new Grid(all, slices, 128, 1, 0), pair, count,
                logits.address(), logits.size(1), vocabulary, seen.address(), mask, scaled.address(), raw.address(), best.address());
        if (samples.stream().anyMatch(each -> each.params.truncates() && !each.params.isGreedy())) {
            truncation.kernel("sampleTruncated").launch(CUDA, Grid.of(all, 512), pair, count, logits.address(), logits.size(1), vocabulary,
                    seen.address(), mask, scaled.address(), raw.address(), tokens.address(), logprobs.address(), last.address());
        }
        sampling.kernel("sampleFinish").launch(CUDA, Grid.of(all, 128), pair, count, logits.address(), logits.size(1), vocabulary,
                seen.address(), scaled.address(), raw.address(), best.address(), slices, tokens.address(), logprobs.address(),
                last.address());
        int[] found = numbers(tokens);
        int[] next = numbers(last);
        float[] values = logprobs.toFloats();
        for (int i = 0; i < all; i++) {
            assertEquals(i < pairs ? Math.max(found[i], 0) : UNTOUCHED, next[i], "the next step's token");
            assertTrue(i < pairs || found[i] == UNTOUCHED && values[i] == UNTOUCHED, "padding was sampled");
        }
        return new Draws(Arrays.copyOf(found, pairs), Arrays.copyOf(values, pairs), penalises ? numbers(seen) : NONE);
    }

    /** Rows whose length is a multiple of 8; what is past the vocabulary is NaN. */
    private static Tensor logits(float[][] rows) {
        int stride = (rows[0].length + 7) / 8 * 8;
        float[] flat = new float[rows.length * stride];
        Arrays.fill(flat, Float.NaN);
        for (int row = 0; row < rows.length; row++) {
            System.arraycopy(rows[row], 0, flat, row * stride, rows[row].length);
        }
        return Tensor.of(CUDA, flat).reshape(rows.length, stride);
    }

    private static int[] numbers(Tensor tensor) {
        return tensor.on(Device.cpu()).memory().toArray(JAVA_INT);
    }
}
