package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Operator;
import dev.tandem.device.Tensor;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.Norm;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/** The operations of a layer by libtorch's, on the CPU: the reference of Tandem's kernels. Statistics are computed in float32. */
final class TensorOperations implements LayerOperations {
    private static final Operator ATTENTION = Operator.named("aten::_scaled_dot_product_flash_attention_for_cpu");
    private static final Operator ATTENTION_BACKWARD = Operator.named("aten::_scaled_dot_product_flash_attention_for_cpu_backward");
    private static final Operator SILU_BACKWARD = Operator.named("aten::silu_backward");
    private static final Operator THRESHOLD_BACKWARD = Operator.named("aten::threshold_backward");
    private static final Operator GELU_BACKWARD = Operator.named("aten::gelu_backward");

    private final ModelConfig config;
    private final Decoder.Placement placement;
    private final long[] lengths;
    private final double scale;

    /** @param lengths of the sequences that are packed one after the other */
    TensorOperations(ModelConfig config, Decoder.Placement placement, long[] lengths) {
        this.config = config;
        this.placement = placement;
        this.lengths = lengths;
        scale = 1 / Math.sqrt(config.headDim());
    }

    // ---- products -------------------------------------------------------------------------------------------------------

    @Override
    public Tensor multiply(Tensor x, Tensor weight) {
        return x.linear(weight, null);
    }

    @Override
    public Tensor multiplyBackward(Tensor byProduct, Tensor weight) {
        return byProduct.matmul(weight);
    }

    // ---- norms ----------------------------------------------------------------------------------------------------------

    @Override
    public Normed norm(Tensor x, @Nullable Tensor addend, @Nullable Tensor weight, @Nullable Tensor bias) {
        Tensor sum = addend == null ? x : x.add(addend);
        Tensor centred = centred(sum.to(DType.FLOAT32));
        Tensor statistics = centred.square().sum(-1).mul(1.0 / sum.size(-1)).add(config.normEps()).sqrt().unsqueeze(-1);
        return new Normed(sum, normAgain(sum, weight, bias), statistics);
    }

    private Tensor normAgain(Tensor sum, @Nullable Tensor weight, @Nullable Tensor bias) {
        return config.norm() == Norm.LAYER
                ? sum.layerNorm(weight, bias, config.normEps())
                : sum.rmsNorm(Objects.requireNonNull(weight), config.normEps());
    }

    private Tensor centred(Tensor x) {
        return config.norm() == Norm.LAYER ? x.sub(x.sum(-1).mul(1.0 / x.size(-1)).unsqueeze(-1)) : x;
    }

    @Override
    public Backward normBackward(Tensor byNormed, Tensor sum, Tensor statistics, @Nullable Tensor weight, @Nullable Tensor bias,
            @Nullable Tensor byOthers, @Nullable Tensor weightGradient, @Nullable Tensor biasGradient) {
        Tensor gradient = byNormed.to(DType.FLOAT32);
        Tensor unit = centred(sum.to(DType.FLOAT32)).div(statistics);
        if (weightGradient != null) {
            weightGradient.addInPlace(gradient.mul(unit).sum(0));
        }
        if (biasGradient != null) {
            biasGradient.addInPlace(gradient.sum(0));
        }
        Tensor bySum = rootBackward(weight == null ? gradient : gradient.mul(weight.to(DType.FLOAT32)), unit, statistics);
        if (config.norm() == Norm.LAYER) {
            bySum = centred(bySum);
        }
        Tensor result = bySum.to(sum.dtype());
        return new Backward(byOthers == null ? result : result.addInPlace(byOthers), normAgain(sum, weight, bias));
    }

    /** The gradient of x, given that of unit = x / root(mean(x²)). */
    private static Tensor rootBackward(Tensor byUnit, Tensor unit, Tensor root) {
        Tensor along = byUnit.mul(unit).sum(-1).mul(1.0 / unit.size(-1)).unsqueeze(-1);
        return byUnit.sub(unit.mul(along)).div(root);
    }

