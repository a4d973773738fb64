package dev.tandem.training;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.Cuda;
import dev.tandem.device.CudnnAttention;
import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.device.Scope;
import dev.tandem.device.Tensor;
import dev.tandem.device.Tensor.RandomStream;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.NativeObjects;
import dev.tandem.training.LayerOperations.Attended;
import dev.tandem.training.LayerOperations.Heads;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.LongStream;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** Both attentions of training and their gradients against automatic differentiation of softmax attention in float64. */
@Gpu
class CudaTrainingAttentionTest {
    private static final Device CUDA = Device.cuda(0);
    /** Of the root mean square: what rounding to BFLOAT16 leaves. */
    private static final double TOLERANCE = 1e-2;
    /** Rows of NaN after the tokens. */
    private static final long BEYOND = 64;

    /** The second and the third have a bucket in common, and so have the last two. */
    private static final long[][] LENGTHS = {{1}, {1, 17, 128, 1000, 2049}, {2500, 3, 1, 700, 64, 1, 1}, {17, 128}, {200, 1, 1, 55}};

    @BeforeEach
    void use() {
        Cuda.use(CUDA);
    }

    private static double scale(long headDim) {
        return 1 / Math.sqrt(headDim);
    }

    /** Inputs of both passes, each followed by NaN that must not matter, and what float64 makes of them. */
    private static final class Case {
        final String name;
        final long[] lengths;
        final long tokens;
        final Heads heads;
        final Tensor byResult;
        final List<Tensor> expected;

        Case(long heads, long kvHeads, long dim, RandomStream random, long... lengths) {
            name = heads + " and " + kvHeads + " heads of " + dim + ", " + Arrays.toString(lengths);
            this.lengths = lengths;
            tokens = LongStream.of(lengths).sum();
            this.heads = new Heads(normal(heads, dim, random), normal(kvHeads, dim, random), normal(kvHeads, dim, random));
            byResult = normal(heads, dim, random).reshape(tokens, heads * dim);
            expected = expected();
        }

        private Tensor normal(long count, long dim, RandomStream random) {
            Tensor all = Tensor.full(CUDA, DType.BFLOAT16, Double.NaN, tokens + BEYOND, count, dim);
            Tensor used = all.narrow(0, 0, tokens);
            return used.copyInPlace(Tensor.empty(CUDA, DType.FLOAT32, tokens, count, dim).normalInPlace(0, 1, random));
        }

        /** The result and the gradients of queries, keys, values. */
        private List<Tensor> expected() {
            List<List<Tensor>> parts = List.of(new ArrayList<>(), new ArrayList<>(), new ArrayList<>(), new ArrayList<>());
            long start = 0;
            for (long length : lengths) {
                try (Scope scope = Scope.open()) {
                    List<Tensor> inputs = new ArrayList<>();
                    for (Tensor of : List.of(heads.query(), heads.key(), heads.value())) {
                        inputs.add(of.narrow(0, start, length).to(DType.FLOAT64).requireGradient());
                    }
                    Tensor result = attention(inputs.get(0), inputs.get(1), inputs.get(2));
                    result.backward(byResult.narrow(0, start, length).to(DType.FLOAT64));
                    parts.get(0).add(scope.escape(result.detach()));
                    for (int i = 0; i < 3; i++) {
                        parts.get(i + 1).add(scope.escape(inputs.get(i).gradient()));
                    }
                }
                start += length;
            }
            return parts.stream().map(each -> Tensor.concatenate(0, each)).toList();
        }

        private static Tensor attention(Tensor query, Tensor key, Tensor value) {
            long length = query.size(0);
            long count = query.size(1);
            Tensor position = Tensor.range(CUDA, length);
            Tensor later = position.unsqueeze(0).sub(position.unsqueeze(1)).greaterThan(0);
            Tensor scores = query.transpose(0, 1).matmul(forAll(key, count).transpose(1, 2)).mul(scale(query.size(2)));
            Tensor weights = later.choose(Tensor.full(CUDA, DType.FLOAT64, Double.NEGATIVE_INFINITY, 1), scores).softmax(2);
            return weights.matmul(forAll(value, count)).transpose(0, 1).reshape(length, count * query.size(2));
        }

        /** [T, K, D] → [H, T, D]. */
        private static Tensor forAll(Tensor x, long count) {
            long group = count / x.size(1);
            return x.unsqueeze(2).expand(x.size(0), x.size(1), group, x.size(2)).reshape(x.size(0), count, x.size(2)).transpose(0, 1);
        }

