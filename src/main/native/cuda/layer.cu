// The elementwise work of a decoder layer: embedding, residual sums and norms, rotary embedding and the write of keys and
// values into pages, activations. Memory bandwidth is the limit, so each kernel reads its inputs once, in 16-byte vectors, does
// all that can be done to them on the way, and writes once. The fusions are those common to inference engines: residual sum and
// norm (FlashInfer), query/key norm, rotation and page write (vLLM), activation and product.
//
// Storage is bfloat16, arithmetic float32. Where one kernel stands for several operations of the training code, ROUND_STEPS
// rounds between them as libtorch does when it stores each result: generation then yields the training code's numbers up to the
// order of sums, which matters because the two policies are compared token by token.
//
// The T tokens of a step lie one after the other, *tokenCount of them real: read from device memory, so that a captured graph
// can serve any number up to its grid; threads beyond leave. A row's result depends on that row alone, bit for bit.
//   embed, residualNorm, gatherNorm: block (32 * ceil(width / 1024), y), grid ceil(rows / y). A row belongs to the threads of
//       one threadIdx.y; y must be 1 unless a warp suffices for the row. Many narrow rows: y = 4; few: y = 1, spreading them.
//   rotateAndWrite: block 256, grid ceil(T * UNITS * HEAD_LANES / 256), for UNITS below and HEAD_LANES of rotation.cuh.
//   activate: block 256, grid ceil(T * width / 4096).
// Widths are multiples of 8, at most 16,384.
//
// Macros: HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE (a power of two); LAYER_NORM 0 RMSNorm (Zhang and Sennrich 2019), 1 LayerNorm;
// POST_NORM 1: the normalised sum is itself the next residual; FINAL_NORM 0: gatherNorm only adds; GATED 1: act(gate) * up;
// ACTIVATION 0 SiLU, 1 ReLU, 2 GELU, 3 GELU by tanh; WRITE_BACK 1: qkv is left with what attention is to see; ROUND_STEPS.

#ifndef LAYER_NORM  // those of the architecture, given together; otherwise a Llama's
#define LAYER_NORM 0
#define POST_NORM 0
#define FINAL_NORM 1
#define GATED 1
#define ACTIVATION 0
#endif
#ifndef WRITE_BACK
#define WRITE_BACK 1
#endif
#ifndef ROUND_STEPS
#define ROUND_STEPS 1
#endif

#include "vectors.cuh"

// 16-byte vectors of a row that a thread holds in registers.
#define VECTORS 4
// Vector k of this thread begins at element i of its row; past the end for some, unless the width is a multiple of 1024.
#define FOR_VECTORS UNROLL for (int k = 0, i = 8 * threadIdx.x; k < VECTORS; k++, i += 8 * blockDim.x)

// ---- embedding -------------------------------------------------------------------------------------------------------------

// out [T][width] = table[tokens] (+ positionTable[positions + positionOffset], for learned positions). table null: out already
// holds the embeddings (they went through a projection) and only positions are added.
extern "C" __global__ void embed(const int* tokens, const int* positions, const bf16* table, const bf16* positionTable,
                                 int positionOffset, bf16* out, int width, const int* tokenCount) {
    followPredecessor();
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= *tokenCount) {
        return;
    }
    bf16* to = out + (long long) row * width;
    const bf16* from = table ? table + (long long) tokens[row] * width : to;
    const bf16* offset = positionTable ? positionTable + (long long) (positions[row] + positionOffset) * width : nullptr;
    uint4 vectors[VECTORS];
    FOR_VECTORS if (i < width) {
        vectors[k] = load(from + i);
    }
    FOR_VECTORS if (i < width) {
        float x[8];
        unpack(x, vectors[k]);
        if (offset) {
            add(x, load(offset + i));
        }
        store(to + i, pack(x));
    }
}

// ---- residual sum and norm -------------------------------------------------------------------------------------------------

// The sum over the threads of a row, in an order that depends only on how many they are.
DEVICE float rowSum(float x, float* partials) {
    x = warpSum(x);
    if (blockDim.x > 32) {
        partials[threadIdx.x / 32] = x;  // all lanes write the same
        __syncthreads();
        x = 0.0f;
        for (int warp = 0; warp < blockDim.x / 32; warp++) {
            x += partials[warp];
        }
    }
    return x;
}

