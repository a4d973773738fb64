package dev.tandem.training;

import dev.tandem.device.CudnnAttention;
import dev.tandem.device.CudnnAttention.Gradient;
import dev.tandem.device.CudnnAttention.Result;
import dev.tandem.device.CudnnAttention.Sequences;
import dev.tandem.device.Tensor;
import dev.tandem.training.LayerOperations.Attended;
import dev.tandem.training.LayerOperations.Heads;

/** Attention by cuDNN. */
record CudnnTrainingAttention(CudnnAttention cudnn, Sequences sequences) implements TrainingAttention {
    @Override
    public Attended forward(Heads heads) {
        Result result = cudnn.forward(sequences, heads.query(), heads.key(), heads.value());
        return new Attended(result.output().reshape(sequences.tokens(), -1), result.logSumExp());
    }

    @Override
    public Heads backward(Tensor byResult, Heads heads, Attended attended) {
        long[] shape = heads.query().shape();
        Gradient gradient = cudnn.backward(sequences, heads.query(), heads.key(), heads.value(),
                new Result(attended.result().reshape(shape), attended.kept()[0]), byResult.reshape(shape));
        return new Heads(gradient.query(), gradient.key(), gradient.value());
    }
}
