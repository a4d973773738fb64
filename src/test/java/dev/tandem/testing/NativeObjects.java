package dev.tandem.testing;

import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.device.Device;
import dev.tandem.generation.SamplingParams;
import dev.tandem.training.TrainingSequence;
import java.util.List;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.extension.AfterEachCallback;
import org.junit.jupiter.api.extension.BeforeAllCallback;
import org.junit.jupiter.api.extension.BeforeEachCallback;
import org.junit.jupiter.api.extension.ExtensionContext;

/** Fails a test after which more native objects exist than before it. */
public final class NativeObjects implements BeforeAllCallback, BeforeEachCallback, AfterEachCallback {
    private long before;

    /** Objects that live as long as their classes are made here: both sides run once, on one rank and on two. */
    @Override
    public void beforeAll(ExtensionContext context) {
        EngineOptions options = EngineOptions.defaults().kvBytes(1 << 20);
        for (EngineOptions each : List.of(options, options.devices(Device.cpu(0), Device.cpu(1)))) {
            try (HybridEngine engine = HybridEngine.create(TinyModels.llama(), null, each)) {
                engine.train(List.of(TrainingSequence.of(new int[] {1, 2, 3}, 1, 1)));
                engine.generateTokens(List.of(new int[] {1, 2, 3}), SamplingParams.defaults().n(2).maxTokens(3));
            }
        }
    }

    @Override
    public void beforeEach(ExtensionContext context) {
        before = Pointer.totalCount();
    }

    @Override
    public void afterEach(ExtensionContext context) {
        if (context.getExecutionException().isEmpty()) {
            check(before);
        }
    }

    /** Fewer are no leak: what JavaCPP makes once and drops goes with a garbage collection. */
    public static void check(long before) {
        long now = Pointer.totalCount();
        assertTrue(now <= before, () -> before + " native objects have become " + now);
    }
}
