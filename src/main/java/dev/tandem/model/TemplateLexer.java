package dev.tandem.model;

import dev.tandem.model.TemplateToken.Kind;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Cuts a chat template into tokens, with the whitespace rules of the jinja2 environment that transformers uses:
 * {@code trim_blocks} (the newline after a block tag or comment is dropped), {@code lstrip_blocks} (blanks before one
 * that starts its line are dropped), {@code -} and {@code +} at a tag's edge, and one newline at the template's end
 * dropped.
 */
final class TemplateLexer {
    private static final List<String> OPERATORS = List.of("//", "**", "==", "!=", "<=", ">=", "+", "-", "*", "/", "%",
            "~", "<", ">",
            "=", ".", ":", ",", ";", "|", "(", ")", "[", "]", "{", "}");

    private static final Pattern END_RAW = Pattern.compile("\\{%([-+]?)\\s*endraw\\s*([-+]?)%}");
    private static final Pattern NUMBER = Pattern.compile("\\d+(?:\\.\\d+)?(?:[eE][-+]?\\d+)?");

    private final String source;
    private final String text;
    private final List<TemplateToken> tokens = new ArrayList<>();
    private int position;
    private int line = 1;
    /** Whether the character before {@link #position} ended a line (or there is none). */
    private boolean lineStarting = true;

    private TemplateLexer(String source, String text) {
        this.source = source;
        this.text = text;
    }

    static List<TemplateToken> tokens(String source, String template) {
        String text = template.replace("\r\n", "\n").replace('\r', '\n');
        text = text.endsWith("\n") ? text.substring(0, text.length() - 1) : text;
        TemplateLexer lexer = new TemplateLexer(source, text);
        while (lexer.position < text.length()) {
            lexer.nextPart();
        }
        lexer.add(Kind.END, "");
        return lexer.tokens;
    }

    /** Literal text, and the tag or comment after it. */
    private void nextPart() {
        int begin = position;
        while (begin < text.length() && !(text.charAt(begin) == '{' && begin + 1 < text.length()
                && "{%#".indexOf(text.charAt(begin + 1)) >= 0)) {
            begin++;
        }
        if (begin == text.length()) {
            addText(text.substring(position), begin);
            return;
        }
        char kind = text.charAt(begin + 1);
        char sign = begin + 2 < text.length() ? text.charAt(begin + 2) : ' ';
        String literal = text.substring(position, begin);
        int lineStart = literal.lastIndexOf('\n') + 1;
        String kept = literal;
        if (sign == '-') {
            kept = PythonText.stripRight(literal);
        } else if (sign != '+' && kind != '{' && (lineStart > 0 || lineStarting)
                && PythonText.isBlank(literal.substring(lineStart))) {
            kept = literal.substring(0, lineStart);
        }
        addText(kept, begin);
        moveTo(begin + (sign == '-' || sign == '+' ? 3 : 2));
        switch (kind) {
            case '#' -> comment();
            case '{' -> {
                add(Kind.PRINT_BEGIN, "");
                tag(Kind.PRINT_END, "}}");
            }
            default -> {
                if (!raw()) {
                    add(Kind.BLOCK_BEGIN, "");
                    tag(Kind.BLOCK_END, "%}");
                }
            }
        }
    }

    private void addText(String kept, int end) {
        if (!kept.isEmpty()) {
            add(Kind.TEXT, kept);
        }
        moveTo(end);
    }

    private void comment() {
        int end = text.indexOf("#}", position);
        if (end < 0) {
            throw error("a comment is not closed with #}");
        }
        char sign = end > position ? text.charAt(end - 1) : ' ';
        moveTo(end + 2);
        afterTag(sign, true);
    }

    /** What a closing tag swallows. */
    private void afterTag(char sign, boolean block) {
        if (sign == '-') {
            int end = position;
            while (end < text.length() && PythonText.isSpace(text.charAt(end))) {
                end++;
            }
            moveTo(end);
        } else if (sign != '+' && block && position < text.length() && text.charAt(position) == '\n') {
            moveTo(position + 1);
        }
    }

