package dev.tandem.generation;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import dev.tandem.model.Attention;
import dev.tandem.model.ModelConfig;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Attention of one step over KV pages with libtorch's operations (PagedAttention, Kwon et al. 2023).
 *
 * <p>Each layer first writes the step's keys and values to their pages, then gathers the pages that its rows attend to. Decoding
 * rows go together in runs that fit the cache, padded to the longest of the run; query heads that share a KV head are folded into the
 * query dimension, so keys and values are read once for all of them. A fresh prompt attends to its own keys and values and gathers
 * nothing; the continuation of a prompt gathers what came before. Tables and masks are made once per step and used in all layers.
 */
final class PagedAttention implements Attention {
    /** Gathered keys and values of a run of rows should stay in the processor's cache until they are multiplied. */
    private static final long RUN_BYTES = 4 << 20;

    private final ModelConfig config;
    private final KvCache cache;
    private final double scale;
    private final Runnable written;
    private final Tensor blocks;
    private final Tensor offsets;
    private final List<Part> parts = new ArrayList<>();

    /** Consecutive tokens of the batch that are attended in one call. */
    private sealed interface Part {
        /** Decoding rows: one token each. {@code table} INT64 [rows × pages], {@code mask} [rows, 1, 1, pages × page tokens]. */
        record Decode(int rows, int pages, Tensor table, Tensor mask) implements Part {}

        /** Whole prompts of one length. */
        record Fresh(int rows, int length) implements Part {}

        /** Several tokens behind a context. {@code mask} [length, context + length]. */
        record Continued(int length, int end, Tensor table, Tensor mask) implements Part {}
    }

    /** @param written called in each layer when the keys and values of this batch are in their pages, before any row attends */
    PagedAttention(ModelConfig config, KvCache cache, StepPlan plan, StepBatch batch, RequestTable requests, Device device,
            DType dtype, Runnable written) {
        this.written = written;
        this.config = config;
        this.cache = cache;
        scale = 1 / Math.sqrt(config.headDim());
        blocks = batch.blocks(device);
        offsets = batch.offsets(device);
        int at = 0;
        while (at < batch.decodeRows()) {
            int rows = runLength(plan, batch, at, dtype);
            parts.add(decode(plan, batch, requests, at, rows, device, dtype));
            at += rows;
        }
        while (at < batch.rows()) {
            int row = batch.planRow(at);
            int length = plan.granted[row];
            if (plan.start[row] > 0) {
                parts.add(continued(plan, row, requests, device, dtype));
                at++;
                continue;
            }
            int rows = 1;
            while (at + rows < batch.rows() && plan.start[batch.planRow(at + rows)] == 0
                    && plan.granted[batch.planRow(at + rows)] == length) {
                rows++;
            }
            parts.add(new Part.Fresh(rows, length));
            at += rows;
        }
    }

    /** How many decoding rows from {@code at} on are gathered together; contexts grow along the batch. */
    private int runLength(StepPlan plan, StepBatch batch, int at, DType dtype) {
        long tokenBytes = 2L * config.kvHeads() * config.headDim() * dtype.bytes();
        int rows = 1;
        while (at + rows < batch.decodeRows()) {
            long longest = plan.start[batch.planRow(at + rows)] + 1L;
            if (longest * (rows + 1) * tokenBytes > RUN_BYTES) {
                break;
            }
            rows++;
        }
        return rows;
    }

    private Part decode(StepPlan plan, StepBatch batch, RequestTable requests, int at, int rows, Device device, DType dtype) {
        int size = cache.blockSize();
        int longest = plan.start[batch.planRow(at + rows - 1)] + 1;
        int pages = (longest + size - 1) / size;
        Tensor table = Tensor.zeros(Device.cpu(), DType.INT64, (long) rows * pages);
        long width = (long) pages * size;
        Tensor mask = Tensor.zeros(Device.cpu(), DType.FLOAT32, rows, 1, 1, width);
        MemorySegment ids = table.memory();
        MemorySegment bias = mask.memory();
        for (int i = 0; i < rows; i++) {
            int row = batch.planRow(at + i);
            int length = plan.start[row] + 1;
            int[] own = requests.blocks[plan.slot[row]];
            for (int page = 0; page * size < length; page++) {
                ids.setAtIndex(ValueLayout.JAVA_LONG, (long) i * pages + page, own[page]);
            }
            for (long p = length; p < width; p++) {
                bias.setAtIndex(ValueLayout.JAVA_FLOAT, i * width + p, Float.NEGATIVE_INFINITY);
            }
        }
        return new Part.Decode(rows, pages, table.on(device), mask.to(dtype).on(device));
    }

