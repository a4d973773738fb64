package dev.tandem.training;

import dev.tandem.device.Tensor;
import dev.tandem.model.Attention;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * Causal attention within each of several packed sequences. Sequences of one length are attended in one call, others one by one:
 * no padding, and no mask.
 */
final class PackedAttention implements Attention {
    private final long[] lengths;
    private final boolean even;
    private final double scale;

    PackedAttention(long[] lengths, int headDim) {
        this.lengths = lengths;
        even = Arrays.stream(lengths).distinct().count() == 1;
        scale = 1 / Math.sqrt(headDim);
    }

    @Override
    public Tensor attend(int layer, Tensor query, Tensor key, Tensor value) {
        long heads = query.size(1);
        Tensor fullKey = repeat(key, heads);
        Tensor fullValue = repeat(value, heads);
        long width = heads * query.size(2);
        if (even) {
            return attend(query, fullKey, fullValue, lengths.length, lengths[0]).reshape(query.size(0), width);
        }
        // One split for all: its gradient is one concatenation, where narrowing each sequence would zero-fill a full tensor each.
        List<Tensor> queries = query.split(0, lengths);
        List<Tensor> keys = fullKey.split(0, lengths);
        List<Tensor> values = fullValue.split(0, lengths);
        List<Tensor> results = new ArrayList<>();
        for (int i = 0; i < lengths.length; i++) {
            results.add(attend(queries.get(i), keys.get(i), values.get(i), 1, lengths[i]).reshape(lengths[i], width));
        }
        return Tensor.concatenate(0, results);
    }

    private Tensor attend(Tensor query, Tensor key, Tensor value, long batch, long length) {
        return heads(query, batch, length)
                .attention(heads(key, batch, length), heads(value, batch, length), null, true, scale)
                .transpose(1, 2);
    }

    /** [T, H, D] → [batch, H, length, D]. */
    private static Tensor heads(Tensor x, long batch, long length) {
        return x.reshape(batch, length, x.size(1), x.size(2)).transpose(1, 2);
    }

    /** Each KV head serves a run of query heads (grouped-query attention). */
    private static Tensor repeat(Tensor x, long heads) {
        long kvHeads = x.size(1);
        return kvHeads == heads
                ? x
                : x.unsqueeze(2).expand(x.size(0), kvHeads, heads / kvHeads, x.size(2)).reshape(x.size(0), heads, x.size(2));
    }
}