        void check(String what, TrainingAttention attention) {
            try (Scope scope = Scope.open()) {
                poisonCache();
                Attended attended = attention.forward(heads);
                Heads gradients = attention.backward(byResult, heads, attended);
                StringBuilder line = new StringBuilder(what + ", " + name + ":");
                double worst = Math.max(difference(line, "result", attended.result(), expected.get(0)),
                        Math.max(difference(line, "queries", gradients.query(), expected.get(1)),
                                Math.max(difference(line, "keys", gradients.key(), expected.get(2)),
                                        difference(line, "values", gradients.value(), expected.get(3)))));
                System.out.println(line);
                assertTrue(worst <= TOLERANCE, line.toString());
            }
        }

        /** Whatever of some size is allocated after this is NaN. */
        private static void poisonCache() {
            Cuda.releaseCached(CUDA);
            Tensor.full(CUDA, DType.FLOAT32, Double.NaN, 1L << 28).close();
        }

        /** {@return the difference's root mean square in units of the expected one, NaN if anything is} */
        private double difference(StringBuilder line, String of, Tensor got, Tensor expected) {
            Tensor exact = got.to(DType.FLOAT64);
            double numbers = exact.equalTo(exact).to(DType.INT64).sum().item();
            assertEquals(got.elements(), numbers, () -> line + " " + of + ": some are NaN");
            Tensor difference = exact.sub(expected);
            // A lone token's gradients of queries and keys are 0.
            double unit = Math.max(expected.square().mean().item(), 1e-6);
            double relative = Math.sqrt(difference.square().mean().item() / unit);
            line.append(String.format(" %s %.1e, at most %.1e of %.3g;", of, relative, difference.abs().max().item(),
                    expected.abs().max().item()));
            return relative;
        }
    }

    private static Tensor starts(long... lengths) {
        return Tensor.of(CUDA, CudnnAttention.starts(lengths));
    }

    @ParameterizedTest(name = "{0} and {1} heads of {2}")
    @CsvSource({"16, 8, 128", "14, 2, 64", "12, 12, 64", "32, 8, 128"})
    void bothAgreeWithFloat64(int heads, int kvHeads, int headDim) {
        try (CudnnAttention cudnn = new CudnnAttention(CUDA, heads, kvHeads, headDim, scale(headDim));
                RandomStream random = new RandomStream(7)) {
            for (long[] lengths : LENGTHS) {
                try (Scope scope = Scope.open()) {
                    Case inputs = new Case(heads, kvHeads, headDim, random, lengths);
                    inputs.check("FlashAttention-2", new FlashTrainingAttention(scale(headDim), starts(lengths), lengths));
                    inputs.check("cuDNN " + cudnn.version(), new CudnnTrainingAttention(cudnn, cudnn.sequences(starts(lengths), lengths)));
                }
            }
            Cuda.synchronize(CUDA);
        }
    }

    @Test
    void logSumExpIsOfScaledScores() {
        try (CudnnAttention cudnn = new CudnnAttention(CUDA, 4, 2, 64, scale(64));
                RandomStream random = new RandomStream(3);
                Scope scope = Scope.open()) {
            Heads heads = new Case(4, 2, 64, random, 300).heads;
            Tensor found = cudnn.forward(cudnn.sequences(starts(300), 300), heads.query(), heads.key(), heads.value()).logSumExp();
            Tensor last = heads.query().select(0, 299).narrow(0, 3, 1).to(DType.FLOAT64);
            Tensor scores = last.matmul(heads.key().select(1, 1).to(DType.FLOAT64).transpose(0, 1)).mul(scale(64));
            assertEquals(scores.logSumExp(1).item(), found.select(0, 299).narrow(0, 3, 1).item(), 1e-3);
            assertThrows(IllegalArgumentException.class,
                    () -> cudnn.forward(cudnn.sequences(starts(299), 299), heads.query(), heads.key(), heads.value()));
        }
    }

    @Test
    void theChoiceServesEveryMicroBatchAndLeavesNothing() {
        ModelConfig config = ModelConfig.llama(1000, 14 * 64, 1, 14, 2, 64, 4000);
        long before = 0;
        for (int i = 0; i < 3; i++) {
            try (AttentionChoice choice = new AttentionChoice(config, CUDA); RandomStream random = new RandomStream(5);
                    Scope scope = Scope.open()) {
                Case inputs = new Case(14, 2, 64, random, 90, 1, 300);
                inputs.check("the chosen one", choice.over(starts(inputs.lengths), inputs.lengths));
                long tooMany = Integer.MAX_VALUE / (14 * 64) + 1;
                assertInstanceOf(FlashTrainingAttention.class, choice.over(starts(tooMany), tooMany));
                Cuda.synchronize(CUDA);
            }
            if (i > 0) {
                NativeObjects.check(before);
            }
            before = Pointer.totalCount();
        }
    }
}
