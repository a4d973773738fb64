package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.Decoder;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.Positions;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.model.WeightLayout;
import dev.tandem.training.LayerOperations.Attended;
import dev.tandem.training.LayerOperations.Backward;
import dev.tandem.training.LayerOperations.Heads;
import dev.tandem.training.LayerOperations.Normed;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/**
 * The training-side forward and backward pass with the gradients of every operation written out, instead of recorded: fewer passes over
 * memory, fewer values kept, and gradients of weights that are added to their FLOAT32 sums by the products themselves.
 *
 * <p>A layer keeps what its backward pass cannot cheaply compute again: residual sums, the products' results, attention's result. Norms'
 * results and activations are computed again. Where the activation budget ends, layers keep their input only and run again (activation
 * checkpointing, Chen et al. 2016), all but their last product. A layer boundary is also where the gradients of a layer are complete and
 * handed to {@link GradientShard}.
 *
 * <p>It computes decoders whose norms come first ({@link #obstacle}). Confined to the rank's thread. The owner closes it.
 */
final class ManualModel implements TrainingModel {
    private final WeightArena arena;
    private final ModelConfig config;
    private final Decoder decoder;
    private final DeviceMemory memory;
    private final Device device;
    private final ActivationMemory activationMemory;
    private final @Nullable TrainingKernels kernels;

    /** {@return what of a model is not computed here, or null if all is} */
    static @Nullable String obstacle(ModelConfig config, DType dtype, Device device) {
        if (!config.normFirst() || !config.finalNorm() || config.embeddingSize() != config.hiddenSize()) {
            return "norms follow their blocks, or embeddings are projected";
        }
        return device.isCpu() ? null : TrainingKernels.obstacle(config, dtype);
    }

    /** {@return the bytes in which several ranks collect a group's gradients before they are reduced; one rank needs none} */
    static long bucketBytes(WeightLayout layout) {
        long open = layout.embeddingLength() + Math.max(layout.longestLayer(), layout.headLength());
        return layout.shards() == 1 ? 0 : Float.BYTES * open;
    }

    ManualModel(WeightArena arena, Decoder decoder, DeviceMemory memory, ActivationMemory activationMemory) {
        this.arena = arena;
        this.decoder = decoder;
        this.memory = memory;
        this.activationMemory = activationMemory;
        config = arena.layout().config();
        device = memory.device();
        kernels = device.isCpu() ? null : new TrainingKernels(config, device);
    }

    /** A residual stream: the last sum, and what is still to be added to it. */
    private record Stream(Tensor sum, @Nullable Tensor addend) {
        Stream escape(Scope scope) {
            scope.escape(sum);
            if (addend != null) {
                scope.escape(addend);
            }
            return this;
        }

        void close() {
            sum.close();
            if (addend != null) {
                addend.close();
            }
        }
    }

    /** What a layer keeps for its backward pass. */
    private record Kept(Tensor input, Tensor inputStatistics, Tensor qkv, Heads heads, Attended attended, Tensor middle,
            Tensor middleStatistics, Tensor widened) {
        private List<Tensor> tensors() {
            List<Tensor> all = new ArrayList<>(List.of(input, inputStatistics, qkv, heads.query(), heads.key(), heads.value(),
                    attended.result(), middle, middleStatistics, widened));
            all.addAll(List.of(attended.kept()));
            return all;
        }

        void close() {
            tensors().forEach(Tensor::close);
        }
    }

