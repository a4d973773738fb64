package dev.tandem.parallel;

import dev.tandem.device.Device;

/**
 * One of the engine's workers: a device and the platform thread that alone computes on it.
 *
 * @param index from 0
 * @param count how many ranks there are
 * @param device where this rank computes
 * @param collectives what the ranks do together; use it on this rank's thread only
 */
public record Rank(int index, int count, Device device, Collectives collectives) {
    @Override
    public String toString() {
        return "rank " + index + " (" + device + ")";
    }
}
