package dev.tandem.model;

import dev.tandem.device.DType;
import java.nio.file.Path;
import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * A decoder-only transformer as data: everything that the decoder, the weight layout and the KV cache need to know,
 * and nothing that is particular to a family. Two families that compute the same thing have equal configs but for
 * {@code architecture}.
 *
 * @param architecture the family, which knows how files spell this config
 * @param vocabSize rows of the embedding table
 * @param hiddenSize width of the residual stream
 * @param layers number of layers
 * @param heads query heads
 * @param kvHeads key and value heads, a divisor of {@code heads}
 * @param headDim channels of a head; {@code heads * headDim} need not be {@code hiddenSize}
 * @param intermediateSize width of the feed-forward block
 * @param maxPositions the longest context in tokens
 * @param norm the kind of norm
 * @param normEps added to the norm's variance
 * @param normAffine whether norms have a weight (and a bias, for layer norms)
 * @param normFirst true when a block's norm comes before it (pre-norm), false when it follows the residual sum
 *     (post-norm)
 * @param finalNorm whether a norm follows the last layer
 * @param activation non-linearity of the feed-forward block
 * @param gatedMlp {@code down(act(gate x) * up x)} when true, {@code down(act(up x))} when false
 * @param qkvBias whether the query, key and value projections have biases
 * @param outputBias whether attention's output projection has one
 * @param mlpBias whether the feed-forward projections have biases
 * @param qkNorm whether each query and key head is RMS-normalised before its rotation
 * @param positions how positions enter
 * @param embeddingSize width of the embedding table; where it is not {@code hiddenSize}, projections lead in and out
 * @param tiedEmbeddings whether the LM head is the embedding table
 * @param bosTokenId the token that starts a text, if there is one
 * @param eosTokenIds tokens that end a generation; may be empty
 * @param padTokenId the token for padding, if there is one
 */
