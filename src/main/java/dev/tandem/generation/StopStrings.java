package dev.tandem.generation;

import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Watches a growing text for stop strings, and holds back what may be the beginning of one.
 *
 * <p>The stop string that is complete first wins (of several complete at the same character, the longest), so the outcome does
 * not depend on how the text is cut into pieces. The text ends before it.
 */
final class StopStrings {
    private final List<String> stops;
    private final StringBuilder held = new StringBuilder();
    private @Nullable String matched;

    /** @param stops non-empty strings; with an empty list all text passes at once */
    StopStrings(List<String> stops) {
        this.stops = stops;
    }

    /** {@return the text that can be shown after {@code text} has arrived} After a match it is empty. */
    String append(String text) {
        if (matched != null) {
            return "";
        }
        if (stops.isEmpty()) {
            return text;
        }
        held.append(text);
        int matchStart = findFirst();
        int safe = matched != null ? matchStart : held.length() - heldSuffix();
        String shown = held.substring(0, safe);
        held.delete(0, matched != null ? held.length() : safe);
        return shown;
    }

    /** {@return the stop string that was found, or {@code null}} */
    @Nullable String matched() {
        return matched;
    }

    /** {@return the text that was held back, when no more will come} */
    String flush() {
        String shown = held.toString();
        held.setLength(0);
        return shown;
    }

    private int findFirst() {
        int start = -1;
        int end = Integer.MAX_VALUE;
        for (String stop : stops) {
            int at = held.indexOf(stop);
            if (at >= 0 && (at + stop.length() < end || at + stop.length() == end && at < start)) {
                start = at;
                end = at + stop.length();
                matched = stop;
            }
        }
        return start;
    }

    /** The length of the longest suffix that begins a stop string. */
    private int heldSuffix() {
        int longest = 0;
        for (String stop : stops) {
            for (int length = Math.min(stop.length() - 1, held.length()); length > longest; length--) {
                if (endsWithStart(stop, length)) {
                    longest = length;
                }
            }
        }
        return longest;
    }

    private boolean endsWithStart(String stop, int length) {
        int offset = held.length() - length;
        for (int i = 0; i < length; i++) {
            if (held.charAt(offset + i) != stop.charAt(i)) {
                return false;
            }
        }
        return true;
    }
}
