package dev.tandem.device;

import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.Deque;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Records what a device and its host do. A device's activity is enclosed in two events of its stream, so recording waits for nothing; on a
 * CPU, where operations are done when they return, it is the host's time.
 *
 * <p>{@link #device} is confined to the rank's thread, {@link #host} may be called from any. The owner closes it.
 */
public final class TimelineRecorder implements AutoCloseable {
    private final Device device;
    private final @Nullable CudaEvent origin;
    private final long start;
    private final List<Activity> activities = new ArrayList<>();
    private final List<Timeline.Interval> host = new ArrayList<>();
    private final Deque<CudaEvent> owned = new ArrayDeque<>();

    /** An activity that ends when this is closed. */
    public interface Span extends AutoCloseable {
        /** Of what is not recorded. */
        Span NONE = () -> {};

        @Override
        void close();
    }

    private record Activity(String name, @Nullable CudaEvent start, @Nullable CudaEvent end, double hostStart, double hostEnd) {}

    /** Begins; waits for what the device still computes. */
    public TimelineRecorder(Device device) {
        this.device = device;
        if (device.isCpu()) {
            origin = null;
        } else {
            Cuda.synchronize(device);
            origin = event();
            origin.record();
            origin.await();
        }
        start = System.nanoTime();
    }

    private CudaEvent event() {
        CudaEvent event = new CudaEvent(device, true);
        owned.push(event);
        return event;
    }

    private double now() {
        return (System.nanoTime() - start) / 1e6;
    }

    /** {@return what the calling rank's thread gives the device from now on, until it is closed} Not to be nested. */
    public Span device(String name) {
        double from = now();
        CudaEvent first = origin == null ? null : event();
        if (first != null) {
            first.record();
        }
        return () -> {
            CudaEvent last = origin == null ? null : event();
            if (last != null) {
                last.record();
            }
            activities.add(new Activity(name, first, last, from, now()));
        };
    }

    /** {@return what the calling thread does from now on, until it is closed} */
    public Span host(String name) {
        double from = now();
        return () -> {
            synchronized (host) {
                host.add(new Timeline.Interval(name, from, now()));
            }
        };
    }

    /** {@return what has been recorded; waits for the device} On the rank's thread. */
    public Timeline finish() {
        if (origin != null) {
            Cuda.synchronize(device);
        }
        double end = now();
        List<Timeline.Interval> computed = activities.stream().map(this::interval).toList();
        synchronized (host) {
            return new Timeline(computed, host.stream().sorted(Comparator.comparingDouble(Timeline.Interval::start)).toList(), end);
        }
    }

    private Timeline.Interval interval(Activity activity) {
        CudaEvent first = activity.start;
        CudaEvent last = activity.end;
        return origin == null || first == null || last == null
                ? new Timeline.Interval(activity.name, activity.hostStart, activity.hostEnd)
                : new Timeline.Interval(activity.name, first.millisecondsSince(origin), last.millisecondsSince(origin));
    }

    @Override
    public void close() {
        owned.forEach(CudaEvent::close);
        owned.clear();
    }
}
