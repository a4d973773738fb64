package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Tensor;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import dev.tandem.testing.CudaTest;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.LayerOperations.Backward;
import dev.tandem.training.LayerOperations.Heads;
import dev.tandem.training.LayerOperations.Normed;
import java.util.stream.LongStream;
import org.jspecify.annotations.Nullable;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Each kernel of training by itself against libtorch's operations in float32 on the CPU, on the same BFLOAT16 numbers. */
@Gpu
class TrainingKernelsTest extends CudaTest {
    /** Of the largest number: what a few roundings to BFLOAT16 leave. */
    private static final double TOLERANCE = 1e-2;

    private static final String WIDE = """
            {"model_type":"llama","hidden_size":4160,"num_hidden_layers":1,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":256,
             "intermediate_size":1000,"vocab_size":515,"max_position_embeddings":512,"rope_theta":10000.0,
             "hidden_act":"gelu_pytorch_tanh"}""";

    /** Numbers on both devices. */
    private record Both(Tensor kernels, Tensor reference) {}

    private Both both(double deviation, long... shape) {
        return onBoth(normal(deviation, shape));
    }

    private Both floats(long... shape) {
        Tensor single = normalFloats(1, shape);
        return new Both(single, single.on(Device.cpu()).copy());
    }

    private @Nullable Both bothIf(boolean wanted, double deviation, long... shape) {
        return wanted ? both(deviation, shape) : null;
    }

    private static Both onBoth(Tensor x) {
        return new Both(x, x.on(Device.cpu()).to(DType.FLOAT32));
    }

    private static @Nullable Tensor kernels(@Nullable Both x) {
        return x == null ? null : x.kernels;
    }

    private static @Nullable Tensor reference(@Nullable Both x) {
        return x == null ? null : x.reference;
    }

    private static void compare(String what, Tensor found, Tensor expected) {
        compare(what, found, expected.on(CUDA), TOLERANCE);
    }

    private static ModelConfig config(String family) {
        return family.equals("wide") ? TinyModels.of(WIDE) : TinyModels.published(family);
    }

    @ParameterizedTest
    @CsvSource({"llama, 1", "llama, 300", "qwen2, 37", "qwen3, 67", "opt, 37", "opt, 300", "wide, 37"})
    void layers(String family, int tokens) {
        ModelConfig config = config(family);
        long[] lengths = tokens < 10 ? new long[] {tokens} : new long[] {tokens - 9, 9};
        Tensor positions = Tensor.of(CUDA, LongStream.of(lengths).flatMap(n -> LongStream.range(0, n)).toArray());
        try (TrainingKernels kernels = new TrainingKernels(config, CUDA);
                Decoder decoder = new Decoder(config, Device.cpu(), DType.FLOAT32)) {
            Tensor starts = Tensor.of(CUDA, 0L, lengths[0], (long) tokens).narrow(0, 0, lengths.length + 1L);
            LayerOperations found = new KernelOperations(kernels, positions, new FlashTrainingAttention(1, starts, lengths));
            LayerOperations expected = new TensorOperations(config, decoder.place(positions.on(Device.cpu()), tokens), lengths);
            String what = family + ", " + tokens + " tokens: ";
            norms(what, config, tokens, found, expected);
            heads(what, config, tokens, found, expected);
            activations(what, config, tokens, found, expected);
            Both x = both(1, tokens, config.hiddenSize());
            Both sums = floats(config.hiddenSize());
            found.addColumnSums(x.kernels, sums.kernels);
            expected.addColumnSums(x.reference, sums.reference);
            compare(what + "sums of columns", sums.kernels, sums.reference);
        }
    }

    private void norms(String what, ModelConfig config, int tokens, LayerOperations found, LayerOperations expected) {
        int width = config.hiddenSize();
        boolean layerNorm = config.norm() == Norm.LAYER;
        Both x = both(3, tokens, width);
        Both weight = both(1, width);
        Both bias = bothIf(layerNorm, 1, width);
        Tensor addend = both(1, tokens, width).kernels;
        Normed added = found.norm(x.kernels, addend, weight.kernels, kernels(bias));
        compare(what + "residual sum", added.sum(), x.reference.add(addend.on(Device.cpu()).to(DType.FLOAT32)));
        Both sum = onBoth(added.sum());
        Normed again = expected.norm(sum.reference, null, weight.reference, reference(bias));
        compare(what + "norm of a sum", added.normed(), again.normed());
        compare(what + "norm", found.norm(sum.kernels, null, weight.kernels, kernels(bias)).normed(), again.normed());

        Both byNormed = both(1, tokens, width);
        Both byOthers = both(0.3, tokens, width);
        Both weightGradient = floats(width);
        Both biasGradient = layerNorm ? floats(width) : null;
        Backward back = found.normBackward(byNormed.kernels, sum.kernels, added.statistics(), weight.kernels, kernels(bias),
                byOthers.kernels, weightGradient.kernels, kernels(biasGradient));
        Backward wanted = expected.normBackward(byNormed.reference, sum.reference, again.statistics(), weight.reference, reference(bias),
                byOthers.reference, weightGradient.reference, reference(biasGradient));
        compare(what + "gradient of a sum", back.gradient(), wanted.gradient());
        compare(what + "norm, again", back.again(), wanted.again());
        compare(what + "gradient of a norm's weight", weightGradient.kernels, weightGradient.reference);
        if (biasGradient != null) {
            compare(what + "gradient of a norm's bias", biasGradient.kernels, biasGradient.reference);
        }
    }