    @Override
    public TokenValues forward(PackedBatch batch, WeightArena weights, double temperature) {
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            Pass pass = new Pass(batch, weights);
            Stream x = pass.embed();
            for (int layer = 0; layer < config.layers(); layer++) {
                try (Scope inner = Scope.open()) {
                    Stream next = pass.output(layer, pass.layer(layer, x)).escape(inner);
                    x.close();
                    x = next;
                }
            }
            LogprobHead head = pass.head(pass.finish(x).normed(), temperature);
            Tensor entropy = Tensor.empty(device, DType.FLOAT32, batch.targets().size(0));
            Tensor logprob = scope.escape(head.forward(entropy));
            return LossGradient.values(batch, logprob, scope.escape(entropy));
        }
    }

    @Override
    public void forwardBackward(@Nullable PackedBatch batch, TokenLoss loss, double temperature, GradientShard gradients, Tensor total) {
        try (Scope scope = Scope.open(); Gradients off = Gradients.disabled()) {
            Tensor embeddingGradients = gradients.open(arena.embedding());
            if (batch == null) {
                withoutTokens(gradients);
            } else {
                new Pass(batch, arena).forwardBackward(loss, temperature, gradients, embeddingGradients, total);
            }
            gradients.complete(arena.embedding(), embeddingGradients);
        }
    }

    private void withoutTokens(GradientShard gradients) {
        for (int layer = config.layers(); layer >= 0; layer--) {
            try (Scope scope = Scope.open()) {
                WeightGroup group = layer == config.layers() ? arena.head() : arena.layer(layer);
                gradients.complete(group, gradients.open(group));
            }
        }
    }

    private static @Nullable Tensor part(WeightGroup group, Tensor of, ParameterRole role) {
        return group.find(role) == null ? null : group.part(of, role);
    }

    /** The way of one micro-batch through the model. */
    private final class Pass {
        private final PackedBatch batch;
        private final WeightArena weights;
        private final LayerOperations operations;
        private final Decoder.Placement placement;

        Pass(PackedBatch batch, WeightArena weights) {
            this.batch = batch;
            this.weights = weights;
            placement = kernels == null
                    ? decoder.place(batch.positions(), batch.longest())
                    : decoder.placeEmbeddings(batch.positions());
            operations = kernels == null
                    ? new TensorOperations(config, placement, batch.lengths())
                    : new KernelOperations(kernels, batch.positions(), kernels.attention.over(batch.starts(), batch.lengths()));
        }

        Stream embed() {
            return new Stream(decoder.embed(weights.embedding(), batch.tokens(), placement), null);
        }

        /** Runs a layer up to what its activation is computed from. */
        Kept layer(int layer, Stream x) {
            WeightGroup w = weights.layer(layer);
            Normed first = norm(x, w, ParameterRole.ATTENTION_NORM_WEIGHT, ParameterRole.ATTENTION_NORM_BIAS);
            Tensor qkv = operations.multiply(first.normed(), w.weight(ParameterRole.Q_WEIGHT));
            Heads heads = operations.heads(qkv, w.find(ParameterRole.Q_BIAS), w.find(ParameterRole.Q_NORM), w.find(ParameterRole.K_NORM));
            Attended attended = operations.attend(heads);
            Tensor output = product(w, ParameterRole.O_WEIGHT, ParameterRole.O_BIAS, attended.result());
            Normed second = norm(new Stream(first.sum(), output), w, ParameterRole.MLP_NORM_WEIGHT, ParameterRole.MLP_NORM_BIAS);
            Tensor widened = operations.multiply(second.normed(), w.weight(widen()));
            return new Kept(first.sum(), first.statistics(), qkv, heads, attended, second.sum(), second.statistics(), widened);
        }

        /** {@return a layer's output} */
        Stream output(int layer, Kept kept) {
            WeightGroup w = weights.layer(layer);
            return new Stream(kept.middle, product(w, ParameterRole.DOWN_WEIGHT, ParameterRole.DOWN_BIAS,
                    operations.activate(kept.widened, widenBias(w))));
        }

        private Tensor product(WeightGroup w, ParameterRole weight, ParameterRole bias, Tensor x) {
            Tensor product = operations.multiply(x, w.weight(weight));
            Tensor addend = w.find(bias);
            return addend == null ? product : product.addInPlace(addend);
        }

        private Normed norm(Stream x, WeightGroup w, ParameterRole weight, ParameterRole bias) {
            return operations.norm(x.sum, x.addend, w.find(weight), w.find(bias));
        }

        private ParameterRole widen() {
            return config.gatedMlp() ? ParameterRole.GATE_WEIGHT : ParameterRole.UP_WEIGHT;
        }

        private ParameterRole widenBiasRole() {
            return config.gatedMlp() ? ParameterRole.GATE_BIAS : ParameterRole.UP_BIAS;
        }

        private @Nullable Tensor widenBias(WeightGroup w) {
            return w.find(widenBiasRole());
        }

        Normed finish(Stream x) {
            return norm(x, weights.head(), ParameterRole.FINAL_NORM_WEIGHT, ParameterRole.FINAL_NORM_BIAS);
        }

        LogprobHead head(Tensor normed, double temperature) {
            Tensor hidden = normed.indexSelect(0, batch.rows());
            TrainerOptions options = activationMemory.options();
            return kernels == null
                    ? new TensorLogprobHead(weights.logitMatrix(), temperature, hidden, batch.targets(), options.logitBytes())
                    : new KernelLogprobHead(kernels, weights.logitMatrix(), temperature, hidden, batch.targets(), options);
        }

        void forwardBackward(TokenLoss loss, double temperature, GradientShard gradients, Tensor embeddingGradients, Tensor total) {
            long tokens = batch.tokens().size(0);
            int recorded = activationMemory.recordedLayers(tokens);
            long activations = activationMemory.bytes(tokens, recorded);
            memory.add(Use.ACTIVATIONS, activations);
            try (Scope scope = Scope.open()) {
                Deque<Tensor> inputs = new ArrayDeque<>();
                Deque<Kept> kept = new ArrayDeque<>();
                Stream x = embed();
                for (int layer = 0; layer < config.layers(); layer++) {
                    try (Scope inner = Scope.open()) {
                        Kept all = layer(layer, x);
                        Stream next = output(layer, all);
                        // The embeddings are a layer's input as they are, and belong to the scope around already.
                        Tensor input = x.addend == null ? x.sum : inner.escape(all.input);
                        if (layer < config.layers() - recorded) {
                            inputs.push(input);
                            inner.escape(all.middle);
                        } else {
                            all.tensors().stream().filter(t -> t != all.input).forEach(inner::escape);
                            kept.push(all);
                        }
                        if (x.addend != null) {
                            x.addend.close();
                            if (layer <= config.layers() - recorded) {
                                x.sum.close(); // else the layer before keeps it
                            }
                        }
                        x = new Stream(next.sum, inner.escape(Objects.requireNonNull(next.addend)));
                    }
                }
                Tensor gradient = headBackward(x, loss, temperature, gradients, embeddingGradients, total);
                for (int layer = config.layers() - 1; layer >= 0; layer--) {
                    try (Scope inner = Scope.open()) {
                        Tensor before = gradient;
                        if (kept.isEmpty()) {
                            try (Tensor input = inputs.pop()) {
                                gradient = inner.escape(backward(layer, layer(layer, new Stream(input, null)), gradient, gradients));
                            }
                        } else {
                            Kept all = kept.pop();
                            gradient = inner.escape(backward(layer, all, gradient, gradients));
                            all.close();
                        }
                        before.close();
                    }
                }
                embeddingBackward(gradient, embeddingGradients);
            } finally {
                memory.add(Use.ACTIVATIONS, -activations);
            }
        }

        /** From the last sum to the loss and back. */
        private Tensor headBackward(Stream x, TokenLoss loss, double temperature, GradientShard gradients, Tensor embeddingGradients,
                Tensor total) {
            WeightGroup w = weights.head();
            try (Scope scope = Scope.open()) {
                Normed last = finish(x);
                LogprobHead head = head(last.normed(), temperature);
                Tensor entropy = Tensor.empty(device, DType.FLOAT32, batch.targets().size(0));
                Tensor logprob = head.forward(entropy);
                LossGradient by;
                try (Gradients on = Gradients.enabled()) {
                    by = LossGradient.of(loss, batch, logprob, entropy);
                }
                total.addInPlace(by.value().to(DType.FLOAT64));
                Tensor group = gradients.open(w);
                Tensor byMatrix = config.tiedEmbeddings()
                        ? weights.embedding().part(embeddingGradients, ParameterRole.EMBED_TOKENS)
                        : w.part(group, ParameterRole.LM_HEAD);
                Tensor byRows = head.backward(by.byLogprob(), by.byEntropy(), byMatrix);
                Tensor byNormed = Tensor.zeros(device, byRows.dtype(), last.normed().shape());
                byNormed.indexAddInPlace(0, batch.rows(), byRows);
                Tensor result = operations.normBackward(byNormed, last.sum(), last.statistics(),
                        w.find(ParameterRole.FINAL_NORM_WEIGHT), w.find(ParameterRole.FINAL_NORM_BIAS), null,
                        part(w, group, ParameterRole.FINAL_NORM_WEIGHT), part(w, group, ParameterRole.FINAL_NORM_BIAS)).gradient();
                gradients.complete(w, group);
                return scope.escape(result);
            }
        }

        /** {@return the gradient of a layer's input, from that of its output; the gradients of its weights are handed on} */
        private Tensor backward(int layer, Kept kept, Tensor byOutput, GradientShard gradients) {
            WeightGroup w = weights.layer(layer);
            Tensor group = gradients.open(w);
            Tensor bias = widenBias(w);
            Backward activation = operations.activateBackward(kept.widened, bias, byInput(w, ParameterRole.DOWN_WEIGHT, byOutput));
            weightGradient(w, group, ParameterRole.DOWN_WEIGHT, ParameterRole.DOWN_BIAS, byOutput, activation.again());
            Tensor byWidened = activation.gradient();
            Backward second = normBackward(w, group, byInput(w, widen(), byWidened), kept.middle, kept.middleStatistics, byOutput,
                    ParameterRole.MLP_NORM_WEIGHT, ParameterRole.MLP_NORM_BIAS);
            weightGradient(w, group, widen(), widenBiasRole(), byWidened, second.again());
            Tensor byMiddle = second.gradient();
            weightGradient(w, group, ParameterRole.O_WEIGHT, ParameterRole.O_BIAS, byMiddle, kept.attended.result());
            Heads byHeads = operations.attendBackward(byInput(w, ParameterRole.O_WEIGHT, byMiddle), kept.heads, kept.attended);
            Tensor byQkv = operations.headsBackward(byHeads, kept.qkv, w.find(ParameterRole.Q_BIAS), w.find(ParameterRole.Q_NORM),
                    w.find(ParameterRole.K_NORM), part(w, group, ParameterRole.Q_NORM), part(w, group, ParameterRole.K_NORM));
            Backward first = normBackward(w, group, byInput(w, ParameterRole.Q_WEIGHT, byQkv), kept.input, kept.inputStatistics, byMiddle,
                    ParameterRole.ATTENTION_NORM_WEIGHT, ParameterRole.ATTENTION_NORM_BIAS);
            weightGradient(w, group, ParameterRole.Q_WEIGHT, ParameterRole.Q_BIAS, byQkv, first.again());
            gradients.complete(w, group);
            return first.gradient();
        }

        /** {@return the gradient of a product's input, from that of its result} */
        private Tensor byInput(WeightGroup w, ParameterRole weight, Tensor byResult) {
            return operations.multiplyBackward(byResult, w.weight(weight));
        }

        /** The gradients of a product's weight and bias, from that of its result [T, n] and its input [T, k]. */
        private void weightGradient(WeightGroup w, Tensor group, ParameterRole weight, ParameterRole bias, Tensor byResult, Tensor input) {
            w.part(group, weight).addMatmulInPlace(byResult.transpose(0, 1), input);
            if (w.find(bias) != null) {
                operations.addColumnSums(byResult, w.part(group, bias));
            }
        }

        private Backward normBackward(WeightGroup w, Tensor group, Tensor byNormed, Tensor sum, Tensor statistics, Tensor byOthers,
                ParameterRole weight, ParameterRole bias) {
            return operations.normBackward(byNormed, sum, statistics, w.find(weight), w.find(bias), byOthers, part(w, group, weight),
                    part(w, group, bias));
        }

        private void embeddingBackward(Tensor gradient, Tensor into) {
            WeightGroup w = weights.embedding();
            Tensor single = gradient.to(DType.FLOAT32);
            if (config.positions() instanceof Positions.Learned learned) {
                w.part(into, ParameterRole.EMBED_POSITIONS).indexAddInPlace(0, batch.positions().add(learned.offset()), single);
            }
            w.part(into, ParameterRole.EMBED_TOKENS).indexAddInPlace(0, batch.tokens(), single);
        }
    }

    @Override
    public void releaseBuckets() {}

    @Override
    public void close() {
        if (kernels != null) {
            kernels.close();
        }
    }
}
