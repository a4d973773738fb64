package dev.tandem.rl;

import dev.tandem.generation.Completion;

/**
 * Scores a completion. Usually a lambda. It is called on virtual threads, many at a time, while other completions are still being
 * generated, and must not call the engine.
 */
@FunctionalInterface
public interface Reward {
    /**
     * {@return a finite score, higher is better} Exceptions end the step with a {@link RewardException}; the engine stays usable.
     */
    double score(Completion completion);
}
