package dev.tandem.device;

import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.locks.LockSupport;
import java.util.function.IntConsumer;
import org.jspecify.annotations.Nullable;

/**
 * A few cores that work side by side on parts of one step, each computing its operations alone.
 *
 * <p>libtorch can spread every single operation over the cores, but then the cores meet at the end of each, and two pools of threads
 * (OpenMP's and the BLAS's) take the cores from each other: on two cores a decoding step ran only 1.3 times faster than on one. Lanes
 * share out the rows of the step instead and meet where one lane needs what another wrote ({@link #meet}), once in a layer. Waiting is
 * a short spin, because the lanes arrive together; an idle lane parks.
 *
 * <p>Lane 0 is the calling thread. Confined to it; the owner closes the lanes.
 */
public final class Lanes implements AutoCloseable {
    private static final int SPINS_BEFORE_PARKING = 20_000;
    private static final int SPINS_BEFORE_YIELDING = 4_000;

    private final Thread[] threads;
    private final AtomicInteger arrived = new AtomicInteger();
    /** How often all lanes have met. */
    private volatile int meetings;

    /** How often {@link #run} was called; a lane starts when it changes. */
    private volatile long calls;

    private volatile @Nullable IntConsumer work;
    private volatile boolean closed;
    private volatile @Nullable Throwable failure;
    private final AtomicInteger busy = new AtomicInteger();

    /** Starts the threads of all lanes but the first. */
    public Lanes(int count) {
        if (count < 1) {
            throw new IllegalArgumentException("at least one lane is needed: " + count);
        }
        threads = new Thread[count - 1];
        String name = Thread.currentThread().getName();
        for (int i = 0; i < threads.length; i++) {
            int lane = i + 1;
            threads[i] = Thread.ofPlatform().daemon().name(name + "-lane-" + lane).start(() -> serve(lane));
        }
    }

    /** {@return the number of lanes} */
    public int count() {
        return threads.length + 1;
    }

    /**
     * Runs {@code task} on every lane with its number, and waits for all. Operations use one core each meanwhile.
     *
     * @throws RuntimeException or Error: the first that a lane threw; the others leave at the next {@link #meet}
     */
    public void run(IntConsumer task) {
        int cores = Threads.perOperation();
        Threads.perOperation(1);
        try {
            failure = null;
            arrived.set(0);
            busy.set(threads.length);
            work = task;
            calls++; // only this thread writes it
            for (Thread thread : threads) {
                LockSupport.unpark(thread);
            }
            attempt(0, task);
            for (int spins = 0; busy.get() > 0; spins++) {
                pause(spins);
            }
        } finally {
            work = null;
            Threads.perOperation(cores);
        }
        Throwable thrown = failure;
        if (thrown instanceof Error e) {
            throw e;
        }
        if (thrown != null) {
            throw (RuntimeException) thrown;
        }
    }

    /**
     * Runs {@code task} once with each number below {@code parts}, on whichever lane is free, and waits for all.
     *
     * @throws RuntimeException or Error: the first that a lane threw; the others take what is left
     */
    void share(int parts, IntConsumer task) {
        AtomicInteger next = new AtomicInteger();
        run(lane -> {
            for (int part = next.getAndIncrement(); part < parts; part = next.getAndIncrement()) {
                task.accept(part);
            }
        });
    }

    /** Waits, within {@link #run}, until every lane has come here as often as this one. */
    public void meet() {
        if (threads.length == 0) {
            return;
        }
        int current = meetings;
        if (arrived.incrementAndGet() == count()) {
            arrived.set(0);
            meetings = current + 1;
            return;
        }
        for (int spins = 0; meetings == current; spins++) {
            if (failure != null) {
                throw new Left();
            }
            pause(spins);
        }
    }

    /** Another lane failed, so this one need not go on. */
    private static final class Left extends RuntimeException {
        private static final long serialVersionUID = 1;

        Left() {
            super("another lane failed", null, false, false);
        }
    }

    private void attempt(int lane, IntConsumer task) {
        try {
            task.accept(lane);
        } catch (RuntimeException | Error e) {
            synchronized (this) {
                if (failure == null) {
                    failure = e;
                }
            }
        }
    }

    private void serve(int lane) {
        Threads.onlyOnePerOperation();
        long seen = 0;
        while (true) {
            for (int spins = 0; calls == seen; spins++) {
                if (closed) {
                    return;
                }
                if (spins < SPINS_BEFORE_PARKING) {
                    Thread.onSpinWait();
                } else {
                    LockSupport.park(this);
                }
            }
            seen++;
            IntConsumer task = work;
            if (task != null) {
                attempt(lane, task);
            }
            busy.decrementAndGet();
        }
    }

    private static void pause(int spins) {
        if (spins < SPINS_BEFORE_YIELDING) {
            Thread.onSpinWait();
        } else {
            Thread.yield();
        }
    }

    @Override
    public void close() {
        closed = true;
        for (Thread thread : threads) {
            LockSupport.unpark(thread);
            try {
                thread.join();
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
                return;
            }
        }
    }
}
