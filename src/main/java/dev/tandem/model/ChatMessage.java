package dev.tandem.model;

/**
 * One turn of a conversation.
 *
 * @param role who speaks: {@code system}, {@code user}, {@code assistant}, or what else the model's template knows
 * @param content what is said
 */
public record ChatMessage(String role, String content) {
    /**
     * {@return a turn of the system}
     *
     * @param content what is said
     */
    public static ChatMessage system(String content) {
        return new ChatMessage("system", content);
    }

    /**
     * {@return a turn of the user}
     *
     * @param content what is said
     */
    public static ChatMessage user(String content) {
        return new ChatMessage("user", content);
    }

    /**
     * {@return a turn of the model}
     *
     * @param content what is said
     */
    public static ChatMessage assistant(String content) {
        return new ChatMessage("assistant", content);
    }
}
