package dev.tandem.model;

import dev.tandem.model.TemplateExpression.Arguments;
import dev.tandem.model.TemplateValues.Namespace;
import dev.tandem.model.TemplateValues.Tuple;
import dev.tandem.model.TemplateValues.Undefined;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/**
 * Runs a parsed chat template once.
 *
 * <p>Scopes are jinja2's: each turn of a loop and each macro call has its own, {@code if} has none, and {@code set}
 * writes the innermost. Only a namespace carries a value out of a loop.
 */
final class TemplateRenderer {
    private enum Flow {
        NEXT, BREAK, CONTINUE
    }

    private record Scope(Map<String, Object> variables, @Nullable Scope parent) {
        Scope(@Nullable Scope parent) {
            this(new HashMap<>(), parent);
        }
    }

    /** A function that is named but not called: templates ask whether {@code strftime_now} is defined. */
    private record Function(String name) {}

    private record Macro(TemplateStatement.Macro definition, Scope scope) {}

    /** What {@code loop} is inside a loop. */
    private record Loop(List<Object> elements, int index, long depth) {
        Object attribute(String name) {
            int size = elements.size();
            return switch (name) {
                case "index" -> index + 1L;
                case "index0" -> (long) index;
                case "revindex" -> (long) size - index;
                case "revindex0" -> size - index - 1L;
                case "first" -> index == 0;
                case "last" -> index == size - 1;
                case "length" -> (long) size;
                case "depth" -> depth;
                case "depth0" -> depth - 1;
                case "previtem" -> index > 0 ? elements.get(index - 1) : new Undefined("there is no previous item");
                case "nextitem" -> index < size - 1 ? elements.get(index + 1) : new Undefined("there is no next item");
                default -> throw new TemplateFailure("unknown attribute loop." + StrictJson.brief(name));
            };
        }
    }

    private final TemplateFunctions functions;
    private final TemplateBudget budget = new TemplateBudget();
    private StringBuilder out = new StringBuilder();
    private Scope scope;
    private int line = 1;

    private TemplateRenderer(TemplateFunctions functions, Map<String, Object> variables) {
        this.functions = functions;
        this.scope = new Scope(new HashMap<>(variables), null);
    }

    static String render(String source, List<TemplateStatement> template, Map<String, Object> variables,
            TemplateFunctions functions) {
        TemplateRenderer renderer = new TemplateRenderer(functions, variables);
        try {
            renderer.run(template);
            return renderer.out.toString();
        } catch (TemplateFailure e) {
            throw new ModelFormatException(source + ": chat template, line " + renderer.line + ": " + e.getMessage(),
                    e);
        }
    }

    private Flow run(List<TemplateStatement> statements) {
        for (TemplateStatement statement : statements) {
            budget.step();
            Flow flow = run(statement);
            if (flow != Flow.NEXT) {
                return flow;
            }
        }
        return Flow.NEXT;
    }

    private Flow run(TemplateStatement statement) {
        switch (statement) {
            case TemplateStatement.Text(String text) -> print(text);
            case TemplateStatement.Print(TemplateExpression value) -> print(TemplateValues.text(value(value), budget));
            case TemplateStatement.If branches -> {
                for (int i = 0; i < branches.tests().size(); i++) {
                    if (TemplateValues.truth(value(branches.tests().get(i)))) {
                        return run(branches.bodies().get(i));
                    }
                }
                return run(branches.otherwise());
            }
            case TemplateStatement.For loop -> {
                return loop(loop);
            }
            case TemplateStatement.Set set -> {
                Object value = value(set.value());
                assign(set.targets(), value, set.line());
            }
            case TemplateStatement.SetAttribute set -> {
                Object value = value(set.value());
                line = set.line();
                if (!(lookUp(set.namespace()) instanceof Namespace namespace)) {
                    throw new TemplateFailure(set.namespace() + " is not a namespace, its attributes cannot be set");
                }
                namespace.attributes().put(set.attribute(), value);
            }
            case TemplateStatement.Capture capture -> {
                String text = capture(capture.body(), new Scope(scope));
                scope.variables.put(capture.target(), capture.filters() == null ? text
                        : filtered(capture.filters(), text));
            }
            case TemplateStatement.Macro macro -> scope.variables.put(macro.name(), new Macro(macro, scope));
            case TemplateStatement.Group(List<TemplateStatement> body) -> {
                return run(body);
            }
            case TemplateStatement.Break stop -> {
                return Flow.BREAK;
            }
            case TemplateStatement.Continue skip -> {
                return Flow.CONTINUE;
            }
        }
        return Flow.NEXT;
    }

    private void print(String text) {
        budget.charge(text.length());
        out.append(text);
    }

    private String capture(List<TemplateStatement> body, Scope inner) {
        StringBuilder outerOut = out;
        Scope outer = scope;
        out = new StringBuilder();
        scope = inner;
        budget.enter();
        run(body);
        budget.leave();
        String text = out.toString();
        out = outerOut;
        scope = outer;
        return text;
    }

