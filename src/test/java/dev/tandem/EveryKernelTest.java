package dev.tandem;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.tandem.device.DType;
import dev.tandem.device.Device;
import dev.tandem.generation.Completion;
import dev.tandem.generation.GeneratorOptions;
import dev.tandem.generation.Prompt;
import dev.tandem.generation.SamplingParams;
import dev.tandem.model.ModelConfig;
import dev.tandem.testing.Gpu;
import dev.tandem.testing.TinyModels;
import dev.tandem.training.TokenLoss;
import dev.tandem.training.TrainingSequence;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/**
 * Whole engines so small that all kernels, in all forms that a model may ask for, run in seconds even under compute-sanitizer: steps with
 * and without prompts, of few and of many rows, every way to sample, losses with and without entropy, logits that are kept or computed again.
 */
@Gpu
class EveryKernelTest {
    private static final String GATED = """
            {"model_type":"%s","hidden_size":128,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":%d,
             "intermediate_size":192,"vocab_size":515,"max_position_embeddings":256,"rope_theta":10000.0,"tie_word_embeddings":%s}""";
    private static final String PLAIN = """
            {"model_type":"opt","hidden_size":192,"num_hidden_layers":2,"num_attention_heads":2,"ffn_dim":256,"vocab_size":515,
             "max_position_embeddings":256,"word_embed_proj_dim":192,"do_layer_norm_before":true}""";

    @ParameterizedTest
    @CsvSource({"llama, 256, false, 1024", "qwen2, 64, false, 1048576", "qwen3, 128, true, 1048576", "opt, 96, true, 1048576"})
    void generatesAndLearns(String family, int headDim, boolean tied, long logitBytes) {
        ModelConfig config = TinyModels.of(family.equals("opt") ? PLAIN : GATED.formatted(family, headDim, tied));
        EngineOptions options = EngineOptions.defaults().devices(Device.cuda(0)).dtype(DType.BFLOAT16).kvBytes(32 << 20)
                .memoryLimit(16L << 30).seed(5).generation(GeneratorOptions.defaults().blockSize(16).step(96, 24, 64));
        options = options.training(options.training().lr(1e-2).memory(1 << 20, logitBytes));
        try (HybridEngine engine = HybridEngine.create(config, null, options)) {
            assertTrue(engine.onEachRank(rank -> rank.generator().runsKernels()).getFirst());
            SamplingParams plain = SamplingParams.defaults().maxTokens(6).ignoreEos(true);
            List<Completion> done = new ArrayList<>();
            for (SamplingParams params : List.of(plain, plain.topK(20).topP(0.9).minP(0.01), plain.repetitionPenalty(1.3),
                    plain.stopTokenIds(List.of(7)).minTokens(4), plain.temperature(0))) {
                done.addAll(engine.rollout(prompts(config, 18, params), c -> {}));
            }
            for (int few = 1; few <= 3; few++) {
                done.addAll(engine.rollout(prompts(config, few, plain), c -> {}));
            }
            done.forEach(c -> assertTrue(c.tokens().length == 6 || c.tokens()[c.tokens().length - 1] == 7));
            double gap = CudaGenerationTest.gap(engine, done, 1)[0];
            assertTrue(gap <= 0.1, "log-probs differ by " + gap);

            List<TrainingSequence> batch = CudaGenerationTest.sequences(done);
            TokenLoss rewarded = t -> t.logprob().sum().mul(-1.0 / (6 * batch.size()));
            TokenLoss spread = t -> t.logprob().add(t.entropy().mul(0.01)).sum().mul(-1.0 / (6 * batch.size()));
            double first = engine.train(batch, rewarded, 1).loss();
            for (int step = 0; step < 4; step++) {
                engine.train(batch, step % 2 == 0 ? spread : rewarded, 1);
            }
            double last = engine.train(batch, rewarded, 1).loss();
            System.out.printf("%s: loss %.3f became %.3f%n", family, first, last);
            assertTrue(last < first - 0.1, first + " became " + last);
            assertEquals(18, engine.rollout(prompts(config, 18, plain), c -> {}).size());
        }
    }

    private static List<Prompt> prompts(ModelConfig config, int count, SamplingParams params) {
        Random random = new Random(count);
        List<Prompt> prompts = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            int length = i == 0 ? 120 : 1 + random.nextInt(40); // the first comes in chunks
            prompts.add(new Prompt(i, "", random.ints(length, 0, config.vocabSize()).toArray(), params));
        }
        return prompts;
    }
}
