package dev.tandem.model;

import dev.tandem.model.TemplateExpression.Arguments;
import dev.tandem.model.TemplateToken.Kind;
import java.util.ArrayList;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.jspecify.annotations.Nullable;

/**
 * Parses the expressions of a chat template with jinja2's precedences: {@code if} below {@code or}, {@code and},
 * {@code not}, comparisons, {@code + -}, {@code ~}, {@code * / // %}, {@code **}, signs; filters and tests bind
 * tightest. Filters, tests and methods that the renderer does not have are refused here, with their line, before
 * anything is rendered.
 */
class TemplateExpressionParser {
    private static final int DEEPEST = 60;
    private static final Set<String> COMPARISONS = Set.of("==", "!=", "<", "<=", ">", ">=");

    private final String source;
    private final List<TemplateToken> tokens;
    private final Set<String> functions = new HashSet<>(TemplateFunctions.NAMES);
    private int position;
    private int depth;

    TemplateExpressionParser(String source, List<TemplateToken> tokens) {
        this.source = source;
        this.tokens = tokens;
    }

    /** Makes a macro known before its definition is reached: macros may call each other. */
    final void defineFunction(String name) {
        functions.add(name);
    }

    final TemplateToken peek() {
        return tokens.get(position);
    }

    final TemplateToken next() {
        TemplateToken token = tokens.get(position);
        if (token.kind() != Kind.END) {
            position++;
        }
        return token;
    }

    final boolean takeName(String name) {
        boolean taken = peek().name(name);
        if (taken) {
            position++;
        }
        return taken;
    }

    final boolean takeOperator(String operator) {
        boolean taken = peek().operator(operator);
        if (taken) {
            position++;
        }
        return taken;
    }

    final void expectOperator(String operator) {
        if (!takeOperator(operator)) {
            throw unexpected("'" + operator + "'");
        }
    }

    final TemplateToken expect(Kind kind, String what) {
        if (peek().kind() != kind) {
            throw unexpected(what);
        }
        return next();
    }

    final ModelFormatException unexpected(String expected) {
        return error(peek().line(), "expected " + expected + ", found " + peek().describe());
    }

    final ModelFormatException error(int line, String problem) {
        return new ModelFormatException(source + ": chat template, line " + line + ": " + problem);
    }

    final void enter() {
        if (++depth > DEEPEST) {
            throw error(peek().line(), "nested more than " + DEEPEST + " deep");
        }
    }

    final void leave() {
        depth--;
    }

    final TemplateExpression expression() {
        enter();
        TemplateExpression value = or();
        while (peek().name("if")) {
            int line = next().line();
            TemplateExpression test = or();
            TemplateExpression otherwise = takeName("else") ? expression() : null;
            value = new TemplateExpression.Conditional(test, value, otherwise, line);
        }
        leave();
        return value;
    }

    /** One expression, or several with commas as a tuple. */
    final TemplateExpression tuple() {
        int line = peek().line();
        TemplateExpression first = expression();
        if (!peek().operator(",")) {
            return first;
        }
        List<TemplateExpression> elements = new ArrayList<>(List.of(first));
        while (takeOperator(",") && !atTupleEnd()) {
            elements.add(expression());
        }
        return new TemplateExpression.Listing(elements, true, line);
    }

    private boolean atTupleEnd() {
        return peek().kind() == Kind.BLOCK_END || peek().kind() == Kind.PRINT_END || peek().operator(")");
    }

    /** An expression in which {@code if} is not part: what a loop runs over. */
    final TemplateExpression or() {
        TemplateExpression left = and();
        while (peek().name("or")) {
            int line = next().line();
            left = new TemplateExpression.Binary("or", left, and(), line);
        }
        return left;
    }

    private TemplateExpression and() {
        TemplateExpression left = not();
        while (peek().name("and")) {
            int line = next().line();
            left = new TemplateExpression.Binary("and", left, not(), line);
        }
        return left;
    }

    private TemplateExpression not() {
        if (!peek().name("not")) {
            return comparison();
        }
        int line = next().line();
        enter();
        TemplateExpression operand = not();
        leave();
        return new TemplateExpression.Unary("not", operand, line);
    }

    private TemplateExpression comparison() {
        TemplateExpression first = sum();
        List<String> operators = new ArrayList<>();
        List<TemplateExpression> rest = new ArrayList<>();
        int line = peek().line();
        while (true) {
            if (peek().kind() == Kind.OPERATOR && COMPARISONS.contains(peek().text())) {
                operators.add(next().text());
            } else if (takeName("in")) {
                operators.add("in");
            } else if (peek().name("not") && tokens.get(position + 1).name("in")) {
                position += 2;
                operators.add("not in");
            } else {
                return rest.isEmpty() ? first : new TemplateExpression.Comparison(first, operators, rest, line);
            }
            rest.add(sum());
        }
    }

