package dev.tandem.parallel;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Stream;

/**
 * Shares out items one after another, each to the share with the least load so far, the first of those (Graham 1966, list scheduling). Not
 * thread-safe.
 */
public final class Shares<T> {
    private final List<List<T>> lists;
    private final long[] loads;

    /** @param count how many shares there are, at least one */
    public Shares(int count) {
        lists = Stream.<List<T>>generate(ArrayList::new).limit(count).toList();
        loads = new long[count];
    }

    /** Adds an item, which is so much work. */
    public void add(T item, long load) {
        int least = 0;
        for (int i = 1; i < loads.length; i++) {
            least = loads[i] < loads[least] ? i : least;
        }
        lists.get(least).add(item);
        loads[least] += load;
    }

    /** {@return the items of each share, in the order in which they came} */
    public List<List<T>> lists() {
        return lists;
    }

    /** {@return the greatest load of a share} */
    public long most() {
        return Arrays.stream(loads).max().orElseThrow();
    }
}