    // ---- queries, keys, values ------------------------------------------------------------------------------------------

    @Override
    public Heads heads(Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm) {
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        Tensor all = split(bias == null ? qkv : qkv.add(bias));
        Tensor queryKey = all.narrow(1, 0, heads + kvHeads);
        if (queryNorm != null && keyNorm != null) {
            queryKey = Tensor.concatenate(1, all.narrow(1, 0, heads).rmsNorm(queryNorm, config.normEps()),
                    all.narrow(1, heads, kvHeads).rmsNorm(keyNorm, config.normEps()));
        }
        queryKey = placement.rotate(queryKey);
        return new Heads(queryKey.narrow(1, 0, heads), queryKey.narrow(1, heads, kvHeads), all.narrow(1, heads + kvHeads, kvHeads));
    }

    private Tensor split(Tensor qkv) {
        return qkv.reshape(qkv.size(0), config.heads() + 2L * config.kvHeads(), config.headDim());
    }

    @Override
    public Tensor headsBackward(Heads gradients, Tensor qkv, @Nullable Tensor bias, @Nullable Tensor queryNorm, @Nullable Tensor keyNorm,
            @Nullable Tensor queryNormGradient, @Nullable Tensor keyNormGradient) {
        int heads = config.heads();
        int kvHeads = config.kvHeads();
        Tensor queryKey = placement.rotateBack(Tensor.concatenate(1, gradients.query(), gradients.key()));
        Tensor byQuery = queryKey.narrow(1, 0, heads);
        Tensor byKey = queryKey.narrow(1, heads, kvHeads);
        if (queryNorm != null && keyNorm != null) {
            Tensor all = split(bias == null ? qkv : qkv.add(bias));
            byQuery = headNormBackward(byQuery, all.narrow(1, 0, heads), queryNorm, queryNormGradient);
            byKey = headNormBackward(byKey, all.narrow(1, heads, kvHeads), keyNorm, keyNormGradient);
        }
        return Tensor.concatenate(1, byQuery, byKey, gradients.value()).reshape(qkv.shape());
    }

    private Tensor headNormBackward(Tensor byNormed, Tensor x, Tensor weight, @Nullable Tensor weightGradient) {
        Tensor single = x.to(DType.FLOAT32);
        Tensor root = single.square().sum(-1).mul(1.0 / x.size(-1)).add(config.normEps()).sqrt().unsqueeze(-1);
        Tensor unit = single.div(root);
        Tensor gradient = byNormed.to(DType.FLOAT32);
        if (weightGradient != null) {
            weightGradient.addInPlace(gradient.mul(unit).sum(0).sum(0));
        }
        return rootBackward(gradient.mul(weight.to(DType.FLOAT32)), unit, root).to(x.dtype());
    }

    // ---- attention ------------------------------------------------------------------------------------------------------

    @Override
    public Attended attend(Heads heads) {
        List<Tensor> results = new ArrayList<>();
        List<Tensor> kept = new ArrayList<>();
        long at = 0;
        for (long length : lengths) {
            List<Tensor> found = ATTENTION.call(sequence(heads.query(), at, length), sequence(repeated(heads.key()), at, length),
                    sequence(repeated(heads.value()), at, length), 0.0, true, null, scale);
            results.add(found.get(0).select(0, 0).transpose(0, 1));
            kept.add(found.get(0));
            kept.add(found.get(1));
            at += length;
        }
        Tensor all = results.size() == 1 ? results.getFirst() : Tensor.concatenate(0, results);
        return new Attended(all.reshape(at, (long) config.heads() * config.headDim()), kept.toArray(Tensor[]::new));
    }