    private TemplateExpression sum() {
        TemplateExpression left = concatenation();
        while (peek().operator("+") || peek().operator("-")) {
            TemplateToken operator = next();
            left = new TemplateExpression.Binary(operator.text(), left, concatenation(), operator.line());
        }
        return left;
    }

    private TemplateExpression concatenation() {
        List<TemplateExpression> parts = new ArrayList<>(List.of(product()));
        int line = peek().line();
        while (takeOperator("~")) {
            parts.add(product());
        }
        return parts.size() == 1 ? parts.getFirst() : new TemplateExpression.Concatenation(parts, line);
    }

    private TemplateExpression product() {
        TemplateExpression left = power();
        while (peek().operator("*") || peek().operator("/") || peek().operator("//") || peek().operator("%")) {
            TemplateToken operator = next();
            left = new TemplateExpression.Binary(operator.text(), left, power(), operator.line());
        }
        return left;
    }

    private TemplateExpression power() {
        TemplateExpression left = unary(true);
        while (peek().operator("**")) {
            int line = next().line();
            left = new TemplateExpression.Binary("**", left, unary(true), line);
        }
        return left;
    }

    private TemplateExpression unary(boolean withFilters) {
        TemplateExpression value;
        if (peek().operator("-") || peek().operator("+")) {
            TemplateToken operator = next();
            enter();
            value = new TemplateExpression.Unary(operator.text(), unary(false), operator.line());
            leave();
        } else {
            value = postfix(primary());
        }
        return withFilters ? filtersAndTests(value) : value;
    }

    private TemplateExpression primary() {
        TemplateToken token = next();
        int line = token.line();
        return switch (token.kind()) {
            case STRING -> {
                StringBuilder text = new StringBuilder(token.text());
                while (peek().kind() == Kind.STRING) {
                    text.append(next().text());
                }
                yield new TemplateExpression.Literal(text.toString(), line);
            }
            case INTEGER -> new TemplateExpression.Literal(Long.parseLong(token.text()), line);
            case FLOAT -> new TemplateExpression.Literal(Double.parseDouble(token.text()), line);
            case NAME -> name(token);
            case OPERATOR -> switch (token.text()) {
                case "(" -> parenthesis(line);
                case "[" -> new TemplateExpression.Listing(elements("]"), false, line);
                case "{" -> dictionary(line);
                default -> throw error(line, "expected a value, found " + token.describe());
            };
            default -> throw error(line, "expected a value, found " + token.describe());
        };
    }

    private TemplateExpression name(TemplateToken token) {
        int line = token.line();
        return switch (token.text()) {
            case "true", "True" -> new TemplateExpression.Literal(true, line);
            case "false", "False" -> new TemplateExpression.Literal(false, line);
            case "none", "None" -> new TemplateExpression.Literal(TemplateValues.NONE, line);
            default -> {
                if (!peek().operator("(")) {
                    yield new TemplateExpression.Name(token.text(), line);
                }
                if (!functions.contains(token.text())) {
                    throw error(line, "unknown function '" + StrictJson.brief(token.text()) + "'");
                }
                yield new TemplateExpression.Call(token.text(), arguments(), line);
            }
        };
    }

    private TemplateExpression parenthesis(int line) {
        if (takeOperator(")")) {
            return new TemplateExpression.Listing(List.of(), true, line);
        }
        TemplateExpression inner = tuple();
        expectOperator(")");
        return inner;
    }

    private List<TemplateExpression> elements(String end) {
        List<TemplateExpression> elements = new ArrayList<>();
        while (!takeOperator(end)) {
            if (!elements.isEmpty()) {
                expectOperator(",");
                if (takeOperator(end)) {
                    break;
                }
            }
            elements.add(expression());
        }
        return elements;
    }

    private TemplateExpression dictionary(int line) {
        List<TemplateExpression> keys = new ArrayList<>();
        List<TemplateExpression> values = new ArrayList<>();
        while (!takeOperator("}")) {
            if (!keys.isEmpty()) {
                expectOperator(",");
                if (takeOperator("}")) {
                    break;
                }
            }
            keys.add(expression());
            expectOperator(":");
            values.add(expression());
        }
        return new TemplateExpression.Dictionary(keys, values, line);
    }

