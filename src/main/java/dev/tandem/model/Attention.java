package dev.tandem.model;

import dev.tandem.device.Tensor;

/** How the tokens of a step attend: over KV pages in generation, within packed sequences in training. */
@FunctionalInterface
public interface Attention {
    /**
     * Attends in one layer.
     *
     * @param layer the layer, from 0
     * @param query [tokens, heads, head size], rotated
     * @param key [tokens, KV heads, head size], rotated
     * @param value [tokens, KV heads, head size]
     * @return [tokens, heads × head size]
     */
    Tensor attend(int layer, Tensor query, Tensor key, Tensor value);
}