public record ModelConfig(Architecture architecture, int vocabSize, int hiddenSize, int layers, int heads, int kvHeads,
        int headDim,
        int intermediateSize, int maxPositions, Norm norm, double normEps, boolean normAffine, boolean normFirst,
        boolean finalNorm, Activation activation, boolean gatedMlp, boolean qkvBias, boolean outputBias,
                boolean mlpBias,
        boolean qkNorm, Positions positions, int embeddingSize, boolean tiedEmbeddings, @Nullable Integer bosTokenId,
        List<Integer> eosTokenIds, @Nullable Integer padTokenId) {

    /** Checks that the numbers describe a decoder; the message of a failure names the component. */
    public ModelConfig {
        eosTokenIds = List.copyOf(eosTokenIds);
        requireSize("vocabSize", vocabSize, 1 << 28);
        requireSize("hiddenSize", hiddenSize, 1 << 24);
        requireSize("layers", layers, 1 << 14);
        requireSize("heads", heads, 1 << 16);
        requireSize("kvHeads", kvHeads, 1 << 16);
        requireSize("headDim", headDim, 1 << 16);
        requireSize("intermediateSize", intermediateSize, 1 << 26);
        requireSize("maxPositions", maxPositions, 1 << 28);
        requireSize("embeddingSize", embeddingSize, 1 << 24);
        if (heads % kvHeads != 0) {
            throw new IllegalArgumentException("ModelConfig.kvHeads: expected a divisor of the " + heads
                    + " heads, found " + kvHeads);
        }
        if (positions instanceof Positions.Rope && headDim % 2 != 0) {
            throw new IllegalArgumentException("ModelConfig.headDim: rotary positions need an even number, found "
                    + headDim);
        }
        if ((long) heads * headDim > 1 << 24) {
            throw new IllegalArgumentException("ModelConfig.headDim: heads * headDim is " + (long) heads * headDim
                    + ", expected at most " + (1 << 24));
        }
        if (!(normEps >= 0 && normEps < 1)) {
            throw new IllegalArgumentException("ModelConfig.normEps: expected a number from 0 to 1, found " + normEps);
        }
        requireToken("bosTokenId", bosTokenId);
        requireToken("padTokenId", padTokenId);
        eosTokenIds.forEach(id -> requireToken("eosTokenIds", id));
    }

    private static void requireSize(String name, int value, int limit) {
        if (value < 1 || value > limit) {
            throw new IllegalArgumentException("ModelConfig." + name + ": expected a number from 1 to " + limit
                    + ", found " + value);
        }
    }

    /** Only the sign: published configs do name ids outside their vocabulary (a pad token that was never added). */
    private static void requireToken(String name, @Nullable Integer id) {
        if (id != null && id < 0) {
            throw new IllegalArgumentException("ModelConfig." + name + ": expected a token id of at least 0, found "
                    + id);
        }
    }

    /**
     * A Llama of these sizes: RMS norm, SwiGLU, rotary positions of base 10,000, no biases, an untied LM head.
     *
     * @param vocabSize rows of the embedding table
     * @param hiddenSize width, a multiple of {@code heads}
     * @param layers number of layers
     * @param heads query heads
     * @param kvHeads key and value heads
     * @param intermediateSize width of the feed-forward block
     * @param maxPositions the longest context in tokens
     * @return the config
     */
    public static ModelConfig llama(int vocabSize, int hiddenSize, int layers, int heads, int kvHeads,
            int intermediateSize,
            int maxPositions) {
        return sized(Architecture.LLAMA, vocabSize, hiddenSize, layers, heads, kvHeads, intermediateSize,
                maxPositions).build();
    }

    /**
     * A Qwen3 of these sizes: as {@link #llama}, with normalised queries and keys and a tied LM head.
     *
     * @param vocabSize rows of the embedding table
     * @param hiddenSize width, a multiple of {@code heads}
     * @param layers number of layers
     * @param heads query heads
     * @param kvHeads key and value heads
     * @param intermediateSize width of the feed-forward block
     * @param maxPositions the longest context in tokens
     * @return the config
     */
    public static ModelConfig qwen3(int vocabSize, int hiddenSize, int layers, int heads, int kvHeads,
            int intermediateSize,
            int maxPositions) {
        ModelConfigBuilder builder =
                sized(Architecture.QWEN3, vocabSize, hiddenSize, layers, heads, kvHeads, intermediateSize,
                        maxPositions);
        builder.qkNorm = true;
        builder.tiedEmbeddings = true;
        return builder.build();
    }

    private static ModelConfigBuilder sized(Architecture architecture, int vocabSize, int hiddenSize, int layers,
            int heads,
            int kvHeads, int intermediateSize, int maxPositions) {
        if (heads < 1 || hiddenSize % heads != 0) {
            throw new IllegalArgumentException("ModelConfig.heads: expected a divisor of the hidden size " + hiddenSize
                    + ", found " + heads);
        }
        ModelConfigBuilder builder = new ModelConfigBuilder(architecture);
        builder.vocabSize = vocabSize;
        builder.hiddenSize = hiddenSize;
        builder.embeddingSize = hiddenSize;
        builder.layers = layers;
        builder.heads = heads;
        builder.kvHeads = kvHeads;
        builder.headDim = hiddenSize / heads;
        builder.intermediateSize = intermediateSize;
        builder.maxPositions = maxPositions;
        return builder;
    }

    /**
     * Reads {@code config.json}.
     *
     * @param folder a Hugging Face folder
     * @return the config
     * @throws ModelFormatException when the file is missing, malformed, or asks for something that is not supported
     */
    public static ModelConfig read(Path folder) {
        return Architecture.readConfig(JsonFields.read(folder.resolve("config.json")));
    }

    /**
     * Writes {@code config.json} so that transformers 4.5x and 5.x load it.
     *
     * @param folder an existing folder
     * @param dtype the element type that the weights are saved in
     */
    public void write(Path folder, DType dtype) {
        AtomicFile.write(folder.resolve("config.json"), StrictJson.print(architecture.toJson(this, dtype)));
    }

    /** {@return every tensor of the model, in the order of {@link Architecture#parameters}} */
    public List<ParameterSpec> parameters() {
        return Architecture.parameters(this);
    }

    /**
     * {@return a changed copy}
     *
     * @param value rows of the embedding table
     */
    public ModelConfig withVocabSize(int value) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.vocabSize = value;
        return builder.build();
    }

    /**
     * {@return a changed copy}
     *
     * @param value the longest context in tokens
     */
    public ModelConfig withMaxPositions(int value) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.maxPositions = value;
        return builder.build();
    }

    /**
     * {@return a changed copy}
     *
     * @param value channels of a head
     */
    public ModelConfig withHeadDim(int value) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.headDim = value;
        return builder.build();
    }

    /**
     * {@return a changed copy}
     *
     * @param value how positions enter
     */
    public ModelConfig withPositions(Positions value) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.positions = value;
        return builder.build();
    }

    /**
     * {@return a changed copy}
     *
     * @param value whether the LM head is the embedding table
     */
    public ModelConfig withTiedEmbeddings(boolean value) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.tiedEmbeddings = value;
        return builder.build();
    }

    /**
     * {@return a changed copy}
     *
     * @param bos the token that starts a text, or null
     * @param eos tokens that end a generation
     * @param pad the token for padding, or null
     */
    public ModelConfig withSpecialTokens(@Nullable Integer bos, List<Integer> eos, @Nullable Integer pad) {
        ModelConfigBuilder builder = new ModelConfigBuilder(this);
        builder.bosTokenId = bos;
        builder.eosTokenIds = eos;
        builder.padTokenId = pad;
        return builder.build();
    }
}
