package dev.tandem.training;

import dev.tandem.device.Cuda;
import dev.tandem.device.CudaEvent;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.KernelModule;
import dev.tandem.device.KernelModule.Grid;
import dev.tandem.device.KernelModule.Kernel;
import dev.tandem.device.KernelModule.Source;
import dev.tandem.device.PinnedMemory;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.parallel.Collectives;
import java.lang.foreign.ValueLayout;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/**
 * The optimizer step on a GPU ({@code optimizer.cu}): norm, clipping, the check that all is finite, and AdamW, without asking the host.
 * The owner closes it.
 */
final class OptimizerKernels implements AutoCloseable {
    private static final int THREADS = 256;
    private static final int ELEMENTS = 2048;
    private static final int PARTS_PER_MULTIPROCESSOR = 5;
    private static final long STATE_BYTES = 32;
    private static final int NORM = 0;
    private static final int APPLIED = 8;

    private final Device device;
    private final TrainerOptions options;
    private final long seed;
    private final KernelModule module;
    private final Kernel squares;
    private final Kernel normAndScale;
    private final Kernel adamw;
    private final Kernel adamwAfterCopy;
    private final @Nullable Kernel drawRemainders;
    private final Tensor partial;
    /** The kernel's StepState. */
    private final Tensor stepState;
    private final List<ReadBack> readBacks;
    private int turn;

    /** @param seed by which masters are drawn and BFLOAT16 moments rounded */
    OptimizerKernels(Device device, DType weights, TrainerOptions options, long seed) {
        this.device = device;
        this.options = options;
        this.seed = seed;
        module = KernelModule.load(device, new Source("optimizer.cu", Map.of("WEIGHTS_FLOAT", weights == DType.FLOAT32 ? "1" : "0",
                "MOMENTS_BF16", options.moments() == DType.BFLOAT16 ? "1" : "0")));
        squares = module.kernel("squares");
        normAndScale = module.kernel("normAndScale");
        adamw = module.kernel("adamw");
        adamwAfterCopy = adamw.afterPredecessor();
        drawRemainders = SplitMasters.needed(weights) ? module.kernel("drawRemainders") : null;
        int multiprocessors = Cuda.multiprocessors(device);
        try (Scope scope = Scope.open()) {
            partial = Tensor.zeros(device, DType.FLOAT64, (long) multiprocessors * PARTS_PER_MULTIPROCESSOR).keep();
            stepState = Tensor.zeros(device, DType.INT32, STATE_BYTES / 4).keep();
        }
        readBacks = List.of(ReadBack.of(device), ReadBack.of(device));
    }

    /**
     * Draws masters for weights, as {@link RandomRounding#draw}.
     *
     * @param weights BFLOAT16
     * @param remainders address of as many
     * @param element the number of the first weight in the model
     */
    void drawRemainders(Tensor weights, long remainders, long element) {
        Objects.requireNonNull(drawRemainders).launch(device, grid(weights.elements()), weights.address(), remainders,
                weights.elements(), seed, element);
    }

    /** A block for each stretch of elements. */
    private static Grid grid(long elements) {
        return Grid.of(Math.toIntExact(Math.max(1, Math.ceilDiv(elements, ELEMENTS))), THREADS);
    }

    /**
     * Begins a step: computes the norm of all ranks' gradients and decides on the device whether and how they are applied.
     *
     * @param loss FLOAT32 [1], of all ranks
     */
    void begin(Tensor gradients, Tensor loss, Collectives collectives) {
        int parts = Math.toIntExact(partial.elements());
        squares.launch(device, Grid.of(parts, THREADS), gradients.address(), gradients.elements(), partial.address(), parts);
        collectives.allReduce(partial);
        normAndScale.launch(device, Grid.of(1, THREADS), partial.address(), parts, options.clip(), loss.address(), stepState.address());
    }

    /**
     * Updates a run of weights.
     *
     * @param gradient address of its gradients
     * @param state address of a state
     * @param layout of that state
     * @param at the run's first element in it
     * @param copied whether the state has just been copied there, and is copied from there next
     * @param weights address of the weights
     * @param count elements of the run
     * @param element the number of the first one in the model
     * @param decays whether weight decay applies
     */
    void update(long gradient, long state, OptimizerLayout layout, long at, boolean copied, long weights, long count, long element,
            double lr, boolean decays) {
        double decay = options.decays(decays) ? options.weightDecay() : 0;
        (copied ? adamwAfterCopy : adamw).launch(device, grid(count), gradient, state + layout.first(at),
                state + layout.second(at), layout.splits() ? state + layout.remainder(at) : 0L, weights, count, lr, options.beta1(),
                options.beta2(), options.epsilon(), decay, seed, element, stepState.address());
    }

    /**
     * {@return what the step that was begun last will have come to; whoever asks waits for the device, and asks before the next but one}
     *
     * @param loss FLOAT64 [1]
     */
    Supplier<RankTrainer.Outcome> outcome(Tensor loss) {
        ReadBack into = readBacks.get(turn++ % readBacks.size());
        into.state.copyFrom(device, stepState.address(), STATE_BYTES);
        into.loss.copyFrom(device, loss.address(), Double.BYTES);
        into.done.record();
        return into::outcome;
    }

    /** Where the result of every other step comes to on the host. */
    private record ReadBack(PinnedMemory state, PinnedMemory loss, CudaEvent done) {
        static ReadBack of(Device device) {
            return new ReadBack(new PinnedMemory(device, STATE_BYTES), new PinnedMemory(device, Double.BYTES), new CudaEvent(device, false));
        }

        RankTrainer.Outcome outcome() {
            done.await();
            return new RankTrainer.Outcome(loss.segment().get(ValueLayout.JAVA_DOUBLE, 0), state.segment().get(ValueLayout.JAVA_FLOAT, NORM),
                    state.segment().get(ValueLayout.JAVA_INT, APPLIED) != 0);
        }

        void close() {
            done.await();
            state.close();
            loss.close();
            done.close();
        }
    }

    @Override
    public void close() {
        readBacks.forEach(ReadBack::close);
        module.close();
        partial.close();
        stepState.close();
    }
}
