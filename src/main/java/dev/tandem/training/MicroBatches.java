package dev.tandem.training;

import dev.tandem.parallel.Shares;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.stream.IntStream;

/**
 * Cuts a step's sequences into micro-batches of at most a number of tokens and shares them out over the ranks.
 *
 * <p>Longest first, each sequence goes to the rank with the fewest tokens so far, and there to the micro-batch with the fewest (Graham 1969:
 * longest processing time first). A rank has as few micro-batches as this rule fits them into: micro-batches of about the same size
 * keep a GPU busier than full ones and a small rest. A sequence longer than the budget is a micro-batch of its own.
 */
final class MicroBatches {
    private MicroBatches() {}

    /** {@return for each rank its micro-batches, each a list of indices of {@code sequences}; ranks may have different numbers} */
    static List<List<List<Integer>>> cut(List<TrainingSequence> sequences, int tokenBudget, int ranks) {
        Shares<Integer> shares = new Shares<>(ranks);
        List<Integer> order = IntStream.range(0, sequences.size()).boxed()
                .sorted(Comparator.comparingInt((Integer i) -> -sequences.get(i).inputTokens()))
                .toList();
        for (int i : order) {
            shares.add(i, sequences.get(i).inputTokens());
        }
        return shares.lists().stream().map(share -> pack(sequences, share, tokenBudget)).toList();
    }

    private static List<List<Integer>> pack(List<TrainingSequence> sequences, List<Integer> share, int tokenBudget) {
        List<List<Integer>> batches = new ArrayList<>();
        List<Integer> rest = new ArrayList<>();
        long tokens = 0;
        for (int i : share) {
            int length = sequences.get(i).inputTokens();
            if (length > tokenBudget) {
                batches.add(List.of(i));
            } else {
                rest.add(i);
                tokens += length;
            }
        }
        for (int count = Math.toIntExact(Math.ceilDiv(tokens, tokenBudget)); !rest.isEmpty(); count++) {
            Shares<Integer> even = new Shares<>(count);
            for (int i : rest) {
                even.add(i, sequences.get(i).inputTokens());
            }
            if (even.most() <= tokenBudget) {
                batches.addAll(even.lists());
                break;
            }
        }
        return batches;
    }
}
