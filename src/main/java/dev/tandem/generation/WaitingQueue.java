package dev.tandem.generation;

import static dev.tandem.generation.RequestTable.NONE;

/**
 * Samples that wait for admission, oldest arrival first: an intrusive list through the request table. A preempted sample comes
 * back at the place its arrival gives it, which is at or near the head.
 */
final class WaitingQueue {
    private final RequestTable requests;
    private int first = NONE;
    private int last = NONE;
    private int size;

    WaitingQueue(RequestTable requests) {
        this.requests = requests;
    }

    int size() {
        return size;
    }

    int first() {
        return first;
    }

    void insert(int slot) {
        long arrival = requests.arrival[slot];
        int before = NONE;
        int after = NONE;
        if (last != NONE && requests.arrival[last] < arrival) { // a new sample
            before = last;
        } else { // a preempted or no longer parked one
            after = first;
            while (after != NONE && requests.arrival[after] < arrival) {
                before = after;
                after = requests.queueNext[after];
            }
        }
        link(before, slot);
        link(slot, after);
        size++;
    }

    void remove(int slot) {
        link(requests.queuePrevious[slot], requests.queueNext[slot]);
        size--;
    }

    private void link(int before, int after) {
        if (before == NONE) {
            first = after;
        } else {
            requests.queueNext[before] = after;
        }
        if (after == NONE) {
            last = before;
        } else {
            requests.queuePrevious[after] = before;
        }
    }
}
