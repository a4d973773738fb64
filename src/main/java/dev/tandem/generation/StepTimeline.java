package dev.tandem.generation;

import dev.tandem.device.CudaEvent;
import dev.tandem.device.Device;
import java.util.Arrays;

/**
 * Where a device's time goes in steps: an event after each part of a step, and what lies between two events is added up when the step
 * has ended. Confined to its rank's thread. The owner closes it.
 */
final class StepTimeline implements AutoCloseable {
    /** The parts of a step, in their order on the device's stream. */
    enum Part {
        /** From the end of the step before until the device is given this one. */
        IDLE,
        /** The copy of the step's input, and of KV pages that samples share no longer. */
        INPUT,
        /** Embedding, layers, logits: a graph where the step only decodes. */
        FORWARD,
        SAMPLING,
        /** The copy of sampled tokens and log-probs to the host. */
        READ_BACK
    }

    private static final int PARTS = Part.values().length;

    /** The events of steps that run and of the one before them. */
    private final CudaEvent[][] events;

    private final double[] seconds = new double[PARTS];
    private int begun;
    private int ended;

    /** @param depth how many steps run at a time */
    StepTimeline(Device device, int depth) {
        events = new CudaEvent[depth + 1][PARTS];
        for (CudaEvent[] step : events) {
            Arrays.setAll(step, part -> new CudaEvent(device, true));
        }
    }

    /** Marks the end of a part of the step that is being launched; {@link Part#READ_BACK} is its last. */
    void ends(Part part) {
        events[begun % events.length][part.ordinal()].record();
        begun += part == Part.READ_BACK ? 1 : 0;
    }

    /** Adds up the oldest step that was launched; it has run. */
    void stepEnded() {
        CudaEvent[] step = events[ended % events.length];
        if (ended > 0) {
            CudaEvent before = events[(ended - 1) % events.length][PARTS - 1];
            for (int part = 0; part < PARTS; part++) {
                seconds[part] += step[part].millisecondsSince(before) / 1e3;
                before = step[part];
            }
        }
        ended++;
    }

    /** Forgets steps that were launched and will not be asked for. */
    void abandon() {
        begun = 0;
        ended = 0;
    }

    /** {@return seconds of each part so far, in the order of {@link Part}; the first step counts for nothing} */
    double[] seconds() {
        return seconds.clone();
    }

    @Override
    public void close() {
        for (CudaEvent[] step : events) {
            for (CudaEvent event : step) {
                event.close();
            }
        }
    }
}
