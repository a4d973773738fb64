package dev.tandem.device;

import dev.tandem.device.CudnnAttention.Bucket;
import dev.tandem.device.CudnnAttention.Gradient;
import dev.tandem.device.CudnnAttention.Result;
import dev.tandem.device.CudnnAttention.Sequences;
import dev.tandem.device.CudnnAttention.Shape;
import dev.tandem.device.CudnnGraph.Operand;
import dev.tandem.device.CudnnGraph.Pointwise;
import dev.tandem.device.CudnnGraph.Reduction;
import org.jspecify.annotations.Nullable;

/**
 * The operations of attention in the order in which cuDNN's engines recognize them as attention.
 *
 * <p>cuDNN sees a tensor of tokens [T, heads, D] as [batch, heads, longest, D] with an offset for each sequence, and scores as
 * [batch, heads, longest, longest]. Rows and columns past a sequence's length are neither read nor written.
 */
abstract sealed class CudnnAttentionGraph implements AutoCloseable {
    final CudnnGraph graph;
    final Shape shape;
    private final Bucket bucket;
    private final Operand queryLengths;
    private final Operand keyLengths;
    private final Operand queryOffsets;
    private final Operand keyOffsets;
    private final Operand statisticsOffsets;
    private final Operand scale;
    private final Operand nothing;

    private CudnnAttentionGraph(CudnnGraph graph, Shape shape, Bucket bucket) {
        this.graph = graph;
        this.shape = shape;
        this.bucket = bucket;
        queryLengths = column("lengths of queries", DType.INT32, bucket.batch());
        keyLengths = column("lengths of keys", DType.INT32, bucket.batch());
        queryOffsets = column("offsets of queries", DType.INT64, bucket.batch() + 1);
        // One tensor where both kinds of rows have one width.
        keyOffsets = shape.grouped() ? column("offsets of keys", DType.INT64, bucket.batch() + 1) : queryOffsets;
        statisticsOffsets = column("offsets of log-sum-exp", DType.INT64, bucket.batch() + 1);
        scale = graph.constant("scale", (float) shape.scale());
        nothing = graph.constant("-inf", Float.NEGATIVE_INFINITY);
    }

    // ---- running --------------------------------------------------------------------------------------------------------

    void bind(Sequences sequences) {
        graph.bind(queryLengths, sequences.lengths());
        graph.bind(keyLengths, sequences.lengths());
        graph.bind(queryOffsets, sequences.queryOffsets());
        graph.bind(keyOffsets, sequences.keyOffsets());
        graph.bind(statisticsOffsets, sequences.statisticsOffsets());
    }

    void bind(Operand operand, Tensor tensor) {
        graph.bind(operand, tensor.address());
    }

    void execute(Sequences sequences) {
        try (Scope scope = Scope.open()) {
            graph.execute(sequences.empty(DType.FLOAT32, Math.ceilDiv(graph.workspaceBytes(), Float.BYTES)).address());
        }
    }

    @Override
    public void close() {
        graph.close();
    }

    // ---- layouts --------------------------------------------------------------------------------------------------------

    private Operand column(String of, DType type, int size) {
        return graph.tensor(of, type, new long[] {size, 1, 1, 1}, new long[] {1, 1, 1, 1}, null);
    }

    private static long[] sizes(long... sizes) {
        return sizes;
    }

    /** [T, H, D]. */
    Operand queries(String of, DType type) {
        return packed(of, type, shape.heads(), queryOffsets);
    }

    /** [T, K, D]. */
    Operand keys(String of) {
        return packed(of, DType.BFLOAT16, shape.kvHeads(), keyOffsets);
    }

    /** [T, K, D], whose matrices are transposed. */
    Operand keysTransposed(String of) {
        return graph.tensor(of, DType.BFLOAT16, CudnnGraph.exchanged(rows(shape.kvHeads(), shape.headDim())),
                CudnnGraph.exchanged(rowStrides(shape.kvHeads())), keyOffsets);
    }

    /** [T, K x group, D]: what is still to be summed over the query heads of each KV head. */
    Operand keysOfAllHeads(String of) {
        // cuDNN multiplies the offsets by the group.
        return packed(of, DType.BFLOAT16, shape.heads(), keyOffsets);
    }

    private Operand packed(String of, DType type, int heads, Operand offsets) {
        return graph.tensor(of, type, rows(heads, shape.headDim()), rowStrides(heads), offsets);
    }

    /** [T, H] in memory. */
    Operand statistics(String of) {
        int heads = shape.heads();
        return graph.tensor(of, DType.FLOAT32, rows(heads, 1), sizes((long) heads * bucket.longest(), 1, heads, 1), statisticsOffsets);
    }

