package dev.tandem.model;

import dev.tandem.model.TemplateValues.Tuple;
import dev.tandem.model.TemplateValues.Undefined;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * Arithmetic, subscripts and slices of chat templates, by Python's rules. Integers are 64 bits wide; beyond that is
 * an error.
 */
final class TemplateOperators {
    private TemplateOperators() {}

    static Object binary(String operator, Object left, Object right, TemplateBudget budget) {
        try {
            if (TemplateValues.isNumber(left) && TemplateValues.isNumber(right)) {
                return arithmetic(operator, TemplateValues.number(left), TemplateValues.number(right));
            }
        } catch (ArithmeticException e) {
            throw new TemplateFailure("'" + operator + "': " + e.getMessage());
        }
        if (operator.equals("+") && left instanceof String a && right instanceof String b) {
            budget.charge((long) a.length() + b.length());
            return a + b;
        }
        if (operator.equals("+") && left instanceof List<?> a && right instanceof List<?> b
                && left instanceof Tuple == right instanceof Tuple) {
            budget.charge(((long) a.size() + b.size()) * TemplateBudget.ELEMENT);
            List<Object> sum = new ArrayList<>(a);
            sum.addAll(b);
            return left instanceof Tuple ? new Tuple(sum) : sum;
        }
        if (operator.equals("*") && TemplateValues.number(right) instanceof Long times) {
            return repeat(left, times, budget);
        }
        if (operator.equals("*") && TemplateValues.number(left) instanceof Long times) {
            return repeat(right, times, budget);
        }
        throw TemplateValues.unsupported(operator, left, right);
    }

    private static Object repeat(Object value, long asked, TemplateBudget budget) {
        int times = Math.clamp(asked, 0, Integer.MAX_VALUE);
        if (value instanceof String text) {
            budget.charge((long) text.length() * times);
            return text.repeat(times);
        }
        if (value instanceof List<?> list) {
            budget.charge((long) list.size() * times * TemplateBudget.ELEMENT);
            List<Object> repeated = new ArrayList<>();
            for (int i = 0; i < times && !list.isEmpty(); i++) {
                repeated.addAll(list);
            }
            return value instanceof Tuple ? new Tuple(repeated) : repeated;
        }
        throw TemplateValues.unsupported("*", value, asked);
    }

    private static Object arithmetic(String operator, Object left, Object right) {
        boolean zero = TemplateValues.toDouble(right) == 0;
        if (zero && (operator.equals("/") || operator.equals("//") || operator.equals("%"))) {
            throw new ArithmeticException("division by zero");
        }
        if (left instanceof Long a && right instanceof Long b && !operator.equals("/")
                && !(operator.equals("**") && b < 0)) {
            return switch (operator) {
                case "+" -> Math.addExact(a, b);
                case "-" -> Math.subtractExact(a, b);
                case "*" -> Math.multiplyExact(a, b);
                case "//" -> Math.floorDivExact(a, b);
                case "%" -> Math.floorMod(a, b);
                default -> power(a, b);
            };
        }
        double a = TemplateValues.toDouble(left);
        double b = TemplateValues.toDouble(right);
        return switch (operator) {
            case "+" -> a + b;
            case "-" -> a - b;
            case "*" -> a * b;
            case "/" -> a / b;
            case "//" -> Math.floor(a / b);
            case "%" -> a - b * Math.floor(a / b);
            default -> {
                if (a < 0 && b != Math.rint(b)) {
                    throw new ArithmeticException("a negative number to a fraction is not real");
                }
                yield Math.pow(a, b);
            }
        };
    }

    private static long power(long base, long exponent) {
        if (base == 0 || base == 1 || base == -1) {
            return exponent == 0 ? 1 : base == -1 && exponent % 2 == 0 ? 1 : base;
        }
        long power = 1;
        for (long i = 0; i < exponent; i++) {
            power = Math.multiplyExact(power, base);
        }
        return power;
    }

