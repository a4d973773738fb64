package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Operator;
import dev.tandem.device.Tensor;
import dev.tandem.training.LayerOperations.Attended;
import dev.tandem.training.LayerOperations.Heads;
import java.util.Arrays;
import java.util.List;

/** Attention by libtorch's FlashAttention-2 (Dao 2023). */
final class FlashTrainingAttention implements TrainingAttention {
    private static final Operator FORWARD = Operator.named("aten::_flash_attention_forward");
    private static final Operator BACKWARD = Operator.named("aten::_flash_attention_backward");

    private final Tensor bounds;
    private final long longest;
    private final double scale;

    /**
     * @param starts where each sequence starts, and their end, INT64; what follows is not read
     * @param lengths tokens of each sequence
     */
    FlashTrainingAttention(double scale, Tensor starts, long... lengths) {
        bounds = starts.narrow(0, 0, lengths.length + 1L).to(DType.INT32);
        longest = Arrays.stream(lengths).max().orElse(0);
        this.scale = scale;
    }

    @Override
    public Attended forward(Heads heads) {
        // Results: output, log-sum-exp, the state of dropout's random numbers (two), a mask for debugging.
        List<Tensor> found = FORWARD.call(heads.query(), heads.key(), heads.value(), bounds, bounds, longest, longest, 0.0, true, false,
                scale, null, null, null, null);
        Tensor output = found.get(0);
        return new Attended(output.reshape(output.size(0), -1), found.get(1), found.get(2), found.get(3));
    }

    @Override
    public Heads backward(Tensor byResult, Heads heads, Attended attended) {
        long[] shape = heads.query().shape();
        List<Tensor> found = BACKWARD.call(byResult.reshape(shape), heads.query(), heads.key(), heads.value(),
                attended.result().reshape(shape), attended.kept()[0], bounds, bounds, longest, longest, 0.0, true, attended.kept()[1],
                attended.kept()[2], scale, null, null);
        return new Heads(found.get(0).contiguous(), found.get(1).contiguous(), found.get(2).contiguous());
    }
}