    private Flow loop(TemplateStatement.For loop) {
        Object iterable = value(loop.iterable());
        line = loop.line();
        List<Object> elements = TemplateValues.elements(iterable);
        Scope outer = scope;
        if (loop.condition() != null) {
            List<Object> kept = new ArrayList<>();
            for (Object element : elements) {
                scope = new Scope(outer);
                assign(loop.targets(), element, loop.line());
                if (TemplateValues.truth(value(loop.condition()))) {
                    kept.add(element);
                }
            }
            elements = kept;
        }
        long depth = lookUp("loop") instanceof Loop enclosing ? enclosing.depth + 1 : 1;
        budget.charge((long) elements.size() * TemplateBudget.ELEMENT);
        budget.enter();
        for (int i = 0; i < elements.size(); i++) {
            budget.step();
            scope = new Scope(outer);
            scope.variables.put("loop", new Loop(elements, i, depth));
            assign(loop.targets(), elements.get(i), loop.line());
            if (run(loop.body()) == Flow.BREAK) {
                break;
            }
        }
        budget.leave();
        scope = outer;
        return elements.isEmpty() ? run(loop.otherwise()) : Flow.NEXT;
    }

    private void assign(List<String> targets, Object value, int at) {
        line = at;
        if (targets.size() == 1) {
            scope.variables.put(targets.getFirst(), value);
            return;
        }
        List<Object> parts = TemplateValues.elements(value);
        if (parts.size() != targets.size()) {
            throw new TemplateFailure("expected " + targets.size() + " values to unpack, found " + parts.size());
        }
        for (int i = 0; i < parts.size(); i++) {
            scope.variables.put(targets.get(i), parts.get(i));
        }
    }

    private @Nullable Object lookUp(String name) {
        for (Scope each = scope; each != null; each = each.parent) {
            Object value = each.variables.get(name);
            if (value != null) {
                return value;
            }
        }
        return null;
    }

    private Object value(TemplateExpression expression) {
        budget.step();
        budget.enter();
        Object value = compute(expression);
        budget.leave();
        return value;
    }

    private Object compute(TemplateExpression expression) {
        line = expression.line();
        return switch (expression) {
            case TemplateExpression.Literal literal -> literal.value();
            case TemplateExpression.Name name -> {
                Object found = lookUp(name.name());
                if (found == null && TemplateFunctions.NAMES.contains(name.name())) {
                    yield new Function(name.name());
                }
                yield found == null ? new Undefined("'" + name.name() + "'") : found;
            }
            case TemplateExpression.Listing listing -> {
                List<Object> elements = values(listing.elements());
                yield listing.tuple() ? new Tuple(elements) : elements;
            }
            case TemplateExpression.Dictionary dictionary -> dictionary(dictionary);
            case TemplateExpression.Attribute attribute -> attribute(attribute);
            case TemplateExpression.Item item -> {
                Object object = value(item.object());
                Object key = value(item.key());
                line = item.line();
                yield TemplateOperators.item(object, key);
            }
            case TemplateExpression.Slice slice -> {
                Object object = value(slice.object());
                Object begin = slice.begin() == null ? null : value(slice.begin());
                Object end = slice.end() == null ? null : value(slice.end());
                Object step = slice.step() == null ? null : value(slice.step());
                line = slice.line();
                yield TemplateOperators.slice(object, begin, end, step, budget);
            }
            case TemplateExpression.Unary unary -> TemplateOperators.unary(unary.operator(), value(unary.operand()));
            case TemplateExpression.Binary binary -> binary(binary);
            case TemplateExpression.Comparison comparison -> comparison(comparison);
            case TemplateExpression.Concatenation concatenation ->
                TemplateMethods.join(values(concatenation.parts()), "", budget);
            case TemplateExpression.Conditional conditional -> {
                if (TemplateValues.truth(value(conditional.test()))) {
                    yield value(conditional.then());
                }
                yield conditional.otherwise() == null ? new Undefined("the value of an 'if' without 'else'")
                        : value(conditional.otherwise());
            }
            case TemplateExpression.Call call -> call(call);
            case TemplateExpression.MethodCall call -> {
                Object object = value(call.object());
                TemplateArguments arguments = arguments("." + call.method() + "()", call.arguments());
                line = call.line();
                yield TemplateMethods.call(object, call.method(), arguments, budget);
            }
            case TemplateExpression.Filter filter -> filtered(filter, null);
            case TemplateExpression.Test test -> {
                Object operand = value(test.operand());
                TemplateArguments arguments = arguments("the test '" + test.test() + "'", test.arguments());
                line = test.line();
                yield TemplateTests.apply(test.test(), operand, arguments) != test.negated();
            }
        };
    }

    private List<Object> values(List<TemplateExpression> expressions) {
        List<Object> values = new ArrayList<>(expressions.size());
        expressions.forEach(expression -> values.add(value(expression)));
        return values;
    }

