package dev.tandem.model;

import dev.tandem.model.TemplateValues.Undefined;
import java.util.List;
import java.util.Map;
import java.util.Set;

/** jinja2's tests: what may follow {@code is}. */
final class TemplateTests {
    static final Set<String> NAMES = Set.of("defined", "undefined", "none", "string", "mapping", "iterable", "sequence",
            "number", "integer",
            "float", "boolean", "true", "false", "sameas", "eq", "equalto", "ne", "lt", "le", "gt", "ge", "in", "odd",
                    "even");

    private TemplateTests() {}

    static boolean apply(String test, Object value, TemplateArguments arguments) {
        boolean result = switch (test) {
            case "defined" -> !(value instanceof Undefined);
            case "undefined" -> value instanceof Undefined;
            case "none" -> value == TemplateValues.NONE;
            case "string" -> value instanceof String;
            case "mapping" -> value instanceof Map<?, ?>;

            case "iterable", "sequence" -> value instanceof String || value instanceof List<?>
                    || value instanceof Map<?, ?>
                    || value instanceof Undefined;
            case "number" -> TemplateValues.isNumber(value);
            case "integer" -> value instanceof Long;
            case "float" -> value instanceof Double;
            case "boolean" -> value instanceof Boolean;
            case "true" -> value.equals(true);
            case "false" -> value.equals(false);
            case "sameas" -> same(value, arguments.required(0, "other"));
            case "eq", "equalto" -> TemplateValues.equal(value, arguments.required(0, "b"));
            case "ne" -> !TemplateValues.equal(value, arguments.required(0, "b"));
            case "lt" -> TemplateValues.ordered("<", value, arguments.required(0, "b"));
            case "le" -> TemplateValues.ordered("<=", value, arguments.required(0, "b"));
            case "gt" -> TemplateValues.ordered(">", value, arguments.required(0, "b"));
            case "ge" -> TemplateValues.ordered(">=", value, arguments.required(0, "b"));
            case "in" -> TemplateValues.contains(arguments.required(0, "seq"), value);
            case "odd", "even" -> {
                if (!(TemplateValues.number(value) instanceof Long number)) {
                    throw new TemplateFailure("the test '" + test + "' takes an integer, found "
                            + TemplateValues.typeName(value));
                }
                yield (number % 2 != 0) == test.equals("odd");
            }
            default -> throw new TemplateFailure("unknown test '" + StrictJson.brief(test) + "'");
        };
        arguments.done();
        return result;
    }

    /** Identity, as {@code is} has it for none and booleans; for other scalars, equality of type and value. */
    private static boolean same(Object value, Object other) {
        return value == other
                || ((value instanceof Boolean || value instanceof Long || value instanceof String)
                        && value.equals(other));
    }
}
