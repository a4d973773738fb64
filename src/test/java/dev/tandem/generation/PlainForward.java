package dev.tandem.generation;

import dev.tandem.device.Device;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.Attention;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.WeightArena;

/** One sequence through the decoder with textbook attention: no pages, no batch, no cache. */
final class PlainForward {
    private PlainForward() {}

    /** The logits that follow each of the tokens. */
    static float[][] logits(WeightArena arena, Decoder decoder, int[] tokens) {
        ModelConfig config = arena.layout().config();
        int n = tokens.length;
        Device cpu = Device.cpu();
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            Attention attention = (layer, query, key, value) -> causal(config, query, key, value, n);
            Decoder.Placement placement = decoder.place(Tensor.range(cpu, n), n);
            Tensor x = decoder.embed(arena.embedding(), Tensor.of(cpu, tokens), placement);
            for (int layer = 0; layer < config.layers(); layer++) {
                x = decoder.layer(layer, arena.layer(layer), x, placement, attention, null);
            }
            float[] flat = decoder.finish(arena.head(), x).linear(arena.logitMatrix(), null).toFloats();
            float[][] rows = new float[n][config.vocabSize()];
            for (int i = 0; i < n; i++) {
                System.arraycopy(flat, i * config.vocabSize(), rows[i], 0, config.vocabSize());
            }
            return rows;
        }
    }

    /** Softmax of scaled products, head by head. */
    private static Tensor causal(ModelConfig config, Tensor query, Tensor key, Tensor value, int n) {
        float[] future = new float[n * n];
        for (int i = 0; i < n; i++) {
            for (int j = i + 1; j < n; j++) {
                future[i * n + j] = Float.NEGATIVE_INFINITY;
            }
        }
        Tensor mask = Tensor.of(Device.cpu(), future).reshape(n, n);
        Tensor[] heads = new Tensor[config.heads()];
        for (int h = 0; h < heads.length; h++) {
            int kv = h * config.kvHeads() / config.heads();
            Tensor scores = query.select(1, h).matmul(key.select(1, kv).transpose(0, 1))
                    .mul(1 / Math.sqrt(config.headDim())).add(mask);
            heads[h] = scores.softmax(-1).matmul(value.select(1, kv));
        }
        return Tensor.concatenate(1, heads);
    }
}
