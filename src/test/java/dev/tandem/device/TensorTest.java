package dev.tandem.device;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;

class TensorTest {
    private static final Device CPU = Device.cpu();

    @Test
    void scopeReleasesWhatWasMadeInIt() {
        Tensor.zeros(CPU, DType.FLOAT32, 1).close();
        long before = Pointer.totalCount();
        Tensor kept;
        try (Scope outer = Scope.open()) {
            Tensor escaped;
            try (Scope inner = Scope.open()) {
                Tensor a = Tensor.of(CPU, 1f, 2f, 3f);
                escaped = inner.escape(a.mul(2).add(a));
                kept = a.keep();
            }
            assertArrayEquals(new float[] {3, 6, 9}, escaped.toFloats());
        }
        assertArrayEquals(new float[] {1, 2, 3}, kept.toFloats());
        kept.close();
        assertEquals(before, Pointer.totalCount());
    }

    @Test
    void gradientsAccumulateIntoGivenMemory() {
        try (Scope scope = Scope.open()) {
            Tensor w = Tensor.of(CPU, 1f, 2f, 3f).detach().requireGradient();
            Tensor into = Tensor.of(CPU, 10f, 10f, 10f);
            w.accumulateInto(into);
            w.square().sum().backward();
            assertArrayEquals(new float[] {12, 14, 16}, into.toFloats());
            w.square().backward(Tensor.of(CPU, 1f, 0f, 0f));
            assertArrayEquals(new float[] {14, 14, 16}, into.toFloats());
        }
    }

    @Test
    void mismatchedShapesAreAnArgumentErrorInOneLine() {
        try (Scope scope = Scope.open()) {
            Tensor a = Tensor.of(CPU, 1f, 2f, 3f);
            Tensor b = Tensor.of(CPU, 1f, 2f);
            var e = assertThrows(IllegalArgumentException.class, () -> a.add(b));
            assertTrue(e.getMessage().contains("size of tensor a (3)"), e.getMessage());
            assertTrue(e.getMessage().lines().count() <= 2, e.getMessage());
        }
    }

    @Test
    void seededNormalsRepeat() {
        try (Scope scope = Scope.open(); var one = new Tensor.RandomStream(7); var two = new Tensor.RandomStream(7)) {
            float[] a = Tensor.empty(CPU, DType.FLOAT32, 100).normalInPlace(0, 1, one).toFloats();
            float[] b = Tensor.empty(CPU, DType.FLOAT32, 100).normalInPlace(0, 1, two).toFloats();
            assertArrayEquals(a, b);
        }
    }

    @Test
    void virtualMemoryKeepsItsAddressAndForgetsItsContent() {
        try (VirtualMemory memory = VirtualMemory.reserve(CPU, 1 << 20); Scope scope = Scope.open()) {
            long unit = memory.granularity();
            memory.commit(0, 2 * unit);
            var segment = java.lang.foreign.MemorySegment.ofAddress(memory.address()).reinterpret(2 * unit);
            Tensor view = Tensor.wrap(segment, DType.FLOAT32, 2 * unit / 4);
            view.fillInPlace(3);
            assertEquals(memory.address(), view.address());
            memory.release(unit, unit);
            assertEquals(unit, memory.committed());
            assertEquals(3, view.select(0, 0).item());
            memory.commit(unit, unit);
            assertEquals(0, view.select(0, unit / 4).item());
            assertThrows(IllegalArgumentException.class, () -> memory.commit(1, unit));
        }
    }
}
