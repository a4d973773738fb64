package dev.tandem.training;

import dev.tandem.device.CudaEvent;
import dev.tandem.device.CudaStream;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.util.function.LongConsumer;

/**
 * The part of a GPU's optimizer state that stays in page-locked host memory. In each step, piece after piece of it is copied to the device,
 * updated there, and copied back, in the manner of ZeRO-Offload (Ren et al. 2021) but with the update on the device.
 *
 * <p>Of two buffers one is filled, on a stream of its own, while the other's piece is updated and goes back, on another one: the bus is
 * busy in both directions, and the thread's stream only updates. It has time for the state that is on the device meanwhile.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class HostState implements AutoCloseable {
    /** Most elements of a piece: parts of tens of megabytes are copied as fast as larger ones. */
    static final long PIECE = 1 << 24;

    private static final int BUFFERS = 2;

    private final Device device;
    private final OptimizerLayout layout;
    private final OptimizerLayout piece;
    private final PinnedMemory memory;
    private final CudaStream arrivals;
    private final CudaStream departures;
    private final CudaEvent[] arrived = new CudaEvent[BUFFERS];
    private final CudaEvent[] updated = new CudaEvent[BUFFERS];
    private final CudaEvent[] returned = new CudaEvent[BUFFERS];
    private final long[] buffers = new long[BUFFERS];
    private int turn;

    /** Allocates the state, all zero. */
    HostState(Device device, OptimizerLayout layout) {
        this.device = device;
        this.layout = layout;
        piece = piece(layout);
        memory = new PinnedMemory(device, layout.bytes());
        arrivals = CudaStream.create(device);
        departures = CudaStream.create(device);
        for (int i = 0; i < BUFFERS; i++) {
            arrived[i] = new CudaEvent(device, false);
            updated[i] = new CudaEvent(device, false);
            returned[i] = new CudaEvent(device, false);
        }
    }

    private static OptimizerLayout piece(OptimizerLayout layout) {
        return new OptimizerLayout(Math.min(PIECE, layout.elements()), layout.splits(), layout.moments());
    }

    /** {@return bytes of the device that a step takes while it lasts} */
    static long bufferBytes(OptimizerLayout layout) {
        return BUFFERS * piece(layout).bytes();
    }

    /** {@return how the state in a buffer lies} */
    OptimizerLayout piece() {
        return piece;
    }

    /** Takes buffers for a step, which belong to the innermost scope. */
    void begin() {
        CudaStream current = CudaStream.current(device);
        for (int i = 0; i < BUFFERS; i++) {
            buffers[i] = Tensor.empty(device, DType.FLOAT32, piece.bytes() / Float.BYTES).address();
            current.record(returned[i]);
        }
    }

    /**
     * Has a piece updated, after what the thread has launched so far.
     *
     * @param at its first element
     * @param count its elements, at most {@link #PIECE}
     * @param update launches the update on the thread's stream, given the piece's address on the device
     */
    void pass(long at, long count, LongConsumer update) {
        turn = (turn + 1) % BUFFERS;
        arrivals.await(returned[turn]);
        copy((buffer, offset, bytes) -> memory.copyTo(arrivals, buffer, offset, bytes), at, count);
        arrivals.record(arrived[turn]);
        CudaStream current = CudaStream.current(device);
        current.await(arrived[turn]);
        update.accept(buffers[turn]);
        current.record(updated[turn]);
        departures.await(updated[turn]);
        copy((buffer, offset, bytes) -> memory.copyFrom(departures, buffer, offset, bytes), at, count);
        departures.record(returned[turn]);
    }

    /** Ends the step: what the thread launches next may use the buffers' memory. */
    void end() {
        CudaStream current = CudaStream.current(device);
        for (CudaEvent mark : returned) {
            current.await(mark);
        }
    }

    /** One way or the other between an address of the device and an offset in the memory. */
    private interface Copy {
        void bytes(long buffer, long offset, long bytes);
    }

    private void copy(Copy copy, long at, long count) {
        long buffer = buffers[turn];
        if (layout.splits()) {
            copy.bytes(buffer + piece.remainder(0), layout.remainder(at), count * SplitMasters.BYTES);
        }
        copy.bytes(buffer + piece.first(0), layout.first(at), count * layout.moments().bytes());
        copy.bytes(buffer + piece.second(0), layout.second(at), count * layout.moments().bytes());
    }

    /**
     * Draws masters for weights on the device.
     *
     * @param at the first one's place
     * @param element its number in the model
     */
    void drawMasters(OptimizerKernels kernels, long at, Tensor weights, long element) {
        CudaStream current = CudaStream.current(device);
        for (long from = 0; from < weights.elements(); from += PIECE) {
            long count = Math.min(PIECE, weights.elements() - from);
            try (Scope scope = Scope.open()) {
                Tensor remainders = Tensor.empty(device, DType.BFLOAT16, count); // 16 bits each
                kernels.drawRemainders(weights.narrow(0, from, count), remainders.address(), element + from);
                memory.copyFrom(current, remainders.address(), layout.remainder(at + from), count * SplitMasters.BYTES);
            }
        }
    }

    @Override
    public void close() {
        arrivals.close();
        departures.close();
        for (int i = 0; i < BUFFERS; i++) {
            arrived[i].close();
            updated[i].close();
            returned[i].close();
        }
        memory.close();
    }
}
