// From the fused projection of queries, keys and values to what attention takes, and back: bias, norm of each head (Qwen 3), rotary
// embedding (Su et al. 2021), and the gradients of all that. Memory bandwidth is the limit: every element is read once, in 16-byte
// vectors, all is done to it on the way, and it is written once. Storage is bfloat16, arithmetic float32; nothing is kept for the
// backward pass but the projection itself, from which statistics are computed anew.
//
// Of each query and key head, with u = bf16(qkv + bias), D elements, h = D / 2, c and s of the token's position:
//   xhat = u r,  r = (mean(u^2) + epsilon)^(-1/2),  n = xhat w   (without norm: n = u)
//   y[i] = n[i] c[i] - n[i + h] s[i]                 y[i + h] = n[i + h] c[i] + n[i] s[i]       (without tables: y = n)
// and backward, for g = dL/dy, the transposed rotation (c and s may carry a factor), then RMSNorm's gradient:
//   e[i] = g[i] c[i] + g[i + h] s[i]                 e[i + h] = g[i + h] c[i] - g[i] s[i]
//   dL/du = r (e w - xhat mean(e w xhat))            dL/dw = sum over tokens and heads of e xhat         (without norm: dL/du = e)
// Values only get their bias. dL/dqkv = dL/du; the bias' gradient is its sum over tokens (columnSums in train_layer.cu).
//
// Threads. LANES threads share a head: each has eight elements of its first half and their partners in the second, so that the
// rotation needs no exchange and the norm a few shuffles. A thread treats several heads of a token, which share cosines and sines.
//
// The backward pass has a fixed grid, for the sake of the norms' gradients: each thread keeps sums for its 16 elements of a query
// and of a key in registers, in the order in which it comes by heads; at the end the threads of a block are added up in order, and
// sumPartials (train_layer.cu) adds the blocks. These registers leave room for few threads, hardly enough to cover the memory's
// latency with plain loads; so a thread copies what it needs in the next round asynchronously into shared memory of its own. The
// bits of byQkv depend on the head alone, those of the norms' gradients on sizes and grid.
//
// Layouts, row-major, pointers aligned to 16 bytes; T tokens, H query and K KV heads; null for what the model has not.
// T (H + 2 K) D < 2^32.
//   qkv, byQkv [T][H + 2 K][D], queries, keys, values; bias [H + 2 K][D]; queryNorm, keyNorm [D], both or none
//   query, byQuery [T][H][D]; key, value, byKey, byValue [T][K][D]
//   cosine, sine float32 [positions][D / 2]; positions int64 [T], each within the tables
//   partial float32 [P][2][D]: sums for queryNorm, then for keyNorm; to be had with norms, may be null otherwise
// Launches
//   rotateForward    units = ceil((H + 2 K) / FORWARD_HEADS); block 256, grid ceil(T units LANES / 256)
//   rotateBackward   units = ceil((H + 2 K) / BACKWARD_HEADS); block 128, grid P = min(4 multiprocessors, ceil(T units LANES / 128))
// Bytes moved, besides tables
//   rotateForward    T (H + 2 K) D 4
//   rotateBackward   T (H + 2 K) D 4, with norms T D (6 (H + K) + 4 K) + 8 P D
//
// Macros: HEAD_DIM 64, 96, 128, 256; ROUND_STEPS 1 rounds after the norm, the factors and the products, as layer.cu does by default.

#include "vectors.cuh"

#define HALF (HEAD_DIM / 2)
// A power of two, for the shuffles; of HEAD_DIM 96 two in eight idle.
#define LANES (HEAD_DIM == 64 ? 4 : HEAD_DIM <= 128 ? 8 : 16)
// Heads of a token that one thread treats.
#define FORWARD_HEADS 4
#define BACKWARD_HEADS 2
#define BACKWARD_THREADS 128

