package dev.tandem.model;

/**
 * A piece of a chat template's source.
 *
 * @param kind what it is
 * @param text literal text, a name, an operator, the digits of a number, or a string's value
 * @param line its line, from 1
 */
record TemplateToken(Kind kind, String text, int line) {
    enum Kind {
        TEXT, BLOCK_BEGIN, BLOCK_END, PRINT_BEGIN, PRINT_END, NAME, STRING, INTEGER, FLOAT, OPERATOR, END
    }

    boolean is(Kind wanted, String value) {
        return kind == wanted && text.equals(value);
    }

    boolean name(String value) {
        return is(Kind.NAME, value);
    }

    boolean operator(String value) {
        return is(Kind.OPERATOR, value);
    }

    String describe() {
        return switch (kind) {
            case BLOCK_BEGIN -> "{%";
            case BLOCK_END -> "%}";
            case PRINT_BEGIN -> "{{";
            case PRINT_END -> "}}";
            case END -> "the end of the template";
            default -> "'" + StrictJson.brief(text) + "'";
        };
    }
}