    private Object dictionary(TemplateExpression.Dictionary dictionary) {
        Map<Object, Object> map = new LinkedHashMap<>();
        for (int i = 0; i < dictionary.keys().size(); i++) {
            Object key = value(dictionary.keys().get(i));
            if (!(key instanceof String || TemplateValues.isNumber(key) || key == TemplateValues.NONE)) {
                throw new TemplateFailure(TemplateValues.typeName(key) + " cannot be a key");
            }
            map.put(key, value(dictionary.values().get(i)));
        }
        return map;
    }

    /** {@code object.name}: what is not there is undefined, but a method that is not called is a mistake. */
    private Object attribute(TemplateExpression.Attribute attribute) {
        Object object = value(attribute.object());
        line = attribute.line();
        if (object instanceof Loop loop) {
            return loop.attribute(attribute.name());
        }
        boolean method = object instanceof String
                || (object instanceof Map<?, ?> map && !map.containsKey(attribute.name()));
        if (method && TemplateMethods.NAMES.contains(attribute.name())) {
            throw new TemplateFailure("the method ." + attribute.name() + " is not called");
        }
        if (object instanceof Undefined undefined) {
            throw undefined.failure();
        }
        return object instanceof Map<?, ?> || object instanceof Namespace
                ? TemplateOperators.item(object, attribute.name())
                : new Undefined("the attribute '" + StrictJson.brief(attribute.name()) + "' of "
                        + TemplateValues.typeName(object));
    }

    private Object binary(TemplateExpression.Binary binary) {
        Object left = value(binary.left());
        if (binary.operator().equals("and") || binary.operator().equals("or")) {
            return TemplateValues.truth(left) == binary.operator().equals("or") ? left : value(binary.right());
        }
        Object right = value(binary.right());
        line = binary.line();
        return TemplateOperators.binary(binary.operator(), left, right, budget);
    }

    private Object comparison(TemplateExpression.Comparison comparison) {
        Object left = value(comparison.first());
        for (int i = 0; i < comparison.operators().size(); i++) {
            Object right = value(comparison.rest().get(i));
            line = comparison.line();
            boolean holds = switch (comparison.operators().get(i)) {
                case "==" -> TemplateValues.equal(left, right);
                case "!=" -> !TemplateValues.equal(left, right);
                case "in" -> TemplateValues.contains(right, left);
                case "not in" -> !TemplateValues.contains(right, left);
                default -> TemplateValues.ordered(comparison.operators().get(i), left, right);
            };
            if (!holds) {
                return false;
            }
            left = right;
        }
        return true;
    }

    private TemplateArguments arguments(String callee, Arguments arguments) {
        Map<String, Object> named = new LinkedHashMap<>();
        List<Object> positional = values(arguments.positional());
        arguments.named().forEach((name, expression) -> named.put(name, value(expression)));
        return new TemplateArguments(callee, positional, named);
    }

    private Object filtered(TemplateExpression expression, @Nullable String captured) {
        if (!(expression instanceof TemplateExpression.Filter filter)) {
            return value(expression);
        }
        Object operand;
        if (filter.operand() != null) {
            operand = captured == null ? value(filter.operand()) : filtered(filter.operand(), captured);
        } else {
            operand = captured == null ? "" : captured;
        }
        TemplateArguments arguments = arguments("the filter '" + filter.filter() + "'", filter.arguments());
        line = filter.line();
        return TemplateFilters.apply(filter.filter(), operand, arguments, budget);
    }

    private Object call(TemplateExpression.Call call) {
        TemplateArguments arguments = arguments(call.function() + "()", call.arguments());
        line = call.line();
        Object callee = lookUp(call.function());
        if (callee instanceof Macro macro) {
            return callMacro(macro, arguments);
        }
        if (callee != null || !TemplateFunctions.NAMES.contains(call.function())) {
            throw new TemplateFailure("'" + call.function() + "' is " + (callee == null
                    ? "a macro that is not defined yet"
                    : TemplateValues.typeName(callee)) + " and cannot be called");
        }
        return functions.call(call.function(), arguments, budget);
    }

    private Object callMacro(Macro macro, TemplateArguments arguments) {
        TemplateStatement.Macro definition = macro.definition;
        Scope inner = new Scope(macro.scope);
        Scope outer = scope;
        for (int i = 0; i < definition.parameters().size(); i++) {
            String parameter = definition.parameters().get(i);
            Object given = arguments.take(i, parameter);
            TemplateExpression otherwise = definition.defaults().get(parameter);
            if (given == null && otherwise != null) {
                scope = inner;
                given = value(otherwise);
                scope = outer;
            }
            inner.variables.put(parameter, given == null ? new Undefined("the parameter '" + parameter + "'") : given);
        }
        arguments.done();
        return capture(definition.body(), inner);
    }
}
