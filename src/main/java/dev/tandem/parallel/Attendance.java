package dev.tandem.parallel;

import java.util.concurrent.atomic.AtomicReferenceArray;

/**
 * Who has come to which collective. Gloo only says that somebody timed out; since all ranks are threads of one process, they can
 * write down where they are, and the one who waits in vain can say who is missing and at what.
 */
final class Attendance {
    /**
     * Where a rank was last seen.
     *
     * @param count of collectives entered
     * @param operation the latest of them
     */
    private record Seen(long count, String operation) {}

    private final AtomicReferenceArray<Seen> seen;

    Attendance(int ranks) {
        seen = new AtomicReferenceArray<>(ranks);
        for (int i = 0; i < ranks; i++) {
            seen.set(i, new Seen(0, "nothing"));
        }
    }

    void enter(int rank, String operation) {
        seen.set(rank, new Seen(seen.get(rank).count + 1, operation));
    }

    /** The exception for a rank whose collective failed: blames the first rank that is behind or at something else. */
    RankException blame(int rank, RuntimeException failure) {
        Seen here = seen.get(rank);
        String where = here.operation + " (collective " + here.count + ")";
        for (int other = 0; other < seen.length(); other++) {
            Seen there = seen.get(other);
            if (there.count < here.count) {
                return new RankException(other, "rank " + other + " did not arrive at " + where + " where rank " + rank
                        + " waited for it; it was last at " + there.operation + " (collective " + there.count + ")", failure);
            }
            if (there.count == here.count && !there.operation.equals(here.operation)) {
                return new RankException(other, "rank " + other + " is at " + there.operation + " while rank " + rank + " is at "
                        + where + ": ranks must call the same collectives in the same order", failure);
            }
        }
        return new RankException(rank, "rank " + rank + ": " + where + " failed", failure);
    }
}
