package dev.tandem.generation;

import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.model.ParameterRole;
import dev.tandem.model.RotaryTables;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * What becomes of queries, keys and values after their product: biases, norms, the rotation, and the addresses where attention reads the
 * results. The addresses never change, so this serves all steps whose tokens lie at the same fields of a step's input.
 *
 * @param arena with biases and norms
 * @param tables of the rotation, or null where there is none
 * @param positions of the tokens
 * @param slots of the tokens, which tell their block tables
 * @param blockTables of all slots
 * @param tableWidth blocks of a slot's table
 * @param pages for keys and values
 * @param query for queries
 * @param tokens how many there are
 */
record Rotation(WeightArena arena, @Nullable RotaryTables tables, long positions, long slots, long blockTables, int tableWidth, long pages,
        long query, long tokens) {
    /** {@return a kernel's first arguments, and then a layer's for {@code rotateAndWrite} but for its first, the product's result} */
    Object[] arguments(int layer, Object... first) {
        WeightGroup weights = arena.layer(layer);
        ModelConfig config = arena.layout().config();
        List<Object> all = new ArrayList<>(List.of(first));
        all.addAll(List.of(address(weights.find(ParameterRole.Q_BIAS)), address(weights.find(ParameterRole.Q_NORM)),
                address(weights.find(ParameterRole.K_NORM)), (float) config.normEps()));
        all.addAll(List.of(address(tables == null ? null : tables.cosines()), address(tables == null ? null : tables.sines())));
        all.addAll(List.of(positions, slots, blockTables, tableWidth, pages, layer, config.layers(), query, tokens));
        return all.toArray();
    }

    private static long address(@Nullable Tensor tensor) {
        return tensor == null ? 0 : tensor.address();
    }
}
