package dev.tandem;

import dev.tandem.device.Timeline;
import dev.tandem.device.TimelineRecorder;
import dev.tandem.device.TimelineRecorder.Span;
import dev.tandem.parallel.Ranks;
import java.util.Optional;
import java.util.function.Supplier;
import org.jspecify.annotations.Nullable;

/** The recording of what an engine's first rank and its host do, while there is one. Activities may come from any thread. */
final class EngineTimeline {
    private static final double LEAST_GAP = 5;

    private final Ranks ranks;
    private final ModelRank first;
    private volatile @Nullable TimelineRecorder recorder;

    EngineTimeline(Ranks ranks, ModelRank first) {
        this.ranks = ranks;
        this.first = first;
    }

    /** Begins anew. */
    void begin() {
        onFirstRank(() -> {
            record(null);
            record(new TimelineRecorder(first.rank().device()));
            return true;
        });
    }

    /**
     * Ends the recording.
     *
     * @throws IllegalStateException when there is none
     */
    Timeline end() {
        TimelineRecorder current = recorder;
        if (current == null) {
            throw new IllegalStateException("no timeline is recorded: call recordTimeline() before");
        }
        Timeline timeline = onFirstRank(() -> {
            Timeline found = current.finish();
            record(null);
            return found;
        });
        timeline.gaps(LEAST_GAP).forEach(EngineEvents.IdleGap::commit);
        return timeline;
    }

    /** Ends the recording if there is one; nobody wants it. */
    void forget() {
        if (recorder != null) {
            onFirstRank(() -> {
                record(null);
                return true;
            });
        }
    }

    Span activity(String name) {
        TimelineRecorder current = recorder;
        return current == null ? Span.NONE : current.host(name);
    }

    private void record(@Nullable TimelineRecorder into) {
        TimelineRecorder before = recorder;
        recorder = into;
        first.generator().record(into);
        first.trainer().record(into);
        if (before != null) {
            before.close();
        }
    }

    private <T> T onFirstRank(Supplier<T> action) {
        return ranks.onEach(rank -> rank.index() == 0 ? Optional.of(action.get()) : Optional.<T>empty()).getFirst().orElseThrow();
    }
}
