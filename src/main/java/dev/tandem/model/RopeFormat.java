package dev.tandem.model;

import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import org.jspecify.annotations.Nullable;

/**
 * How config.json spells rotary positions. transformers 5 keeps everything in {@code rope_parameters}; before, the
 * base stood at the top as {@code rope_theta} and the rest in {@code rope_scaling}, whose kind was first called
 * {@code type}. All are read, with the precedence of transformers; the older spelling is written, because both
 * generations read it.
 */
final class RopeFormat {
    private RopeFormat() {}

    static Positions.Rope read(JsonFields fields, int maxPositions) {
        JsonFields scaling = fields.fields("rope_scaling");
        if (scaling == null || scaling.object().isEmpty()) {
            scaling = fields.fields("rope_parameters");
        }
        double theta = fields.number("rope_theta", 10_000);
        if (scaling != null) {
            theta = scaling.number("rope_theta", theta);
        }
        for (JsonFields each : scaling == null ? new JsonFields[] {fields} : new JsonFields[] {fields, scaling}) {
            if (each.number("partial_rotary_factor", 1) != 1) {
                throw each.wrong("partial_rotary_factor", "1 (partly rotated heads are not supported)");
            }
        }
        return new Positions.Rope(theta, scaling == null ? new RopeScaling.None()
                : scaling(fields, scaling, maxPositions));
    }

    private static RopeScaling scaling(JsonFields fields, JsonFields scaling, int maxPositions) {
        String field = scaling.has("rope_type") || !scaling.has("type") ? "rope_type" : "type";
        // Both generations let a field at the top win (Phi3's way of saying it).
        int original = fields.size("original_max_position_embeddings",
                scaling.size("original_max_position_embeddings", maxPositions));
        return switch (scaling.text(field, "default")) {
            case "default" -> new RopeScaling.None();
            case "linear" -> new RopeScaling.Linear(required(scaling, "factor"));
            case "llama3" -> new RopeScaling.Llama3(required(scaling, "factor"), required(scaling, "low_freq_factor"),
                    required(scaling, "high_freq_factor"), original);
            case "yarn" -> new RopeScaling.Yarn(scaling.number("factor", (double) maxPositions / original), original,
                    orDefault(scaling.optionalNumber("beta_fast"), 32),
                            orDefault(scaling.optionalNumber("beta_slow"), 1),
                    scaling.optionalNumber("attention_factor"), scaling.optionalNumber("mscale"),
                    scaling.optionalNumber("mscale_all_dim"), scaling.flag("truncate", true));
            default -> throw scaling.wrong(field, "one of default, linear, llama3, yarn");
        };
    }

    private static double required(JsonFields scaling, String field) {
        Double value = scaling.optionalNumber(field);
        if (value == null) {
            throw scaling.wrong(field, "a positive number");
        }
        return value;
    }

    private static double orDefault(@Nullable Double value, double whenAbsent) {
        return value == null || value == 0 ? whenAbsent : value;
    }

    static void write(Positions positions, JsonObject json) {
        if (!(positions instanceof Positions.Rope(double theta, RopeScaling scaling))) {
            throw new IllegalArgumentException("ModelConfig.positions: this family has rotary positions, found "
                    + positions);
        }
        json.addProperty("rope_theta", theta);
        switch (scaling) {
            case RopeScaling.None none -> json.add("rope_scaling", JsonNull.INSTANCE);
            case RopeScaling.Linear(double factor) -> json.add("rope_scaling", scaling("linear", factor));
            case RopeScaling.Llama3 llama -> {
                JsonObject fields = scaling("llama3", llama.factor());
                fields.addProperty("low_freq_factor", llama.lowFrequencyFactor());
                fields.addProperty("high_freq_factor", llama.highFrequencyFactor());
                fields.addProperty("original_max_position_embeddings", llama.originalMaxPositions());
                json.add("rope_scaling", fields);
            }
            case RopeScaling.Yarn yarn -> {
                JsonObject fields = scaling("yarn", yarn.factor());
                fields.addProperty("original_max_position_embeddings", yarn.originalMaxPositions());
                fields.addProperty("beta_fast", yarn.betaFast());
                fields.addProperty("beta_slow", yarn.betaSlow());
                addIfPresent(fields, "attention_factor", yarn.attentionFactor());
                addIfPresent(fields, "mscale", yarn.mscale());
                addIfPresent(fields, "mscale_all_dim", yarn.mscaleAllDim());
                fields.addProperty("truncate", yarn.truncate());
                json.add("rope_scaling", fields);
            }
        }
    }

    private static JsonObject scaling(String type, double factor) {
        JsonObject fields = new JsonObject();
        fields.addProperty("rope_type", type);
        fields.addProperty("factor", factor);
        return fields;
    }

    private static void addIfPresent(JsonObject fields, String name, @Nullable Double value) {
        if (value != null) {
            fields.addProperty(name, value);
        }
    }
}
