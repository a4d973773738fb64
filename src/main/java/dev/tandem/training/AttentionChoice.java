package dev.tandem.training;

import dev.tandem.device.Cuda;
import dev.tandem.device.CudaEvent;
import dev.tandem.device.CudnnAttention;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.TandemException;
import dev.tandem.device.Tensor;
import dev.tandem.model.ModelConfig;
import dev.tandem.training.LayerOperations.Heads;
import java.lang.System.Logger.Level;
import java.util.Arrays;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.jspecify.annotations.Nullable;

/**
 * Chooses between cuDNN's attention and FlashAttention-2: the one that takes less time for the forward and backward pass of a typical
 * micro-batch. They are timed when the first micro-batch needs one, once in a process for each device and kind of heads; who only generates
 * does not wait for it. Where cuDNN cannot be used, FlashAttention-2 serves.
 *
 * <p>Confined to the rank's thread. The owner closes it.
 */
final class AttentionChoice implements AutoCloseable {
    private static final System.Logger LOG = System.getLogger(AttentionChoice.class.getName());
    private static final int SEQUENCES = 8;
    private static final int LENGTH = 1024;
    private static final int WARM_UP = 10;
    private static final int TIMINGS = 20;

    private record Key(Device device, int heads, int kvHeads, int headDim) {}

    /** Whether cuDNN has been chosen. */
    private static final Map<Key, Boolean> CUDNN_IS_FASTER = new ConcurrentHashMap<>();

    private final Device device;
    private final Key key;
    private final double scale;
    private boolean chosen;
    /** Null where it was not chosen. */
    private @Nullable CudnnAttention cudnn;

    AttentionChoice(ModelConfig config, Device device) {
        this.device = device;
        key = new Key(device, config.heads(), config.kvHeads(), config.headDim());
        scale = 1 / Math.sqrt(config.headDim());
    }

    private void choose() {
        chosen = true;
        if (!CUDNN_IS_FASTER.getOrDefault(key, true)) {
            return;
        }
        try {
            CudnnAttention candidate = new CudnnAttention(device, key.heads, key.kvHeads, key.headDim, scale);
            cudnn = candidate;
            if (!CUDNN_IS_FASTER.computeIfAbsent(key, unknown -> isFaster(candidate))) {
                close();
            }
        } catch (RuntimeException e) { // also libtorch's, when the device's memory does not suffice
            refuse(e);
        }
    }

    private boolean isFaster(CudnnAttention candidate) {
        long[] lengths = new long[SEQUENCES];
        Arrays.fill(lengths, LENGTH);
        float byCudnn;
        float byFlash;
        try (Scope scope = Scope.open()) {
            Heads heads = new Heads(values(key.heads), values(key.kvHeads), values(key.kvHeads));
            Tensor byResult = values(key.heads);
            Tensor starts = Tensor.of(device, CudnnAttention.starts(lengths));
            byCudnn = milliseconds(new CudnnTrainingAttention(candidate, candidate.sequences(starts, lengths)), heads, byResult);
            byFlash = milliseconds(new FlashTrainingAttention(scale, starts, lengths), heads, byResult);
        } finally {
            Cuda.releaseCached(device);
        }
        String first = String.format(Locale.ROOT, "cuDNN %s: %.2f ms", candidate.version(), byCudnn);
        String second = String.format(Locale.ROOT, "FlashAttention-2: %.2f ms", byFlash);
        boolean faster = byCudnn < byFlash;
        LOG.log(Level.INFO, () -> "attention of training by " + (faster ? first : second) + " forward and backward of " + SEQUENCES
                + " sequences of " + LENGTH + " tokens; " + (faster ? second : first));
        return faster;
    }

    /** {@return values between -1 and 1 for all tokens, equal in all sequences} */
    private Tensor values(int count) {
        try (Scope scope = Scope.open()) {
            Tensor one = Tensor.range(device, (long) LENGTH * count * key.headDim).to(DType.FLOAT32).mul(12.9898).sin().to(DType.BFLOAT16);
            return scope.escape(one.unsqueeze(0).expand(SEQUENCES, one.size(0)).reshape((long) SEQUENCES * LENGTH, count, key.headDim));
        }
    }

    private float milliseconds(TrainingAttention attention, Heads heads, Tensor byResult) {
        try (CudaEvent start = new CudaEvent(device, true); CudaEvent end = new CudaEvent(device, true)) {
            for (int i = 0; i < WARM_UP + TIMINGS; i++) {
                if (i == WARM_UP) {
                    start.record();
                }
                try (Scope scope = Scope.open()) {
                    attention.backward(byResult, heads, attention.forward(heads));
                }
            }
            end.record();
            end.await();
            return end.millisecondsSince(start) / TIMINGS;
        }
    }

    private void refuse(RuntimeException reason) {
        LOG.log(Level.INFO, () -> "attention of training by FlashAttention-2: " + reason.getMessage());
        CUDNN_IS_FASTER.put(key, false);
        Cuda.synchronize(device);
        close();
    }

    /**
     * {@return the chosen attention over sequences} Its tensors belong to the innermost scope.
     *
     * @param starts {@link CudnnAttention#starts} on the device
     * @param lengths tokens of each sequence
     */
    TrainingAttention over(Tensor starts, long... lengths) {
        if (!chosen) {
            choose();
        }
        if (cudnn != null && CudnnAttention.obstacle(Arrays.stream(lengths).sum(), key.heads, key.headDim) == null) {
            try {
                return new CudnnTrainingAttention(cudnn, cudnn.sequences(starts, lengths));
            } catch (TandemException e) { // no plan for so many sequences, or such long ones
                refuse(e);
            }
        }
        return new FlashTrainingAttention(scale, starts, lengths);
    }

    @Override
    public void close() {
        if (cudnn != null) {
            cudnn.close();
            cudnn = null;
        }
    }
}