// sum = residual + (addend + addendBias) goes to newResidual, norm(sum) to out; either may be null. Pointers are those of the
// row, which stays in registers, so that the variance can be taken about the mean.
template <bool normalise>
DEVICE void addAndNormalise(const bf16* residual, const bf16* addend, const bf16* addendBias, const bf16* weight,
                            const bf16* bias, bf16* newResidual, bf16* out, int width, float epsilon) {
    __shared__ float partials[2][32];
    const uint4 zeros = make_uint4(0, 0, 0, 0), ones = make_uint4(0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80);
    uint4 row[VECTORS], change[VECTORS], scale[VECTORS];
    FOR_VECTORS if (i < width) {
        row[k] = load(residual + i);
        change[k] = addend ? load(addend + i) : zeros;
        scale[k] = weight ? load(weight + i) : ones;
    }
    float sum = 0.0f;
    FOR_VECTORS if (i < width) {
        float x[8], y[8];
        unpack(x, row[k]);
        unpack(y, change[k]);
        if (addendBias) {
            add(y, load(addendBias + i));
        }
        add(x, pack(y));
        row[k] = pack(x);
        if (newResidual && !(normalise && POST_NORM)) {
            store(newResidual + i, row[k]);
        }
        sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
    if (!normalise) {
        return;
    }
    float mean = LAYER_NORM ? rowSum(sum, partials[0]) / width : 0.0f;
    float squares = 0.0f;
    FOR_VECTORS if (i < width) {
        float x[8];
        unpack(x, row[k]);
        UNROLL for (int j = 0; j < 8; j++) {
            squares += (x[j] - mean) * (x[j] - mean);
        }
    }
    float factor = rsqrtf(rowSum(squares, partials[1]) / width + epsilon);
    FOR_VECTORS if (i < width) {
        float x[8], w[8], b[8];
        unpack(x, row[k]);
        unpack(w, scale[k]);
        unpack(b, bias ? load(bias + i) : zeros);
        UNROLL for (int j = 0; j < 8; j++) {
            x[j] = (x[j] - mean) * factor * w[j] + b[j];
        }
        if (out) {
            store(out + i, pack(x));
        }
        if (POST_NORM && newResidual) {
            store(newResidual + i, pack(x));
        }
    }
}

// residual [T][width] += addend [T][width] + addendBias [width]; out [T][width] = norm(residual). addend null: only the norm.
// POST_NORM: residual becomes the norm, too, and out may be null. out may be addend.
extern "C" __global__ void residualNorm(bf16* residual, const bf16* addend, const bf16* addendBias, const bf16* weight,
                                        const bf16* bias, bf16* out, int width, float epsilon, const int* tokenCount) {
    followPredecessor();
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= *tokenCount) {
        return;
    }
    long long at = (long long) row * width;
    addAndNormalise<true>(residual + at, addend ? addend + at : nullptr, addendBias, weight, bias,
                          addend || POST_NORM ? residual + at : nullptr, out ? out + at : nullptr, width, epsilon);
}

// out [rows][width] = norm(residual + addend) of the rows rowIndex [rows], whose logits are wanted; rows = *rowCount, an index
// below zero is padding. residual is left as it is.
extern "C" __global__ void gatherNorm(const bf16* residual, const bf16* addend, const bf16* addendBias, const bf16* weight,
                                      const bf16* bias, bf16* out, int width, float epsilon, const int* rowIndex,
                                      const int* rowCount) {
    followPredecessor();
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    int source = row < *rowCount ? rowIndex[row] : -1;
    if (source < 0) {
        return;
    }
    long long at = (long long) source * width;
    bf16* to = out + (long long) row * width;
    addAndNormalise<FINAL_NORM>(residual + at, addend ? addend + at : nullptr, addendBias, weight, bias,
                                FINAL_NORM ? nullptr : to, to, width, epsilon);
}

// ---- queries and keys: bias, norm, rotation, cache -------------------------------------------------------------------------

#include "rotation.cuh"

// Heads of one token that a thread treats: cosines and sines are read once for them, and more bytes are under way.
#define HEADS_PER_THREAD 2
#define UNITS ((ALL_HEADS + HEADS_PER_THREAD - 1) / HEADS_PER_THREAD)