    private void heads(String what, ModelConfig config, int tokens, LayerOperations found, LayerOperations expected) {
        int dim = config.headDim();
        long width = (config.heads() + 2L * config.kvHeads()) * dim;
        Both qkv = both(1, tokens, width);
        Both bias = bothIf(config.qkvBias(), 1, width);
        Both queryNorm = bothIf(config.qkNorm(), 1, dim);
        Both keyNorm = bothIf(config.qkNorm(), 1, dim);
        Heads rotated = found.heads(qkv.kernels, kernels(bias), kernels(queryNorm), kernels(keyNorm));
        Heads wanted = expected.heads(qkv.reference, reference(bias), reference(queryNorm), reference(keyNorm));
        compare(what + "queries", rotated.query(), wanted.query());
        compare(what + "keys", rotated.key(), wanted.key());
        compare(what + "values", rotated.value(), wanted.value());

        Both byQuery = both(1, tokens, config.heads(), dim);
        Both byKey = both(1, tokens, config.kvHeads(), dim);
        Both byValue = both(1, tokens, config.kvHeads(), dim);
        Both queryGradient = config.qkNorm() ? floats(dim) : null;
        Both keyGradient = config.qkNorm() ? floats(dim) : null;
        Tensor back = found.headsBackward(new Heads(byQuery.kernels, byKey.kernels, byValue.kernels), qkv.kernels, kernels(bias),
                kernels(queryNorm), kernels(keyNorm), kernels(queryGradient), kernels(keyGradient));
        compare(what + "gradient of queries, keys, values", back,
                expected.headsBackward(new Heads(byQuery.reference, byKey.reference, byValue.reference), qkv.reference, reference(bias),
                        reference(queryNorm), reference(keyNorm), reference(queryGradient), reference(keyGradient)));
        if (queryGradient != null && keyGradient != null) {
            compare(what + "gradient of the norm of queries", queryGradient.kernels, queryGradient.reference);
            compare(what + "gradient of the norm of keys", keyGradient.kernels, keyGradient.reference);
        }
    }

    private void activations(String what, ModelConfig config, int tokens, LayerOperations found, LayerOperations expected) {
        long inner = config.intermediateSize();
        long width = config.gatedMlp() ? 2 * inner : inner;
        Both widened = both(2, tokens, width);
        Both bias = bothIf(config.mlpBias(), 1, width);
        Both byActivated = both(1, tokens, inner);
        compare(what + "activation", found.activate(widened.kernels, kernels(bias)), expected.activate(widened.reference, reference(bias)));
        Backward back = found.activateBackward(widened.kernels, kernels(bias), byActivated.kernels);
        Backward wanted = expected.activateBackward(widened.reference, reference(bias), byActivated.reference);
        compare(what + "gradient of an activation", back.gradient(), wanted.gradient());
        compare(what + "activation, again", back.again(), wanted.again());
    }

    /** With probabilities that are kept, and with logits that are computed again in chunks; rows of many tokens are shared by thread blocks. */
    @ParameterizedTest
    @CsvSource({"1, 151936, 64", "37, 515, 576", "19, 151939, 64"})
    void logprobHeads(int rows, int vocabulary, int width) {
        ModelConfig config = ModelConfig.llama(vocabulary, 576, 1, 9, 3, 1536, 128);
        Both matrix = both(0.1, vocabulary, width);
        Both hidden = both(1, rows, width);
        Tensor targets = Tensor.of(CUDA, LongStream.range(0, rows).map(i -> i * (vocabulary / rows)).toArray());
        Tensor targetsOnHost = targets.on(Device.cpu());
        Both byLogprob = floats(rows);
        Both byEntropy = floats(rows);
        try (TrainingKernels kernels = new TrainingKernels(config, CUDA)) {
            for (long logitBytes : new long[] {4L * (vocabulary + 7) * Math.max(1, rows / 9), 1 << 30}) {
                TrainerOptions options = TrainerOptions.defaults().memory(0, logitBytes);
                for (boolean entropies : new boolean[] {false, true}) {
                    String what = rows + " rows of " + vocabulary + ", " + logitBytes + " bytes, entropies " + entropies + ": ";
                    LogprobHead found = new KernelLogprobHead(kernels, matrix.kernels, 0.8, hidden.kernels, targets, options);
                    LogprobHead expected = new TensorLogprobHead(matrix.reference, 0.8, hidden.reference, targetsOnHost, 1 << 30);
                    Both entropy = floats(rows);
                    Both byMatrix = floats(vocabulary, width);
                    compare(what + "log-probs", found.forward(entropy.kernels), expected.forward(entropy.reference));
                    compare(what + "entropies", entropy.kernels, entropy.reference);
                    compare(what + "gradient of hidden states",
                            found.backward(byLogprob.kernels, entropies ? byEntropy.kernels : null, byMatrix.kernels),
                            expected.backward(byLogprob.reference, entropies ? byEntropy.reference : null, byMatrix.reference));
                    compare(what + "gradient of the matrix", byMatrix.kernels, byMatrix.reference);
                }
            }
        }
    }
}
