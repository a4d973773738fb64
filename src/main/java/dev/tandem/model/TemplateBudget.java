package dev.tandem.model;

/**
 * What one rendering may spend. A template is a program out of a downloaded file: two lines of it can loop for a
 * century or double a string until memory ends. The limits are far above what a conversation of a million tokens
 * needs.
 */
final class TemplateBudget {
    private static final long MOST_STEPS = 20_000_000;
    private static final long MOST_CHARACTERS = 256 << 20;
    private static final int DEEPEST = 400;
    /** What an element of a list is charged. */
    static final int ELEMENT = 16;

    private long steps;
    private long characters;
    private int depth;

    void step() {
        if (++steps > MOST_STEPS) {
            throw new TemplateFailure("it takes more than " + MOST_STEPS + " steps");
        }
    }

    /** Called before characters (or elements, times {@link #ELEMENT}) are made. */
    void charge(long count) {
        if (count < 0 || count > MOST_CHARACTERS - characters) {
            throw new TemplateFailure("it makes more than " + MOST_CHARACTERS + " characters of text");
        }
        characters += count;
    }

    void enter() {
        if (++depth > DEEPEST) {
            throw new TemplateFailure("its expressions, macros or values are nested more than " + DEEPEST + " deep");
        }
    }

    void leave() {
        depth--;
    }
}
