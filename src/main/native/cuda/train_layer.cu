// Activations in training, forward and backward, and sums over tokens, for the gradients of biases and norm weights. Memory
// bandwidth is the limit: each kernel reads its inputs once, in 16-byte vectors, and writes each output once. Storage is bfloat16,
// arithmetic float32. The backward pass computes the activation anew, which the weight gradient of the product behind it needs: the
// same bits, so that none need be kept.
//
// With g = dL/dy of the result y:
//   gated (Shazeer 2020)   y = act(a) u:   dL/da = g u act'(a),  dL/du = g act(a);     otherwise   y = act(a):   dL/da = g act'(a)
//   SiLU           act = a s,  s = 1 / (1 + exp(-a))                  act' = s (1 + a (1 - s))
//   GELU           act = a Phi(a), of the normal distribution         act' = Phi(a) + a phi(a)
//   GELU by tanh   act = a (1 + t) / 2,  t = tanh(k (a + c a^3))      act' = (1 + t) / 2 + a (1 - t^2) k (1 + 3 c a^2) / 2
//
// Sums over tokens have two stages, without atomics: every block adds up the rows that it treats, in their order, and leaves one
// row of `partial`; sumPartials adds those. The order, and with it each bit, depends on sizes and grids alone.
//
// Launches, for T tokens; widths are multiples of 8, pointers aligned to 16 bytes (`into` of sumPartials: 4)
//   gatedForward, gatedBackward   block 256, grid ceil(T I / 4096)
//   columnSums     block (32, 8), grid (strips, P): strips = ceil(N / 256), P = min(ceil(T / 32), ceil(4 multiprocessors / strips))
//   sumPartials    block (8, 32), grid ceil(columns / 32)
// Bytes moved
//   gatedForward   T I 6, ungated 4                     gatedBackward  T I (10 + 2 for activated), ungated T I (6 + 2)
//   columnSums     2 T N + 4 P N                        sumPartials    4 P columns
//
// Macros: GATED 1: act(gate) * up; ACTIVATION 0 SiLU, 1 ReLU, 2 GELU, 3 GELU by tanh; ROUND_STEPS 1 rounds act(gate) before the
// multiplication, as layer.cu does by default.

#include "vectors.cuh"

#ifndef GATED
#define GATED 1
#endif
#ifndef ACTIVATION
#define ACTIVATION 0
#endif

// ---- activations -----------------------------------------------------------------------------------------------------------

// act(x), in layer.cu's form, and act'(x).
DEVICE float activation(float x, float& slope) {
    if (ACTIVATION == 0) {
        float divisor = 1.0f + __expf(-x), sigmoid = __fdividef(1.0f, divisor);
        slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
        return __fdividef(x, divisor);
    }
    if (ACTIVATION == 1) {
        slope = x > 0.0f ? 1.0f : 0.0f;
        return fmaxf(x, 0.0f);
    }
    if (ACTIVATION == 2) {
        float twice = 1.0f + erff(x * 0.70710678f);
        slope = 0.5f * twice + x * (0.39894228f * __expf(-0.5f * x * x));
        return 0.5f * x * twice;
    }
    float t = tanhf(0.79788456f * (x + 0.044715f * (x * x * x))), rest = 1.0f - t * t;
    slope = 0.5f * (1.0f + t) + (rest > 0.0f ? 0.5f * x * rest * (0.79788456f * (1.0f + 0.134145f * (x * x))) : 0.0f);
    return 0.5f * x * (1.0f + t);
}

// The eight columns of one vector, of gate and up; a matrix is taken as one line of vectors, whatever its shape.
struct Vector {
    int column;
    long long at[1 + GATED];  // in widened
};

DEVICE Vector vectorAt(u32 index, int width) {
    u32 perRow = width / 8, row = index / perRow;
    int column = 8 * (index - row * perRow);
    Vector v;
    v.column = column;
    UNROLL for (int part = 0; part < 1 + GATED; part++) {
        v.at[part] = ((long long) row * (1 + GATED) + part) * width + column;
    }
    return v;
}

// Gate and up, or the one that there is, with their bias.
DEVICE void preactivations(float (&x)[1 + GATED][8], const uint4 (&vectors)[1 + GATED], const bf16* bias, int column, int width) {
    UNROLL for (int part = 0; part < 1 + GATED; part++) {
        unpack(x[part], vectors[part]);
        if (bias) {
            add(x[part], load(bias + part * width + column));
        }
    }
}

// Two vectors for each thread.
#define FOR_PAIR UNROLL for (u32 k = 0, at = blockIdx.x * 512 + threadIdx.x; k < 2; k++, at += 256) if (at < end)

