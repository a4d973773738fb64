package dev.tandem.model;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;

/**
 * The one copy of a model's weights on a device: a contiguous allocation of which every parameter is a view. Generation and
 * training read these bytes and the optimizer writes them in place; addresses never change while the arena is open.
 *
 * <p>Confined to the thread of its rank. The owner closes it.
 */
public final class WeightArena implements AutoCloseable {
    private static final long MAX_SHARD_BYTES = 5_000_000_000L;

    private final WeightLayout layout;
    private final Tensor flat;
    private final DType dtype;
    private final List<WeightGroup> groups;

    /**
     * Allocates weights, all zero.
     *
     * @param dtype FLOAT32 or BFLOAT16
     */
    public WeightArena(WeightLayout layout, Device device, DType dtype) {
        if (dtype != DType.FLOAT32 && dtype != DType.BFLOAT16) {
            throw new IllegalArgumentException("weights are kept in FLOAT32 or BFLOAT16, not in " + dtype);
        }
        this.layout = layout;
        this.dtype = dtype;
        try (Scope scope = Scope.open()) {
            flat = Tensor.zeros(device, dtype, layout.length()).keep();
        }
        groups = layout.groups().stream().map(group -> new WeightGroup(group, flat)).toList();
    }

    /** {@return where the parameters lie} */
    public WeightLayout layout() {
        return layout;
    }

    /** {@return the element type} */
    public DType dtype() {
        return dtype;
    }

    /** {@return the size of the allocation in bytes} */
    public long bytes() {
        return layout.length() * dtype.bytes();
    }

    /** {@return the address of the first weight} */
    public long address() {
        return flat.address();
    }

    /** {@return the embedding group: token and position embeddings, and the projection after them} */
    public WeightGroup embedding() {
        return groups.getFirst();
    }

    /** {@return the group of a layer, from 0} */
    public WeightGroup layer(int layer) {
        return groups.get(layer + 1);
    }

    /** {@return the head group: final norm, the projection after it, and the LM head unless it is tied} */
    public WeightGroup head() {
        return groups.getLast();
    }

    /** {@return the embedding, the layers and the head, in the order of the arena} */
    public List<WeightGroup> groups() {
        return groups;
    }

    /** {@return the matrix [vocabulary, embedding size] that turns hidden states into logits, tied or not} */
    public Tensor logitMatrix() {
        return layout.config().tiedEmbeddings()
                ? embedding().weight(ParameterRole.EMBED_TOKENS)
                : head().weight(ParameterRole.LM_HEAD);
    }

    /**
     * Reads the weights from a checkpoint, converting their type.
     *
     * @throws ModelFormatException when a tensor is missing, unknown or of the wrong shape, or holds a NaN or an infinity
     */
    public void load(Safetensors checkpoint) {
        List<ParameterSpec> specs = layout.places().stream().map(WeightLayout.Place::spec).toList();
        Map<String, TensorEntry> entries = CheckpointTensors.match(specs, checkpoint);
        for (WeightLayout.Place place : layout.places()) {
            try (Scope scope = Scope.open()) {
                TensorEntry entry = Objects.requireNonNull(entries.get(place.spec().name()));
                Tensor target = view(place);
                target.copyInPlace(Tensor.wrap(entry.data(), entry.dtype(), entry.shape()));
                if (!Double.isFinite(target.to(DType.FLOAT32).sum().item())) {
                    throw new ModelFormatException(checkpoint.source() + ": tensor " + entry.name()
                            + " holds a NaN or an infinity: the checkpoint is damaged, or overflows " + dtype);
                }
            }
        }
    }

    /**
     * Fills the weights as for training from scratch: matrices are normal with standard deviation {@code deviation}, those that
     * write to the residual stream smaller by √(2 × layers) (Radford et al. 2019), norm scales are one and biases zero.
     *
     * @param seed the same seed gives the same weights
     */
    public void initialize(long seed, double deviation) {
        double residual = deviation / Math.sqrt(2.0 * layout.config().layers());
        try (var random = new Tensor.RandomStream(seed)) {
            for (WeightLayout.Place place : layout.places()) {
                try (Scope scope = Scope.open()) {
                    Tensor target = view(place);
                    switch (place.spec().role()) {
                        case ATTENTION_NORM_WEIGHT, MLP_NORM_WEIGHT, FINAL_NORM_WEIGHT, Q_NORM, K_NORM -> target.fillInPlace(1);
                        case O_WEIGHT, DOWN_WEIGHT -> target.normalInPlace(0, residual, random);
                        default -> {
                            if (place.spec().shape().length > 1) {
                                target.normalInPlace(0, deviation, random);
                            } else {
                                target.fillInPlace(0);
                            }
                        }
                    }
                }
            }
        }
    }

    /**
     * Writes weights and config as a Hugging Face folder, in shards of at most 5 GB. Files are complete or absent.
     *
     * @throws TandemException when the folder cannot be written
     */
    public void save(Path folder) {
        List<SafetensorsWriter.Tensor> tensors = layout.places().stream()
                .map(p -> new SafetensorsWriter.Tensor(p.spec().name(), dtype, p.spec().shape()))
                .toList();
        Map<String, WeightLayout.Place> byName = new HashMap<>();
        layout.places().forEach(place -> byName.put(place.spec().name(), place));
        layout.config().write(folder, dtype);
        SafetensorsWriter.writeFolder(folder, tensors, MAX_SHARD_BYTES, (name, sink) -> {
            try (Scope scope = Scope.open()) {
                sink.write(view(Objects.requireNonNull(byName.get(name))).on(Device.cpu()).contiguous().memory());
            }
        });
    }

    /** Copies all weights of another arena with the same layout, converting type and device. */
    public void copyFrom(WeightArena other) {
        if (other.layout.length() != layout.length()) {
            throw new TandemException("cannot copy weights: the arenas have " + other.layout.length() + " and "
                    + layout.length() + " elements");
        }
        flat.copyInPlace(other.flat);
    }

    /** {@return a view of one parameter as checkpoints name and shape it, for the innermost scope} */
    Tensor view(WeightLayout.Place place) {
        return flat.narrow(0, place.offset(), place.elements()).reshape(place.spec().shape());
    }

    @Override
    public void close() {
        groups.forEach(WeightGroup::close);
        flat.close();
    }
}
