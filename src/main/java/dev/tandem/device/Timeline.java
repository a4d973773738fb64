package dev.tandem.device;

import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.stream.Collectors;

/**
 * What a device and its host did, in milliseconds since the recording began.
 *
 * @param device what the device computed, in order of time; nothing overlaps
 * @param host what the host did, in order of its beginning; may overlap and contain each other
 * @param end when the recording ended
 */
public record Timeline(List<Interval> device, List<Interval> host, double end) {

    /**
     * An activity.
     *
     * @param name what it was
     * @param start when it began
     * @param end when it ended
     */
    public record Interval(String name, double start, double end) {
        /** {@return how long it took} */
        public double milliseconds() {
            return end - start;
        }
    }

    /**
     * A time in which the device had nothing to compute.
     *
     * @param after what the device had computed before
     * @param before what it computed next
     * @param host what the host did meanwhile, the longest first
     */
    public record Gap(double start, double end, String after, String before, List<Interval> host) {
        /** {@return how long it took} */
        public double milliseconds() {
            return end - start;
        }

        @Override
        public String toString() {
            String names = host.stream().map(Interval::name).distinct().collect(Collectors.joining(", "));
            return String.format(Locale.ROOT, "idle %.1f ms at %.1f ms, between %s and %s; the host: %s", milliseconds(), start, after,
                    before, names.isEmpty() ? "nothing that is recorded" : names);
        }
    }

    /** {@return the times beyond {@code milliseconds} in which the device was idle, in order} */
    public List<Gap> gaps(double milliseconds) {
        List<Gap> gaps = new ArrayList<>();
        double from = 0;
        String after = "the beginning";
        for (Interval next : device) {
            add(gaps, milliseconds, from, next.start, after, next.name);
            from = Math.max(from, next.end);
            after = next.name;
        }
        add(gaps, milliseconds, from, end, after, "the end");
        return gaps;
    }

    private void add(List<Gap> gaps, double least, double from, double to, String after, String before) {
        if (to - from > least) {
            List<Interval> meanwhile = host.stream().filter(i -> i.start < to && i.end > from)
                    .map(i -> new Interval(i.name, Math.max(i.start, from), Math.min(i.end, to)))
                    .sorted((a, b) -> Double.compare(b.milliseconds(), a.milliseconds())).toList();
            gaps.add(new Gap(from, to, after, before, meanwhile));
        }
    }

    /** {@return how long the device computed} */
    public double busy() {
        return device.stream().mapToDouble(Interval::milliseconds).sum();
    }

    /** {@return the activities of the device, each with how often and how long, with the host's below, and every gap beyond 5 ms} */
    @Override
    public String toString() {
        StringBuilder text = new StringBuilder();
        text.append(String.format(Locale.ROOT, "%.1f ms, of them %.1f ms computing on the device%n", end, busy()));
        text.append(String.format(Locale.ROOT, "%10s %10s %7s  %s%n", "from ms", "busy ms", "times", "device"));
        for (int i = 0; i < device.size();) {
            Interval first = device.get(i);
            int next = i;
            double busy = 0;
            while (next < device.size() && device.get(next).name.equals(first.name)) {
                busy += device.get(next++).milliseconds();
            }
            text.append(String.format(Locale.ROOT, "%10.1f %10.1f %7d  %s%n", first.start, busy, next - i, first.name));
            i = next;
        }
        text.append(String.format(Locale.ROOT, "%10s %10s %7s  %s%n", "from ms", "ms", "", "host"));
        for (Interval interval : host) {
            text.append(String.format(Locale.ROOT, "%10.1f %10.1f %7s  %s%n", interval.start, interval.milliseconds(), "", interval.name));
        }
        List<Gap> gaps = gaps(5);
        text.append(gaps.isEmpty() ? String.format("no gap beyond 5 ms%n") : "");
        gaps.forEach(gap -> text.append(gap).append(System.lineSeparator()));
        return text.toString();
    }
}
