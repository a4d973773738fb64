package dev.tandem.model;

import java.time.LocalDateTime;
import java.time.format.DateTimeFormatter;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.function.Supplier;

/** The functions that transformers gives to chat templates. */
final class TemplateFunctions {
    static final Set<String> NAMES = Set.of("raise_exception", "strftime_now", "range", "namespace", "dict");
    private static final long LONGEST_RANGE = 100_000;

    private final Supplier<LocalDateTime> now;

    TemplateFunctions(Supplier<LocalDateTime> now) {
        this.now = now;
    }

    Object call(String function, TemplateArguments arguments, TemplateBudget budget) {
        Object result = switch (function) {
            // Not the template's failure but its answer: the conversation is one that it does not allow.
            case "raise_exception" -> throw new IllegalArgumentException("The chat template refuses this conversation: "
                    + TemplateValues.text(arguments.required(0, "message"), budget));
            case "strftime_now" -> format(arguments.text(0, "format"));
            case "range" -> range(arguments, budget);
            case "namespace" -> new TemplateValues.Namespace(mapping(arguments));
            case "dict" -> mapping(arguments);
            default -> throw new TemplateFailure("unknown function '" + function + "'");
        };
        arguments.done();
        return result;
    }

    private static Map<Object, Object> mapping(TemplateArguments arguments) {
        Map<Object, Object> all = new LinkedHashMap<>();
        if (arguments.count() > 0) {
            if (!(arguments.take(0, "mapping") instanceof Map<?, ?> map)) {
                throw new TemplateFailure("namespace and dict take a mapping and named arguments");
            }
            all.putAll(map);
        }
        all.putAll(arguments.takeNamed());
        return all;
    }

    private static Object range(TemplateArguments arguments, TemplateBudget budget) {
        boolean single = arguments.count() == 1;
        long begin = single ? 0 : arguments.integer(0, "start", 0);
        long end = arguments.integer(single ? 0 : 1, "stop", 0);
        long step = arguments.integer(2, "step", 1);
        if (step == 0 || arguments.count() == 0) {
            throw new TemplateFailure("range takes one to three integers, the step not zero");
        }
        List<Object> numbers = new ArrayList<>();
        try {
            for (long i = begin; step > 0 ? i < end : i > end; i = Math.addExact(i, step)) {
                numbers.add(i);
                if (numbers.size() > LONGEST_RANGE) {
                    throw new TemplateFailure("range: more than " + LONGEST_RANGE + " numbers");
                }
            }
        } catch (ArithmeticException e) {
            // The range ends with the 64-bit integers.
            budget.step();
        }
        budget.charge((long) numbers.size() * TemplateBudget.ELEMENT);
        return numbers;
    }

    /** As {@code strftime} in the C locale. */
    private String format(String pattern) {
        LocalDateTime time = now.get();
        StringBuilder out = new StringBuilder();
        for (int i = 0; i < pattern.length(); i++) {
            char c = pattern.charAt(i);
            if (c != '%' || i + 1 == pattern.length()) {
                out.append(c);
                continue;
            }
            char directive = pattern.charAt(++i);
            String java = switch (directive) {
                case 'd' -> "dd";
                case 'm' -> "MM";
                case 'Y' -> "uuuu";
                case 'y' -> "uu";
                case 'b', 'h' -> "MMM";
                case 'B' -> "MMMM";
                case 'a' -> "EEE";
                case 'A' -> "EEEE";
                case 'H' -> "HH";
                case 'I' -> "hh";
                case 'M' -> "mm";
                case 'S' -> "ss";
                case 'p' -> "a";
                case 'j' -> "DDD";
                case 'F' -> "uuuu-MM-dd";
                case 'T' -> "HH:mm:ss";
                case '%' -> "'%'";
                default -> throw new TemplateFailure("strftime_now: unknown directive %" + directive);
            };
            out.append(time.format(DateTimeFormatter.ofPattern(java, Locale.US)));
        }
        return out.toString();
    }
}
