package dev.tandem.model;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * The fields of one JSON object, taken by type. Every failure is a {@link ModelFormatException} with file, field,
 * what was expected and what was found. Null counts as absent; {@link #isNull} tells the two apart where a family
 * gives them different meanings.
 *
 * @param source the file, and where in it, for messages
 * @param object the fields
 */
record JsonFields(String source, JsonObject object) {

    static JsonFields read(Path file) {
        return of(file.toString(), StrictJson.read(file));
    }

    static JsonFields of(String source, JsonElement element) {
        if (!element.isJsonObject()) {
            throw new ModelFormatException(source + ": expected a JSON object, found " + StrictJson.brief(element));
        }
        return new JsonFields(source, element.getAsJsonObject());
    }

    boolean has(String name) {
        return object.has(name) && !object.get(name).isJsonNull();
    }

    boolean isNull(String name) {
        return object.has(name) && object.get(name).isJsonNull();
    }

    ModelFormatException wrong(String name, String expected) {
        JsonElement found = object.get(name);
        return new ModelFormatException(source + ": field \"" + name + "\": expected " + expected + ", found "
                + (found == null ? "no such field" : StrictJson.brief(found)));
    }

    /** A whole number of at least 1 that must be there. */
    int size(String name) {
        long value = has(name) ? integer(name, object.get(name)) : 0;
        if (value < 1 || value > Integer.MAX_VALUE) {
            throw wrong(name, "a positive number");
        }
        return (int) value;
    }

    int size(String name, int whenAbsent) {
        return has(name) ? size(name) : whenAbsent;
    }

    double number(String name, double whenAbsent) {
        Double value = optionalNumber(name);
        return value == null ? whenAbsent : value;
    }

    @Nullable Double optionalNumber(String name) {
        if (!has(name)) {
            return null;
        }
        if (object.get(name) instanceof JsonPrimitive primitive && primitive.isNumber()) {
            double value = Double.parseDouble(primitive.getAsString());
            if (Double.isFinite(value)) {
                return value;
            }
        }
        throw wrong(name, "a finite number");
    }

    boolean flag(String name, boolean whenAbsent) {
        if (!has(name)) {
            return whenAbsent;
        }
        if (object.get(name) instanceof JsonPrimitive primitive && primitive.isBoolean()) {
            return primitive.getAsBoolean();
        }
        throw wrong(name, "true or false");
    }

    @Nullable String text(String name) {
        if (!has(name)) {
            return null;
        }
        if (object.get(name) instanceof JsonPrimitive primitive && primitive.isString()) {
            return primitive.getAsString();
        }
        throw wrong(name, "a string");
    }

    String text(String name, String whenAbsent) {
        String value = text(name);
        return value == null ? whenAbsent : value;
    }

    @Nullable JsonFields fields(String name) {
        if (!has(name)) {
            return null;
        }
        if (object.get(name) instanceof JsonObject inner) {
            return new JsonFields(source + ": " + name, inner);
        }
        throw wrong(name, "an object");
    }

    @Nullable JsonArray list(String name) {
        if (!has(name)) {
            return null;
        }
        if (object.get(name) instanceof JsonArray array) {
            return array;
        }
        throw wrong(name, "a list");
    }

    /** The strings of a list; empty when absent. */
    List<String> texts(String name) {
        List<String> values = new ArrayList<>();
        JsonArray array = list(name);
        if (array != null) {
            for (JsonElement element : array) {
                if (!(element instanceof JsonPrimitive primitive) || !primitive.isString()) {
                    throw wrong(name, "a list of strings");
                }
                values.add(primitive.getAsString());
            }
        }
        return values;
    }

    /** A token id; an absent field has the family's default, null and -1 mean that there is none. */
    @Nullable Integer tokenId(String name, @Nullable Integer whenAbsent) {
        List<Integer> ids = tokenIds(name, whenAbsent == null ? List.of() : List.of(whenAbsent));
        if (ids.size() > 1) {
            throw wrong(name, "one token id");
        }
        return ids.isEmpty() ? null : ids.getFirst();
    }

    /** Token ids written as one number or a list of them. */
    List<Integer> tokenIds(String name, List<Integer> whenAbsent) {
        if (!has(name)) {
            return isNull(name) ? List.of() : whenAbsent;
        }
        JsonElement element = object.get(name);
        List<Integer> ids = new ArrayList<>();
        for (JsonElement each : element instanceof JsonArray array ? array : List.of(element)) {
            long id = integer(name, each);
            if (id < -1 || id > Integer.MAX_VALUE) {
                throw wrong(name, "token ids of at least 0");
            }
            if (id >= 0) {
                ids.add((int) id);
            }
        }
        return List.copyOf(ids);
    }

    private long integer(String name, JsonElement element) {
        if (element instanceof JsonPrimitive primitive && primitive.isNumber()) {
            long value = wholeNumber(primitive.getAsString());
            if (value != Long.MIN_VALUE) {
                return value;
            }
        }
        throw wrong(name, "a whole number");
    }

    /** {@return the number, or Long.MIN_VALUE when the text is no whole number of at most 18 digits} */
    static long wholeNumber(String text) {
        int digits = text.startsWith("-") ? text.length() - 1 : text.length();
        return digits >= 1 && digits <= 18 && text.chars().skip(text.length() - digits).allMatch(c -> c >= '0'
                && c <= '9')
                ? Long.parseLong(text) : Long.MIN_VALUE;
    }
}
