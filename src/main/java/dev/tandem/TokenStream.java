package dev.tandem;

import dev.tandem.generation.Generator;
import dev.tandem.generation.Prompt;
import dev.tandem.parallel.Ranks;
import java.util.ArrayDeque;
import java.util.Queue;
import java.util.Spliterator;
import java.util.Spliterators;
import java.util.function.Consumer;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;

/** Pulls one sample out of rank 0's generator, as many steps at a time as the next token needs. */
final class TokenStream extends Spliterators.AbstractSpliterator<Token> {
    private final Ranks ranks;
    private final Generator generator;
    private final Occupancy.Hold hold;
    private final Queue<Token> ready = new ArrayDeque<>();
    private boolean ended;

    TokenStream(Ranks ranks, Generator generator, Prompt prompt, Occupancy.Hold hold) {
        super(Long.MAX_VALUE, Spliterator.ORDERED | Spliterator.NONNULL);
        this.ranks = ranks;
        this.generator = generator;
        this.hold = hold;
        onRank(() -> generator.submit(prompt, (id, logprob, text) -> ready.add(new Token(id, logprob, text))));
    }

    Stream<Token> stream() {
        return StreamSupport.stream(this, false).onClose(this::end);
    }

    @Override
    public boolean tryAdvance(Consumer<? super Token> action) {
        while (ready.isEmpty() && !ended) {
            try {
                onRank(() -> {
                    while (ready.isEmpty() && generator.hasWork()) {
                        generator.step(completion -> {});
                    }
                });
            } catch (RuntimeException | Error e) {
                end();
                throw e;
            }
            if (ready.isEmpty()) {
                end();
            }
        }
        Token next = ready.poll();
        if (next == null) {
            return false;
        }
        action.accept(next);
        return true;
    }

    private void end() {
        if (!ended) {
            ended = true;
            try {
                onRank(generator::reset);
            } finally {
                hold.close();
            }
        }
    }

    private void onRank(Runnable action) {
        ranks.onEach(rank -> {
            if (rank.index() == 0) {
                action.run();
            }
            return true;
        });
    }
}