    private TemplateExpression postfix(TemplateExpression start) {
        TemplateExpression value = start;
        while (true) {
            int line = peek().line();
            if (takeOperator(".")) {
                if (peek().kind() == Kind.INTEGER) {
                    value = new TemplateExpression.Item(value,
                            new TemplateExpression.Literal(Long.parseLong(next().text()), line), line);
                    continue;
                }
                String name = expect(Kind.NAME, "a name after '.'").text();
                if (peek().operator("(")) {
                    if (!TemplateMethods.NAMES.contains(name)) {
                        throw error(line, "unknown method ." + StrictJson.brief(name) + "()");
                    }
                    value = new TemplateExpression.MethodCall(value, name, arguments(), line);
                } else {
                    value = new TemplateExpression.Attribute(value, name, line);
                }
            } else if (takeOperator("[")) {
                value = subscript(value, line);
            } else if (peek().operator("(")) {
                throw error(line, "only a function, a macro or a method can be called");
            } else {
                return value;
            }
        }
    }

    private TemplateExpression subscript(TemplateExpression object, int line) {
        TemplateExpression begin = peek().operator(":") ? null : expression();
        if (!peek().operator(":")) {
            if (begin == null) {
                throw unexpected("an index");
            }
            expectOperator("]");
            return new TemplateExpression.Item(object, begin, line);
        }
        expectOperator(":");
        TemplateExpression end = sliceBound();
        TemplateExpression step = takeOperator(":") ? sliceBound() : null;
        expectOperator("]");
        return new TemplateExpression.Slice(object, begin, end, step, line);
    }

    private @Nullable TemplateExpression sliceBound() {
        return peek().operator(":") || peek().operator("]") ? null : expression();
    }

    private Arguments arguments() {
        expectOperator("(");
        List<TemplateExpression> positional = new ArrayList<>();
        Map<String, TemplateExpression> named = new LinkedHashMap<>();
        while (!takeOperator(")")) {
            if (!positional.isEmpty() || !named.isEmpty()) {
                expectOperator(",");
                if (takeOperator(")")) {
                    break;
                }
            }
            if (peek().kind() == Kind.NAME && tokens.get(position + 1).operator("=")) {
                TemplateToken name = next();
                next();
                if (named.put(name.text(), expression()) != null) {
                    throw error(name.line(), "the argument " + name.text() + " is given twice");
                }
            } else if (!named.isEmpty()) {
                throw unexpected("a named argument");
            } else {
                positional.add(expression());
            }
        }
        return new Arguments(positional, named);
    }

    private TemplateExpression filtersAndTests(TemplateExpression start) {
        TemplateExpression value = start;
        while (true) {
            if (peek().operator("|")) {
                value = filters(value);
            } else if (peek().name("is")) {
                value = test(value);
            } else {
                return value;
            }
        }
    }

    /** {@code | filter | filter(…)}; an operand of null stands for what a block captures. */
    final TemplateExpression filters(@Nullable TemplateExpression operand) {
        TemplateExpression value = operand;
        do {
            expectOperator("|");
            TemplateToken name = expect(Kind.NAME, "the name of a filter");
            if (!TemplateFilters.NAMES.contains(name.text())) {
                throw error(name.line(), "unknown filter '" + StrictJson.brief(name.text()) + "'");
            }
            value = new TemplateExpression.Filter(value, name.text(), peek().operator("(") ? arguments()
                    : Arguments.NONE, name.line());
        } while (peek().operator("|"));
        return value;
    }

    private TemplateExpression test(TemplateExpression operand) {
        next();
        boolean negated = takeName("not");
        TemplateToken name = expect(Kind.NAME, "the name of a test");
        if (!TemplateTests.NAMES.contains(name.text())) {
            throw error(name.line(), "unknown test '" + StrictJson.brief(name.text()) + "'");
        }
        Arguments arguments = Arguments.NONE;
        if (peek().operator("(")) {
            arguments = arguments();
        } else if (startsTestArgument()) {
            arguments = new Arguments(List.of(postfix(primary())), Map.of());
        }
        if (peek().name("is")) {
            throw error(name.line(), "tests cannot be chained with 'is'");
        }
        return new TemplateExpression.Test(operand, name.text(), negated, arguments, name.line());
    }

    private boolean startsTestArgument() {
        return switch (peek().kind()) {
            case STRING, INTEGER, FLOAT -> true;
            case NAME -> !Set.of("else", "or", "and", "if", "is", "in", "not").contains(peek().text());
            case OPERATOR -> peek().operator("[") || peek().operator("{");
            default -> false;
        };
    }
}