    private boolean raw() {
        int at = skipSpace(position);
        if (!text.startsWith("raw", at)) {
            return false;
        }
        at = skipSpace(at + 3);
        char sign = at < text.length() ? text.charAt(at) : ' ';
        int afterSign = sign == '-' ? at + 1 : at;
        if (!text.startsWith("%}", afterSign)) {
            return false;
        }
        moveTo(afterSign + 2);
        afterTag(sign == '-' ? '-' : '+', true);
        Matcher end = END_RAW.matcher(text);
        if (!end.find(position)) {
            throw error("{% raw %} is not closed with {% endraw %}");
        }
        String literal = text.substring(position, end.start());
        int lineStart = literal.lastIndexOf('\n') + 1;
        if (end.group(1).equals("-")) {
            literal = PythonText.stripRight(literal);
        } else if (end.group(1).isEmpty() && (lineStart > 0 || lineStarting)
                && PythonText.isBlank(literal.substring(lineStart))) {
            literal = literal.substring(0, lineStart);
        }
        addText(literal, end.end());
        afterTag(end.group(2).isEmpty() ? ' ' : end.group(2).charAt(0), true);
        return true;
    }

    private int skipSpace(int from) {
        int at = from;
        while (at < text.length() && PythonText.isSpace(text.charAt(at))) {
            at++;
        }
        return at;
    }

    /**
     * The inside of a tag up to its end; the end does not count inside brackets, so that {@code {{ {'a': {}}} }}
     * works.
     */
    private void tag(Kind endKind, String end) {
        Deque<Character> open = new ArrayDeque<>();
        while (true) {
            moveTo(skipSpace(position));
            if (position >= text.length()) {
                throw error("a tag is not closed with " + end);
            }
            char c = text.charAt(position);
            char sign = c == '-' || (c == '+' && endKind == Kind.BLOCK_END) ? c : ' ';
            if (open.isEmpty() && text.startsWith(end, sign == ' ' ? position : position + 1)) {
                add(endKind, "");
                moveTo(position + (sign == ' ' ? 2 : 3));
                afterTag(sign, endKind == Kind.BLOCK_END);
                return;
            }
            if (Character.isLetter(c) || c == '_') {
                name();
            } else if (c >= '0' && c <= '9') {
                number();
            } else if (c == '"' || c == '\'') {
                string(c);
            } else {
                operator(open);
            }
        }
    }

    private void name() {
        int end = position;
        while (end < text.length() && (Character.isLetterOrDigit(text.charAt(end)) || text.charAt(end) == '_')) {
            end++;
        }
        add(Kind.NAME, text.substring(position, end));
        moveTo(end);
    }

    private void number() {
        Matcher number = NUMBER.matcher(text);
        number.region(position, Math.min(text.length(), position + 60));
        if (!number.lookingAt()) {
            throw error("a number cannot be read");
        }
        if (number.group().matches("0\\d.*")) {
            throw error("the number " + number.group() + " starts with zero");
        }
        boolean whole = number.group().chars().allMatch(Character::isDigit);
        if (whole && JsonFields.wholeNumber(number.group()) == Long.MIN_VALUE) {
            throw error("the number " + number.group() + " is too large");
        }
        add(whole ? Kind.INTEGER : Kind.FLOAT, number.group());
        moveTo(number.end());
    }

    private void string(char quote) {
        int end = position + 1;
        while (end < text.length() && text.charAt(end) != quote) {
            end += text.charAt(end) == '\\' ? 2 : 1;
        }
        if (end >= text.length()) {
            throw error("a string is not closed with " + quote);
        }
        try {
            add(Kind.STRING, PythonText.unescape(text.substring(position + 1, end)));
        } catch (IllegalArgumentException e) {
            throw error(String.valueOf(e.getMessage()));
        }
        moveTo(end + 1);
    }

    private void operator(Deque<Character> open) {
        for (String operator : OPERATORS) {
            if (text.startsWith(operator, position)) {
                char c = operator.charAt(0);
                if ("([{".indexOf(c) >= 0) {
                    open.push(c == '(' ? ')' : c == '[' ? ']' : '}');
                } else if (")]}".indexOf(c) >= 0 && (open.isEmpty() || open.pop() != c)) {
                    throw error("unexpected '" + c + "'");
                }
                add(Kind.OPERATOR, operator);
                moveTo(position + operator.length());
                return;
            }
        }
        throw error("unexpected character '" + Character.toString(text.codePointAt(position)) + "'");
    }

    private void add(Kind kind, String value) {
        tokens.add(new TemplateToken(kind, value, line));
    }

    private void moveTo(int to) {
        for (int i = position; i < to; i++) {
            if (text.charAt(i) == '\n') {
                line++;
            }
        }
        if (to > position) {
            lineStarting = text.charAt(to - 1) == '\n';
        }
        position = to;
    }

    private ModelFormatException error(String problem) {
        return new ModelFormatException(source + ": chat template, line " + line + ": " + problem);
    }
}
