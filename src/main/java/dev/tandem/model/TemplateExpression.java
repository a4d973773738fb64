package dev.tandem.model;

import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** What a chat template computes with. Every node knows its line, for messages. */
sealed interface TemplateExpression {
    int line();

    record Literal(Object value, int line) implements TemplateExpression {}

    record Name(String name, int line) implements TemplateExpression {}

    record Listing(List<TemplateExpression> elements, boolean tuple, int line) implements TemplateExpression {}

    record Dictionary(List<TemplateExpression> keys, List<TemplateExpression> values,
            int line) implements TemplateExpression {}

    /** {@code object.name}. */
    record Attribute(TemplateExpression object, String name, int line) implements TemplateExpression {}

    /** {@code object[key]}. */
    record Item(TemplateExpression object, TemplateExpression key, int line) implements TemplateExpression {}

    record Slice(TemplateExpression object, @Nullable TemplateExpression begin, @Nullable TemplateExpression end,
            @Nullable TemplateExpression step, int line) implements TemplateExpression {}

    record Unary(String operator, TemplateExpression operand, int line) implements TemplateExpression {}

    record Binary(String operator, TemplateExpression left, TemplateExpression right,
            int line) implements TemplateExpression {}

    /** {@code a < b <= c}: each operand is computed once. */
    record Comparison(TemplateExpression first, List<String> operators, List<TemplateExpression> rest, int line)
            implements TemplateExpression {}

    /** {@code a ~ b ~ c}. */
    record Concatenation(List<TemplateExpression> parts, int line) implements TemplateExpression {}

    record Conditional(TemplateExpression test, TemplateExpression then, @Nullable TemplateExpression otherwise,
            int line)
            implements TemplateExpression {}

    /** A call of a function or macro by its name. */
    record Call(String function, Arguments arguments, int line) implements TemplateExpression {}

    record MethodCall(TemplateExpression object, String method, Arguments arguments,
            int line) implements TemplateExpression {}

    record Filter(@Nullable TemplateExpression operand, String filter, Arguments arguments,
            int line) implements TemplateExpression {}

    record Test(TemplateExpression operand, String test, boolean negated, Arguments arguments, int line)
            implements TemplateExpression {}

    /** What a call is given. */
    record Arguments(List<TemplateExpression> positional, Map<String, TemplateExpression> named) {
        static final Arguments NONE = new Arguments(List.of(), Map.of());
    }
}
