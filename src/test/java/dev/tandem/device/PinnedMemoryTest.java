package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import dev.tandem.testing.Gpu;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.SplittableRandom;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

@Gpu
class PinnedMemoryTest {
    private static final Device CUDA = Device.cuda(0);
    private static final long BYTES = 600L << 20;

    @ParameterizedTest
    @ValueSource(longs = {1000, BYTES})
    void isZeroAtFirst(long bytes) {
        try (PinnedMemory memory = new PinnedMemory(CUDA, bytes)) {
            assertEquals(bytes, memory.segment().byteSize());
            assertEquals(-1, memory.segment().mismatch(MemorySegment.ofArray(new byte[(int) bytes])));
        }
    }

    @Test
    void comesBackFromTheDeviceBitForBit() {
        try (PinnedMemory memory = new PinnedMemory(CUDA, BYTES)) {
            checkRoundTrip(memory);
        }
    }

    private static void checkRoundTrip(PinnedMemory memory) {
        MemorySegment all = memory.segment();
        SplittableRandom random = new SplittableRandom(1);
        for (long at = 0; at < BYTES; at += Long.BYTES) {
            all.set(ValueLayout.JAVA_LONG, at, random.nextLong());
        }
        byte[] written = all.toArray(ValueLayout.JAVA_BYTE);
        CudaStream stream = CudaStream.current(CUDA);
        try (Scope scope = Scope.open()) {
            long device = Tensor.empty(CUDA, DType.FLOAT32, BYTES / Float.BYTES).address();
            long middle = (128L << 20) - 12;
            long length = (400L << 20) + 20;
            memory.copyTo(stream, device, 0, middle);
            memory.copyTo(stream, device + middle, middle, length);
            memory.copyTo(CUDA, device, middle + length, BYTES - middle - length);
            Cuda.synchronize(CUDA);
            all.fill((byte) 0);
            memory.copyFrom(stream, device + middle, middle, length);
            Cuda.synchronize(CUDA);
            assertEquals(-1, MemorySegment.mismatch(all, middle, middle + length, MemorySegment.ofArray(written), middle, middle + length));
            assertEquals(0, all.get(ValueLayout.JAVA_BYTE, middle - 1));
            memory.copyFrom(CUDA, device, BYTES);
            Cuda.synchronize(CUDA);
            assertEquals(-1, all.mismatch(MemorySegment.ofArray(written)));
        }
    }

    @Test
    void copiesStayWithinTheMemory() {
        try (PinnedMemory memory = new PinnedMemory(CUDA, 1000)) {
            CudaStream stream = CudaStream.current(CUDA);
            assertThrows(IllegalArgumentException.class, () -> memory.copyTo(stream, 0, -1, 10));
            assertThrows(IllegalArgumentException.class, () -> memory.copyTo(stream, 0, 991, 10));
            assertThrows(IllegalArgumentException.class, () -> memory.copyFrom(stream, 0, Long.MAX_VALUE, 10));
            assertThrows(IllegalArgumentException.class, () -> memory.copyFrom(CUDA, 0, 1001));
        }
    }

    @Test
    void isClosedOnceAndCanBeHadAgain() {
        for (int i = 0; i < 5; i++) {
            for (long bytes : new long[] {BYTES, 1 << 20}) {
                PinnedMemory memory = new PinnedMemory(CUDA, bytes);
                memory.close();
                memory.close();
            }
        }
    }

    /** The addresses that the refused one had are free: what is registered next may lie there. */
    @Test
    void whatTheMachineLacksIsRefused() {
        long more = ProcessMemory.available() + (4L << 30);
        assertThrows(TandemException.class, () -> new RegisteredMemory(more));
        try (PinnedMemory memory = new PinnedMemory(CUDA, BYTES)) {
            assertEquals(BYTES, memory.segment().byteSize());
        }
    }
}
