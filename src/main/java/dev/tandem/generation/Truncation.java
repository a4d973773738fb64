package dev.tandem.generation;

import java.util.Arrays;

/**
 * The tokens that min-p, top-k and top-p (nucleus sampling, Holtzman et al. 2019) keep, found without sorting the vocabulary.
 *
 * <p>Tokens are ordered by logit, then by token id (the lower first), which is a strict order: each filter keeps a prefix of it,
 * and the result is exactly that of a full sort. Min-p keeps what is at least {@code minP} times as likely as the likeliest;
 * top-k the first k of what is left; top-p the shortest prefix of what is left then that holds at least {@code topP} of its
 * probability.
 *
 * <p>A prefix is given by its last element. To find it, one pass puts the row into a histogram over the distance from the
 * maximum, by count for top-k, by probability for top-p; the cut lies in one bucket, whose few members are then searched by
 * quickselect. The search works on keys that hold a float's bits in sortable form above the inverted token id.
 *
 * <p>Holds scratch memory for one row; not thread-safe.
 */
final class Truncation {
    private static final int BUCKETS = 2048;
    /** Logits within 32 of the maximum are told apart in steps of 1/64; the last bucket holds the rest. */
    private static final float BUCKETS_PER_LOGIT = 64;

    private static final int CHUNK = 512;

    /** The kept tokens in ascending order, and their unnormalised probabilities; the first {@link #count} entries. */
    final int[] ids;
    final double[] weights;
    int count;

    private final long[] keys;
    private final double[] masses = new double[BUCKETS];
    private final double[] chunk = new double[CHUNK];

    Truncation(int vocabularySize) {
        ids = new int[vocabularySize];
        weights = new double[vocabularySize];
        keys = new long[vocabularySize];
    }

    /**
     * Fills {@link #ids}, {@link #weights} and {@link #count}.
     *
     * @param row logits; its length is the vocabulary size
     * @param max the largest of them, finite
     * @param inverseTemperature multiplies logits before they become probabilities
     */
    void apply(float[] row, float max, double inverseTemperature, SamplingParams params) {
        double floor = params.minP() > 0 ? Math.log(params.minP()) : -Double.MAX_VALUE;
        boolean topK = params.topK() > 0 && params.topK() < row.length;
        long last = Long.MIN_VALUE;
        if (topK) {
            countBuckets(row, max, inverseTemperature, floor);
            last = cutInBucket(row, max, inverseTemperature, floor, params.topK(), true);
        } else if (params.topP() < 1) {
            double total = weighBuckets(row, max, inverseTemperature, floor);
            last = cutInBucket(row, max, inverseTemperature, floor, params.topP() * total, false);
        }
        gather(row, max, inverseTemperature, floor, last);
        if (topK && params.topP() < 1) {
            keepMass(row, max, inverseTemperature, params.topP());
        }
    }

    private void countBuckets(float[] row, float max, double inverseTemperature, double floor) {
        Arrays.fill(masses, 0);
        for (float x : row) {
            if (((double) x - max) * inverseTemperature >= floor) {
                masses[bucket(x, max)]++;
            }
        }
    }

    private double weighBuckets(float[] row, float max, double inverseTemperature, double floor) {
        Arrays.fill(masses, 0);
        for (int from = 0; from < row.length; from += CHUNK) {
            int size = Math.min(CHUNK, row.length - from);
            Exponential.weights(row, from, size, max, inverseTemperature, chunk);
            for (int i = 0; i < size; i++) {
                float x = row[from + i];
                if (((double) x - max) * inverseTemperature >= floor) {
                    masses[bucket(x, max)] += chunk[i];
                }
            }
        }
        return Exponential.sum(masses, BUCKETS);
    }

    /** The key at which the running sum in descending order reaches {@code target}; the lowest key if it never does. */
    private long cutInBucket(float[] row, float max, double inverseTemperature, double floor, double target, boolean counting) {
        int limiting = 0;
        double before = 0;
        while (limiting < BUCKETS && before + masses[limiting] < target) {
            before += masses[limiting++];
        }
        if (limiting == BUCKETS) {
            return Long.MIN_VALUE;
        }
        int size = 0;
        for (int i = 0; i < row.length; i++) {
            double scaled = ((double) row[i] - max) * inverseTemperature;
            if (bucket(row[i], max) == limiting && scaled >= floor) {
                keys[size] = key(row[i], i);
                weights[size++] = counting ? 1 : Exponential.exp(scaled);
            }
        }
        return cut(size, target - before);
    }

    private void gather(float[] row, float max, double inverseTemperature, double floor, long last) {
        count = 0;
        for (int i = 0; i < row.length; i++) {
            double scaled = ((double) row[i] - max) * inverseTemperature;
            if (key(row[i], i) >= last && scaled >= floor) {
                ids[count] = i;
                weights[count++] = scaled;
            }
        }
        for (int i = 0; i < count; i++) {
            weights[i] = Exponential.exp(weights[i]);
        }
    }

    private void keepMass(float[] row, float max, double inverseTemperature, double topP) {
        double target = topP * Exponential.sum(weights, count);
        for (int i = 0; i < count; i++) {
            keys[i] = key(row[ids[i]], ids[i]);
        }
        long last = cut(count, target);
        int candidates = count;
        count = 0;
        for (int i = 0; i < candidates; i++) {
            int id = ids[i];
            if (key(row[id], id) >= last) {
                ids[count] = id;
                weights[count++] = Exponential.exp(((double) row[id] - max) * inverseTemperature);
            }
        }
    }

    /**
     * Weighted quickselect over the first {@code size} keys and weights, which are reordered: the key at which the running sum of
     * weights in descending order of keys reaches {@code target}, or the lowest key if rounding keeps it from reaching it.
     */
    private long cut(int size, double target) {
        int low = 0;
        int high = size - 1;
        while (low < high) {
            swap(pivot(low, high), high);
            long pivot = keys[high];
            int boundary = low;
            double above = 0;
            for (int i = low; i < high; i++) {
                if (keys[i] > pivot) {
                    above += weights[i];
                    swap(i, boundary++);
                }
            }
            swap(boundary, high);
            if (boundary > low && target <= above) {
                high = boundary - 1;
            } else if (boundary == high || target <= above + weights[boundary]) {
                return pivot;
            } else {
                target -= above + weights[boundary];
                low = boundary + 1;
            }
        }
        return keys[low];
    }

    /** The median of three, so that an ordered row is no worse than any other. */
    private int pivot(int low, int high) {
        int middle = (low + high) >>> 1;
        long a = keys[low];
        long b = keys[middle];
        long c = keys[high];
        if (a < b) {
            return b < c ? middle : a < c ? high : low;
        }
        return a < c ? low : b < c ? high : middle;
    }

    private void swap(int i, int j) {
        long key = keys[i];
        keys[i] = keys[j];
        keys[j] = key;
        double weight = weights[i];
        weights[i] = weights[j];
        weights[j] = weight;
    }

    private static int bucket(float x, float max) {
        return Math.min(BUCKETS - 1, (int) ((max - x) * BUCKETS_PER_LOGIT));
    }

    /** Larger for larger logits, and among equal ones for lower token ids. Adding zero makes -0 equal to 0. */
    private static long key(float x, int id) {
        int bits = Float.floatToRawIntBits(x + 0f);
        int sortable = bits ^ ((bits >> 31) & 0x7FFFFFFF);
        return (long) sortable << 32 | ~id & 0xFFFFFFFFL;
    }
}
