package dev.tandem.training;

import dev.tandem.device.DType;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import java.util.ArrayList;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * The log-prob head by libtorch's operations.
 *
 * <p>Rows go through in chunks. The loss needs all log-probabilities before it can say a gradient, so the backward pass computes the
 * logits of a chunk again, unless all rows fit into one chunk: then they are kept. With z the logits divided by the temperature and
 * p their softmax, {@code d logprob/dz = onehot - p} and {@code d entropy/dz = -p (log p + entropy)}.
 */
final class TensorLogprobHead implements LogprobHead {
    private final Tensor matrix;
    private final double temperature;
    private final Tensor hidden;
    private final Tensor targets;
    private final int chunk;
    private @Nullable Tensor keptLogits;
    private @Nullable Tensor logSumExp;
    private @Nullable Tensor entropy;

    /**
     * @param matrix [V, E]
     * @param temperature by which logits are divided
     * @param hidden [N, E], rows that predict the targets
     * @param targets INT64 [N]
     * @param logitBytes the largest chunk of FLOAT32 logits
     */
    TensorLogprobHead(Tensor matrix, double temperature, Tensor hidden, Tensor targets, long logitBytes) {
        this.matrix = matrix;
        this.temperature = temperature;
        this.hidden = hidden;
        this.targets = targets;
        chunk = (int) Math.clamp(logitBytes / (4 * matrix.size(0)), 1, Math.max(1, hidden.size(0)));
    }

    @Override
    public Tensor forward(Tensor entropy) {
        int n = (int) hidden.size(0);
        Tensor logprob = Tensor.empty(hidden.device(), DType.FLOAT32, n);
        Tensor sums = Tensor.empty(hidden.device(), DType.FLOAT32, n);
        for (int start = 0; start < n; start += chunk) {
            int rows = Math.min(chunk, n - start);
            try (Scope scope = Scope.open()) {
                Tensor z = logits(start, rows);
                Tensor lse = z.logSumExp(-1);
                Tensor chosen = z.gather(1, targets.narrow(0, start, rows).unsqueeze(1)).select(1, 0);
                logprob.narrow(0, start, rows).copyInPlace(chosen.sub(lse));
                sums.narrow(0, start, rows).copyInPlace(lse);
                Tensor p = z.sub(lse.unsqueeze(1)).expInPlace();
                Tensor mean = p.unsqueeze(1).matmul(z.unsqueeze(2)).reshape(rows);
                entropy.narrow(0, start, rows).copyInPlace(lse.sub(mean));
                if (rows == n) {
                    keptLogits = scope.escape(z);
                }
            }
        }
        logSumExp = sums;
        this.entropy = entropy;
        return logprob;
    }

    @Override
    public Tensor backward(Tensor byLogprob, @Nullable Tensor byEntropy, Tensor byMatrix) {
        int n = (int) hidden.size(0);
        if (logSumExp == null || entropy == null) {
            throw new IllegalStateException("the forward pass has not run");
        }
        List<Tensor> byHidden = new ArrayList<>();
        for (int start = 0; start < n; start += chunk) {
            int rows = Math.min(chunk, n - start);
            try (Scope scope = Scope.open()) {
                Tensor z = keptLogits == null ? logits(start, rows) : keptLogits;
                Tensor g = byLogprob.narrow(0, start, rows).unsqueeze(1);
                Tensor gradient = z.subInPlace(logSumExp.narrow(0, start, rows).unsqueeze(1));
                if (byEntropy == null) {
                    gradient.expInPlace().mulInPlace(g.neg());
                } else {
                    Tensor h = entropy.narrow(0, start, rows).unsqueeze(1);
                    Tensor p = z.exp();
                    gradient.addInPlace(h).mulInPlace(byEntropy.narrow(0, start, rows).unsqueeze(1)).addInPlace(g)
                            .mulInPlace(p).mulInPlace(-1);
                }
                gradient.scatterAddInPlace(1, targets.narrow(0, start, rows).unsqueeze(1), g.contiguous());
                if (temperature != 1) {
                    gradient.mulInPlace(1 / temperature);
                }
                Tensor typed = gradient.to(matrix.dtype());
                byHidden.add(scope.escape(typed.matmul(matrix)));
                Tensor rowsOfHidden = hidden.narrow(0, start, rows);
                byMatrix.addMatmulInPlace(typed.transpose(0, 1), rowsOfHidden);
            }
        }
        if (keptLogits != null) {
            keptLogits.close();
            keptLogits = null;
        }
        return Tensor.concatenate(0, byHidden);
    }

    private Tensor logits(int start, int rows) {
        Tensor z = hidden.narrow(0, start, rows).linearInFloat(matrix);
        return temperature == 1 ? z : z.mulInPlace(1 / temperature);
    }
}
