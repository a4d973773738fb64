package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.Decoder;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.Positions;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.model.WeightLayout;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * The training-side forward and backward pass of one rank, layer by layer.
 *
 * <p>The forward pass keeps each layer's input and nothing else; the backward pass goes from the last layer to the first, runs the
 * layer again with gradients recorded, and propagates through that one layer (activation checkpointing, Chen et al. 2016). So at most
 * one layer's activations exist at a time. Where the activation budget has room, the last layers' graphs are recorded in the forward
 * pass already and need not run twice. A layer boundary is also where the gradients of a layer are complete: they are handed to
 * {@link GradientShard} there and their bucket is used again for the layer below.
 *
 * <p>Leaves are views of the arena, so nothing is copied to be differentiated. The embedding table gets its gradient last, and with a
 * tied head from both ends; its bucket lives through the whole pass, in FLOAT32 because one row may be added to many times.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class LayerwiseModel implements TrainingModel {
    private final WeightArena arena;
    private final Decoder decoder;
    private final DeviceMemory memory;
    private final dev.tandem.device.Device device;
    private final ActivationMemory activationMemory;
    private @Nullable Tensor layerBucket;
    private @Nullable Tensor headBucket;
    private @Nullable Tensor embeddingBucket;
    private long bucketBytes;

    LayerwiseModel(WeightArena arena, Decoder decoder, DeviceMemory memory, ActivationMemory activationMemory) {
        this.arena = arena;
        this.decoder = decoder;
        this.memory = memory;
        this.activationMemory = activationMemory;
        device = memory.device();
    }

    @Override
    public TokenValues forward(PackedBatch batch, WeightArena weights, double temperature) {
        try (Gradients off = Gradients.disabled(); Scope scope = Scope.open()) {
            Decoder.Placement placement = decoder.place(batch.positions(), batch.longest());
            PackedAttention attention = new PackedAttention(batch.lengths(), weights.layout().config().headDim());
            Tensor x = decoder.embed(weights.embedding(), batch.tokens(), placement);
            for (int layer = 0; layer < weights.layout().config().layers(); layer++) {
                try (Scope inner = Scope.open()) {
                    x = inner.escape(decoder.layer(layer, weights.layer(layer), x, placement, attention, null));
                }
            }
            Tensor hidden = decoder.finish(weights.head(), x.indexSelect(0, batch.rows()));
            LogprobHead head = new TensorLogprobHead(
                    weights.logitMatrix(), temperature, hidden, batch.targets(), activationMemory.options().logitBytes());
            Tensor entropy = Tensor.empty(device, DType.FLOAT32, batch.targets().size(0));
            Tensor logprob = scope.escape(head.forward(entropy));
            return LossGradient.values(batch, logprob, scope.escape(entropy));
        }
    }

    @Override
    public void forwardBackward(@Nullable PackedBatch batch, TokenLoss loss, double temperature, GradientShard gradients, Tensor total) {
        allocateBuckets();
        Tensor embeddingGradients = zeroed(embeddingBucket);
        try (Scope scope = Scope.open()) {
            if (batch == null) {
                withoutTokens(gradients);
            } else {
                withTokens(batch, loss, temperature, gradients, embeddingGradients, total);
            }
            gradients.add(arena.embedding(), embeddingGradients);
        }
    }

    private void withoutTokens(GradientShard gradients) {
        gradients.add(arena.head(), zeroed(headBucket));
        for (int layer = arena.layout().config().layers() - 1; layer >= 0; layer--) {
            gradients.add(arena.layer(layer), zeroed(layerBucket).narrow(0, 0, arena.layer(layer).length()));
        }
    }

    private void withTokens(PackedBatch batch, TokenLoss loss, double temperature, GradientShard gradients,
            Tensor embeddingGradients, Tensor total) {
        Tape tape;
        try (Gradients off = Gradients.disabled()) {
            tape = new Tape(batch);
            tape.forward();
        }
        long activations = tape.bytes();
        memory.add(Use.ACTIVATIONS, activations);
        try {
            tape.head(loss, temperature, gradients, embeddingGradients, total);
            for (int layer = arena.layout().config().layers() - 1; layer >= 0; layer--) {
                tape.backward(layer, gradients);
            }
            try (Gradients off = Gradients.disabled()) {
                tape.embedding(embeddingGradients);
            }
        } finally {
            memory.add(Use.ACTIVATIONS, -activations);
        }
    }

    /** What one micro-batch's forward pass leaves for its backward pass. */
    private final class Tape {
        private final PackedBatch batch;
        private final Decoder.Placement placement;
        private final PackedAttention attention;
        private final int layers = arena.layout().config().layers();
        /** Inputs of the layers, and after them the output of the last. */
        private final List<Tensor> inputs = new ArrayList<>();

        private final List<@Nullable Recorded> recorded = new ArrayList<>();
        private final int firstRecorded;
        private Tensor gradient;

        Tape(PackedBatch batch) {
            this.batch = batch;
            placement = decoder.place(batch.positions(), batch.longest());
            attention = new PackedAttention(batch.lengths(), arena.layout().config().headDim());
            firstRecorded = layers - activationMemory.recordedLayers(batch.tokens().size(0));
            gradient = batch.weight();
        }

        /** A layer whose graph exists: its leaves, and its output. */
        private record Recorded(Tensor input, WeightGroup weights, Tensor output) {}

        void forward() {
            Tensor x = decoder.embed(arena.embedding(), batch.tokens(), placement);
            for (int layer = 0; layer < layers; layer++) {
                inputs.add(x);
                if (layer < firstRecorded) {
                    recorded.add(null);
                    try (Scope inner = Scope.open()) {
                        x = inner.escape(decoder.layer(layer, arena.layer(layer), x, placement, attention, null));
                    }
                } else {
                    Recorded graph = record(layer);
                    recorded.add(graph);
                    x = graph.output.detach();
                }
            }
            inputs.add(x);
        }

        private Recorded record(int layer) {
            Tensor input = inputs.get(layer).detach().requireGradient();
            WeightGroup weights = arena.layer(layer).differentiable();
            try (Gradients on = Gradients.enabled(); Scope inner = Scope.open()) {
                Tensor output = decoder.layer(layer, weights, input, placement, attention, null);
                return new Recorded(input, weights, inner.escape(output));
            }
        }

        /** From the last layer's output to the loss and back. */
        void head(TokenLoss loss, double temperature, GradientShard gradients, Tensor embeddingGradients, Tensor total) {
            try (Scope scope = Scope.open()) {
                Tensor x = inputs.getLast().detach().requireGradient();
                WeightGroup weights = arena.head().differentiable();
                Tensor bucket = zeroed(headBucket);
                weights.accumulateInto(bucket);
                Tensor hidden = decoder.finish(weights, x.indexSelect(0, batch.rows()));
                LogprobHead head = new TensorLogprobHead(arena.logitMatrix(), temperature, hidden.detach(), batch.targets(),
                        activationMemory.options().logitBytes());
                Tensor entropy = Tensor.empty(device, DType.FLOAT32, batch.targets().size(0));
                Tensor logprob;
                try (Gradients off = Gradients.disabled()) {
                    logprob = head.forward(entropy);
                }
                LossGradient by = LossGradient.of(loss, batch, logprob, entropy);
                try (Gradients off = Gradients.disabled()) {
                    total.addInPlace(by.value().to(DType.FLOAT64));
                    boolean tied = arena.layout().config().tiedEmbeddings();
                    Tensor byMatrix = tied
                            ? arena.embedding().part(embeddingGradients, ParameterRole.EMBED_TOKENS)
                            : arena.head().part(bucket, ParameterRole.LM_HEAD);
                    gradient = head.backward(by.byLogprob(), by.byEntropy(), byMatrix);
                }
                hidden.backward(gradient);
                gradient = scope.escape(present(x.gradient()));
                gradients.add(arena.head(), bucket);
                inputs.removeLast().close();
            }
        }

        /** Propagates the gradient of a layer's output to its input and weights. */
        void backward(int layer, GradientShard gradients) {
            try (Scope scope = Scope.open()) {
                Recorded graph = recorded.get(layer);
                if (graph == null) {
                    graph = record(layer);
                }
                Tensor bucket = zeroed(layerBucket).narrow(0, 0, arena.layer(layer).length());
                graph.weights.accumulateInto(bucket);
                graph.output.backward(gradient);
                Tensor next = scope.escape(present(graph.input.gradient()));
                gradient.close();
                gradient = next;
                gradients.add(arena.layer(layer), bucket);
                graph.output.close();
                graph.input.close();
                inputs.removeLast().close();
            }
        }

        /** Adds the gradient of the first layer's input to the embedding group's. */
        void embedding(Tensor into) {
            try (Scope scope = Scope.open()) {
                WeightGroup weights = arena.embedding();
                Tensor byOutput = gradient;
                if (arena.layout().config().positions() instanceof Positions.Learned learned) {
                    weights.part(into, ParameterRole.EMBED_POSITIONS)
                            .indexAddInPlace(0, batch.positions().add(learned.offset()), byOutput.to(DType.FLOAT32));
                }
                Tensor projection = weights.find(ParameterRole.PROJECT_IN);
                if (projection != null) {
                    Tensor rows = weights.weight(ParameterRole.EMBED_TOKENS).indexSelect(0, batch.tokens());
                    weights.part(into, ParameterRole.PROJECT_IN)
                            .addInPlace(byOutput.transpose(0, 1).matmul(rows).to(DType.FLOAT32));
                    byOutput = byOutput.matmul(projection);
                }
                weights.part(into, ParameterRole.EMBED_TOKENS)
                        .indexAddInPlace(0, batch.tokens(), byOutput.to(DType.FLOAT32));
            }
        }

        long bytes() {
            return activationMemory.bytes(batch.tokens().size(0), layers - firstRecorded);
        }
    }

    private static Tensor present(@Nullable Tensor gradient) {
        if (gradient == null) {
            throw new IllegalStateException("a layer's input has no gradient");
        }
        return gradient;
    }

    private void allocateBuckets() {
        if (layerBucket != null) {
            return;
        }
        try (Scope scope = Scope.open()) {
            layerBucket = Tensor.empty(device, arena.dtype(), arena.layout().longestLayer()).keep();
            headBucket = Tensor.empty(device, arena.dtype(), arena.head().length()).keep();
            embeddingBucket = Tensor.empty(device, DType.FLOAT32, arena.embedding().length()).keep();
        }
        bucketBytes = bucketBytes(arena.layout(), arena.dtype());
        memory.add(Use.GRADIENTS, bucketBytes);
    }

    /** The bytes of the buckets in which a group's gradients are collected before they are reduced. */
    static long bucketBytes(WeightLayout layout, DType dtype) {
        return (layout.longestLayer() + layout.headLength()) * dtype.bytes() + layout.embeddingLength() * Float.BYTES;
    }

    private static Tensor zeroed(@Nullable Tensor bucket) {
        if (bucket == null) {
            throw new IllegalStateException("gradient buckets are not allocated");
        }
        return bucket.fillInPlace(0);
    }

    @Override
    public void releaseBuckets() {
        if (layerBucket != null && headBucket != null && embeddingBucket != null) {
            layerBucket.close();
            headBucket.close();
            embeddingBucket.close();
            layerBucket = null;
            headBucket = null;
            embeddingBucket = null;
            memory.add(Use.GRADIENTS, -bucketBytes);
        }
    }

    @Override
    public void close() {
        releaseBuckets();
    }
}
