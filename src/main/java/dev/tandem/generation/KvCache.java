package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.device.VirtualMemory;
import dev.tandem.model.ModelConfig;
import java.util.ArrayList;
import java.util.List;

/**
 * Keys and values of all sequences on one device, in pages of a fixed number of tokens.
 *
 * <p>All pages lie in one range of addresses that is reserved for the largest cache and backed by memory in part: page i of all
 * layers is one contiguous piece, so the cache grows by mapping its end and moves nothing. {@link #wake} backs as many pages as were
 * of use before, {@link #require} more when a step needs them, and {@link #sleep} gives all memory back. Whoever holds memory that can
 * wait elsewhere is asked to make room when, and only when, so many pages are needed ({@link #askForRoom}). The tensors here stay valid
 * as views, but only backed pages may be read: {@link #requireAwake} is asked before each step. Block 0 is nobody's, and pads tables.
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
    /** How many pages may be backed until the cache sleeps. */
    private int room;
    /** How many pages the next wake backs. */
    private int first = 1;
    /** Bytes that may be backed before {@link #makeRoom} is called. */
    private long free = Long.MAX_VALUE;
    private Runnable makeRoom = () -> {};

    private int blocks;
    /** Most pages that a step required since the cache woke, 0 before the first step. */
    private int used;

    /**
     * @param maxBlocks most pages
     * @param range addresses for so many pages; closed with this
     */
    KvCache(ModelConfig config, DType dtype, int blockSize, int maxBlocks, VirtualMemory range, DeviceMemory memory) {
        this.memory = memory;
        this.blockSize = blockSize;
        this.maxBlocks = maxBlocks;
        this.range = range;
        clears = !memory.device().isCpu();
        blockBytes = blockBytes(config, dtype, blockSize);
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

    /**
     * Makes room for {@code count} pages and backs as many of them as were used before the last sleep, at least one.
     *
     * @throws TandemException when there is not enough memory; the cache sleeps on then
     */
    void wake(int count) {
        if (count > maxBlocks) {
            throw new IllegalArgumentException(count + " KV blocks asked for, addresses are reserved for " + maxBlocks);
        }
        if (blocks > 0) {
            throw new IllegalStateException("the KV cache is awake already");
        }
        back(Math.min(first, count), count);
        room = count;
    }

    /** Has {@code makeRoom} called each time before more than {@code free} bytes are backed, for the first time since the cache woke. */
    void askForRoom(long free, Runnable makeRoom) {
        this.free = free;
        this.makeRoom = makeRoom;
    }

    /** Tells how many pages the next {@link #wake} backs, whatever was used before. */
    void expect(int count) {
        first = count;
    }

    /**
     * Sees to it that the first {@code count} pages, at most as many as there is room for, are backed. Where they are not, an eighth is
     * added to what is, so that a growing cache maps in few pieces.
     *
     * @throws TandemException when there is not enough memory; nothing has changed then
     */
    void require(int count) {
        if (count > blocks) {
            back(Math.min(room, Math.max(count, blocks + blocks / 8)), room);
        }
        used = Math.max(used, count);
    }

    /** Backs at least {@code count} pages, as many as the units of memory hold that this takes, but at most {@code most}. */
    private void back(int count, int most) {
        long unit = range.granularity();
        long now = range.committed();
        long target = Math.ceilDiv(count * blockBytes, unit) * unit;
        if (target > free && now <= free) {
            makeRoom.run();
        }
        try {
            range.commit(now, target - now);
        } catch (TandemException e) {
            throw new TandemException("no memory for more KV pages, %.1f MiB beside %.1f: %s; held by this rank:%n%s".formatted(
                    (target - now) / 0x1p20, now / 0x1p20, e.getMessage(), memory.table()), e);
        }
        memory.add(Use.KV, target - now);
        int backed = (int) Math.min(most, target / blockBytes);
        if (clears) {
            clear(blocks, backed);
        }
        blocks = backed;
    }

    /** Gives all memory back. Where no step ran, the next wake backs as many pages as this one did. */
    void sleep() {
        long now = range.committed();
        range.release(0, now);
        memory.add(Use.KV, -now);
        first = used > 0 ? used : first;
        blocks = 0;
        used = 0;
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

    /** Zeroes all backed pages, so that nothing that is not finite can be read from a page that is used again. */
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
