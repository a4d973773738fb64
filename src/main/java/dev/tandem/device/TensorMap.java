package dev.tandem.device;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/**
 * How the copy engine of a Hopper GPU sees a BFLOAT16 tensor, cut into boxes that are swizzled by 128 bytes in shared memory
 * (CUtensorMap): an argument of kernels that load tiles by TMA. Elements beyond a size read as zero. It lives as long as its arena.
 */
public final class TensorMap {
    private static final long BYTES = 128;
    private static final long ALIGNMENT = 64;

    private final MemorySegment words;

    /**
     * Describes a tensor, the innermost dimension first.
     *
     * @param address of the first element, a multiple of 16
     * @param sizes in elements
     * @param strides in bytes from one index to the next, of all dimensions but the innermost; multiples of 16
     * @param box elements of a tile; 64 in the innermost dimension
     * @throws CudaException when the driver refuses the description
     */
    public TensorMap(Arena arena, long address, long[] sizes, long[] strides, int[] box) {
        words = arena.allocate(BYTES, ALIGNMENT);
        int[] steps = new int[sizes.length];
        java.util.Arrays.fill(steps, 1);
        try (Arena local = Arena.ofConfined()) {
            CudaDriver.encodeTensorMap(words, sizes.length, address, local.allocateFrom(ValueLayout.JAVA_LONG, sizes),
                    local.allocateFrom(ValueLayout.JAVA_LONG, strides), local.allocateFrom(ValueLayout.JAVA_INT, box),
                    local.allocateFrom(ValueLayout.JAVA_INT, steps));
        }
    }

    long address() {
        return words.address();
    }
}