    /** A number for each row of scores, not in memory. */
    Operand perRow(String of) {
        long longest = bucket.longest();
        return graph.intermediate(of, DType.FLOAT32, rows(shape.heads(), 1), sizes(shape.heads() * longest, longest, 1, 1));
    }

    long[] rows(int heads, int width) {
        return sizes(bucket.batch(), heads, bucket.longest(), width);
    }

    private long[] rowStrides(int heads) {
        long width = (long) heads * shape.headDim();
        return sizes(bucket.longest() * width, shape.headDim(), width, 1);
    }

    // ---- operations that both passes have -------------------------------------------------------------------------------

    /** The product of queries (or their gradients) and transposed keys (or values). */
    Operand scores(String of, Operand queries, Operand transposed) {
        long longest = bucket.longest();
        Operand scores = graph.intermediate(of, DType.FLOAT32, sizes(bucket.batch(), shape.heads(), longest, longest),
                sizes(shape.heads() * longest * longest, longest * longest, longest, 1));
        return graph.matmul(of, queries, transposed, scores, queryLengths, keyLengths, null);
    }

    /** The product of scores and keys (or values). */
    Operand overKeys(String of, Operand scores, Operand keys, Operand out) {
        return graph.matmul(of, scores, keys, out, queryLengths, null, keyLengths);
    }

    /** The product of transposed scores and queries (or gradients of the output). */
    Operand overQueries(String of, Operand transposed, Operand queries, Operand out) {
        return graph.matmul(of, transposed, queries, out, keyLengths, null, queryLengths);
    }

    Operand map(String of, Pointwise mode, Operand x, Operand... others) {
        return graph.pointwise(of, mode, DType.FLOAT32, x, others);
    }

    Operand scaled(String of, Operand x) {
        return map(of, Pointwise.MUL, x, scale);
    }

    Operand maskPadding(Operand x) {
        Operand row = graph.index("row", 2, DType.INT32, x);
        Operand column = graph.index("column", 3, DType.INT32, x);
        Operand rowInside = graph.pointwise("row inside", Pointwise.CMP_LT, DType.BOOL, row, queryLengths);
        Operand columnInside = graph.pointwise("column inside", Pointwise.CMP_LT, DType.BOOL, column, keyLengths);
        Operand inside = graph.pointwise("inside", Pointwise.LOGICAL_AND, DType.BOOL, rowInside, columnInside);
        return map("without padding", Pointwise.BINARY_SELECT, x, nothing, inside);
    }

    Operand maskFuture(Operand x) {
        Operand row = graph.index("row of the diagonal", 2, DType.FLOAT32, x);
        Operand column = graph.index("column of the diagonal", 3, DType.FLOAT32, x);
        Operand past = graph.pointwise("past", Pointwise.CMP_GE, DType.BOOL, row, column);
        return map("without future", Pointwise.BINARY_SELECT, x, graph.constant("-inf of the future", Float.NEGATIVE_INFINITY), past);
    }

    // ---- the passes -----------------------------------------------------------------------------------------------------

    /** Softmax of scaled scores over values, and the log-sum-exp of each row. */
    static final class Forward extends CudnnAttentionGraph {
        private final Operand query;
        private final Operand key;
        private final Operand value;
        private final Operand output;
        private final Operand logSumExp;

        Forward(CudnnGraph graph, Shape shape, Bucket bucket) {
            super(graph, shape, bucket);
            query = queries("queries", DType.BFLOAT16);
            key = keysTransposed("keys");
            value = keys("values");
            output = queries("output", DType.BFLOAT16);
            logSumExp = statistics("log-sum-exp");
            Operand scores = maskFuture(maskPadding(scaled("scaled scores", scores("scores", query, key))));
            Operand largest = graph.reduce("largest score", Reduction.MAX, scores, perRow("largest score"));
            Operand powers = map("powers", Pointwise.EXP, map("differences", Pointwise.SUB, scores, largest));
            Operand sum = graph.reduce("sum of powers", Reduction.ADD, powers, perRow("sum of powers"));
            graph.pointwiseInto(logSumExp, "log-sum-exp", Pointwise.ADD, largest, map("log", Pointwise.LOG, sum));
            overKeys("output", graph.pointwise("softmax", Pointwise.DIV, DType.BFLOAT16, powers, sum), value, output);
            graph.plan();
        }

        void run(Sequences sequences, Tensor q, Tensor k, Tensor v, Result into) {
            bind(sequences);
            bind(query, q);
            bind(key, k);
            bind(value, v);
            bind(output, into.output());
            bind(logSumExp, into.logSumExp());
            execute(sequences);
        }
    }

