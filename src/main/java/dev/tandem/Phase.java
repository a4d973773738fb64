package dev.tandem;

/** What the engine's memory is set up for. */
public enum Phase {
    /** The KV cache is mapped: the engine can generate. */
    GENERATION,
    /** The KV cache is given back and the training state exists: the engine can train. */
    TRAINING,
    /** The KV cache and the transient training state are given back; {@link HybridEngine#wake} ends it. */
    ASLEEP,
    /** Everything is given back for good. */
    CLOSED
}