// qkv [T][ALL_HEADS][HEAD_DIM] plus qkvBias [ALL_HEADS][HEAD_DIM]; queryNorm, keyNorm [HEAD_DIM] (null: none) are weights of an
// RMSNorm of each head; then the rotation by cosine, sine [positions][HALF] float32 (null: none), element i with i + HALF.
// Queries go to query [T][HEADS][HEAD_DIM], keys and values into the page of their position,
//   kv [block][layer][K, V][KV_HEADS][BLOCK_SIZE][HEAD_DIM], block = blockTable [slots][maxBlocksPerSlot] of the token's slot,
// and, with WRITE_BACK, also back into qkv. Tokens of slot -1 write nothing.
extern "C" __global__ void __launch_bounds__(256)
        rotateAndWrite(bf16* qkv, const bf16* qkvBias, const bf16* queryNorm, const bf16* keyNorm, float epsilon,
                       const float* cosine, const float* sine, const int* positions, const int* tokenSlot,
                       const int* blockTable, int maxBlocksPerSlot, bf16* kv, int layer, int layers, bf16* query,
                       const int* tokenCount) {
    awaitPredecessor();
    admitSuccessor();  // not before: decode attention reads what kernels before this one wrote without waiting for this one
    u32 group = (blockIdx.x * 256 + threadIdx.x) / HEAD_LANES;
    int token = group / UNITS, unit = group % UNITS;
    int element = 8 * (threadIdx.x % HEAD_LANES);
    // Nobody leaves before the shuffles: a warp may hold the last token and one beyond.
    bool within = token < *tokenCount && element < HALF;
    int slot = within ? tokenSlot[token] : -1;
    int position = within ? positions[token] : 0;

    bool live = slot >= 0;
    float x[HEADS_PER_THREAD][2][8];
    UNROLL for (int r = 0; r < HEADS_PER_THREAD; r++) UNROLL for (int half = 0; half < 2; half++) {
        int head = unit + r * UNITS;
        const bf16* from = qkv + ((long long) token * ALL_HEADS + head) * HEAD_DIM + element + half * HALF;
        unpack(x[r][half], within && head < ALL_HEADS ? load(from) : make_uint4(0, 0, 0, 0));
    }
    float c[8], s[8];
    if (cosine && live) {
        loadFloats(c, cosine + (long long) position * HALF + element);
        loadFloats(s, sine + (long long) position * HALF + element);
        storedAll(c);
        storedAll(s);
    }
    long long page = live ? blockTable[(long long) slot * maxBlocksPerSlot + position / BLOCK_SIZE] : 0;

    UNROLL for (int r = 0; r < HEADS_PER_THREAD; r++) {
        int head = unit + r * UNITS;
        bool present = live && head < ALL_HEADS, isValue = head >= HEADS + KV_HEADS;
        if (qkvBias && present) {
            add(x[r][0], load(qkvBias + head * HEAD_DIM + element));
            add(x[r][1], load(qkvBias + head * HEAD_DIM + element + HALF));
        }
        if (queryNorm) {
            float factor = normFactor(x[r], epsilon);
            if (present && !isValue) {
                const bf16* weight = (head < HEADS ? queryNorm : keyNorm) + element;
                scaleBy(x[r][0], factor, load(weight));
                scaleBy(x[r][1], factor, load(weight + HALF));
            }
        }
        if (cosine && present && !isValue) {
            rotate(x[r], c, s);
        }
        if (!present) {
            continue;
        }
        bf16* to = placeOf(head, token, query, position, page, kv, layer, layers);
        bf16* back = qkv + ((long long) token * ALL_HEADS + head) * HEAD_DIM;
        UNROLL for (int half = 0; half < 2; half++) {
            uint4 result = pack(x[r][half]);
            store(to + element + half * HALF, result);
            if (WRITE_BACK && head >= HEADS && (!isValue || qkvBias)) {
                store(back + element + half * HALF, result);
            }
        }
    }
}

// ---- activation ------------------------------------------------------------------------------------------------------------

// libtorch's formulas, cancellation included.
DEVICE float activation(float x) {
    switch (ACTIVATION) {
        case 0: return __fdividef(x, 1.0f + __expf(-x));
        case 1: return fmaxf(x, 0.0f);
        case 2: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        default: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * (x * x * x))));
    }
}

// GATED: in [T][2 * width], out [T][width] = act(gate) * up; otherwise in [T][width], out = act(in), may be in place. bias is
// as long as a row of in. The matrix is taken as one line of vectors, two for each thread, whatever its shape.
extern "C" __global__ void __launch_bounds__(256)
        activate(const bf16* in, const bf16* bias, bf16* out, int width, const int* tokenCount) {
    followPredecessor();
    u32 perRow = width / 8;
    u32 first = blockIdx.x * 512 + threadIdx.x;
    u32 end = *tokenCount * perRow;
    u32 column[2];
    uint4 vectors[2][1 + GATED];
    UNROLL for (u32 k = 0, at = first; k < 2; k++, at += 256) {
        u32 row = at / perRow;
        column[k] = 8 * (at - row * perRow);
        UNROLL for (int part = 0; part < 1 + GATED; part++) if (at < end) {
            vectors[k][part] = load(in + ((long long) row * (1 + GATED) + part) * width + column[k]);
        }
    }
    UNROLL for (u32 k = 0, at = first; k < 2; k++, at += 256) if (at < end) {
        float x[1 + GATED][8];
        UNROLL for (int part = 0; part < 1 + GATED; part++) {
            unpack(x[part], vectors[k][part]);
            if (bias) {
                add(x[part], load(bias + part * width + column[k]));
            }
        }
        UNROLL for (int i = 0; i < 8; i++) {
            x[0][i] = activation(x[0][i]);
            x[0][i] = GATED ? stored(x[0][i]) * x[GATED][i] : x[0][i];
        }
        store(out + (long long) at * 8, pack(x[0]));
    }
}
