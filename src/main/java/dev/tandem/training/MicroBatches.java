package dev.tandem.training;

import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.stream.IntStream;

/**
 * Cuts a step's sequences into micro-batches of at most a number of tokens and shares them out over the ranks.
 *
 * <p>Longest first, each sequence goes to the rank with the fewest tokens so far; a rank packs its sequences, longest first, into
 * the first micro-batch with room (first-fit decreasing). A sequence longer than the budget is a micro-batch of its own.
 */
final class MicroBatches {
    private MicroBatches() {}

    /** {@return for each rank its micro-batches, each a list of indices of {@code sequences}; ranks may have different numbers} */
    static List<List<List<Integer>>> cut(List<TrainingSequence> sequences, int tokenBudget, int ranks) {
        List<List<Integer>> shares = new ArrayList<>();
        long[] load = new long[ranks];
        for (int r = 0; r < ranks; r++) {
            shares.add(new ArrayList<>());
        }
        List<Integer> order = IntStream.range(0, sequences.size()).boxed()
                .sorted(Comparator.comparingInt((Integer i) -> -sequences.get(i).inputTokens()))
                .toList();
        for (int i : order) {
            int least = 0;
            for (int r = 1; r < ranks; r++) {
                least = load[r] < load[least] ? r : least;
            }
            shares.get(least).add(i);
            load[least] += sequences.get(i).inputTokens();
        }
        return shares.stream().map(share -> pack(sequences, share, tokenBudget)).toList();
    }

    private static List<List<Integer>> pack(List<TrainingSequence> sequences, List<Integer> share, int tokenBudget) {
        List<List<Integer>> batches = new ArrayList<>();
        List<Integer> room = new ArrayList<>();
        for (int i : share) {
            int tokens = sequences.get(i).inputTokens();
            int at = 0;
            while (at < batches.size() && room.get(at) < tokens) {
                at++;
            }
            if (at == batches.size()) {
                batches.add(new ArrayList<>());
                room.add(Math.max(tokenBudget, tokens));
            }
            batches.get(at).add(i);
            room.set(at, room.get(at) - tokens);
        }
        return batches;
    }
}
