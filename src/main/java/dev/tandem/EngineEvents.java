package dev.tandem;

import dev.tandem.device.Timeline;
import java.util.stream.Collectors;
import jdk.jfr.Category;
import jdk.jfr.DataAmount;
import jdk.jfr.Event;
import jdk.jfr.Label;
import jdk.jfr.Name;
import jdk.jfr.StackTrace;

/** What the engine tells Java Flight Recorder. */
final class EngineEvents {
    private EngineEvents() {}

    /** The engine went from one phase to another. */
    @Name("dev.tandem.PhaseChange")
    @Label("Phase Change")
    @Category("Tandem")
    @StackTrace(false)
    static final class PhaseChange extends Event {
        @Label("From")
        String from = "";

        @Label("To")
        String to = "";

        @Label("Bytes held afterwards on rank 0")
        @DataAmount
        long held;
    }

    /** A batch of prompts was generated. */
    @Name("dev.tandem.Rollout")
    @Label("Rollout")
    @Category("Tandem")
    @StackTrace(false)
    static final class Rollout extends Event {
        @Label("Prompts")
        int prompts;

        @Label("Completions")
        int completions;

        @Label("Generated Tokens")
        long tokens;

        @Label("Weight Version")
        long weightVersion;
    }

    /** One optimizer step. */
    @Name("dev.tandem.TrainStep")
    @Label("Train Step")
    @Category("Tandem")
    @StackTrace(false)
    static final class Step extends Event {
        @Label("Step")
        long step;

        @Label("Loss")
        double loss;

        @Label("Gradient Norm")
        double gradientNorm;

        @Label("Tokens")
        long tokens;

        @Label("Skipped")
        boolean skipped;
    }

    /** The model was written to a folder. */
    @Name("dev.tandem.Checkpoint")
    @Label("Checkpoint")
    @Category("Tandem")
    @StackTrace(false)
    static final class Checkpoint extends Event {
        @Label("Folder")
        String folder = "";
    }

    /** A time in which the device had nothing to compute, found when a timeline was read. */
    @Name("dev.tandem.IdleGap")
    @Label("Idle Gap")
    @Category("Tandem")
    @StackTrace(false)
    static final class IdleGap extends Event {
        @Label("Milliseconds")
        double milliseconds;

        @Label("Milliseconds Since The Recording Began")
        double start;

        @Label("After")
        String after = "";

        @Label("Before")
        String before = "";

        @Label("Host")
        String host = "";

        static void commit(Timeline.Gap gap) {
            var event = new IdleGap();
            event.milliseconds = gap.milliseconds();
            event.start = gap.start();
            event.after = gap.after();
            event.before = gap.before();
            event.host = gap.host().stream().map(Timeline.Interval::name).distinct().collect(Collectors.joining(", "));
            event.commit();
        }
    }
}
