package dev.tandem.benchmarks;

import com.google.gson.Gson;
import dev.tandem.EngineOptions;
import dev.tandem.HybridEngine;
import dev.tandem.training.TrainStep;
import dev.tandem.training.TrainingSequence;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;

/**
 * The training steps that {@code loss_curve.py} took, from the same weights on the same tokens: how far the losses lie from those of
 * transformers, and these from those of another seed.
 *
 * <pre>
 * LossCurve DIR
 * </pre>
 */
final class LossCurve {
    private LossCurve() {}

    private record Losses(int sequences, int length, double[][] losses) {}

    public static void main(String[] args) throws IOException {
        Path folder = Path.of(args[0]);
        Losses wanted = new Gson().fromJson(Files.readString(folder.resolve("losses.json")), Losses.class);
        ByteBuffer tokens = ByteBuffer.wrap(Files.readAllBytes(folder.resolve("tokens.bin"))).order(ByteOrder.LITTLE_ENDIAN);
        EngineOptions options = EngineOptions.defaults().kvBytes(1L << 30);
        options = options.training(options.training().lr(3e-4).betas(0.9, 0.95).clip(1));
        double[] found = new double[wanted.losses[0].length];
        try (HybridEngine engine = HybridEngine.open(folder.resolve("model"), options)) {
            for (int step = 0; step < found.length; step++) {
                List<TrainingSequence> batch = new ArrayList<>();
                for (int s = 0; s < wanted.sequences; s++) {
                    int[] sequence = new int[wanted.length];
                    tokens.slice().order(ByteOrder.LITTLE_ENDIAN).asIntBuffer().get(sequence);
                    tokens.position(tokens.position() + Integer.BYTES * wanted.length);
                    batch.add(TrainingSequence.of(sequence, 1, 1));
                }
                TrainStep done = engine.train(batch);
                found[step] = done.loss();
            }
        }
        double own = 0;
        double band = 0;
        double widest = 0;
        double widestBand = 0;
        for (int i = 0; i < found.length; i++) {
            own += Math.abs(found[i] - wanted.losses[0][i]) / found.length;
            band += Math.abs(wanted.losses[1][i] - wanted.losses[0][i]) / found.length;
            widest = Math.max(widest, Math.abs(found[i] - wanted.losses[0][i]));
            widestBand = Math.max(widestBand, Math.abs(wanted.losses[1][i] - wanted.losses[0][i]));
            if (i % 20 == 0 || i == found.length - 1) {
                System.out.printf(Locale.ROOT, "step %3d: %.4f, transformers %.4f, with another seed %.4f%n", i + 1, found[i],
                        wanted.losses[0][i], wanted.losses[1][i]);
            }
        }
        System.out.printf(Locale.ROOT, "%d steps: from transformers %.4f on average, at most %.4f; between its seeds %.4f, at most %.4f%n",
                found.length, own, widest, band, widestBand);
    }
}
