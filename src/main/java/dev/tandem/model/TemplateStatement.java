package dev.tandem.model;

import java.util.List;
import java.util.Map;
import org.jspecify.annotations.Nullable;

/** What a chat template does, in order. */
sealed interface TemplateStatement {

    record Text(String text) implements TemplateStatement {}

    record Print(TemplateExpression value) implements TemplateStatement {}

    /** The bodies of if and elifs with their tests, then else (perhaps empty). */
    record If(List<TemplateExpression> tests, List<List<TemplateStatement>> bodies, List<TemplateStatement> otherwise)
            implements TemplateStatement {}

    record For(List<String> targets, TemplateExpression iterable, @Nullable TemplateExpression condition,
            List<TemplateStatement> body, List<TemplateStatement> otherwise, int line) implements TemplateStatement {}

    /** {@code set a = …}, or {@code set a, b = …}. */
    record Set(List<String> targets, TemplateExpression value, int line) implements TemplateStatement {}

    /** {@code set namespace.attribute = …}. */
    record SetAttribute(String namespace, String attribute, TemplateExpression value,
            int line) implements TemplateStatement {}

    /** {@code set a}…{@code endset}; {@code filters} is applied from the inside out to an operand of null. */
    record Capture(String target, @Nullable TemplateExpression filters, List<TemplateStatement> body, int line)
            implements TemplateStatement {}

    record Macro(String name, List<String> parameters, Map<String, TemplateExpression> defaults,
            List<TemplateStatement> body,
            int line) implements TemplateStatement {}

    /** {@code generation}…{@code endgeneration}, a mark of transformers that renders as its inside. */
    record Group(List<TemplateStatement> body) implements TemplateStatement {}

    record Break() implements TemplateStatement {}

    record Continue() implements TemplateStatement {}
}
