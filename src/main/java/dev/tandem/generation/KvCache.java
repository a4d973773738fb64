package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.VirtualMemory;
import dev.tandem.model.ModelConfig;
import java.util.ArrayList;
import java.util.List;

/**
 * Keys and values of all sequences on one device, in pages of a fixed number of tokens.
 *
 * <p>All pages lie in one range of addresses that is reserved for the largest cache and backed by memory in part: page i of all
 * layers is one contiguous piece, so growing and shrinking the cache maps and unmaps its end and moves nothing. {@link #sleep} gives
 * all memory back and {@link #wake} brings it at the same addresses; the tensors here stay valid as views, but must not be read
 * while the cache sleeps: {@link #requireAwake} is asked before each step. Block 0 is nobody's, and pads tables.
 *
 * <p>Confined to its rank's thread. The owner closes it.
 */
final class KvCache implements AutoCloseable {
    private final VirtualMemory range;
    private final DeviceMemory memory;
    private final int blockSize;
    private final int maxBlocks;
    private final long blockBytes;
    private final List<Tensor> keys = new ArrayList<>();
    private final List<Tensor> values = new ArrayList<>();
    private final Tensor pages;
    private boolean clears;
    private int blocks;

    /** @param maxBlocks for how many pages addresses are reserved */
    KvCache(ModelConfig config, Device device, DType dtype, int blockSize, int maxBlocks, DeviceMemory memory) {
        this.memory = memory;
        this.blockSize = blockSize;
        this.maxBlocks = maxBlocks;
        clears = !device.isCpu();
        blockBytes = blockBytes(config, dtype, blockSize);
        range = VirtualMemory.reserve(device, Math.multiplyExact(blockBytes, maxBlocks));
        long width = (long) config.kvHeads() * config.headDim();
        long slab = blockSize * width;
        long page = 2 * config.layers() * slab;
        try (Scope scope = Scope.open()) {
            pages = range.tensor(dtype, maxBlocks, page).keep();
            for (int layer = 0; layer < config.layers(); layer++) {
                long[] shape = {maxBlocks, blockSize, width};
                long[] strides = {page, width, 1};
                keys.add(pages.strided(shape, strides, 2 * layer * slab).keep());
                values.add(pages.strided(shape, strides, (2 * layer + 1) * slab).keep());
            }
        }
    }

    /** {@return the bytes of one page: keys and values of {@code blockSize} tokens in all layers} */
    static long blockBytes(ModelConfig config, DType dtype, int blockSize) {
        return 2L * config.layers() * config.kvHeads() * config.headDim() * blockSize * dtype.bytes();
    }

    /** {@return tokens of a page} */
    int blockSize() {
        return blockSize;
    }

    /** {@return pages that are backed by memory} */
    int blocks() {
        return blocks;
    }

    /** {@return for how many pages addresses are reserved} */
    int maxBlocks() {
        return maxBlocks;
    }

    /** {@return the address of the first page} */
    long address() {
        return range.address();
    }

    /** Tells that whoever reads pages skips what was never written, so that new pages need not be zeroed. */
    void readersSkipUnwritten() {
        clears = false;
    }

    /** Backs the first {@code count} pages with memory. A failure changes nothing. */
    void wake(int count) {
        if (count > maxBlocks) {
            throw new IllegalArgumentException(count + " KV blocks asked for, addresses are reserved for " + maxBlocks);
        }
        long target = mapped(count);
        long now = range.committed();
        if (target > now) {
            range.commit(now, target - now);
        } else if (target < now) {
            range.release(target, now - target);
        }
        memory.add(Use.KV, target - now);
        if (clears && count > blocks) {
            clear(blocks, count);
        }
        blocks = count;
    }

    /** Gives all memory back. */
    void sleep() {
        wake(0);
    }

    private long mapped(int count) {
        long unit = range.granularity();
        return (count * blockBytes + unit - 1) / unit * unit;
    }

    /** @throws IllegalStateException when the cache sleeps */
    void requireAwake() {
        if (blocks == 0) {
            throw new IllegalStateException("the KV cache sleeps: wake the engine before generating");
        }
    }

    /** {@return the keys of a layer, [pages, page tokens, KV heads × head size]} */
    Tensor keys(int layer) {
        return keys.get(layer);
    }

    /** {@return the values of a layer, as {@link #keys}} */
    Tensor values(int layer) {
        return values.get(layer);
    }

    /** Copies whole pages, all layers. */
    void copy(int[] source, int[] target, int count) {
        try (Scope scope = Scope.open()) {
            for (int i = 0; i < count; i++) {
                pages.select(0, target[i]).copyInPlace(pages.select(0, source[i]));
            }
        }
    }

    /** Zeroes all pages, so that nothing that is not finite can be read from a page that is used again. */
    void clear() {
        clear(0, blocks);
    }

    private void clear(int from, int to) {
        try (Scope scope = Scope.open()) {
            pages.narrow(0, from, to - from).fillInPlace(0);
        }
    }

    @Override
    public void close() {
        sleep();
        keys.forEach(Tensor::close);
        values.forEach(Tensor::close);
        pages.close();
        range.close();
    }
}
