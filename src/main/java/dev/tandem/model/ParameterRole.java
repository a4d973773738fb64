package dev.tandem.model;

/** What a tensor does in a decoder, whatever its family calls it. */
public enum ParameterRole {
    /** Token embeddings [vocabSize, embeddingSize]; also the LM head where the two are tied. */
    EMBED_TOKENS,
    /** Learned positions [maxPositions + offset, hiddenSize]. */
    EMBED_POSITIONS,
    /** From embeddingSize to hiddenSize: [hiddenSize, embeddingSize]. */
    PROJECT_IN,
    /** From hiddenSize to embeddingSize: [embeddingSize, hiddenSize]. */
    PROJECT_OUT,
    /** Weight of the norm after the last layer [hiddenSize]. */
    FINAL_NORM_WEIGHT,
    /** Bias of the norm after the last layer [hiddenSize]. */
    FINAL_NORM_BIAS,
    /** The untied LM head [vocabSize, embeddingSize]. */
    LM_HEAD,

    /** Weight of the attention block's norm [hiddenSize]. */
    ATTENTION_NORM_WEIGHT,
    /** Bias of the attention block's norm [hiddenSize]. */
    ATTENTION_NORM_BIAS,
    /** Query projection [heads * headDim, hiddenSize]. */
    Q_WEIGHT,
    /** Key projection [kvHeads * headDim, hiddenSize]. */
    K_WEIGHT,
    /** Value projection [kvHeads * headDim, hiddenSize]. */
    V_WEIGHT,
    /** Query bias [heads * headDim]. */
    Q_BIAS,
    /** Key bias [kvHeads * headDim]. */
    K_BIAS,
    /** Value bias [kvHeads * headDim]. */
    V_BIAS,
    /** Norm over each query head [headDim]. */
    Q_NORM,
    /** Norm over each key head [headDim]. */
    K_NORM,
    /** Attention's output projection [hiddenSize, heads * headDim]. */
    O_WEIGHT,
    /** Bias of attention's output projection [hiddenSize]. */
    O_BIAS,
    /** Weight of the feed-forward block's norm [hiddenSize]. */
    MLP_NORM_WEIGHT,
    /** Bias of the feed-forward block's norm [hiddenSize]. */
    MLP_NORM_BIAS,
    /** Gate projection of a gated feed-forward block [intermediateSize, hiddenSize]. */
    GATE_WEIGHT,
    /** Up projection [intermediateSize, hiddenSize] (OPT: fc1). */
    UP_WEIGHT,
    /** Gate bias [intermediateSize]. */
    GATE_BIAS,
    /** Up bias [intermediateSize]. */
    UP_BIAS,
    /** Down projection [hiddenSize, intermediateSize] (OPT: fc2). */
    DOWN_WEIGHT,
    /** Down bias [hiddenSize]. */
    DOWN_BIAS
}