// GATED: widened [T][2 I], activated [T][I] = act(gate) * up; otherwise widened [T][I], activated = act(widened), may be in place.
// bias is as long as a row of widened; null: none.
extern "C" __global__ void __launch_bounds__(256)
        gatedForward(const bf16* widened, const bf16* bias, bf16* activated, int width, int tokens) {
    followPredecessor();
    u32 end = tokens * (u32) (width / 8);
    uint4 vectors[2][1 + GATED];
    Vector places[2];
    FOR_PAIR {
        places[k] = vectorAt(at, width);
        UNROLL for (int part = 0; part < 1 + GATED; part++) {
            vectors[k][part] = load(widened + places[k].at[part]);
        }
    }
    FOR_PAIR {
        float x[1 + GATED][8], slope;
        preactivations(x, vectors[k], bias, places[k].column, width);
        UNROLL for (int j = 0; j < 8; j++) {
            float y = activation(x[0][j], slope);
            x[0][j] = GATED ? stored(y) * x[GATED][j] : y;
        }
        store(activated + (long long) at * 8, pack(x[0]));
    }
}

// byWidened, shaped as widened, from byActivated [T][I] and widened (before the bias); activated [T][I], unless null, once more.
// byWidened may be widened; when not GATED it may be byActivated.
extern "C" __global__ void __launch_bounds__(256)
        gatedBackward(const bf16* widened, const bf16* bias, const bf16* byActivated, bf16* byWidened, bf16* activated, int width,
                      int tokens) {
    followPredecessor();
    u32 end = tokens * (u32) (width / 8);
    uint4 vectors[2][1 + GATED], gradients[2];
    Vector places[2];
    FOR_PAIR {
        places[k] = vectorAt(at, width);
        UNROLL for (int part = 0; part < 1 + GATED; part++) {
            vectors[k][part] = load(widened + places[k].at[part]);
        }
        gradients[k] = load(byActivated + (long long) at * 8);
    }
    FOR_PAIR {
        float x[1 + GATED][8], g[8], y[8];
        preactivations(x, vectors[k], bias, places[k].column, width);
        unpack(g, gradients[k]);
        UNROLL for (int j = 0; j < 8; j++) {
            float slope, act = activation(x[0][j], slope), up = GATED ? x[GATED][j] : 1.0f;
            y[j] = GATED ? stored(act) * up : act;
            x[GATED][j] = g[j] * act;
            x[0][j] = g[j] * up * slope;
        }
        UNROLL for (int part = 0; part < 1 + GATED; part++) {
            store(byWidened + places[k].at[part], pack(x[part]));
        }
        if (activated) {
            store(activated + (long long) at * 8, pack(y));
        }
    }
}

// ---- sums over tokens ------------------------------------------------------------------------------------------------------

// partial [P][N]: of the rows of x [T][N], block y has added those of number 8 y to 8 y + 7 modulo 8 P.
extern "C" __global__ void __launch_bounds__(256) columnSums(const bf16* x, float* partial, int width, int tokens) {
    followPredecessor();
    constexpr int AT_ONCE = 4;
    __shared__ float shared[8][256 + 8];
    int column = 256 * blockIdx.x + 8 * threadIdx.x, stride = 8 * gridDim.y;
    float sums[8] = {};
    if (column < width) {
        for (int row = 8 * blockIdx.y + threadIdx.y; row < tokens; row += AT_ONCE * stride) {
            uint4 vectors[AT_ONCE];
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                int other = row + k * stride;
                vectors[k] = other < tokens ? load(x + (long long) other * width + column) : zeros();
            }
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                float y[8];
                unpack(y, vectors[k]);
                UNROLL for (int j = 0; j < 8; j++) {
                    sums[j] += y[j];
                }
            }
        }
    }
    UNROLL for (int j = 0; j < 8; j++) {
        shared[threadIdx.y][8 * threadIdx.x + j] = sums[j];
    }
    __syncthreads();
    int own = 32 * threadIdx.y + threadIdx.x;
    float total = 0.0f;
    UNROLL for (int y = 0; y < 8; y++) {
        total += shared[y][own];
    }
    if (256 * blockIdx.x + own < width) {
        partial[(long long) blockIdx.y * width + 256 * blockIdx.x + own] = total;
    }
}

// into [columns] = (accumulate: +=) the sums of `rows` rows of partial, each `columns` long and `stride` after the one before; both
// multiples of 4. Thread y adds rows y, y + 32, ... in order, then the 32 parts are added in theirs.
extern "C" __global__ void __launch_bounds__(256)
        sumPartials(const float* partial, int rows, int stride, float* into, int columns, int accumulate) {
    followPredecessor();
    constexpr int AT_ONCE = 8;
    __shared__ float4 shared[32][8];
    int column = 32 * blockIdx.x + 4 * threadIdx.x;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (column < columns) {
        for (int row = threadIdx.y; row < rows; row += 32 * AT_ONCE) {
            float4 four[AT_ONCE];
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                int other = row + 32 * k;
                four[k] = other < rows ? *reinterpret_cast<const float4*>(partial + (long long) other * stride + column)
                                       : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                sum = make_float4(sum.x + four[k].x, sum.y + four[k].y, sum.z + four[k].z, sum.w + four[k].w);
            }
        }
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    int own = 8 * threadIdx.y + threadIdx.x;
    if (own < 32 && 32 * blockIdx.x + own < columns) {
        float* to = into + 32 * blockIdx.x + own;
        float total = 0.0f;
        for (int y = 0; y < 32; y++) {
            total += reinterpret_cast<const float*>(shared[y])[own];
        }
        *to = accumulate ? *to + total : total;
    }
}
