package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.generation.StepLayout.Field;

/**
 * A step's input on its way to the device: laid out in pinned host memory ({@link StepLayout}), copied to the same offsets of a buffer
 * on the device, whose addresses never change.
 *
 * <p>There are as many pinned halves as steps may run, so the next step is laid out while the last one's copy may still wait; the device's
 * side is one, because copies and kernels follow each other on one stream. The owner closes it when nothing runs.
 */
final class CudaStepInput implements AutoCloseable {
    private final Device device;
    private final StepLayout layout;
    private final Tensor buffer;
    private final PinnedMemory[] pinned;
    private int half;

    /**
     * @param tableWidth most blocks of a row
     * @param tileQueries tokens of a tile of the prefill attention
     * @param halves how many steps may run
     */
    CudaStepInput(Device device, GeneratorOptions options, int tableWidth, int tileQueries, int halves) {
        this.device = device;
        layout = new StepLayout(options, tableWidth, tileQueries);
        try (Scope scope = Scope.open()) {
            buffer = Tensor.zeros(device, DType.INT32, layout.bytes() / 4).keep();
        }
        pinned = new PinnedMemory[halves];
        for (int i = 0; i < halves; i++) {
            pinned[i] = new PinnedMemory(device, layout.bytes());
            pinned[i].segment().fill((byte) 0);
        }
    }

    /** Lays out a plan and starts its copy to the device: one piece, or two when the step has prompts or held back tokens. */
    void fill(StepPlan plan, RequestTable requests, long seed) {
        half = (half + 1) % pinned.length;
        layout.fill(pinned[half].segment(), plan, requests, seed);
        pinned[half].copyTo(device, buffer.address(), 0, layout.decodeBytes());
        if (!layout.decodesOnly() || layout.edits()) {
            long rest = layout.at(Field.TOKENS);
            pinned[half].copyTo(device, buffer.address(), rest, layout.bytes() - rest);
        }
    }

    /** {@return what the latest step holds} */
    StepLayout layout() {
        return layout;
    }

    /** {@return the address of a field on the device} */
    long address(Field field) {
        return buffer.address() + layout.at(field);
    }

    /** {@return INT32, the tokens of the latest step whose logits are wanted} */
    Tensor wanted() {
        return buffer.narrow(0, layout.at(Field.WANTED) / 4, layout.wantedCount());
    }

    /** {@return the address of a count on the device} */
    long countAddress(int place) {
        return address(Field.COUNTS) + 4L * place;
    }

    @Override
    public void close() {
        buffer.close();
        for (PinnedMemory memory : pinned) {
            memory.close();
        }
    }
}
