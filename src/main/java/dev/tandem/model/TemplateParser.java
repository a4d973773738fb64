package dev.tandem.model;

import dev.tandem.model.TemplateToken.Kind;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;

/**
 * Parses the tags of a chat template. Tags and functions that the renderer does not have are refused with their line.
 */
final class TemplateParser extends TemplateExpressionParser {
    private int loops;
    /** The tag that ended the latest {@link #statements}. */
    private String lastTag = "";

    private TemplateParser(String source, List<TemplateToken> tokens) {
        super(source, tokens);
        for (int i = 0; i + 2 < tokens.size(); i++) {
            if (tokens.get(i).kind() == Kind.BLOCK_BEGIN && tokens.get(i + 1).name("macro")) {
                defineFunction(tokens.get(i + 2).text());
            }
        }
    }

    private static boolean isKeyword(String name) {
        return Set.of("if", "elif", "in", "and", "or", "not", "is", "else", "for", "set").contains(name);
    }

    static List<TemplateStatement> parse(String source, String text) {
        TemplateParser parser = new TemplateParser(source, TemplateLexer.tokens(source, text));
        List<TemplateStatement> statements = parser.statements(Set.of());
        if (parser.peek().kind() != Kind.END) {
            throw parser.unexpected("the end of the template");
        }
        return statements;
    }

    /** Statements up to a tag of one of these names, whose begin and name are taken, or to the end of the template. */
    private List<TemplateStatement> statements(Set<String> ends) {
        enter();
        List<TemplateStatement> statements = new ArrayList<>();
        while (true) {
            TemplateToken token = peek();
            switch (token.kind()) {
                case TEXT -> statements.add(new TemplateStatement.Text(next().text()));
                case PRINT_BEGIN -> {
                    next();
                    statements.add(new TemplateStatement.Print(tuple()));
                    expect(Kind.PRINT_END, "}}");
                }
                case BLOCK_BEGIN -> {
                    next();
                    TemplateToken name = expect(Kind.NAME, "the name of a tag");
                    if (ends.contains(name.text())) {
                        lastTag = name.text();
                        leave();
                        return statements;
                    }
                    statements.add(statement(name));
                }
                case END -> {
                    if (!ends.isEmpty()) {
                        throw unexpected("{% " + String.join(" %} or {% ", ends.stream().sorted().toList()) + " %}");
                    }
                    leave();
                    return statements;
                }
                default -> throw unexpected("text or a tag");
            }
        }
    }

    private TemplateStatement statement(TemplateToken tag) {
        return switch (tag.text()) {
            case "if" -> ifStatement();
            case "for" -> forStatement(tag.line());
            case "set" -> setStatement(tag.line());
            case "macro" -> macroStatement(tag.line());
            case "generation" -> {
                endTag();
                yield new TemplateStatement.Group(body("endgeneration"));
            }
            case "break", "continue" -> {
                if (loops == 0) {
                    throw error(tag.line(), "{% " + tag.text() + " %} outside a loop");
                }
                endTag();
                yield tag.text().equals("break") ? new TemplateStatement.Break() : new TemplateStatement.Continue();
            }
            default -> throw error(tag.line(), "unknown tag '" + StrictJson.brief(tag.text()) + "'");
        };
    }

    private void endTag() {
        expect(Kind.BLOCK_END, "%}");
    }

    private List<TemplateStatement> body(String end) {
        List<TemplateStatement> body = statements(Set.of(end));
        endTag();
        return body;
    }

    private TemplateStatement ifStatement() {
        List<TemplateExpression> tests = new ArrayList<>();
        List<List<TemplateStatement>> bodies = new ArrayList<>();
        do {
            tests.add(or());
            endTag();
            bodies.add(statements(Set.of("elif", "else", "endif")));
        } while (lastTag.equals("elif"));
        boolean hasElse = lastTag.equals("else");
        endTag();
        return new TemplateStatement.If(tests, bodies, hasElse ? body("endif") : List.of());
    }

    private TemplateStatement forStatement(int line) {
        List<String> targets = targets();
        if (!takeName("in")) {
            throw unexpected("'in'");
        }
        TemplateExpression iterable = or();
        TemplateExpression condition = takeName("if") ? expression() : null;
        if (peek().name("recursive")) {
            throw error(peek().line(), "unknown construct 'recursive' (recursive loops are not supported)");
        }
        endTag();
        loops++;
        List<TemplateStatement> body = statements(Set.of("else", "endfor"));
        loops--;
        boolean hasElse = lastTag.equals("else");
        endTag();
        return new TemplateStatement.For(targets, iterable, condition, body, hasElse ? body("endfor") : List.of(),
                line);
    }

    private List<String> targets() {
        boolean parenthesis = takeOperator("(");
        List<String> targets = new ArrayList<>();
        do {
            targets.add(target());
        } while (takeOperator(","));
        if (parenthesis) {
            expectOperator(")");
        }
        return targets;
    }

    private String target() {
        TemplateToken token = expect(Kind.NAME, "a name");
        if (Set.of("true", "false", "none", "True", "False", "None", "loop").contains(token.text())
                || isKeyword(token.text())) {
            throw error(token.line(), "'" + token.text() + "' cannot be assigned to");
        }
        return token.text();
    }

    private TemplateStatement setStatement(int line) {
        String first = target();
        if (takeOperator(".")) {
            String attribute = expect(Kind.NAME, "a name").text();
            expectOperator("=");
            TemplateExpression value = tuple();
            endTag();
            return new TemplateStatement.SetAttribute(first, attribute, value, line);
        }
        List<String> targets = new ArrayList<>(List.of(first));
        while (takeOperator(",")) {
            targets.add(target());
        }
        if (takeOperator("=")) {
            TemplateExpression value = tuple();
            endTag();
            return new TemplateStatement.Set(targets, value, line);
        }
        TemplateExpression filters = targets.size() == 1 && peek().operator("|") ? filters(null) : null;
        if (targets.size() > 1 || peek().kind() != Kind.BLOCK_END) {
            throw unexpected("'='");
        }
        endTag();
        return new TemplateStatement.Capture(first, filters, body("endset"), line);
    }

    private TemplateStatement macroStatement(int line) {
        String name = target();
        expectOperator("(");
        List<String> parameters = new ArrayList<>();
        Map<String, TemplateExpression> defaults = new LinkedHashMap<>();
        while (!takeOperator(")")) {
            if (!parameters.isEmpty()) {
                expectOperator(",");
            }
            String parameter = target();
            parameters.add(parameter);
            if (takeOperator("=")) {
                defaults.put(parameter, expression());
            } else if (!defaults.isEmpty()) {
                throw error(line, "parameter " + parameter + " of macro " + name
                        + " needs a default, as the one before it has");
            }
        }
        endTag();
        int outside = loops;
        loops = 0;
        List<TemplateStatement> body = body("endmacro");
        loops = outside;
        return new TemplateStatement.Macro(name, parameters, defaults, body, line);
    }
}
