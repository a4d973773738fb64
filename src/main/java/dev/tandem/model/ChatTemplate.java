package dev.tandem.model;

import java.time.LocalDateTime;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * A model's chat template: the program in its tokenizer's files that turns a conversation into the text the model was
 * trained on.
 *
 * <p>Templates are written in Jinja for the environment that transformers gives them, and a model is sensitive to
 * every newline in their output, so this is an interpreter of that language with that environment's whitespace rules,
 * filters and functions, tested character for character against jinja2. It has the part of the language that
 * published templates use. What it does not have (a tag, filter, test, method or function) is refused when the
 * template is read, naming it and its line: a template that is rendered nearly right is a training bug that nobody
 * sees.
 *
 * <p>The template comes with the model, perhaps from a stranger. It can compute text and nothing else, and how much
 * it may compute is limited.
 *
 * <p>Immutable and safe for use by several threads.
 */
public final class ChatTemplate {
    private static final int LARGEST = 1 << 20;

    private final String source;
    private final List<TemplateStatement> statements;
    private final Map<String, Object> constants;
    private final TemplateFunctions functions;

    private ChatTemplate(String source, List<TemplateStatement> statements, Map<String, Object> constants,
            TemplateFunctions functions) {
        this.source = source;
        this.statements = statements;
        this.constants = constants;
        this.functions = functions;
    }

    /**
     * Reads a template.
     *
     * @param source where it comes from, for messages
     * @param template its text, at most 1 MiB
     * @param specialTokens the variables it finds beside the conversation, such as {@code bos_token}
     * @return the template
     * @throws ModelFormatException naming the line, when it is malformed or uses a construct that is not known
     */
    public static ChatTemplate parse(String source, String template, Map<String, String> specialTokens) {
        return parse(source, template, specialTokens, new TemplateFunctions(LocalDateTime::now));
    }

    static ChatTemplate parse(String source, String template, Map<String, String> specialTokens,
            TemplateFunctions functions) {
        if (template.length() > LARGEST) {
            throw new ModelFormatException(source + ": chat template: expected at most " + LARGEST
                    + " characters, found "
                    + template.length());
        }
        return new ChatTemplate(source, TemplateParser.parse(source, template), Map.copyOf(specialTokens), functions);
    }

    /**
     * Renders a conversation.
     *
     * @param messages its turns, in order
     * @param addGenerationPrompt whether the text ends with the beginning of the model's next turn
     * @param extra further variables of the template, such as {@code enable_thinking} or {@code tools}: strings,
     *     numbers, booleans, null, lists and maps of these
     * @return the text
     * @throws IllegalArgumentException when the template refuses the conversation ({@code raise_exception}), with
     *     its reason
     * @throws ModelFormatException naming the line, when the template fails
     */
    public String render(List<ChatMessage> messages, boolean addGenerationPrompt, Map<String, Object> extra) {
        Map<String, Object> variables = new HashMap<>(extra);
        variables.put("messages", messages);
        variables.put("add_generation_prompt", addGenerationPrompt);
        return render(variables);
    }

    /**
     * As {@link #render(List, boolean, Map)}, without further variables.
     *
     * @param messages the turns, in order
     * @param addGenerationPrompt whether the text ends with the beginning of the model's next turn
     * @return the text
     */
    public String render(List<ChatMessage> messages, boolean addGenerationPrompt) {
        return render(messages, addGenerationPrompt, Map.of());
    }

    /** Renders with all variables given by the caller: messages may then have fields beyond role and content. */
    String render(Map<String, ?> variables) {
        Map<String, Object> all = new HashMap<>(constants);
        // transformers passes these even when there are none.
        all.put("tools", TemplateValues.NONE);
        all.put("documents", TemplateValues.NONE);
        variables.forEach((name, value) -> all.put(name, TemplateValues.of(value)));
        return TemplateRenderer.render(source, statements, all, functions);
    }
}
