package dev.tandem.model;

import java.util.AbstractList;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * The values of a chat template, and Python's rules for them: String, Long, Double, Boolean, List, {@link Tuple},
 * Map, {@link #NONE}, {@link Undefined}, {@link Namespace}; beside these only a loop's state, functions and macros.
 */
final class TemplateValues {
    private static final int DEEPEST = 100;

    /** Python's None. */
    static final Object NONE = new Object() {
        @Override
        public String toString() {
            return "None";
        }
    };

    /** What a missing name, key or attribute is: empty when printed or looped over, an error for anything else. */
    record Undefined(String what) {
        TemplateFailure failure() {
            return new TemplateFailure(what + " is undefined");
        }
    }

    /** What {@code namespace(…)} makes: attributes that a loop's body can set for the code after it. */
    record Namespace(Map<Object, Object> attributes) {}

    /** A list that Python would write in parentheses. */
    static final class Tuple extends AbstractList<Object> {
        private final List<Object> elements;

        Tuple(List<Object> elements) {
            this.elements = elements;
        }

        @Override
        public Object get(int index) {
            return elements.get(index);
        }

        @Override
        public int size() {
            return elements.size();
        }
    }

    private TemplateValues() {}

    /** {@return a caller's value as the template sees it} */
    static Object of(@Nullable Object value) {
        return of(value, 0);
    }

    private static Object of(@Nullable Object value, int depth) {
        if (depth > DEEPEST) {
            throw new IllegalArgumentException("A chat template's variable is nested more than " + DEEPEST + " deep");
        }
        return switch (value) {
            case null -> NONE;
            case String text -> text;
            case Boolean truth -> truth;
            case Integer number -> number.longValue();
            case Long number -> number;
            case Float number -> number.doubleValue();
            case Double number -> number;
            case ChatMessage message -> {
                Map<Object, Object> fields = new LinkedHashMap<>();
                fields.put("role", message.role());
                fields.put("content", message.content());
                yield fields;
            }
            case Map<?, ?> map -> {
                Map<Object, Object> fields = new LinkedHashMap<>();
                map.forEach((key, field) -> fields.put(of(key, depth + 1), of(field, depth + 1)));
                yield fields;
            }
            case Collection<?> collection -> {
                List<Object> elements = new ArrayList<>();
                collection.forEach(element -> elements.add(of(element, depth + 1)));
                yield elements;
            }
            default -> throw new IllegalArgumentException("A chat template's variables are strings, numbers,"
                    + " booleans, lists and maps;"
                    + " found " + value.getClass().getName());
        };
    }

    static String typeName(Object value) {
        return switch (value) {
            case String text -> "a string";
            case Boolean truth -> "a boolean";
            case Long number -> "an integer";
            case Double number -> "a float";
            case List<?> list -> "a list";
            case Map<?, ?> map -> "a mapping";
            case Namespace namespace -> "a namespace";
            case Undefined undefined -> "undefined";
            default -> value == NONE ? "none" : "a loop, function or macro";
        };
    }

    static boolean truth(Object value) {
        return switch (value) {
            case Boolean truth -> truth;
            case String text -> !text.isEmpty();
            case Long number -> number != 0;
            case Double number -> number != 0;
            case Collection<?> collection -> !collection.isEmpty();
            case Map<?, ?> map -> !map.isEmpty();
            case Undefined undefined -> false;
            default -> value != NONE;
        };
    }

    static boolean equal(Object left, Object right) {
        return equal(left, right, 0);
    }

    private static boolean equal(Object left, Object right, int depth) {
        if (depth > DEEPEST) {
            throw new TemplateFailure("values nested more than " + DEEPEST + " deep are compared");
        }
        if (isNumber(left) && isNumber(right)) {
            return compareNumbers(left, right) == 0;
        }
        if (left instanceof List<?> a && right instanceof List<?> b) {
            if (a.size() != b.size() || a instanceof Tuple != b instanceof Tuple) {
                return false;
            }
            for (int i = 0; i < a.size(); i++) {
                if (!equal(a.get(i), b.get(i), depth + 1)) {
                    return false;
                }
            }
            return true;
        }
        if (left instanceof Map<?, ?> a && right instanceof Map<?, ?> b) {
            if (!a.keySet().equals(b.keySet())) {
                return false;
            }
            for (Map.Entry<?, ?> entry : a.entrySet()) {
                Object other = b.get(entry.getKey());
                if (other == null || !equal(entry.getValue(), other, depth + 1)) {
                    return false;
                }
            }
            return true;
        }
        return left == right || (left instanceof Undefined && right instanceof Undefined)
                || (left instanceof String && left.equals(right));
    }

    static boolean isNumber(Object value) {
        return value instanceof Long || value instanceof Double || value instanceof Boolean;
    }

    /** A boolean counts as 0 or 1, as in Python. */
    static Object number(Object value) {
        return value instanceof Boolean truth ? truth ? 1L : 0L : value;
    }

    static double toDouble(Object number) {
        return number(number) instanceof Long whole ? whole : (Double) number;
    }

    private static int compareNumbers(Object left, Object right) {
        if (number(left) instanceof Long a && number(right) instanceof Long b) {
            return Long.compare(a, b);
        }
        double a = toDouble(left);
        double b = toDouble(right);
        // NaN is not equal to anything; 2 stands for "no order".
        return a < b ? -1 : a > b ? 1 : a == b ? 0 : 2;
    }

    /** {@code <}, {@code <=}, {@code >}, {@code >=}. */
    static boolean ordered(String operator, Object left, Object right) {
        int order;
        if (isNumber(left) && isNumber(right)) {
            order = compareNumbers(left, right);
            if (order == 2) {
                return false;
            }
        } else if (left instanceof String a && right instanceof String b) {
            order = Arrays.compare(a.codePoints().toArray(), b.codePoints().toArray());
        } else {
            throw unsupported(operator, left, right);
        }
        return switch (operator) {
            case "<" -> order < 0;
            case "<=" -> order <= 0;
            case ">" -> order > 0;
            default -> order >= 0;
        };
    }

    static TemplateFailure unsupported(String operator, Object left, Object right) {
        if (left instanceof Undefined undefined) {
            return undefined.failure();
        }
        return right instanceof Undefined undefined ? undefined.failure()
                : new TemplateFailure("'" + operator + "' is not supported between " + typeName(left) + " and "
                        + typeName(right));
    }

    static boolean contains(Object container, Object element) {
        return switch (container) {
            case String text when element instanceof String part -> text.contains(part);
            case List<?> list -> list.stream().anyMatch(each -> equal(each, element));
            case Map<?, ?> map -> field(map, element) != null;
            case Undefined undefined -> false;
            default -> throw unsupported("in", element, container);
        };
    }

    /** The value of a key; only scalars are keys, and asking a deeply nested list for its hash would end the stack. */
    static @Nullable Object field(Map<?, ?> map, Object key) {
        return key instanceof String || isNumber(key) || key == NONE ? map.get(key) : null;
    }

    /** What a loop runs over: elements, keys, or characters. */
    static List<Object> elements(Object value) {
        return switch (value) {
            case List<?> list -> new ArrayList<>(list);
            case Map<?, ?> map -> new ArrayList<>(map.keySet());
            case String text -> {
                List<Object> characters = new ArrayList<>();
                text.codePoints().forEach(c -> characters.add(Character.toString(c)));
                yield characters;
            }
            case Undefined undefined -> new ArrayList<>();
            default -> throw new TemplateFailure("cannot loop over " + typeName(value));
        };
    }

    static long length(Object value) {
        return switch (value) {
            case String text -> text.codePointCount(0, text.length());
            case Collection<?> collection -> collection.size();
            case Map<?, ?> map -> map.size();
            case Undefined undefined -> 0;
            default -> throw new TemplateFailure(typeName(value) + " has no length");
        };
    }

    /** As {@code str(value)}. */
    static String text(Object value, TemplateBudget budget) {
        if (value instanceof String text) {
            return text;
        }
        if (value instanceof Undefined) {
            return "";
        }
        StringBuilder out = new StringBuilder();
        write(value, out, budget);
        return out.toString();
    }

    /** As {@code repr(value)}. */
    private static void write(Object value, StringBuilder out, TemplateBudget budget) {
        budget.enter();
        int before = out.length();
        switch (value) {
            case Boolean truth -> out.append(truth ? "True" : "False");
            case Long number -> out.append(number.longValue());
            case Double number -> out.append(PythonText.number(number));
            case String text -> PythonText.quote(text, out);
            case List<?> list -> {
                boolean tuple = list instanceof Tuple;
                out.append(tuple ? '(' : '[');
                for (int i = 0; i < list.size(); i++) {
                    out.append(i == 0 ? "" : ", ");
                    write(list.get(i), out, budget);
                }
                out.append(tuple ? list.size() == 1 ? ",)" : ")" : "]");
            }
            case Map<?, ?> map -> {
                out.append('{');
                boolean first = true;
                for (Map.Entry<?, ?> entry : map.entrySet()) {
                    out.append(first ? "" : ", ");
                    first = false;
                    write(entry.getKey(), out, budget);
                    out.append(": ");
                    write(entry.getValue(), out, budget);
                }
                out.append('}');
            }
            default -> {
                if (value != NONE) {
                    throw new TemplateFailure("cannot print " + typeName(value));
                }
                out.append("None");
            }
        }
        // A container is charged for its parts again; the factor is its depth.
        budget.charge(out.length() - before);
        budget.leave();
    }
}