    /**
     * With P the softmax and S the scaled scores, both computed again: dV = Pᵀ dO, dS = P (dO Vᵀ - rowsum(dO O)), dQ = scale dS K,
     * dK = scale dSᵀ Q. Blocks of keys add their shares of dQ to a sum in FLOAT32, in no fixed order.
     */
    static final class Backward extends CudnnAttentionGraph {
        private final Operand query;
        private final Operand key;
        private final Operand value;
        private final Operand output;
        private final Operand logSumExp;
        private final Operand byOutput;
        private final Operand byQuery;
        private final Operand byKey;
        private final Operand byValue;
        private final Operand delta;
        private final Operand querySum;
        private final @Nullable Operand byKeyOfAllHeads;
        private final @Nullable Operand byValueOfAllHeads;

        Backward(CudnnGraph graph, Shape shape, Bucket bucket) {
            super(graph, shape, bucket);
            query = queries("queries", DType.BFLOAT16);
            key = keysTransposed("keys");
            value = keysTransposed("values");
            output = queries("output", DType.BFLOAT16);
            byOutput = queries("gradient of output", DType.BFLOAT16);
            logSumExp = statistics("log-sum-exp");
            byQuery = queries("gradient of queries", DType.BFLOAT16);
            byKey = keys("gradient of keys");
            byValue = keys("gradient of values");
            delta = statistics("row sums");
            querySum = queries("sum of gradients of queries", DType.FLOAT32);
            byKeyOfAllHeads = shape.grouped() ? keysOfAllHeads("gradient of keys of all heads") : null;
            byValueOfAllHeads = shape.grouped() ? keysOfAllHeads("gradient of values of all heads") : null;

            long longest = bucket.longest();
            long width = (long) shape.heads() * shape.headDim();
            Operand products = graph.intermediate("output x gradient", DType.FLOAT32, rows(shape.heads(), shape.headDim()),
                    new long[] {longest * width, longest * shape.headDim(), width, 1});
            graph.pointwiseInto(products, "output x gradient", Pointwise.MUL, byOutput, output);
            Operand rowSums = graph.reduce("row sums", Reduction.ADD, products, perRow("row sums"));
            graph.pointwiseInto(delta, "row sums in memory", Pointwise.MUL, rowSums, graph.constant("one", 1));

            Operand scores = maskPadding(scaled("scaled scores", scores("scores", query, key)));
            Operand softmax = map("softmax", Pointwise.EXP, maskFuture(map("differences", Pointwise.SUB, scores, logSumExp)));
            gradient("gradient of values", graph.transpose("softmax transposed", DType.BFLOAT16, softmax), byOutput, byValueOfAllHeads,
                    byValue);
            Operand bySoftmax = map("gradient of softmax", Pointwise.SUB, scores("gradient of softmax", byOutput, value), delta);
            Operand byScores = scaled("gradient of scores", map("gradient of scaled scores", Pointwise.MUL, bySoftmax, softmax));
            gradient("gradient of keys", graph.transpose("gradient of scores transposed", DType.BFLOAT16, byScores), query,
                    byKeyOfAllHeads, byKey);
            overKeys("gradient of queries", byScores, graph.transpose("keys again", DType.BFLOAT16, key), querySum);
            graph.pointwiseInto(byQuery, "gradient of queries", Pointwise.IDENTITY, querySum);
            graph.plan();
        }

        /** Of keys or values: from each query head, and then summed over those that share a KV head. */
        private void gradient(String of, Operand transposed, Operand queries, @Nullable Operand ofAllHeads, Operand out) {
            if (ofAllHeads == null) {
                overQueries(of, transposed, queries, out);
            } else {
                graph.reduce(of + " over heads", Reduction.ADD, overQueries(of, transposed, queries, ofAllHeads), out);
            }
        }

        void run(Sequences sequences, Tensor q, Tensor k, Tensor v, Result result, Tensor gradient, Gradient into) {
            long tokens = sequences.tokens();
            long[] allHeads = {tokens, shape.heads(), shape.headDim()};
            bind(sequences);
            bind(query, q);
            bind(key, k);
            bind(value, v);
            bind(output, result.output());
            bind(logSumExp, result.logSumExp());
            bind(byOutput, gradient);
            bind(byQuery, into.query());
            bind(byKey, into.key());
            bind(byValue, into.value());
            try (Scope scope = Scope.open()) {
                bind(delta, sequences.empty(DType.FLOAT32, tokens, shape.heads()));
                bind(querySum, sequences.empty(DType.FLOAT32, allHeads));
                if (byKeyOfAllHeads != null && byValueOfAllHeads != null) {
                    bind(byKeyOfAllHeads, sequences.empty(DType.BFLOAT16, allHeads));
                    bind(byValueOfAllHeads, sequences.empty(DType.BFLOAT16, allHeads));
                }
                execute(sequences);
            }
        }
    }
}
