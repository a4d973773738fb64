package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.testing.Gpu;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

@Gpu
class CudaVirtualMemoryTest {
    private static final Device CUDA = Device.cuda(0);

    @Test
    void keepsAddresses() {
        try (VirtualMemory range = VirtualMemory.reserve(CUDA, 256L << 20); Scope scope = Scope.open()) {
            long address = range.address();
            long unit = range.granularity();
            Tensor all = range.tensor(DType.FLOAT32, range.reserved() / 4);
            range.commit(0, 4 * unit);
            all.narrow(0, 0, unit).fillInPlace(3);
            assertEquals(3.0 * unit, all.narrow(0, 0, unit).sum().item());
            long before = Cuda.free(CUDA);
            range.release(2 * unit, 2 * unit);
            assertEquals(before + 2 * unit, Cuda.free(CUDA));
            assertEquals(3.0, all.narrow(0, 0, unit / 2).max().item());
            range.release(0, 2 * unit);
            range.commit(0, unit);
            assertEquals(address, range.address());
            all.narrow(0, 0, unit / 4).fillInPlace(2);
            assertEquals(0.5 * unit, all.narrow(0, 0, unit / 4).sum().item());
            assertEquals(unit, range.committed());
            assertThrows(IllegalArgumentException.class, () -> range.commit(1, unit));
        }
    }

    /** Real exhaustion: everything but k chunks of the device is taken before the commit of six, which follow those that are there. */
    @ParameterizedTest
    @ValueSource(ints = {0, 2})
    void aCommitThatFailsAtAnyChunkLeavesWhatWas(int chunks) {
        Cuda.use(CUDA);
        try (VirtualMemory range = VirtualMemory.reserve(CUDA, 16L << 30); Scope scope = Scope.open()) {
            long unit = range.granularity();
            long there = chunks * unit;
            range.commit(0, there);
            Tensor kept = range.tensor(DType.FLOAT32, there / 4).fillInPlace(3);
            int wanted = 6;
            for (int possible = 0; possible < wanted; possible++) {
                Cuda.releaseCached(CUDA);
                List<Long> ballast = new ArrayList<>();
                long piece = CudaDriver.granularity(0);
                long spare = Cuda.free(CUDA);
                long size = spare / 2 / piece * piece;
                while (size >= piece) {
                    if (Cuda.free(CUDA) >= size + (possible + 0.5) * unit) {
                        try {
                            ballast.add(CudaDriver.createMemory(0, size));
                            continue;
                        } catch (CudaException e) {
                            assertEquals(CudaException.OUT_OF_MEMORY, e.code());
                        }
                    }
                    size = size / 2 / piece * piece;
                }
                try {
                    long free = Cuda.free(CUDA);
                    TandemException e = assertThrows(TandemException.class, () -> range.commit(there, wanted * unit));
                    assertTrue(e.getMessage().contains("missing"), e.getMessage());
                    assertEquals(free, Cuda.free(CUDA));
                    assertEquals(there, range.committed());
                } finally {
                    ballast.forEach(CudaDriver::releaseMemory);
                }
                range.commit(there, wanted * unit);
                range.release(there, wanted * unit);
            }
            assertEquals(3.0 * kept.elements(), kept.sum().item(), 1e-3 * kept.elements());
        }
    }

    @Test
    void aThousandCyclesGiveEverythingBack() {
        try (VirtualMemory range = VirtualMemory.reserve(CUDA, 8L << 30)) {
            Cuda.releaseCached(CUDA);
            range.commit(0, range.reserved());
            range.release(0, range.reserved());
            long free = Cuda.free(CUDA);
            for (int i = 0; i < 1000; i++) {
                range.commit(0, range.reserved());
                range.release(0, range.reserved());
            }
            assertEquals(free, Cuda.free(CUDA));
        }
    }
}
