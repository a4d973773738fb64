package dev.tandem.benchmarks;

import dev.tandem.ModelRank;
import dev.tandem.device.Device;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.Attention;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.WeightGroup;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.bytedeco.pytorch.AdamW;
import org.bytedeco.pytorch.AdamWOptions;
import org.bytedeco.pytorch.TensorVector;
import org.bytedeco.pytorch.global.torch;

/** The same decoder and weights, used as a textbook would: one graph for the whole model, all logits, no KV cache. */
final class PlainModel {
    private PlainModel() {}

    /** The likeliest next token, from a forward pass over the whole sequence. */
    static int greedy(ModelRank rank, int[] tokens) {
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            Tensor logits = logits(rank, rank.arena().groups(), List.of(tokens), true);
            float[] row = logits.toFloats();
            int best = 0;
            for (int i = 1; i < row.length; i++) {
                best = row[i] > row[best] ? i : best;
            }
            return best;
        }
    }

    private static Tensor logits(ModelRank rank, List<WeightGroup> weights, List<int[]> sequences, boolean lastOnly) {
        ModelConfig config = rank.arena().layout().config();
        int batch = sequences.size();
        int length = sequences.getFirst().length;
        Device device = rank.rank().device();
        int[] tokens = sequences.stream().flatMapToInt(Arrays::stream).toArray();
        int[] positions = new int[tokens.length];
        Arrays.setAll(positions, i -> i % length);
        Decoder decoder = rank.decoder();
        Decoder.Placement placement = decoder.place(Tensor.of(device, positions), length);
        Attention attention = (layer, q, k, v) -> {
            Tensor result = heads(q, batch, length, q.size(1)).attention(heads(k, batch, length, q.size(1)),
                    heads(v, batch, length, q.size(1)), null, true, 1 / Math.sqrt(config.headDim()));
            return result.transpose(1, 2).reshape(tokens.length, q.size(1) * q.size(2));
        };
        Tensor x = decoder.embed(weights.getFirst(), Tensor.of(device, tokens), placement);
        for (int layer = 0; layer < config.layers(); layer++) {
            x = decoder.layer(layer, weights.get(layer + 1), x, placement, attention, null);
        }
        Tensor wanted = lastOnly ? x.narrow(0, tokens.length - 1L, 1) : x;
        Tensor matrix = config.tiedEmbeddings()
                ? weights.getFirst().weight(ParameterRole.EMBED_TOKENS)
                : weights.getLast().weight(ParameterRole.LM_HEAD);
        return decoder.finish(weights.getLast(), wanted).linear(matrix, null);
    }

    private static Tensor heads(Tensor x, long batch, long length, long heads) {
        long kvHeads = x.size(1);
        Tensor all = kvHeads == heads
                ? x
                : x.unsqueeze(2).expand(x.size(0), kvHeads, heads / kvHeads, x.size(2)).reshape(x.size(0), heads, x.size(2));
        return all.reshape(batch, length, heads, x.size(2)).transpose(1, 2);
    }

    /** Forward, backward, clipping and libtorch's AdamW over one graph. */
    static final class Training implements AutoCloseable {
        private final ModelRank rank;
        private final Scope scope = Scope.open();
        private final List<WeightGroup> weights = new ArrayList<>();
        private final TensorVector parameters = new TensorVector();
        private final AdamW optimizer;

        Training(ModelRank rank) {
            this.rank = rank;
            for (WeightGroup group : rank.arena().groups()) {
                WeightGroup leaves = group.differentiable();
                weights.add(leaves);
                for (ParameterRole role : ParameterRole.values()) {
                    Tensor leaf = leaves.find(role);
                    if (leaf != null) {
                        parameters.push_back(leaf.nativeTensor());
                    }
                }
            }
            optimizer = new AdamW(parameters, new AdamWOptions(1e-6));
        }

        void step(List<int[]> sequences) {
            try (Scope inner = Scope.open()) {
                int length = sequences.getFirst().length;
                List<int[]> inputs = sequences.stream().map(s -> Arrays.copyOf(s, length - 1)).toList();
                int[] targets = sequences.stream().flatMapToInt(s -> Arrays.stream(s, 1, length)).toArray();
                Tensor logprobs = logits(rank, weights, inputs, false).logSoftmax(-1);
                Tensor chosen = logprobs.gather(1, Tensor.of(rank.rank().device(), targets).unsqueeze(1));
                chosen.mean().neg().backward();
                torch.clip_grad_norm_(parameters, 1.0);
                optimizer.step();
                optimizer.zero_grad();
            }
        }

        @Override
        public void close() {
            optimizer.close();
            scope.close();
        }
    }
}
