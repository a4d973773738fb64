package dev.tandem.parallel;

import dev.tandem.device.Cuda;
import dev.tandem.device.Device;
import dev.tandem.device.TandemException;
import dev.tandem.device.Threads;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Function;
import org.jspecify.annotations.Nullable;

/**
 * The engine's rank threads, one platform thread for each device. libtorch is used on these threads only: its switches are native
 * thread-locals that would leak through virtual threads.
 *
 * <p>When a rank fails, the others cannot finish what they do together. They are waited for up to the time limit (they leave
 * their collectives by then), the failure is reported with the rank's name, and the group is formed anew before the next call.
 * Calls come from one thread at a time.
 */
public final class Ranks implements AutoCloseable {
    private final List<Device> devices;
    private final Duration limit;
    private final List<ExecutorService> threads = new ArrayList<>();
    private final List<@Nullable Future<?>> running = new ArrayList<>();
    private final List<Rank> ranks = new ArrayList<>();
    private final List<RankCollectives> collectives = new ArrayList<>();
    private boolean formed;

    /**
     * Starts the threads.
     *
     * @param devices one for each rank
     * @param limit how long a rank waits for the others in a collective
     */
    public Ranks(List<Device> devices, Duration limit) {
        if (devices.isEmpty()) {
            throw new IllegalArgumentException("at least one device is needed");
        }
        this.devices = List.copyOf(devices);
        this.limit = limit;
        devices.stream().filter(device -> !device.isCpu()).forEach(Cuda::require);
        int cores = Math.max(1, Threads.perOperation() / devices.size());
        for (int i = 0; i < devices.size(); i++) {
            String name = "rank-" + i;
            threads.add(Executors.newSingleThreadExecutor(
                    Thread.ofPlatform().name(name).daemon().factory()));
            running.add(null);
            Device device = devices.get(i);
            threads.get(i).execute(() -> {
                Threads.perOperation(cores);
                if (!device.isCpu()) {
                    Cuda.use(device);
                }
            });
            if (devices.size() > 1) {
                collectives.add(new RankCollectives(i, devices.size()));
            }
            ranks.add(new Rank(i, devices.size(), devices.get(i), devices.size() > 1 ? collectives.get(i) : Collectives.alone()));
        }
    }

    /** {@return how many ranks there are} */
    public int count() {
        return devices.size();
    }

    /** {@return the device of each rank} */
    public List<Device> devices() {
        return devices;
    }

    /**
     * Runs a function on every rank at the same time and waits for all.
     *
     * @return the results in the order of the ranks
     * @throws RankException when a rank threw or did not arrive; a single rank's own exception is thrown as it is
     */
    public <T extends @Nullable Object> List<T> onEach(Function<Rank, T> function) {
        if (!formed && devices.size() > 1) {
            form();
        }
        return run(i -> function.apply(ranks.get(i)));
    }

    private void form() {
        Attendance attendance = new Attendance(devices.size());
        Path meetingPoint;
        try {
            meetingPoint = Files.createTempFile("tandem-ranks", "");
            Files.delete(meetingPoint);
        } catch (IOException e) {
            throw new TandemException("could not make the file at which the ranks meet", e);
        }
        meetingPoint.toFile().deleteOnExit();
        run(i -> {
            collectives.get(i).join(new GlooCollectives(i, devices.size(), meetingPoint.toString(), limit, attendance));
            return true;
        });
        formed = true;
    }

    private <T extends @Nullable Object> List<T> run(Function<Integer, T> function) {
        for (int i = 0; i < threads.size(); i++) {
            Future<?> before = running.get(i);
            if (before != null && !before.isDone()) {
                throw new RankException(i, "rank " + i + " (" + devices.get(i) + ") is still busy with an earlier call");
            }
        }
        List<Future<T>> results = new ArrayList<>();
        for (int i = 0; i < threads.size(); i++) {
            int rank = i;
            Future<T> result = threads.get(i).submit(() -> function.apply(rank));
            running.set(i, result);
            results.add(result);
        }
        return gather(results);
    }

    /** Polls all ranks in turn, so that the first failure starts the clock for the others. */
    private <T extends @Nullable Object> List<T> gather(List<Future<T>> results) {
        List<Throwable> failures = new ArrayList<>();
        List<Integer> failed = new ArrayList<>();
        boolean[] done = new boolean[results.size()];
        int left = results.size();
        long deadline = Long.MAX_VALUE;
        while (left > 0) {
            for (int i = 0; i < results.size(); i++) {
                if (done[i]) {
                    continue;
                }
                try {
                    results.get(i).get(left == 1 && deadline == Long.MAX_VALUE ? 1000 : 1, TimeUnit.MILLISECONDS);
                    done[i] = true;
                    left--;
                } catch (ExecutionException e) {
                    done[i] = true;
                    left--;
                    failures.add(e.getCause() == null ? e : e.getCause());
                    failed.add(i);
                    deadline = Math.min(deadline, System.nanoTime() + 2 * limit.toNanos());
                } catch (TimeoutException e) {
                    if (System.nanoTime() > deadline) {
                        failures.add(new RankException(i, "rank " + i + " (" + devices.get(i) + ") did not return within "
                                + limit.multipliedBy(2) + " after " + failed + " failed"));
                        failed.add(i);
                        done[i] = true;
                        left--;
                    }
                } catch (InterruptedException e) {
                    Thread.currentThread().interrupt();
                    throw new TandemException("interrupted while waiting for rank " + i, e);
                }
            }
        }
        if (!failures.isEmpty()) {
            throw failure(failures, failed);
        }
        List<T> values = new ArrayList<>();
        for (Future<T> result : results) {
            values.add(result.resultNow());
        }
        return values;
    }

    /** The first failure that is a rank's own, rather than the consequence of another rank's, is the one to report. */
    private RuntimeException failure(List<Throwable> failures, List<Integer> failed) {
        abandon();
        int first = 0;
        while (first + 1 < failures.size() && failures.get(first) instanceof RankException) {
            first++;
        }
        if (failures.get(first) instanceof RankException) {
            first = 0;
        }
        Throwable cause = failures.get(first);
        RuntimeException report;
        if (cause instanceof RankException e) {
            report = e;
        } else if (devices.size() == 1) {
            if (cause instanceof Error e) {
                throw e;
            }
            report = cause instanceof RuntimeException e ? e : new TandemException(cause.toString(), cause);
        } else {
            int rank = failed.get(first);
            report = new RankException(rank, "rank " + rank + " (" + devices.get(rank) + ") failed: " + cause.getMessage(), cause);
        }
        for (int i = 0; i < failures.size(); i++) {
            if (i != first) {
                report.addSuppressed(failures.get(i));
            }
        }
        return report;
    }

    private void abandon() {
        collectives.forEach(RankCollectives::close);
        formed = false;
    }

    /** Ends the threads. Whoever keeps native objects on a rank frees them in a last {@link #onEach}. */
    @Override
    public void close() {
        abandon();
        threads.forEach(ExecutorService::shutdownNow);
        for (ExecutorService thread : threads) {
            try {
                if (!thread.awaitTermination(limit.toMillis(), TimeUnit.MILLISECONDS)) {
                    System.getLogger(Ranks.class.getName()).log(System.Logger.Level.WARNING, "a rank thread did not end");
                }
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
            }
        }
    }
}
