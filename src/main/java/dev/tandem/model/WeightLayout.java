package dev.tandem.model;

import java.util.ArrayList;
import java.util.List;

/**
 * Where every parameter lies in the {@link WeightArena}.
 *
 * <p>The arena is cut into groups: the embeddings, each layer, and the head. A group is contiguous and padded so that it can be
 * cut evenly over the ranks: it is the unit in which gradients are reduced and weights gathered. Within a group, parameters that
 * are multiplied with the same input lie next to each other without a gap (q, k, v; gate, up), so one fused matrix and the
 * separate tensors of a checkpoint are views of the same bytes. Everything else starts on a boundary of {@value #ALIGNMENT}
 * elements. All numbers are elements, not bytes.
 */
public final class WeightLayout {
    /** Where fused matrices start, in elements; also the grain of a rank's shard. */
    static final int ALIGNMENT = 64;

    /**
     * A parameter and its place.
     *
     * @param spec the tensor as checkpoints name it
     * @param offset of its first element in the arena
     */
    record Place(ParameterSpec spec, long offset) {
        long elements() {
            return product(spec.shape());
        }
    }

    /**
     * Adjacent parameters seen as one matrix or vector.
     *
     * @param role of the first member; Q_WEIGHT stands for q, k and v, GATE_WEIGHT for gate and up
     * @param offset of the first element in the arena
     * @param shape rows of all members together
     */
    record Fused(ParameterRole role, long offset, long[] shape) {
        long elements() {
            return product(shape);
        }

        /** Whether weight decay applies: to matrices, and not to norms and biases. */
        boolean decays() {
            return shape.length > 1;
        }
    }

    /**
     * A contiguous part of the arena.
     *
     * @param layer number of the layer, or -1 for the embeddings and the number of layers for the head
     * @param offset of the first element
     * @param length in elements, padding included
     */
    record Group(int layer, long offset, long length, List<Fused> fused) {}

    private final ModelConfig config;
    private final int shards;
    private final List<Place> places = new ArrayList<>();
    private final List<Group> groups = new ArrayList<>();
    private final long length;

    /**
     * @param config the model
     * @param shards over how many ranks optimizer state and gradients are cut
     */
    public WeightLayout(ModelConfig config, int shards) {
        this.config = config;
        this.shards = shards;
        List<ParameterSpec> specs = config.parameters();
        long at = 0;
        int next = 0;
        for (int layer = -1; layer <= config.layers(); layer++) {
            long start = at;
            List<Fused> fused = new ArrayList<>();
            while (next < specs.size() && groupOf(specs.get(next)) == layer) {
                at = align(at, ALIGNMENT);
                ParameterSpec first = specs.get(next);
                long offset = at;
                long rows = 0;
                do {
                    ParameterSpec spec = specs.get(next++);
                    Place place = new Place(spec, at);
                    places.add(place);
                    at += place.elements();
                    rows += spec.shape()[0];
                } while (next < specs.size() && specs.get(next).layer() == first.layer()
                        && continues(first.role(), specs.get(next).role()));
                long[] shape = first.shape().clone();
                shape[0] = rows;
                fused.add(new Fused(first.role(), offset, shape));
            }
            at = start + align(at - start, (long) ALIGNMENT * shards);
            groups.add(new Group(layer, start, at - start, List.copyOf(fused)));
        }
        length = at;
    }

    private int groupOf(ParameterSpec spec) {
        return switch (spec.role()) {
            case EMBED_TOKENS, EMBED_POSITIONS, PROJECT_IN -> -1;
            case FINAL_NORM_WEIGHT, FINAL_NORM_BIAS, PROJECT_OUT, LM_HEAD -> config.layers();
            default -> spec.layer();
        };
    }

    private static boolean continues(ParameterRole first, ParameterRole next) {
        return switch (first) {
            case Q_WEIGHT -> next == ParameterRole.K_WEIGHT || next == ParameterRole.V_WEIGHT;
            case Q_BIAS -> next == ParameterRole.K_BIAS || next == ParameterRole.V_BIAS;
            case GATE_WEIGHT -> next == ParameterRole.UP_WEIGHT;
            case GATE_BIAS -> next == ParameterRole.UP_BIAS;
            default -> false;
        };
    }

    /** {@return the model} */
    public ModelConfig config() {
        return config;
    }

    /** {@return over how many ranks the groups can be cut} */
    public int shards() {
        return shards;
    }

    /** {@return the length of the arena in elements, padding included} */
    public long length() {
        return length;
    }

    /** {@return the number of parameters, padding not included} */
    public long parameters() {
        return places.stream().mapToLong(Place::elements).sum();
    }

    /** {@return the length of the longest group of a layer, in elements} */
    public long longestLayer() {
        return groups.subList(1, groups.size() - 1).stream().mapToLong(Group::length).max().orElse(0);
    }

    /** {@return the length of the embedding group, in elements} */
    public long embeddingLength() {
        return groups.getFirst().length();
    }

    /** {@return the length of the head group, in elements} */
    public long headLength() {
        return groups.getLast().length();
    }

    /** {@return the number of groups} */
    public int groupCount() {
        return groups.size();
    }

    /** {@return where a group begins in the arena, in elements; for the number after the last, the arena's length} */
    public long groupOffset(int group) {
        return group == groups.size() ? length : groups.get(group).offset();
    }

    List<Place> places() {
        return places;
    }

    List<Group> groups() {
        return groups;
    }

    private static long align(long value, long unit) {
        return (value + unit - 1) / unit * unit;
    }

    static long product(long[] shape) {
        long n = 1;
        for (long d : shape) {
            n *= d;
        }
        return n;
    }
}