    @Override
    public Heads attendBackward(Tensor byResult, Heads heads, Attended attended) {
        Tensor gradient = byResult.reshape(heads.query().shape());
        List<Tensor> byQuery = new ArrayList<>();
        List<Tensor> byKey = new ArrayList<>();
        List<Tensor> byValue = new ArrayList<>();
        long at = 0;
        for (int i = 0; i < lengths.length; i++) {
            List<Tensor> found = ATTENTION_BACKWARD.call(sequence(gradient, at, lengths[i]), sequence(heads.query(), at, lengths[i]),
                    sequence(repeated(heads.key()), at, lengths[i]), sequence(repeated(heads.value()), at, lengths[i]),
                    attended.kept()[2 * i], attended.kept()[2 * i + 1], 0.0, true, null, scale);
            byQuery.add(found.get(0).select(0, 0).transpose(0, 1));
            byKey.add(summed(found.get(1).select(0, 0).transpose(0, 1)));
            byValue.add(summed(found.get(2).select(0, 0).transpose(0, 1)));
            at += lengths[i];
        }
        return new Heads(Tensor.concatenate(0, byQuery), Tensor.concatenate(0, byKey), Tensor.concatenate(0, byValue));
    }

    /** [T, H, D] → [1, H, length, D]. */
    private static Tensor sequence(Tensor x, long start, long length) {
        return x.narrow(0, start, length).transpose(0, 1).unsqueeze(0);
    }

    /** Each KV head for the run of query heads that it serves. */
    private Tensor repeated(Tensor x) {
        long group = config.heads() / config.kvHeads();
        return group == 1
                ? x
                : x.unsqueeze(2).expand(x.size(0), x.size(1), group, x.size(2)).reshape(x.size(0), config.heads(), x.size(2));
    }

    /** The transpose of {@link #repeated}. */
    private Tensor summed(Tensor x) {
        long group = config.heads() / config.kvHeads();
        return group == 1 ? x : x.reshape(x.size(0), config.kvHeads(), group, x.size(2)).sum(2);
    }

    // ---- feed-forward block ---------------------------------------------------------------------------------------------

    @Override
    public Tensor activate(Tensor widened, @Nullable Tensor bias) {
        Tensor x = bias == null ? widened : widened.add(bias);
        return config.gatedMlp() ? activation(gate(x)).mulInPlace(up(x)) : activation(x);
    }

    @Override
    public Backward activateBackward(Tensor widened, @Nullable Tensor bias, Tensor byActivated) {
        Tensor x = bias == null ? widened : widened.add(bias);
        if (!config.gatedMlp()) {
            return new Backward(activationBackward(byActivated, x), activation(x));
        }
        Tensor result = Tensor.empty(x.device(), x.dtype(), x.shape());
        gate(result).copyInPlace(activationBackward(byActivated.mul(up(x)), gate(x)));
        Tensor activated = activation(gate(x));
        up(result).copyInPlace(activated.mul(byActivated));
        return new Backward(result, activated.mulInPlace(up(x)));
    }

    private Tensor gate(Tensor x) {
        return x.narrow(1, 0, config.intermediateSize());
    }

    private Tensor up(Tensor x) {
        return x.narrow(1, config.intermediateSize(), config.intermediateSize());
    }

    private Tensor activation(Tensor x) {
        return switch (config.activation()) {
            case SILU -> x.silu();
            case RELU -> x.relu();
            case GELU -> x.gelu(false);
            case GELU_TANH -> x.gelu(true);
        };
    }

    private Tensor activationBackward(Tensor gradient, Tensor x) {
        return switch (config.activation()) {
            case SILU -> SILU_BACKWARD.call(gradient, x).getFirst();
            case RELU -> THRESHOLD_BACKWARD.call(gradient, x, 0.0).getFirst();
            case GELU -> GELU_BACKWARD.call(gradient, x, "none").getFirst();
            case GELU_TANH -> GELU_BACKWARD.call(gradient, x, "tanh").getFirst();
        };
    }

    @Override
    public void addColumnSums(Tensor x, Tensor into) {
        into.addInPlace(x.to(DType.FLOAT32).sum(0));
    }
}
