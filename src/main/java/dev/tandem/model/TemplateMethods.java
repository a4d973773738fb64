package dev.tandem.model;

import dev.tandem.model.TemplateValues.Tuple;
import dev.tandem.model.TemplateValues.Undefined;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;

/**
 * The methods of Python's strings and dictionaries that chat templates call. None changes its object, as the sandbox
 * demands.
 */
final class TemplateMethods {
    static final Set<String> NAMES = Set.of("strip", "lstrip", "rstrip", "split", "startswith", "endswith", "upper",
            "lower", "replace",
            "join", "find", "removeprefix", "removesuffix", "splitlines", "items", "keys", "values", "get");

    private TemplateMethods() {}

    static Object call(Object object, String method, TemplateArguments arguments, TemplateBudget budget) {
        Object result = switch (object) {
            case String text -> ofText(text, method, arguments, budget);
            case Map<?, ?> map -> ofMap(map, method, arguments, budget);
            case Undefined undefined -> throw undefined.failure();
            default -> throw missing(object, method);
        };
        arguments.done();
        return result;
    }

    private static TemplateFailure missing(Object object, String method) {
        return new TemplateFailure(TemplateValues.typeName(object) + " has no method ." + method + "()");
    }

    private static Object ofText(String text, String method, TemplateArguments arguments, TemplateBudget budget) {
        budget.charge(text.length());
        return switch (method) {
            case "strip" -> PythonText.strip(text, arguments.optionalText(0, "chars"), true, true);
            case "lstrip" -> PythonText.strip(text, arguments.optionalText(0, "chars"), true, false);
            case "rstrip" -> PythonText.strip(text, arguments.optionalText(0, "chars"), false, true);
            case "split" -> split(text, arguments, budget);
            case "splitlines" -> lines(text);
            case "startswith" -> affix(arguments.required(0, "prefix")).stream().anyMatch(text::startsWith);
            case "endswith" -> affix(arguments.required(0, "suffix")).stream().anyMatch(text::endsWith);
            case "removeprefix" -> {
                String prefix = arguments.text(0, "prefix");
                yield text.startsWith(prefix) ? text.substring(prefix.length()) : text;
            }
            case "removesuffix" -> {
                String suffix = arguments.text(0, "suffix");
                yield text.endsWith(suffix) ? text.substring(0, text.length() - suffix.length()) : text;
            }
            case "upper" -> text.toUpperCase(Locale.ROOT);
            case "lower" -> text.toLowerCase(Locale.ROOT);
            case "replace" -> replace(text, arguments.text(0, "old"), arguments.text(1, "new"),
                    arguments.integer(2, "count", -1), budget);
            case "find" -> {
                int at = text.indexOf(arguments.text(0, "sub"));
                yield at < 0 ? -1L : (long) text.codePointCount(0, at);
            }
            case "join" -> {
                List<Object> parts = TemplateValues.elements(arguments.required(0, "iterable"));
                for (Object part : parts) {
                    if (!(part instanceof String)) {
                        throw new TemplateFailure(".join(): expected strings, found " + TemplateValues.typeName(part));
                    }
                }
                yield join(parts, text, budget);
            }
            default -> throw missing(text, method);
        };
    }

    private static List<Object> split(String text, TemplateArguments arguments, TemplateBudget budget) {
        budget.charge((long) text.length() * TemplateBudget.ELEMENT);
        String separator = arguments.optionalText(0, "sep");
        long most = arguments.integer(1, "maxsplit", -1);
        if (separator == null) {
            if (most >= 0) {
                throw new TemplateFailure(".split(): maxsplit without a separator is not supported");
            }
            return PythonText.split(text);
        }
        if (separator.isEmpty()) {
            throw new TemplateFailure(".split(): the separator is empty");
        }
        return PythonText.split(text, separator, most);
    }

    private static List<Object> lines(String text) {
        List<Object> lines = new ArrayList<>();
        int begin = 0;
        for (int i = 0; i < text.length(); i++) {
            char c = text.charAt(i);
            boolean breaks = (c >= 10 && c <= 13) || (c >= 28 && c <= 30) || c == 0x85 || c == 0x2028 || c == 0x2029;
            if (breaks) {
                lines.add(text.substring(begin, i));
                i += c == '\r' && i + 1 < text.length() && text.charAt(i + 1) == '\n' ? 1 : 0;
                begin = i + 1;
            }
        }
        if (begin < text.length()) {
            lines.add(text.substring(begin));
        }
        return lines;
    }

    private static List<String> affix(Object argument) {
        List<String> affixes = new ArrayList<>();
        for (Object each : argument instanceof Tuple tuple ? tuple : List.of(argument)) {
            if (!(each instanceof String text)) {
                throw new TemplateFailure("startswith and endswith take strings, found "
                        + TemplateValues.typeName(each));
            }
            affixes.add(text);
        }
        return affixes;
    }

    /** As {@code str.replace}; a negative count is no limit. */
    static String replace(String text, String old, String replacement, long count, TemplateBudget budget) {
        StringBuilder out = new StringBuilder();
        int position = 0;
        long done = 0;
        while (count < 0 || done < count) {
            int found = text.indexOf(old, position);
            if (found < 0) {
                break;
            }
            budget.charge((long) found - position + replacement.length() + 1);
            out.append(text, position, found).append(replacement);
            position = found + old.length();
            done++;
            if (old.isEmpty()) {
                // Python puts the replacement before every character and at the end.
                if (found >= text.length()) {
                    return out.toString();
                }
                int next = text.offsetByCodePoints(found, 1);
                out.append(text, found, next);
                position = next;
            }
        }
        budget.charge((long) text.length() - position);
        return out.append(text, position, text.length()).toString();
    }

    static String join(List<Object> parts, String separator, TemplateBudget budget) {
        StringBuilder out = new StringBuilder();
        for (int i = 0; i < parts.size(); i++) {
            String part = TemplateValues.text(parts.get(i), budget);
            budget.charge((long) part.length() + separator.length());
            out.append(i == 0 ? "" : separator).append(part);
        }
        return out.toString();
    }

    private static Object ofMap(Map<?, ?> map, String method, TemplateArguments arguments, TemplateBudget budget) {
        budget.charge((long) map.size() * TemplateBudget.ELEMENT);
        return switch (method) {
            case "items" -> items(map);
            case "keys" -> new ArrayList<>(map.keySet());
            case "values" -> new ArrayList<>(map.values());
            case "get" -> {
                Object found = TemplateValues.field(map, arguments.required(0, "key"));
                Object otherwise = arguments.take(1, "default", TemplateValues.NONE);
                yield found == null ? otherwise : found;
            }
            default -> throw missing(map, method);
        };
    }

    static List<Object> items(Map<?, ?> map) {
        List<Object> items = new ArrayList<>();
        map.forEach((key, value) -> items.add(new Tuple(List.of(key, value))));
        return items;
    }
}
