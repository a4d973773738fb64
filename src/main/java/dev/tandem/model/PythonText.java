package dev.tandem.model;

import java.math.BigDecimal;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Python's idea of text, where it is not Java's: what counts as whitespace, strings as code points, how strings and
 * floats are written in source and in output. Chat templates are written against it.
 */
final class PythonText {
    private PythonText() {}

    /** As {@code str.isspace}; all of these are in the basic plane. */
    static boolean isSpace(char c) {
        return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680
                || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f
                || c == 0x3000;
    }

    static boolean isBlank(String text) {
        return stripRight(text).isEmpty();
    }

    static String stripRight(String text) {
        return strip(text, null, false, true);
    }

    /** As {@code str.strip}, {@code lstrip}, {@code rstrip}: whitespace, or the code points of {@code characters}. */
    static String strip(String text, @Nullable String characters, boolean left, boolean right) {
        int begin = 0;
        int end = text.length();
        while (left && begin < end && strippable(text.codePointAt(begin), characters)) {
            begin += Character.charCount(text.codePointAt(begin));
        }
        while (right && end > begin && strippable(text.codePointBefore(end), characters)) {
            end -= Character.charCount(text.codePointBefore(end));
        }
        return text.substring(begin, end);
    }

    private static boolean strippable(int codePoint, @Nullable String characters) {
        return characters == null ? codePoint <= 0xffff && isSpace((char) codePoint)
                : characters.indexOf(codePoint) >= 0;
    }

    /** As {@code str.split()}: at runs of whitespace, without empty parts. */
    static List<Object> split(String text) {
        List<Object> parts = new ArrayList<>();
        int begin = -1;
        for (int i = 0; i <= text.length(); i++) {
            boolean space = i == text.length() || isSpace(text.charAt(i));
            if (!space && begin < 0) {
                begin = i;
            } else if (space && begin >= 0) {
                parts.add(text.substring(begin, i));
                begin = -1;
            }
        }
        return parts;
    }

    /** As {@code str.split(separator, most)}; a negative {@code most} is no limit. */
    static List<Object> split(String text, String separator, long most) {
        List<Object> parts = new ArrayList<>();
        int begin = 0;
        int found = text.indexOf(separator);
        while (found >= 0 && (most < 0 || parts.size() < most)) {
            parts.add(text.substring(begin, found));
            begin = found + separator.length();
            found = text.indexOf(separator, begin);
        }
        parts.add(text.substring(begin));
        return parts;
    }

    /** {@return what a string literal's inside means} */
    static String unescape(String literal) {
        if (literal.indexOf('\\') < 0) {
            return literal;
        }
        StringBuilder out = new StringBuilder();
        int i = 0;
        while (i < literal.length()) {
            char c = literal.charAt(i++);
            if (c != '\\') {
                out.append(c);
                continue;
            }
            char escape = literal.charAt(i++);
            switch (escape) {
                case '\n' -> { }
                case '\\', '\'', '"' -> out.append(escape);
                case 'n' -> out.append('\n');
                case 't' -> out.append('\t');
                case 'r' -> out.append('\r');
                case 'a' -> out.append('\u0007');
                case 'b' -> out.append('\b');
                case 'f' -> out.append('\f');
                case 'v' -> out.append('\u000b');
                case 'x', 'u', 'U' -> {
                    int digits = escape == 'x' ? 2 : escape == 'u' ? 4 : 8;
                    out.append(codePoint(literal, i, digits));
                    i += digits;
                }
                case 'N', '0', '1', '2', '3', '4', '5', '6', '7' ->
                    throw new IllegalArgumentException("the escape \\" + escape + " is not supported");
                default -> out.append('\\').append(escape);
            }
        }
        return out.toString();
    }

    private static String codePoint(String literal, int begin, int digits) {
        String hex = literal.substring(begin, Math.min(literal.length(), begin + digits));
        if (!hex.matches("[0-9a-fA-F]{" + digits + "}") || Long.parseLong(hex, 16) > Character.MAX_CODE_POINT) {
            throw new IllegalArgumentException("a string has the malformed escape \\" + literal.charAt(begin - 1)
                    + hex);
        }
        return Character.toString(Integer.parseInt(hex, 16));
    }

    /** As {@code repr(float)}: the shortest digits, an exponent from 1e16 up and below 1e-4. */
    static String number(double value) {
        if (Double.isNaN(value)) {
            return "nan";
        }
        if (Double.isInfinite(value)) {
            return value > 0 ? "inf" : "-inf";
        }
        double size = Math.abs(value);
        if (size == 0 || (size >= 1e-4 && size < 1e16)) {
            String plain = size == 0 ? Double.toString(value) : new BigDecimal(Double.toString(value)).toPlainString();
            return plain.contains(".") ? plain : plain + ".0";
        }
        BigDecimal digits = new BigDecimal(Double.toString(value)).stripTrailingZeros();
        int exponent = digits.precision() - digits.scale() - 1;
        return digits.movePointLeft(exponent).stripTrailingZeros().toPlainString() + (exponent < 0 ? "e-" : "e+")
                + (Math.abs(exponent) < 10 ? "0" : "") + Math.abs(exponent);
    }

    /** As {@code repr(str)}. */
    static void quote(String text, StringBuilder out) {
        char quote = text.indexOf('\'') >= 0 && text.indexOf('"') < 0 ? '"' : '\'';
        out.append(quote);
        text.codePoints().forEach(c -> {
            switch (c) {
                case '\n' -> out.append("\\n");
                case '\r' -> out.append("\\r");
                case '\t' -> out.append("\\t");
                case '\\' -> out.append("\\\\");
                default -> {
                    if (c == quote) {
                        out.append('\\').append(quote);
                    } else if (c < 32 || (c >= 127 && c < 161) || c == 0xad) {
                        out.append("\\x%02x".formatted(c));
                    } else if (printable(c)) {
                        out.appendCodePoint(c);
                    } else {
                        out.append((c > 0xffff ? "\\U%08x" : "\\u%04x").formatted(c));
                    }
                }
            }
        });
        out.append(quote);
    }

    private static boolean printable(int c) {
        return switch (Character.getType(c)) {
            case Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED,
                Character.LINE_SEPARATOR, Character.PARAGRAPH_SEPARATOR -> false;
            case Character.SPACE_SEPARATOR -> c == ' ';
            default -> true;
        };
    }
}
