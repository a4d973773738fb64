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
import java.util.Objects;
import org.jspecify.annotations.Nullable;

/**
 * AdamW (Loshchilov and Hutter 2019) over this rank's slice of every group, writing the arena in place.
 *
 * <p>Moments are FLOAT32. In a FLOAT32 arena the weights themselves are updated; in a BFLOAT16 arena a FLOAT32 master of the slice
 * is, and its rounding is written to the arena: small updates would be lost otherwise. After the update an in-place all-gather
 * completes the arena on every rank. Work goes through in chunks that stay in the cache, so a step reads and writes each number
 * about once. All memory is taken before the first weight is written: a step that runs out of memory has changed nothing.
 *
 * <p>The state of a GPU's slice can be parked: {@link #park} moves it to page-locked host memory, and whatever needs it next brings it
 * back.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class ShardedAdamW implements AutoCloseable {
    private static final long CHUNK = 1 << 16;
    private static final long CUDA_CHUNK = 1 << 26;

    private final WeightArena arena;
    private final Collectives collectives;
    private final DeviceMemory memory;
    private final TrainerOptions options;
    private final boolean hasMaster;
    private final @Nullable OptimizerKernels kernels;
    private final long length;
    private final long bytes;
    /** FLOAT32 [2 or 3, slice]: first moments, second moments, masters; null while parked. */
    private @Nullable Tensor state;

    private @Nullable PinnedMemory parkingPlace;
    private long steps;

    ShardedAdamW(WeightArena arena, Collectives collectives, DeviceMemory memory, TrainerOptions options) {
        this.arena = arena;
        this.collectives = collectives;
        this.memory = memory;
        this.options = options;
        hasMaster = arena.dtype() != DType.FLOAT32;
        length = arena.layout().length() / collectives.size();
        kernels = memory.device().isCpu() || TrainingKernels.obstacle(arena.layout().config(), arena.dtype()) != null
                ? null
                : new OptimizerKernels(memory.device(), arena.dtype());
        bytes = length * Float.BYTES * parts();
        allocate().fillInPlace(0);
        refreshMaster();
    }

    private int parts() {
        return hasMaster ? 3 : 2;
    }

    private Tensor allocate() {
        try (Scope scope = Scope.open()) {
            Tensor made = Tensor.empty(memory.device(), DType.FLOAT32, parts(), length).keep();
            memory.add(Use.OPTIMIZER, bytes);
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
        PinnedMemory place = parkingPlace == null ? new PinnedMemory(device, bytes) : parkingPlace;
        parkingPlace = place;
        place.copyFrom(device, present.address(), bytes);
        Cuda.synchronize(device);
        present.close();
        state = null;
        memory.add(Use.OPTIMIZER, -bytes);
    }

    /** The state, brought back if it was parked. */
    private Tensor present() {
        Tensor present = state;
        PinnedMemory place = parkingPlace;
        if (present == null && place != null) {
            present = allocate();
            place.copyTo(memory.device(), present.address(), 0, bytes);
        }
        return Objects.requireNonNull(present);
    }

    /** Takes the master weights from the arena again, after weights were loaded into it. */
    void refreshMaster() {
        if (hasMaster) {
            try (Scope scope = Scope.open()) {
                Tensor master = present().select(0, 2);
                for (WeightGroup group : arena.groups()) {
                    slice(master, group).copyInPlace(own(group));
                }
            }
        }
    }

    /**
     * Clips the gradients and updates the weights, unless loss or gradients are not finite.
     *
     * @param gradients accumulated over the step; may be scaled in place
     * @param loss FLOAT64 [1], this rank's
     */
    RankTrainer.Outcome step(GradientShard gradients, Tensor loss, double lr) {
        try (Scope scope = Scope.open()) {
            collectives.allReduce(loss);
            if (kernels != null) {
                return onDevice(kernels, gradients, loss, lr);
            }
            double norm = Math.sqrt(gradients.sumOfSquares());
            double sum = loss.item();
            boolean finite = Double.isFinite(norm) && Double.isFinite(sum);
            if (finite) {
                update(gradients, lr, norm > options.clip() ? options.clip() / (norm + 1e-6) : 1);
            }
            return new RankTrainer.Outcome(sum, norm, finite);
        }
    }

    private RankTrainer.Outcome onDevice(OptimizerKernels on, GradientShard gradients, Tensor loss, double lr) {
        Tensor moments = present();
        long first = moments.address();
        long second = first + length * Float.BYTES;
        long master = hasMaster ? second + length * Float.BYTES : 0;
        on.begin(gradients.all(), options.clip(), loss.to(DType.FLOAT32), collectives);
        for (WeightGroup group : arena.groups()) {
            long slice = group.length() / collectives.size();
            long start = slice * collectives.rank();
            long offset = group.offset() / collectives.size();
            long weights = group.flat().address() + start * arena.dtype().bytes();
            long gradient = gradients.all().address() + offset * Float.BYTES;
            group.runs(start, start + slice, (from, to, decays) -> {
                long at = offset + from - start;
                on.update(gradient + (from - start) * Float.BYTES, first + at * Float.BYTES, second + at * Float.BYTES,
                        master == 0 ? 0 : master + at * Float.BYTES, weights + (from - start) * arena.dtype().bytes(), to - from, lr,
                        options, options.decays(decays) ? options.weightDecay() : 0);
            });
            collectives.allGather(group.flat());
        }
        RankTrainer.Outcome outcome = on.outcome(loss.item());
        steps += outcome.applied() ? 1 : 0;
        return outcome;
    }

    private void update(GradientShard gradients, double lr, double scale) {
        long chunkSize = Math.min(length, memory.device().isCpu() ? CHUNK : CUDA_CHUNK);
        double correction1 = 1 - Math.pow(options.beta1(), steps + 1);
        double correction2 = Math.sqrt(1 - Math.pow(options.beta2(), steps + 1));
        try (Gradients off = Gradients.disabled(); Scope step = Scope.open()) {
            Tensor moments = present();
            Tensor first = moments.select(0, 0);
            Tensor second = moments.select(0, 1);
            Tensor master = hasMaster ? moments.select(0, 2) : null;
            Tensor scratch = Tensor.empty(memory.device(), DType.FLOAT32, chunkSize);
            steps++;
            for (WeightGroup group : arena.groups()) {
                long slice = group.length() / collectives.size();
                long start = slice * collectives.rank();
                try (Scope scope = Scope.open()) {
                    Tensor own = own(group);
                    Tensor weights = master == null ? own : slice(master, group);
                    Tensor gradient = gradients.slice(group);
                    Tensor m = slice(first, group);
                    Tensor v = slice(second, group);
                    group.runs(start, start + slice, (from, to, decays) -> {
                        for (long at = from - start; at < to - start; at += chunkSize) {
                            long n = Math.min(chunkSize, to - start - at);
                            try (Scope chunk = Scope.open()) {
                                Tensor w = weights.narrow(0, at, n);
                                Tensor g = gradient.narrow(0, at, n);
                                Tensor mean = m.narrow(0, at, n);
                                Tensor square = v.narrow(0, at, n);
                                if (scale != 1) {
                                    g.mulInPlace(scale);
                                }
                                if (options.decays(decays)) {
                                    w.mulInPlace(1 - lr * options.weightDecay());
                                }
                                mean.lerpInPlace(g, 1 - options.beta1());
                                square.mulInPlace(options.beta2()).addProductInPlace(g, g, 1 - options.beta2());
                                Tensor denominator = scratch.narrow(0, 0, n).setSqrt(square)
                                        .mulInPlace(1 / correction2).addInPlace(options.epsilon());
                                w.addQuotientInPlace(mean, denominator, -lr / correction1);
                                if (master != null) {
                                    own.narrow(0, at, n).copyInPlace(w);
                                }
                            }
                        }
                    });
                    collectives.allGather(group.flat());
                }
            }
        }
    }

    /** {@return how many updates were applied} */
    long steps() {
        return steps;
    }

    private Tensor own(WeightGroup group) {
        long length = group.length() / collectives.size();
        return group.flat().narrow(0, length * collectives.rank(), length);
    }

    private Tensor slice(Tensor of, WeightGroup group) {
        return of.narrow(0, group.offset() / collectives.size(), group.length() / collectives.size());
    }

    @Override
    public void close() {
        if (state != null) {
            state.close();
            state = null;
            memory.add(Use.OPTIMIZER, -bytes);
        }
        if (parkingPlace != null) {
            parkingPlace.close();
        }
        if (kernels != null) {
            kernels.close();
        }
    }
}