DEVICE float laneSum(float x) {
    UNROLL for (int offset = LANES / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

DEVICE void loadFactors(float (&x)[8], const float* from) {
    UNROLL for (int i = 0; i < 8; i += 4) {
        float4 four = *reinterpret_cast<const float4*>(from + i);
        x[i] = stored(four.x);
        x[i + 1] = stored(four.y);
        x[i + 2] = stored(four.z);
        x[i + 3] = stored(four.w);
    }
}

// Of the two halves of a head, for this thread.
DEVICE float squaresOf(const float (&x)[2][8]) {
    float squares = 0.0f;
    UNROLL for (int i = 0; i < 8; i++) {
        squares += x[0][i] * x[0][i] + x[1][i] * x[1][i];
    }
    return squares;
}

extern "C" __global__ void __launch_bounds__(256)
        rotateForward(const bf16* qkv, const bf16* bias, const bf16* queryNorm, const bf16* keyNorm, float epsilon,
                      const float* cosine, const float* sine, const long long* positions, bf16* query, bf16* key, bf16* value,
                      int heads, int kvHeads, int tokens) {
    followPredecessor();
    int allHeads = heads + 2 * kvHeads, units = (allHeads + FORWARD_HEADS - 1) / FORWARD_HEADS;
    u32 group = (blockIdx.x * 256 + threadIdx.x) / LANES;
    int token = group / units, unit = group % units;
    int element = 8 * (threadIdx.x % LANES);
    // Nobody leaves before the shuffles: a warp may hold the last token and one beyond.
    bool within = token < tokens && element < HALF;
    uint4 vectors[FORWARD_HEADS][2];
    UNROLL for (int n = 0; n < FORWARD_HEADS; n++) UNROLL for (int half = 0; half < 2; half++) {
        int head = unit + n * units;
        const bf16* from = qkv + (u32) (token * allHeads + head) * HEAD_DIM + element + half * HALF;
        vectors[n][half] = within && head < allHeads ? load(from) : zeros();
    }
    float c[8], s[8];
    if (cosine && within) {
        long long at = positions[token] * HALF + element;
        loadFactors(c, cosine + at);
        loadFactors(s, sine + at);
    }
    UNROLL for (int n = 0; n < FORWARD_HEADS; n++) {
        int head = unit + n * units;
        bool present = within && head < allHeads, isQuery = head < heads, isValue = head >= heads + kvHeads;
        float x[2][8];
        UNROLL for (int half = 0; half < 2; half++) {
            unpack(x[half], vectors[n][half]);
            if (bias && present) {
                add(x[half], load(bias + head * HEAD_DIM + element + half * HALF));
            }
        }
        if (queryNorm) {
            float squares = laneSum(squaresOf(x));
            if (present && !isValue) {
                const bf16* weight = (isQuery ? queryNorm : keyNorm) + element;
                float factor = rsqrtf(squares / HEAD_DIM + epsilon);
                UNROLL for (int half = 0; half < 2; half++) {
                    float w[8];
                    unpack(w, load(weight + half * HALF));
                    UNROLL for (int i = 0; i < 8; i++) {
                        x[half][i] = stored(x[half][i] * factor * w[i]);
                    }
                }
            }
        }
        if (!present) {
            continue;
        }
        if (cosine && !isValue) {
            UNROLL for (int i = 0; i < 8; i++) {
                float a = x[0][i], b = x[1][i];
                x[0][i] = stored(a * c[i]) - stored(b * s[i]);
                x[1][i] = stored(b * c[i]) + stored(a * s[i]);
            }
        }
        bf16* to = isQuery ? query : isValue ? value : key;
        u32 row = isQuery ? token * heads + head : token * kvHeads + head - heads - (isValue ? kvHeads : 0);
        to += row * HEAD_DIM + element;
        store(to, pack(x[0]));
        store(to + HALF, pack(x[1]));
    }
}

// partial [2][D] of this block: the sums of all its threads, in their order.
DEVICE void leavePartial(const float (&sums)[2][2][8], float* shared, int element, float* to) {
    constexpr int GROUPS = BACKWARD_THREADS / LANES;
    float* own = shared + threadIdx.x / LANES * HEAD_DIM + element;
    for (int kind = 0; kind < 2; kind++) {
        __syncthreads();
        if (element < HALF) {
            UNROLL for (int half = 0; half < 2; half++) UNROLL for (int i = 0; i < 8; i++) {
                own[half * HALF + i] = kind ? sums[1][half][i] : sums[0][half][i];
            }
        }
        __syncthreads();
        for (int d = threadIdx.x; d < HEAD_DIM; d += BACKWARD_THREADS) {
            float total = 0.0f;
            UNROLL for (int group = 0; group < GROUPS; group++) {
                total += shared[group * HEAD_DIM + d];
            }
            to[kind * HEAD_DIM + d] = total;
        }
    }
}

// byQkv may be qkv.
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 4)
        rotateBackward(const bf16* byQuery, const bf16* byKey, const bf16* byValue, const bf16* qkv, const bf16* bias,
                       const bf16* queryNorm, const bf16* keyNorm, float epsilon, const float* cosine, const float* sine,
                       const long long* positions, bf16* byQkv, float* partial, int heads, int kvHeads, int tokens) {
    followPredecessor();
    // The vectors of a stage: for each head two of the gradient, then two of qkv.
    __shared__ uint4 ring[2][BACKWARD_HEADS][4][BACKWARD_THREADS];
    int allHeads = heads + 2 * kvHeads, units = (allHeads + BACKWARD_HEADS - 1) / BACKWARD_HEADS;
    int element = 8 * (threadIdx.x % LANES);
    u32 first = blockIdx.x * (BACKWARD_THREADS / LANES), stride = gridDim.x * (BACKWARD_THREADS / LANES), end = tokens * units;

    // This thread's heads of a round: `unit` and those at a distance of all units. Tokens past the end are nobody's.
    struct Place {
        int token, unit;
    };
    auto fetch = [&](Place place, int stage) {
        bool within = place.token < tokens && element < HALF;
        UNROLL for (int n = 0; n < BACKWARD_HEADS; n++) {
            int head = place.unit + n * units, kvHead = head - heads;
            bool present = within && head < allHeads, isValue = kvHead >= kvHeads;
            const bf16* by = kvHead < 0 ? byQuery : isValue ? byValue : byKey;
            u32 row = kvHead < 0 ? place.token * heads + head : place.token * kvHeads + (isValue ? kvHead - kvHeads : kvHead);
            by += row * HEAD_DIM + element;
            const bf16* input = qkv + (u32) (place.token * allHeads + head) * HEAD_DIM + element;
            UNROLL for (int half = 0; half < 2; half++) {
                copyAsync16(sharedAddress(&ring[stage][n][half][threadIdx.x]), by + half * HALF, present);
                if (queryNorm) {
                    copyAsync16(sharedAddress(&ring[stage][n][2 + half][threadIdx.x]), input + half * HALF, present && !isValue);
                }
            }
        }
        commitCopies();
        return cosine && within ? positions[place.token] : 0;
    };

    float sums[2][2][8];  // for queries and keys
    UNROLL for (int i = 0; i < 8; i++) {
        sums[0][0][i] = sums[0][1][i] = sums[1][0][i] = sums[1][1][i] = 0.0f;
    }
    int tokenStep = stride / units, unitStep = stride % units;
    u32 mine = first + threadIdx.x / LANES;
    Place place = {(int) (mine / units), (int) (mine % units)};
    long long position = fetch(place, 0);
    int stage = 0;
    for (u32 index = first; index < end; index += stride, stage ^= 1) {
        Place next = {place.token + tokenStep, place.unit + unitStep};
        if (next.unit >= units) {
            next = {next.token + 1, next.unit - units};
        }
        long long nextPosition = fetch(next, stage ^ 1);
        bool within = place.token < tokens && element < HALF;
        float c[8], s[8];
        if (cosine && within) {
            loadFactors(c, cosine + position * HALF + element);
            loadFactors(s, sine + position * HALF + element);
        }
        waitCopies<1>();
        UNROLL for (int n = 0; n < BACKWARD_HEADS; n++) {
            int head = place.unit + n * units;
            bool present = within && head < allHeads, isQuery = head < heads, isValue = head >= heads + kvHeads;
            float g[2][8];
            UNROLL for (int half = 0; half < 2; half++) {
                unpack(g[half], ring[stage][n][half][threadIdx.x]);
            }
            if (cosine && present && !isValue) {
                UNROLL for (int i = 0; i < 8; i++) {
                    float a = g[0][i], b = g[1][i];
                    g[0][i] = a * c[i] + b * s[i];
                    g[1][i] = b * c[i] - a * s[i];
                }
            }
            if (queryNorm && __any_sync(0xffffffffu, present && !isValue)) {
                float u[2][8], w[2][8], along = 0.0f;
                const bf16* weight = (isQuery ? queryNorm : keyNorm) + element;
                UNROLL for (int half = 0; half < 2; half++) {
                    unpack(u[half], ring[stage][n][2 + half][threadIdx.x]);
                    unpack(w[half], present ? load(weight + half * HALF) : zeros());
                    if (bias && present) {
                        add(u[half], load(bias + head * HEAD_DIM + element + half * HALF));
                    }
                    UNROLL for (int i = 0; i < 8; i++) {
                        along += g[half][i] * w[half][i] * u[half][i];
                    }
                }
                float factor = rsqrtf(laneSum(squaresOf(u)) / HEAD_DIM + epsilon);
                float slope = laneSum(along) * factor / HEAD_DIM;
                if (present && !isValue) {
                    UNROLL for (int half = 0; half < 2; half++) UNROLL for (int i = 0; i < 8; i++) {
                        u[half][i] *= factor;
                        if (isQuery) {
                            sums[0][half][i] += g[half][i] * u[half][i];
                        } else {
                            sums[1][half][i] += g[half][i] * u[half][i];
                        }
                        g[half][i] = factor * (g[half][i] * w[half][i] - u[half][i] * slope);
                    }
                }
            }
            if (present) {
                bf16* to = byQkv + (u32) (place.token * allHeads + head) * HEAD_DIM + element;
                store(to, pack(g[0]));
                store(to + HALF, pack(g[1]));
            }
        }
        place = next;
        position = nextPosition;
    }
    waitCopies<0>();
    if (queryNorm) {
        leavePartial(sums, reinterpret_cast<float*>(ring), element, partial + (long long) blockIdx.x * 2 * HEAD_DIM);
    }
}
