package dev.tandem.training;

import dev.tandem.device.Cuda;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Gradients;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.parallel.Collectives;
import java.lang.foreign.MemorySegment;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.Objects;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/**
 * AdamW (Loshchilov and Hutter 2019) over this rank's slice of every group, writing the arena in place.
 *
 * <p>In a FLOAT32 arena the weights themselves are updated; in a BFLOAT16 arena a FLOAT32 master of each is, or small updates would be
 * lost. The arena has the master's upper half, rounded; the lower one is kept here ({@link SplitMasters}). A master begins at one of the
 * numbers that round to its weight, drawn at random. Would it begin at the weight itself, in the middle of what rounds to it, then no
 * weight would move before its master has gone half a unit in the last place, which at the learning rates of reinforcement learning is a
 * hundred steps away; so as many weights move in each step as the update is worth. Moments are FLOAT32, or BFLOAT16 by
 * {@link RandomRounding}.
 *
 * <p>After the update an in-place all-gather completes the arena on every rank. On the CPU, work goes through in chunks that stay in the
 * cache, so a step reads and writes each number about once; on a GPU it is one pass of {@link OptimizerKernels}. All memory is taken before
 * the first weight is written: a step that runs out of memory has changed nothing.
 *
 * <p>What a GPU has no room for, the state of the arena's first groups, stays in host memory and passes through the device in each step
 * ({@link HostState}). The rest can be parked: {@link #park} moves it to page-locked host memory, and whatever needs it next brings it
 * back.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class ShardedAdamW implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(ShardedAdamW.class.getName());
    private static final long CHUNK = 1 << 16;
    /** For each element of a chunk on the CPU: denominator, moments that are rounded, master. */
    private static final int SCRATCH = 4;

    private final WeightArena arena;
    private final Collectives collectives;
    private final DeviceMemory memory;
    private final TrainerOptions options;
    private final long seed;
    /** How many elements of the slice have their state on the host; those after them have it on the device. */
    private final long hostElements;
    private final @Nullable HostState host;
    /** Of the state that is on the device. */
    private final OptimizerLayout layout;
    private final @Nullable OptimizerKernels kernels;
    /** As {@link #layout} says; null while parked. */
    private @Nullable Tensor state;

    private @Nullable PinnedMemory parkingPlace;
    /** Updates applied so far on the CPU; a GPU counts its own. */
    private long steps;

    /**
     * @param seed by which masters are drawn and BFLOAT16 moments rounded
     * @param hostGroups of how many groups, from the first, a GPU's state stays in host memory
     */
    ShardedAdamW(WeightArena arena, Collectives collectives, DeviceMemory memory, TrainerOptions options, long seed, int hostGroups) {
        this.arena = arena;
        this.collectives = collectives;
        this.memory = memory;
        this.options = options;
        this.seed = seed;
        Device device = memory.device();
        hostElements = arena.layout().groupOffset(hostGroups) / collectives.size();
        layout = OptimizerLayout.of(arena.layout().length() / collectives.size() - hostElements, arena.dtype(), options);
        OptimizerLayout onHost = OptimizerLayout.of(hostElements, arena.dtype(), options);
        try {
            kernels = device.isCpu() ? null : new OptimizerKernels(device, arena.dtype(), options, seed);
            host = hostGroups == 0 ? null : new HostState(device, onHost);
            allocate().fillInPlace(0);
            refreshMaster();
        } catch (RuntimeException | Error e) {
            close();
            throw e;
        }
        if (hostGroups > 0) {
            LOG.log(System.Logger.Level.INFO, "{0}: the optimizer state of {1} of {2} groups, {3} MiB, stays in host memory; each step "
                    + "copies it to the device and back", device, hostGroups, arena.groups().size(), onHost.bytes() >> 20);
        }
    }

    private Tensor allocate() {
        try (Scope scope = Scope.open()) {
            Tensor made = Tensor.empty(memory.device(), DType.FLOAT32, layout.bytes() / Float.BYTES).keep();
            memory.add(Use.OPTIMIZER, layout.bytes());
            state = made;
            return made;
        }
    }

    /** Moves the state to the host, where it stays until it is needed. */
    void park() {
        Tensor present = state;
        if (present == null) {
            return;
        }
        Device device = memory.device();
        PinnedMemory place = parkingPlace == null ? new PinnedMemory(device, layout.bytes()) : parkingPlace;
        parkingPlace = place;
        place.copyFrom(device, present.address(), layout.bytes());
        Cuda.synchronize(device);
        present.close();
        state = null;
        memory.add(Use.OPTIMIZER, -layout.bytes());
    }

    /** The state, brought back if it was parked. */
    private Tensor present() {
        Tensor present = state;
        PinnedMemory place = parkingPlace;
        if (present == null && place != null) {
            present = allocate();
            place.copyTo(memory.device(), present.address(), 0, layout.bytes());
        }
        return Objects.requireNonNull(present);
    }

    /** Draws the master weights again, after weights were loaded into the arena. */
    void refreshMaster() {
        if (layout.splits()) {
            try (Scope scope = Scope.open()) {
                for (WeightGroup group : arena.groups()) {
                    Tensor own = group.flat().narrow(0, start(group), length(group));
                    long element = group.offset() + start(group);
                    Tensor resident = present();
                    if (kernels == null) {
                        RandomRounding.draw(seed, own, remainders(offset(group)), element);
                    } else if (host != null && offset(group) < hostElements) {
                        host.drawMasters(kernels, offset(group), own, element);
                    } else {
                        kernels.drawRemainders(own, resident.address() + layout.remainder(offset(group) - hostElements), element);
                    }
                }
            }
        }
    }

    /**
     * Clips the gradients and updates the weights, unless loss or gradients are not finite.
     *
     * @param gradients accumulated over the step; may be scaled in place
     * @param loss FLOAT64 [1], this rank's
     * @return what the step will have come to, to be asked on this thread before the next but one
     */
    Supplier<RankTrainer.Outcome> step(GradientShard gradients, Tensor loss, double lr) {
        try (Scope scope = Scope.open()) {
            collectives.allReduce(loss);
            if (kernels != null) {
                return onDevice(kernels, gradients, loss, lr);
            }
            double norm = Math.sqrt(gradients.sumOfSquares());
            double sum = loss.item();
            boolean finite = Double.isFinite(norm) && Double.isFinite(sum);
            if (finite) {
                onCpu(gradients, lr, norm > options.clip() ? options.clip() / (norm + 1e-6) : 1);
            }
            RankTrainer.Outcome outcome = new RankTrainer.Outcome(sum, norm, finite);
            return () -> outcome;
        }
    }

    private Supplier<RankTrainer.Outcome> onDevice(OptimizerKernels on, GradientShard gradients, Tensor loss, double lr) {
        Tensor resident = present();
        if (host != null) {
            host.begin();
        }
        on.begin(gradients.all(), loss.to(DType.FLOAT32), collectives);
        Deque<Runnable> staying = new ArrayDeque<>();
        List<Runnable> passing = new ArrayList<>();
        for (WeightGroup group : arena.groups()) {
            boolean stays = offset(group) >= hostElements;
            runs(group, (from, to, decays) -> {
                long at = offset(group) + from - start(group);
                long gradient = gradients.all().address() + at * Float.BYTES;
                long weights = group.flat().address() + from * arena.dtype().bytes();
                long element = group.offset() + from;
                if (stays) {
                    staying.add(() -> on.update(gradient, resident.address(), layout, at - hostElements, false, weights, to - from, element,
                            lr, decays));
                    return;
                }
                for (long done = 0; done < to - from; done += HostState.PIECE) {
                    long first = done;
                    long count = Math.min(HostState.PIECE, to - from - done);
                    passing.add(() -> Objects.requireNonNull(host).pass(at + first, count, state -> on.update(
                            gradient + first * Float.BYTES, state, host.piece(), 0, true, weights + first * arena.dtype().bytes(), count,
                            element + first, lr, decays)));
                }
            });
            (stays ? staying : passing).add(() -> collectives.allGather(group.flat()));
        }
        alternate(passing, staying);
        if (host != null) {
            host.end();
        }
        return on.outcome(loss);
    }

    /** While a piece passes there is time for what is on the device. */
    private static void alternate(List<Runnable> passing, Deque<Runnable> staying) {
        int each = Math.ceilDiv(staying.size(), Math.max(1, passing.size()));
        for (Runnable piece : passing) {
            piece.run();
            for (int i = 0; i < each && !staying.isEmpty(); i++) {
                staying.remove().run();
            }
        }
        staying.forEach(Runnable::run);
    }

    private void onCpu(GradientShard gradients, double lr, double scale) {
        long chunkSize = Math.min(layout.elements(), CHUNK);
        try (Gradients off = Gradients.disabled(); Scope step = Scope.open()) {
            Tensor scratch = Tensor.empty(Device.cpu(), DType.FLOAT32, SCRATCH, chunkSize);
            steps++;
            for (WeightGroup group : arena.groups()) {
                runs(group, (from, to, decays) -> {
                    for (long at = from; at < to; at += chunkSize) {
                        long n = Math.min(chunkSize, to - at);
                        try (Scope chunk = Scope.open()) {
                            Tensor g = gradients.all().narrow(0, offset(group) + at - start(group), n);
                            if (scale != 1) {
                                g.mulInPlace(scale);
                            }
                            update(group, at, g, scratch.narrow(1, 0, n), lr, decays);
                        }
                    }
                });
                collectives.allGather(group.flat());
            }
        }
    }

    /**
     * Updates a chunk of a group.
     *
     * @param from where it begins in the group
     * @param g its gradient
     * @param scratch FLOAT32 [{@link #SCRATCH}, the chunk's length]
     */
    private void update(WeightGroup group, long from, Tensor g, Tensor scratch, double lr, boolean decays) {
        long n = g.elements();
        long at = offset(group) + from - start(group);
        boolean rounds = options.moments() != DType.FLOAT32;
        Tensor weights = group.flat().narrow(0, from, n);
        Tensor w = weights;
        if (layout.splits()) {
            w = scratch.select(0, 3);
            SplitMasters.join(weights, remainders(at), w);
        }
        Tensor first = Tensor.wrap(present().memory().asSlice(layout.first(at)), options.moments(), n);
        Tensor second = Tensor.wrap(present().memory().asSlice(layout.second(at)), options.moments(), n);
        Tensor mean = rounds ? scratch.select(0, 1).copyInPlace(first) : first;
        Tensor square = rounds ? scratch.select(0, 2).copyInPlace(second) : second;
        if (options.decays(decays)) {
            w.mulInPlace(1 - lr * options.weightDecay());
        }
        mean.lerpInPlace(g, 1 - options.beta1());
        square.mulInPlace(options.beta2()).addProductInPlace(g, g, 1 - options.beta2());
        Tensor denominator = scratch.select(0, 0).setSqrt(square)
                .mulInPlace(1 / Math.sqrt(1 - Math.pow(options.beta2(), steps))).addInPlace(options.epsilon());
        w.addQuotientInPlace(mean, denominator, -lr / (1 - Math.pow(options.beta1(), steps)));
        if (layout.splits()) {
            SplitMasters.split(w, weights, remainders(at));
        }
        if (rounds) {
            new RandomRounding(seed, steps).round(mean, square, first, second, group.offset() + from);
        }
    }

    /** On the CPU: the remainders from an element on. */
    private MemorySegment remainders(long at) {
        return present().memory().asSlice(layout.remainder(at));
    }

    /** This rank's slice of a group in runs of elements that decay alike. */
    private void runs(WeightGroup group, WeightGroup.RunConsumer runs) {
        long start = start(group);
        if (options.decays(true) == options.decays(false)) {
            runs.accept(start, start + length(group), true);
        } else {
            group.runs(start, start + length(group), runs);
        }
    }

    /** {@return where this rank's slice begins in a group, in elements} */
    private long start(WeightGroup group) {
        return length(group) * collectives.rank();
    }

    /** {@return the length of this rank's slice of a group} */
    private long length(WeightGroup group) {
        return group.length() / collectives.size();
    }

    /** {@return where the slice of a group begins in gradients and state} */
    private long offset(WeightGroup group) {
        return group.offset() / collectives.size();
    }

    @Override
    public void close() {
        if (state != null) {
            state.close();
            state = null;
            memory.add(Use.OPTIMIZER, -layout.bytes());
        }
        if (parkingPlace != null) {
            parkingPlace.close();
        }
        if (host != null) {
            host.close();
        }
        if (kernels != null) {
            kernels.close();
        }
    }
}
