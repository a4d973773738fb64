package dev.tandem.training;

import static java.lang.foreign.ValueLayout.JAVA_FLOAT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import dev.tandem.device.CudaEvent;
import dev.tandem.device.CudnnAttention;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Tensor;
import java.lang.foreign.MemorySegment;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/**
 * Packs the micro-batches of a step, all at once: token data is written once, in the order in which the device reads it, and reaches a GPU
 * in two copies that nobody waits for. Copies batch by batch would each wait for all that the GPU has been given before, and leave it idle
 * until the host has launched more.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class BatchPacker implements AutoCloseable {
    private final Device device;
    private final @Nullable CudaEvent copied;
    private final Staging longs;
    private final Staging floats;

    BatchPacker(Device device) {
        this.device = device;
        longs = new Staging(device);
        floats = new Staging(device);
        copied = device.isCpu() ? null : new CudaEvent(device, false);
    }

    /** {@return the micro-batches, for the innermost scope} */
    List<PackedBatch> pack(List<List<TrainingSequence>> microBatches) {
        if (microBatches.isEmpty()) {
            return List.of();
        }
        List<Sizes> sizes = microBatches.stream().map(Sizes::of).toList();
        long integers = sizes.stream().mapToLong(Sizes::integers).sum();
        long numbers = sizes.stream().mapToLong(Sizes::numbers).sum();
        Tensor allLongs = Tensor.empty(device, DType.INT64, integers);
        Tensor allFloats = Tensor.empty(device, DType.FLOAT32, numbers);
        await();
        MemorySegment longSegment = longs.of(allLongs);
        MemorySegment floatSegment = floats.of(allFloats);
        List<PackedBatch> batches = new ArrayList<>();
        long atLong = 0;
        long atFloat = 0;
        for (int i = 0; i < sizes.size(); i++) {
            Sizes size = sizes.get(i);
            Columns columns = new Columns(size, allLongs.narrow(0, atLong, size.integers()), allFloats.narrow(0, atFloat, size.numbers()));
            fill(microBatches.get(i), size, longSegment.asSlice(Long.BYTES * atLong, Long.BYTES * size.integers()),
                    floatSegment.asSlice(Float.BYTES * atFloat, Float.BYTES * size.numbers()));
            batches.add(columns.batch());
            atLong += size.integers();
            atFloat += size.numbers();
        }
        if (copied != null) {
            longs.send(allLongs);
            floats.send(allFloats);
            copied.record();
        }
        return batches;
    }

    private void await() {
        if (copied != null) {
            copied.await();
        }
    }

    /** Page-locked memory from which a GPU's tensors are copied; a CPU's are written in place. It grows as it is needed. */
    private static final class Staging implements AutoCloseable {
        private static final long LEAST = 1 << 16;

        private final Device device;
        private @Nullable PinnedMemory memory;

        Staging(Device device) {
            this.device = device;
        }

        /** {@return where a tensor's numbers are written; nothing must be on its way any more} */
        MemorySegment of(Tensor tensor) {
            if (device.isCpu()) {
                return tensor.memory();
            }
            PinnedMemory current = memory;
            if (current == null || current.segment().byteSize() < bytes(tensor)) {
                close();
                current = new PinnedMemory(device, Math.max(bytes(tensor), LEAST) * 5 / 4);
                memory = current;
            }
            return current.segment();
        }

        /** Starts the copy of what was written. */
        void send(Tensor tensor) {
            Objects.requireNonNull(memory).copyTo(device, tensor.address(), 0, bytes(tensor));
        }

        private static long bytes(Tensor tensor) {
            return tensor.elements() * tensor.dtype().bytes();
        }

        @Override
        public void close() {
            if (memory != null) {
                memory.close();
                memory = null;
            }
        }
    }

    /**
     * How much a micro-batch holds.
     *
     * @param lengths tokens of each sequence that the model reads
     * @param optional which of old log-probs, reference log-probs and advantages it has
     */
    private record Sizes(long[] lengths, long[] starts, int tokens, int trained, List<Boolean> optional) {
        static Sizes of(List<TrainingSequence> sequences) {
            TrainingSequence first = sequences.getFirst();
            long[] lengths = sequences.stream().mapToLong(TrainingSequence::inputTokens).toArray();
            return new Sizes(lengths, CudnnAttention.starts(lengths), Math.toIntExact(Arrays.stream(lengths).sum()),
                    sequences.stream().mapToInt(TrainingSequence::trainedTokens).sum(),
                    List.of(first.old() != null, first.reference() != null, first.advantage() != null));
        }

        /** Starts; tokens and positions; rows, targets and sequences. */
        long integers() {
            return starts.length + 2L * tokens + 3L * trained;
        }

        /** Weights, and what else there is. */
        long numbers() {
            return (1L + optional.stream().filter(has -> has).count()) * trained;
        }
    }

    /** Views of a micro-batch's memory, in order. */
    private static final class Columns {
        private final Sizes size;
        private final Tensor longs;
        private final Tensor floats;
        private long nextLong;
        private long nextFloat;

        Columns(Sizes size, Tensor longs, Tensor floats) {
            this.size = size;
            this.longs = longs;
            this.floats = floats;
        }

        PackedBatch batch() {
            int longest = Math.toIntExact(Arrays.stream(size.lengths).max().orElse(0));
            return new PackedBatch(size.lengths, longest, integers(size.starts.length), integers(size.tokens), integers(size.tokens),
                    integers(size.trained), integers(size.trained), integers(size.trained), numbers(), optional(0), optional(1),
                    optional(2));
        }

        private Tensor integers(int count) {
            nextLong += count;
            return longs.narrow(0, nextLong - count, count);
        }

        private Tensor numbers() {
            nextFloat += size.trained;
            return floats.narrow(0, nextFloat - size.trained, size.trained);
        }

        private @Nullable Tensor optional(int which) {
            return size.optional.get(which) ? numbers() : null;
        }
    }

    private static void fill(List<TrainingSequence> sequences, Sizes size, MemorySegment longs, MemorySegment floats) {
        MemorySegment.copy(size.starts, 0, longs, JAVA_LONG, 0, size.starts.length);
        long firstToken = size.starts.length;
        long rows = firstToken + 2L * size.tokens;
        int row = 0;
        int n = 0;
        for (int s = 0; s < sequences.size(); s++) {
            TrainingSequence sequence = sequences.get(s);
            int[] tokens = sequence.tokens();
            boolean[] trained = sequence.trained();
            float[][] values = {sequence.weight(), sequence.old(), sequence.reference(), sequence.advantage()};
            check(size, values);
            for (int i = 0; i < sequence.inputTokens(); i++, row++) {
                longs.setAtIndex(JAVA_LONG, firstToken + row, tokens[i]);
                longs.setAtIndex(JAVA_LONG, firstToken + size.tokens + row, i);
                if (trained[i + 1]) {
                    longs.setAtIndex(JAVA_LONG, rows + n, row);
                    longs.setAtIndex(JAVA_LONG, rows + size.trained + n, tokens[i + 1]);
                    longs.setAtIndex(JAVA_LONG, rows + 2L * size.trained + n, s);
                    long at = n;
                    for (float[] column : values) {
                        if (column != null) {
                            floats.setAtIndex(JAVA_FLOAT, at, column[i + 1]);
                            at += size.trained;
                        }
                    }
                    n++;
                }
            }
        }
    }

    private static void check(Sizes size, float[][] values) {
        String[] names = {"old log-probs", "reference log-probs", "advantages"};
        for (int i = 0; i < names.length; i++) {
            if (size.optional.get(i) != (values[i + 1] != null)) {
                throw new IllegalArgumentException("some sequences of the batch have " + names[i] + " and some have none");
            }
        }
    }

    @Override
    public void close() {
        await();
        if (copied != null) {
            copied.close();
        }
        longs.close();
        floats.close();
    }
}
