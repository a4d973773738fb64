package dev.tandem.model;

import dev.tandem.model.TemplateValues.Undefined;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;

/** jinja2's filters: what may follow {@code |}. Those that are lazy in Python give lists here. */
final class TemplateFilters {
    static final Set<String> NAMES = Set.of("trim", "tojson", "length", "count", "string", "upper", "lower",
            "capitalize", "default", "d",
            "join", "replace", "items", "first", "last", "list", "reverse", "select", "reject", "selectattr",
                    "rejectattr", "map", "int", "safe");

    private TemplateFilters() {}

    static Object apply(String filter, Object value, TemplateArguments arguments, TemplateBudget budget) {
        Object result = switch (filter) {
            case "trim" -> PythonText.strip(TemplateValues.text(value, budget), arguments.optionalText(0, "chars"),
                    true, true);
            case "tojson" -> TemplateJson.write(value, arguments, budget);
            case "length", "count" -> TemplateValues.length(value);
            case "string", "safe" -> TemplateValues.text(value, budget);
            case "upper" -> TemplateValues.text(value, budget).toUpperCase(Locale.ROOT);
            case "lower" -> TemplateValues.text(value, budget).toLowerCase(Locale.ROOT);
            case "capitalize" -> capitalize(TemplateValues.text(value, budget));
            case "default", "d" -> {
                Object otherwise = arguments.take(0, "default_value", "");
                boolean ifFalse = arguments.flag(1, "boolean", false);
                yield value instanceof Undefined || (ifFalse && !TemplateValues.truth(value)) ? otherwise : value;
            }
            case "join" -> join(value, arguments, budget);
            case "replace" -> TemplateMethods.replace(TemplateValues.text(value, budget), arguments.text(0, "old"),
                    arguments.text(1, "new"), arguments.integer(2, "count", -1), budget);
            case "items" -> switch (value) {
                case Map<?, ?> map -> TemplateMethods.items(map);
                case Undefined undefined -> new ArrayList<>();
                default -> throw new TemplateFailure("the filter 'items' takes a mapping, found "
                        + TemplateValues.typeName(value));
            };
            case "first" -> {
                List<Object> elements = elements(value, budget);
                yield elements.isEmpty() ? new Undefined("the first of nothing") : elements.getFirst();
            }
            case "last" -> {
                List<Object> elements = elements(value, budget);
                yield elements.isEmpty() ? new Undefined("the last of nothing") : elements.getLast();
            }
            case "list" -> elements(value, budget);
            case "reverse" -> reverse(value, budget);
            case "select", "selectattr", "reject", "rejectattr" -> select(filter, value, arguments, budget);
            case "map" -> map(value, arguments, budget);
            case "int" -> integer(value, arguments);
            default -> throw new TemplateFailure("unknown filter '" + StrictJson.brief(filter) + "'");
        };
        arguments.done();
        return result;
    }

    private static List<Object> elements(Object value, TemplateBudget budget) {
        List<Object> elements = TemplateValues.elements(value);
        budget.charge((long) elements.size() * TemplateBudget.ELEMENT);
        return elements;
    }

    private static String capitalize(String text) {
        if (text.isEmpty()) {
            return text;
        }
        int first = text.codePointAt(0);
        return Character.toString(Character.toTitleCase(first))
                + text.substring(Character.charCount(first)).toLowerCase(Locale.ROOT);
    }

    private static Object join(Object value, TemplateArguments arguments, TemplateBudget budget) {
        String separator = arguments.text(0, "d", "");
        String attribute = arguments.optionalText(1, "attribute");
        List<Object> parts = elements(value, budget);
        if (attribute != null) {
            parts.replaceAll(part -> attribute(part, attribute));
        }
        return TemplateMethods.join(parts, separator, budget);
    }

    private static Object reverse(Object value, TemplateBudget budget) {
        if (value instanceof String text) {
            budget.charge(text.length());
            return new StringBuilder(text).reverse().toString();
        }
        List<Object> elements = elements(value, budget);
        Collections.reverse(elements);
        return elements;
    }

    /** Keeps the elements (or those whose attribute) pass a test, or fail it; without a test, those that are true. */
    private static Object select(String filter, Object value, TemplateArguments arguments, TemplateBudget budget) {
        boolean wanted = filter.startsWith("select");
        String attribute = filter.endsWith("attr") ? arguments.text(0, "attribute") : null;
        List<Object> rest = arguments.rest(attribute == null ? 0 : 1);
        List<Object> selected = new ArrayList<>();
        for (Object element : elements(value, budget)) {
            Object found = attribute == null ? element : attribute(element, attribute);
            boolean passes;
            if (rest.isEmpty()) {
                passes = TemplateValues.truth(found);
            } else if (rest.getFirst() instanceof String test) {
                passes = TemplateTests.apply(test, found, new TemplateArguments(filter, rest.subList(1, rest.size()),
                        Map.of()));
            } else {
                throw new TemplateFailure("the filter '" + filter + "' takes the name of a test, found "
                        + TemplateValues.typeName(rest.getFirst()));
            }
            if (passes == wanted) {
                selected.add(element);
            }
        }
        return selected;
    }

    private static Object map(Object value, TemplateArguments arguments, TemplateBudget budget) {
        String attribute = arguments.optionalText(-1, "attribute");
        List<Object> mapped = elements(value, budget);
        if (attribute != null) {
            Object otherwise = arguments.take(-1, "default");
            mapped.replaceAll(element -> {
                Object found = attribute(element, attribute);
                return found instanceof Undefined && otherwise != null ? otherwise : found;
            });
            return mapped;
        }
        String filter = arguments.text(0, "filter");
        List<Object> rest = arguments.rest(1);
        Map<String, Object> named = arguments.takeNamed();
        budget.enter();
        mapped.replaceAll(element -> {
            budget.step();
            return apply(filter, element, new TemplateArguments(filter, rest, named), budget);
        });
        budget.leave();
        return mapped;
    }

    /** A path such as {@code function.name}; a number in it is an index. */
    private static Object attribute(Object element, String path) {
        Object value = element;
        for (String part : path.split("\\.", -1)) {
            long index = JsonFields.wholeNumber(part);
            value = TemplateOperators.item(value, index < 0 ? part : index);
        }
        return value;
    }

    private static Object integer(Object value, TemplateArguments arguments) {
        Object otherwise = arguments.take(0, "default", 0L);
        if (value instanceof String text) {
            String digits = PythonText.strip(text, null, true, true);
            long whole = JsonFields.wholeNumber(digits.startsWith("+") ? digits.substring(1) : digits);
            if (whole != Long.MIN_VALUE) {
                return whole;
            }
            try {
                double fraction = Double.parseDouble(digits);
                return Double.isFinite(fraction) && Math.abs(fraction) < 1e18 ? (Object) (long) fraction : otherwise;
            } catch (NumberFormatException e) {
                return otherwise;
            }
        }
        if (!TemplateValues.isNumber(value)) {
            return otherwise;
        }
        return TemplateValues.number(value) instanceof Double fraction
                ? Math.abs(fraction) < 1e18 ? (Object) (long) (double) fraction : otherwise
                        : TemplateValues.number(value);
    }
}
