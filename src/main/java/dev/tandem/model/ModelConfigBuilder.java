package dev.tandem.model;

import java.util.List;
import org.jspecify.annotations.Nullable;

/**
 * Twenty-six components are too many to pass by position, so whoever makes a {@link ModelConfig} fills these fields
 * by name. They start as what the Llama pattern has.
 */
final class ModelConfigBuilder {
    final Architecture architecture;
    int vocabSize;
    int hiddenSize;
    int layers;
    int heads;
    int kvHeads;
    int headDim;
    int intermediateSize;
    int maxPositions;
    Norm norm = Norm.RMS;
    double normEps = 1e-6;
    boolean normAffine = true;
    boolean normFirst = true;
    boolean finalNorm = true;
    Activation activation = Activation.SILU;
    boolean gatedMlp = true;
    boolean qkvBias;
    boolean outputBias;
    boolean mlpBias;
    boolean qkNorm;
    Positions positions = new Positions.Rope(10_000);
    int embeddingSize;
    boolean tiedEmbeddings;
    @Nullable Integer bosTokenId;
    List<Integer> eosTokenIds = List.of();
    @Nullable Integer padTokenId;

    ModelConfigBuilder(Architecture architecture) {
        this.architecture = architecture;
    }

    ModelConfigBuilder(ModelConfig from) {
        architecture = from.architecture();
        vocabSize = from.vocabSize();
        hiddenSize = from.hiddenSize();
        layers = from.layers();
        heads = from.heads();
        kvHeads = from.kvHeads();
        headDim = from.headDim();
        intermediateSize = from.intermediateSize();
        maxPositions = from.maxPositions();
        norm = from.norm();
        normEps = from.normEps();
        normAffine = from.normAffine();
        normFirst = from.normFirst();
        finalNorm = from.finalNorm();
        activation = from.activation();
        gatedMlp = from.gatedMlp();
        qkvBias = from.qkvBias();
        outputBias = from.outputBias();
        mlpBias = from.mlpBias();
        qkNorm = from.qkNorm();
        positions = from.positions();
        embeddingSize = from.embeddingSize();
        tiedEmbeddings = from.tiedEmbeddings();
        bosTokenId = from.bosTokenId();
        eosTokenIds = from.eosTokenIds();
        padTokenId = from.padTokenId();
    }

    ModelConfig build() {
        return new ModelConfig(architecture, vocabSize, hiddenSize, layers, heads, kvHeads, headDim, intermediateSize,
                maxPositions,
                norm, normEps, normAffine, normFirst, finalNorm, activation, gatedMlp, qkvBias, outputBias, mlpBias,
                        qkNorm,
                positions, embeddingSize, tiedEmbeddings, bosTokenId, eosTokenIds, padTokenId);
    }
}