    private Part continued(StepPlan plan, int row, RequestTable requests, Device device, DType dtype) {
        int size = cache.blockSize();
        int start = plan.start[row];
        int length = plan.granted[row];
        int end = start + length;
        int[] own = requests.blocks[plan.slot[row]];
        int pages = (end + size - 1) / size;
        long[] table = new long[pages];
        for (int page = 0; page < pages; page++) {
            table[page] = own[page];
        }
        Tensor mask = Tensor.zeros(Device.cpu(), DType.FLOAT32, length, end);
        MemorySegment bias = mask.memory();
        for (int i = 0; i < length; i++) {
            for (int p = start + i + 1; p < end; p++) {
                bias.setAtIndex(ValueLayout.JAVA_FLOAT, (long) i * end + p, Float.NEGATIVE_INFINITY);
            }
        }
        return new Part.Continued(length, end, Tensor.of(device, table), mask.to(dtype).on(device));
    }

    @Override
    public Tensor attend(int layer, Tensor query, Tensor key, Tensor value) {
        long tokens = query.size(0);
        long kvWidth = (long) config.kvHeads() * config.headDim();
        long width = (long) config.heads() * config.headDim();
        cache.keys(layer).indexPutInPlace(blocks, offsets, key.reshape(tokens, kvWidth));
        cache.values(layer).indexPutInPlace(blocks, offsets, value.reshape(tokens, kvWidth));
        written.run();
        List<Tensor> results = new ArrayList<>(parts.size());
        long at = 0;
        for (Part part : parts) {
            switch (part) {
                case Part.Decode p -> {
                    results.add(decode(layer, p, query.narrow(0, at, p.rows)).reshape(p.rows, width));
                    at += p.rows;
                }
                case Part.Fresh p -> {
                    long n = (long) p.rows * p.length;
                    results.add(causal(query.narrow(0, at, n), key.narrow(0, at, n), value.narrow(0, at, n), p.rows, p.length,
                            p.length, null).reshape(n, width));
                    at += n;
                }
                case Part.Continued p -> {
                    Tensor keys = gather(cache.keys(layer), p.table, p.end);
                    Tensor values = gather(cache.values(layer), p.table, p.end);
                    results.add(causal(query.narrow(0, at, p.length), keys, values, 1, p.length, p.end, p.mask)
                            .reshape(p.length, width));
                    at += p.length;
                }
            }
        }
        return results.size() == 1 ? results.getFirst() : Tensor.concatenate(0, results);
    }

    private Tensor decode(int layer, Part.Decode part, Tensor query) {
        long group = config.heads() / config.kvHeads();
        long length = (long) part.pages * cache.blockSize();
        Tensor q = query.reshape(part.rows, config.kvHeads(), group, config.headDim());
        Tensor k = cache.keys(layer).indexSelect(0, part.table)
                .reshape(part.rows, length, config.kvHeads(), config.headDim()).transpose(1, 2);
        Tensor v = cache.values(layer).indexSelect(0, part.table)
                .reshape(part.rows, length, config.kvHeads(), config.headDim()).transpose(1, 2);
        return q.attention(k, v, part.mask, false, scale);
    }

    private Tensor gather(Tensor pages, Tensor table, int length) {
        return pages.indexSelect(0, table).reshape(-1, config.kvHeads(), config.headDim()).narrow(0, 0, length);
    }

    /** Attention of {@code rows} sequences of {@code queries} tokens to {@code keys} tokens each; causal unless there is a mask. */
    private Tensor causal(Tensor query, Tensor key, Tensor value, long rows, long queries, long keys, @Nullable Tensor mask) {
        Tensor q = query.reshape(rows, queries, config.heads(), config.headDim()).transpose(1, 2);
        return q.attention(repeat(key, rows, keys), repeat(value, rows, keys), mask, mask == null, scale).transpose(1, 2);
    }

    private Tensor repeat(Tensor x, long rows, long length) {
        long group = config.heads() / config.kvHeads();
        Tensor heads = x.reshape(rows, length, config.kvHeads(), config.headDim()).transpose(1, 2);
        return group == 1
                ? heads
                : heads.unsqueeze(2).expand(rows, config.kvHeads(), group, length, config.headDim())
                        .reshape(rows, config.heads(), length, config.headDim());
    }
}
