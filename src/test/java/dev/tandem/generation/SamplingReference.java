package dev.tandem.generation;

import java.util.Arrays;
import java.util.Comparator;
import java.util.stream.IntStream;

/** What the definitions say about a row of logits: computed in doubles, by sorting the vocabulary. */
final class SamplingReference {
    /** Log-probabilities of the row itself. */
    final double[] raw;
    /** Log-probabilities after penalty, mask and temperature. */
    final double[] scaled;
    /** Probabilities of what min-p, top-k and top-p keep; 0 of the rest. */
    final double[] kept;
    /** A filter's cut is so close to a bound that the rounding of doubles decides. */
    boolean close;

    /** @param tokens that the repetition penalty is for */
    SamplingReference(float[] row, SamplingParams params, int[] tokens, int[] masked) {
        raw = logSoftmax(IntStream.range(0, row.length).mapToDouble(i -> row[i]).toArray());
        float[] edited = row.clone();
        for (int id : Arrays.stream(tokens).distinct().toArray()) {
            float penalty = (float) params.repetitionPenalty();
            edited[id] = edited[id] > 0 ? edited[id] / penalty : edited[id] * penalty;
        }
        for (int id : masked) {
            edited[id] = Float.NEGATIVE_INFINITY;
        }
        double temperature = params.isGreedy() ? 1 : params.temperature();
        scaled = logSoftmax(IntStream.range(0, row.length).mapToDouble(i -> edited[i] / temperature).toArray());
        Integer[] order = IntStream.range(0, row.length).boxed().toArray(Integer[]::new);
        Arrays.sort(order, Comparator.<Integer>comparingDouble(i -> -(edited[i] + 0f)).thenComparingInt(i -> i));
        double top = scaled[order[0]];
        int count = 0;
        while (count < order.length && Double.isFinite(scaled[order[count]])) {
            double ratio = Math.exp(scaled[order[count]] - top);
            close |= params.minP() > 0 && Math.abs(ratio - params.minP()) < 1e-9;
            if (ratio < params.minP()) {
                break;
            }
            count++;
        }
        if (params.topK() > 0) {
            count = Math.min(count, params.topK());
        }
        double total = 0;
        for (int i = 0; i < count; i++) {
            total += Math.exp(scaled[order[i]]);
        }
        if (params.topP() < 1) {
            double sum = 0;
            int nucleus = 0;
            while (nucleus < count && sum < params.topP() * total) {
                sum += Math.exp(scaled[order[nucleus++]]);
                close |= Math.abs(sum / total - params.topP()) < 1e-9;
            }
            count = nucleus;
            total = sum;
        }
        kept = new double[row.length];
        for (int i = 0; i < count; i++) {
            kept[order[i]] = Math.exp(scaled[order[i]]) / total;
        }
    }

    static double[] logSoftmax(double[] x) {
        double max = Arrays.stream(x).max().orElseThrow();
        double sum = 0;
        for (double v : x) {
            sum += Math.exp(v - max);
        }
        double logSum = max + Math.log(sum);
        return Arrays.stream(x).map(v -> v - logSum).toArray();
    }
}
