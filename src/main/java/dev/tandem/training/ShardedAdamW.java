package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.DeviceMemory;
import dev.tandem.device.DeviceMemory.Use;
import dev.tandem.device.Gradients;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.model.WeightArena;
import dev.tandem.model.WeightGroup;
import dev.tandem.parallel.Collectives;
import org.jspecify.annotations.Nullable;

/**
 * AdamW (Loshchilov and Hutter 2019) over this rank's slice of every group, writing the arena in place.
 *
 * <p>Moments are FLOAT32. In a FLOAT32 arena the weights themselves are updated; in a BFLOAT16 arena a FLOAT32 master of the slice
 * is, and its rounding is written to the arena: small updates would be lost otherwise. After the update an in-place all-gather
 * completes the arena on every rank. Work goes through in chunks that stay in the cache, so a step reads and writes each number
 * about once.
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
    private final Tensor first;
    private final Tensor second;
    private final @Nullable Tensor master;
    private final long bytes;
    private long steps;

    ShardedAdamW(WeightArena arena, Collectives collectives, DeviceMemory memory, TrainerOptions options) {
        this.arena = arena;
        this.collectives = collectives;
        this.memory = memory;
        this.options = options;
        long length = arena.layout().length() / collectives.size();
        try (Scope scope = Scope.open()) {
            first = Tensor.zeros(memory.device(), DType.FLOAT32, length).keep();
            second = Tensor.zeros(memory.device(), DType.FLOAT32, length).keep();
            master = arena.dtype() == DType.FLOAT32 ? null : Tensor.empty(memory.device(), DType.FLOAT32, length).keep();
        }
        bytes = length * Float.BYTES * (master == null ? 2 : 3);
        memory.add(Use.OPTIMIZER, bytes);
        refreshMaster();
    }

    /** Takes the master weights from the arena again, after weights were loaded into it. */
    void refreshMaster() {
        if (master != null) {
            try (Scope scope = Scope.open()) {
                for (WeightGroup group : arena.groups()) {
                    state(master, group).copyInPlace(own(group));
                }
            }
        }
    }

    /**
     * Updates the weights.
     *
     * @param gradients accumulated over the step; scaled in place
     * @param scale factor of the gradients, for clipping
     */
    void step(GradientShard gradients, double lr, double scale) {
        steps++;
        long chunkSize = memory.device().isCpu() ? CHUNK : CUDA_CHUNK;
        double correction1 = 1 - Math.pow(options.beta1(), steps);
        double correction2 = Math.sqrt(1 - Math.pow(options.beta2(), steps));
        try (Gradients off = Gradients.disabled()) {
            for (WeightGroup group : arena.groups()) {
                long length = group.length() / collectives.size();
                long start = length * collectives.rank();
                try (Scope scope = Scope.open()) {
                    Tensor own = own(group);
                    Tensor weights = master == null ? own : state(master, group);
                    Tensor gradient = gradients.slice(group);
                    Tensor m = state(first, group);
                    Tensor v = state(second, group);
                    group.runs(start, start + length, (from, to, decays) -> {
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
                                Tensor denominator = square.sqrt().mulInPlace(1 / correction2).addInPlace(options.epsilon());
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

    private Tensor state(Tensor of, WeightGroup group) {
        return of.narrow(0, group.offset() / collectives.size(), group.length() / collectives.size());
    }

    @Override
    public void close() {
        first.close();
        second.close();
        if (master != null) {
            master.close();
        }
        memory.add(Use.OPTIMIZER, -bytes);
    }
}
