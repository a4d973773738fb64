package dev.tandem.model;

import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** The computed arguments of one call, taken by position or name; {@link #done} refuses those that nobody took. */
final class TemplateArguments {
    private final String callee;
    private final List<Object> positional;
    private final Map<String, Object> named;
    private int most;

    TemplateArguments(String callee, List<Object> positional, Map<String, Object> named) {
        this.callee = callee;
        this.positional = positional;
        this.named = new LinkedHashMap<>(named);
    }

    int count() {
        return positional.size();
    }

    @Nullable Object take(int index, String name) {
        most = Math.max(most, index + 1);
        Object byName = named.remove(name);
        if (index >= 0 && index < positional.size()) {
            if (byName != null) {
                throw new TemplateFailure(callee + ": the argument " + name + " is given twice");
            }
            return positional.get(index);
        }
        return byName;
    }

    Object take(int index, String name, Object whenAbsent) {
        Object value = take(index, name);
        return value == null ? whenAbsent : value;
    }

    Object required(int index, String name) {
        Object value = take(index, name);
        if (value == null) {
            throw new TemplateFailure(callee + ": the argument " + name + " is missing");
        }
        return value;
    }

    String text(int index, String name) {
        return asText(name, required(index, name));
    }

    String text(int index, String name, String whenAbsent) {
        return asText(name, take(index, name, whenAbsent));
    }

    /** A string, or null when absent or none. */
    @Nullable String optionalText(int index, String name) {
        Object value = take(index, name);
        return value == null || value == TemplateValues.NONE ? null : asText(name, value);
    }

    private String asText(String name, Object value) {
        if (value instanceof String text) {
            return text;
        }
        throw value instanceof TemplateValues.Undefined undefined ? undefined.failure()
                : new TemplateFailure(callee + ": the argument " + name + " must be a string, found "
                        + TemplateValues.typeName(value));
    }

    long integer(int index, String name, long whenAbsent) {
        Object value = take(index, name);
        if (value == null || value == TemplateValues.NONE) {
            return whenAbsent;
        }
        if (TemplateValues.number(value) instanceof Long number) {
            return number;
        }
        throw new TemplateFailure(callee + ": the argument " + name + " must be an integer, found "
                + TemplateValues.typeName(value));
    }

    boolean flag(int index, String name, boolean whenAbsent) {
        Object value = take(index, name);
        return value == null ? whenAbsent : TemplateValues.truth(value);
    }

    /** All positional arguments from an index on. */
    List<Object> rest(int from) {
        most = positional.size();
        return positional.subList(Math.min(from, positional.size()), positional.size());
    }

    Map<String, Object> takeNamed() {
        Map<String, Object> all = new LinkedHashMap<>(named);
        named.clear();
        return all;
    }

    void done() {
        if (!named.isEmpty()) {
            throw new TemplateFailure(callee + ": unknown argument "
                    + StrictJson.brief(named.keySet().iterator().next()));
        }
        if (positional.size() > most) {
            throw new TemplateFailure(callee + ": takes at most " + most + " arguments, found " + positional.size());
        }
    }
}