    static Object unary(String operator, Object value) {
        if (operator.equals("not")) {
            return !TemplateValues.truth(value);
        }
        Object number = TemplateValues.number(value);
        if (number instanceof Long whole && whole != Long.MIN_VALUE) {
            return operator.equals("-") ? -whole : whole;
        }
        if (number instanceof Double fraction) {
            return operator.equals("-") ? -fraction : fraction;
        }
        throw value instanceof Undefined undefined ? undefined.failure()
                : new TemplateFailure("'" + operator + "' is not supported for " + TemplateValues.typeName(value));
    }

    /** {@code object[key]}: what is not there is undefined, as in jinja2. */
    static Object item(Object object, Object key) {
        Object found = switch (object) {
            case Map<?, ?> map -> TemplateValues.field(map, key);
            case TemplateValues.Namespace namespace -> TemplateValues.field(namespace.attributes(), key);
            case List<?> list when TemplateValues.number(key) instanceof Long index -> {
                long at = index < 0 ? index + list.size() : index;
                yield at >= 0 && at < list.size() ? list.get((int) at) : null;
            }
            case String text when TemplateValues.number(key) instanceof Long index -> {
                int length = text.codePointCount(0, text.length());
                long at = index < 0 ? index + length : index;
                yield at >= 0 && at < length ? Character.toString(text.codePointAt(text.offsetByCodePoints(0,
                        (int) at))) : null;
            }
            case Undefined undefined -> throw undefined.failure();
            default -> null;
        };
        return found == null ? new Undefined("the item '" + describe(key) + "' of " + TemplateValues.typeName(object))
                : found;
    }

    private static String describe(Object key) {
        return key instanceof String || TemplateValues.isNumber(key) ? StrictJson.brief(key.toString())
                : TemplateValues.typeName(key);
    }

    /** {@code object[begin:end:step]}, as {@code slice.indices} has it. */
    static Object slice(Object object, @Nullable Object begin, @Nullable Object end, @Nullable Object step,
            TemplateBudget budget) {
        if (object instanceof Undefined undefined) {
            throw undefined.failure();
        }
        if (!(object instanceof String) && !(object instanceof List<?>)) {
            throw new TemplateFailure(TemplateValues.typeName(object) + " cannot be sliced");
        }
        long size = TemplateValues.length(object);
        long stride = bound(step, 1);
        if (stride == 0) {
            throw new TemplateFailure("a slice's step cannot be zero");
        }
        long low = stride > 0 ? 0 : -1;
        long high = stride > 0 ? size : size - 1;
        long from = clip(bound(begin, stride > 0 ? low : high), absent(begin), size, low, high);
        long to = clip(bound(end, stride > 0 ? high : low), absent(end), size, low, high);
        budget.charge(size * TemplateBudget.ELEMENT);
        List<Object> all = TemplateValues.elements(object);
        List<Object> taken = new ArrayList<>();
        for (long at = from; stride > 0 ? at < to : at > to; at += stride) {
            taken.add(all.get((int) at));
        }
        if (object instanceof String) {
            StringBuilder text = new StringBuilder();
            taken.forEach(text::append);
            return text.toString();
        }
        return object instanceof Tuple ? new Tuple(taken) : taken;
    }

    private static boolean absent(@Nullable Object bound) {
        return bound == null || bound == TemplateValues.NONE;
    }

    private static long bound(@Nullable Object value, long whenAbsent) {
        if (value == null || absent(value)) {
            return whenAbsent;
        }
        if (TemplateValues.number(value) instanceof Long whole) {
            return Math.clamp(whole, -(1L << 40), 1L << 40);
        }
        throw new TemplateFailure("a slice takes integers, found " + TemplateValues.typeName(value));
    }

    private static long clip(long value, boolean absent, long size, long low, long high) {
        return absent ? value : Math.clamp(value < 0 ? value + size : value, low, high);
    }
}
