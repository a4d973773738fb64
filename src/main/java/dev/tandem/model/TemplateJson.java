package dev.tandem.model;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Objects;

/**
 * Python's {@code json.dumps} as transformers gives it to templates: nothing escaped for HTML, non-ASCII text as it
 * is unless asked, {@code ", "} and {@code ": "} between things. Models were trained on exactly these spaces.
 */
final class TemplateJson {
    private final StringBuilder out = new StringBuilder();
    private final TemplateBudget budget;
    private final boolean ascii;
    private final boolean sorted;
    private final String indent;
    private final boolean indented;
    private final String itemSeparator;
    private final String keySeparator;

    private TemplateJson(TemplateArguments arguments, TemplateBudget budget) {
        this.budget = budget;
        ascii = arguments.flag(0, "ensure_ascii", false);
        Object indentation = arguments.take(1, "indent", TemplateValues.NONE);
        indented = indentation != TemplateValues.NONE;
        indent = indentation instanceof String text ? text : indented ? " ".repeat(width(indentation)) : "";
        Object separators = arguments.take(2, "separators", TemplateValues.NONE);
        if (separators instanceof List<?> pair && pair.size() == 2 && pair.get(0) instanceof String item
                && pair.get(1) instanceof String key) {
            itemSeparator = item;
            keySeparator = key;
        } else if (separators == TemplateValues.NONE) {
            itemSeparator = indented ? "," : ", ";
            keySeparator = ": ";
        } else {
            throw new TemplateFailure("tojson: separators must be two strings");
        }
        sorted = arguments.flag(3, "sort_keys", false);
    }

    private static int width(Object indentation) {
        if (TemplateValues.number(indentation) instanceof Long width && width <= 1000) {
            return (int) Math.max(width, 0);
        }
        throw new TemplateFailure("tojson: indent must be an integer of at most 1000 or a string");
    }

    static String write(Object value, TemplateArguments arguments, TemplateBudget budget) {
        TemplateJson json = new TemplateJson(arguments, budget);
        json.value(value, 0);
        return json.out.toString();
    }

    private void value(Object value, int depth) {
        budget.enter();
        int before = out.length();
        switch (value) {
            case String text -> string(text);
            case Boolean truth -> out.append(truth ? "true" : "false");
            case Long number -> out.append(number.longValue());
            case Double number -> out.append(number(number));
            case List<?> list -> list(list, depth);
            case Map<?, ?> map -> map(map, depth);
            case TemplateValues.Undefined undefined -> throw undefined.failure();
            default -> {
                if (value != TemplateValues.NONE) {
                    throw new TemplateFailure("tojson cannot write " + TemplateValues.typeName(value));
                }
                out.append("null");
            }
        }
        budget.charge(out.length() - before);
        budget.leave();
    }

    private static String number(double value) {
        return Double.isNaN(value) ? "NaN" : Double.isInfinite(value) ? value > 0 ? "Infinity" : "-Infinity"
                : PythonText.number(value);
    }

    private void list(List<?> list, int depth) {
        out.append('[');
        for (int i = 0; i < list.size(); i++) {
            out.append(i == 0 ? "" : itemSeparator);
            newline(depth + 1);
            value(list.get(i), depth + 1);
        }
        if (!list.isEmpty()) {
            newline(depth);
        }
        out.append(']');
    }

    private void map(Map<?, ?> map, int depth) {
        out.append('{');
        List<Object> keys = new ArrayList<>(map.keySet());
        if (sorted) {
            keys.sort((a, b) -> TemplateValues.equal(a, b) ? 0 : TemplateValues.ordered("<", a, b) ? -1 : 1);
        }
        for (int i = 0; i < keys.size(); i++) {
            out.append(i == 0 ? "" : itemSeparator);
            newline(depth + 1);
            string(key(keys.get(i)));
            out.append(keySeparator);
            value(Objects.requireNonNull(map.get(keys.get(i))), depth + 1);
        }
        if (!keys.isEmpty()) {
            newline(depth);
        }
        out.append('}');
    }

    private static String key(Object key) {
        return switch (key) {
            case String text -> text;
            case Boolean truth -> truth ? "true" : "false";
            case Long number -> number.toString();
            case Double number -> number(number);
            default -> {
                if (key != TemplateValues.NONE) {
                    throw new TemplateFailure("tojson: " + TemplateValues.typeName(key) + " cannot be a key");
                }
                yield "null";
            }
        };
    }

    private void newline(int depth) {
        if (indented) {
            budget.charge((long) indent.length() * depth);
            out.append('\n').append(indent.repeat(depth));
        }
    }

    private void string(String text) {
        out.append('"');
        for (int i = 0; i < text.length(); i++) {
            char c = text.charAt(i);
            switch (c) {
                case '"' -> out.append("\\\"");
                case '\\' -> out.append("\\\\");
                case '\n' -> out.append("\\n");
                case '\r' -> out.append("\\r");
                case '\t' -> out.append("\\t");
                case '\f' -> out.append("\\f");
                case '\b' -> out.append("\\b");
                default -> {
                    if (c < 32 || (ascii && c > 126)) {
                        out.append(c == 127 ? "\u007f" : "\\u%04x".formatted((int) c));
                    } else {
                        out.append(c);
                    }
                }
            }
        }
        out.append('"');
    }
}
