// Residual sums and norms in training, forward and backward. Memory bandwidth is the limit: each kernel reads its inputs once, in
// 16-byte vectors, and writes each output once. Storage is bfloat16, arithmetic and statistics float32. The backward pass computes
// the norm's result anew, which the weight gradient of the product behind it needs: the same bits, so that none need be kept.
//
// With g = dL/dy of the result y, and mean(.) over the E elements of a row, sum_t over the tokens:
//   RMSNorm (Zhang and Sennrich 2019)    y = xhat w,       xhat = x r,         r = (mean(x^2) + epsilon)^(-1/2)
//       dL/dx = r (g w - xhat mean(g w xhat))                        dL/dw = sum_t g xhat
//   LayerNorm (Ba et al. 2016)           y = xhat w + b,   xhat = (x - m) r,   r = (mean((x - m)^2) + epsilon)^(-1/2),  m = mean(x)
//       dL/dx = r (g w - mean(g w) - xhat mean(g w xhat))            dL/dw = sum_t g xhat,   dL/db = sum_t g
//
// Sums over tokens have two stages, without atomics: every block adds up the rows that it treats, in their order, in registers, and
// leaves one row of `partial`; sumPartials (train_layer.cu) adds those. All bits depend on sizes and grids alone; those of a row's
// results on the row alone.
//
// Launches, for T tokens; E is a multiple of 8, at most 16,384 (normBackward with LAYER_NORM: 10,240), T E < 2^32; pointers aligned
// to 16 bytes. A row belongs to the threads of one threadIdx.y.
//   normForward    lanes = 32 ceil(E / 1024), y = max(1, 128 / lanes) or another with lanes y <= 512;
//                  block (lanes, y), grid ceil(T / y)
//   normBackward   lanes = 32 ceil(E / 1024), with LAYER_NORM 32 ceil(E / 512); y = 512 / lanes, with LAYER_NORM 640 / lanes,
//                  rounded down: a block fills a multiprocessor; block (lanes, y), grid P = min(multiprocessors, T)
// Bytes moved, besides statistics
//   normForward    T E (4, with an addend 8)
//   normBackward   T E (6 + 2 for byResidual + 2 for normed) + 4 P E: partials of 2 MB for E = 4,096 on 132 multiprocessors
//
// Macro: LAYER_NORM 0 RMSNorm, 1 LayerNorm.

#include "vectors.cuh"

#ifndef LAYER_NORM
#define LAYER_NORM 0
#endif

// 16-byte vectors of a row that a thread holds in registers; in the backward pass, where it holds their sums, too, with two sums
// for an element half as many. BACKWARD_THREADS of a block then have registers enough.
#define VECTORS 4
#define BACKWARD_VECTORS (LAYER_NORM ? 2 : 4)
#define BACKWARD_THREADS (LAYER_NORM ? 640 : 512)
// Vector k of this thread begins at element i of its row; those past the end are left out.
#define FOR_VECTORS(count) UNROLL for (int k = 0, i = 8 * threadIdx.x; k < count; k++, i += 8 * blockDim.x) if (i < width)

#if LAYER_NORM
typedef float2 Statistics;  // m, r
DEVICE float meanOf(float2 statistics) { return statistics.x; }
DEVICE float factorOf(float2 statistics) { return statistics.y; }
#else
typedef float Statistics;  // r
DEVICE float meanOf(float) { return 0.0f; }
DEVICE float factorOf(float statistics) { return statistics; }
#endif

// A barrier among the threads of this row only: rows of a block need not wait for each other.
DEVICE void meetRow() { asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.y), "r"(blockDim.x) : "memory"); }

// Sums over the threads of a row, in an order that depends only on how many they are. `parts`: one for each warp of the block.
template <int count>
DEVICE void rowSums(float (&x)[count], float (*parts)[2]) {
    UNROLL for (int j = 0; j < count; j++) {
        x[j] = warpSum(x[j]);
    }
    if (blockDim.x > 32) {
        int warps = blockDim.x / 32, first = threadIdx.y * warps;
        UNROLL for (int j = 0; j < count; j++) {
            parts[first + threadIdx.x / 32][j] = x[j];  // all lanes write the same
        }
        meetRow();
        UNROLL for (int j = 0; j < count; j++) {
            x[j] = 0.0f;
            for (int warp = 0; warp < warps; warp++) {
                x[j] += parts[first + warp][j];
            }
        }
    }
}

DEVICE void loadAffine(float (&w)[8], const bf16* weight, int i) {
    unpack(w, weight ? load(weight + i) : make_uint4(0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80));
}

// y = xhat w + b. Forward and backward pass round it in the same place.
DEVICE uint4 normedVector(const float (&xhat)[8], const float (&w)[8], const bf16* bias, int i) {
    float b[8], y[8];
    unpack(b, bias ? load(bias + i) : zeros());
    UNROLL for (int j = 0; j < 8; j++) {
        y[j] = fmaf(xhat[j], w[j], b[j]);
    }
    return pack(y);
}

// normed [T][E] = norm(s) and statistics [T], for s = x [T][E] or, if addend [T][E] is given, sum [T][E] = bf16(x + addend). sum
// may be x or addend. weight, bias [E]: null for none (RMSNorm has no bias).
extern "C" __global__ void __launch_bounds__(512)
        normForward(const bf16* x, const bf16* addend, bf16* sum, const bf16* weight, const bf16* bias, bf16* normed,
                    Statistics* statistics, int width, float epsilon, int tokens) {
    followPredecessor();
    __shared__ float parts[2][16][2];
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= tokens) {
        return;
    }
    u32 at = (u32) row * width;
    uint4 vectors[VECTORS], change[VECTORS];
    FOR_VECTORS(VECTORS) {
        vectors[k] = load(x + at + i);
        change[k] = addend ? load(addend + at + i) : zeros();
    }
    float total[1] = {0.0f};
    FOR_VECTORS(VECTORS) {
        float s[8];
        unpack(s, vectors[k]);
        if (addend) {
            add(s, change[k]);
            vectors[k] = pack(s);
            store(sum + at + i, vectors[k]);
        }
        total[0] += ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    }
    float mean = 0.0f;
    if (LAYER_NORM) {
        rowSums(total, parts[0]);
        mean = total[0] / width;
    }
    float squares[1] = {0.0f};
    FOR_VECTORS(VECTORS) {
        float s[8];
        unpack(s, vectors[k]);
        UNROLL for (int j = 0; j < 8; j++) {
            squares[0] += (s[j] - mean) * (s[j] - mean);
        }
    }
    rowSums(squares, parts[1]);
    float factor = rsqrtf(squares[0] / width + epsilon);
    FOR_VECTORS(VECTORS) {
        float xhat[8], w[8];
        unpack(xhat, vectors[k]);
        loadAffine(w, weight, i);
        UNROLL for (int j = 0; j < 8; j++) {
            xhat[j] = (xhat[j] - mean) * factor;
        }
        store(normed + at + i, normedVector(xhat, w, bias, i));
    }
    if (threadIdx.x == 0) {
#if LAYER_NORM
        statistics[row] = make_float2(mean, factor);
#else
        statistics[row] = factor;
#endif
    }
}

// to [width] = the sums of all rows of the block, which meet through shared memory a vector of each thread at a time.
DEVICE void leavePartial(const float (&sums)[BACKWARD_VECTORS][8], float* to, int width) {
    __shared__ float4 shared[2 * BACKWARD_THREADS];
    const float* elements = reinterpret_cast<const float*>(shared);
    int thread = threadIdx.y * blockDim.x + threadIdx.x, line = 8 * blockDim.x;
    UNROLL for (int k = 0; k < BACKWARD_VECTORS; k++) {
        __syncthreads();
        shared[2 * thread] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
        shared[2 * thread + 1] = make_float4(sums[k][4], sums[k][5], sums[k][6], sums[k][7]);
        __syncthreads();
        for (int column = thread; column < line && k * line + column < width; column += blockDim.x * blockDim.y) {
            float total = 0.0f;
            for (int y = 0; y < blockDim.y; y++) {
                total += elements[y * line + column];
            }
            to[k * line + column] = total;
        }
    }
}

// byInput [T][E] = dL/dx + byResidual [T][E] (null: none) from byNormed [T][E], x [T][E], the norm's input (sum, if there was an
// addend), and its statistics [T]; normed [T][E], unless null, once more. partial [P][E] (LAYER_NORM: [P][2 E], of weight, then
// bias), unless null, receives the blocks' sums for the gradients. byInput may be byResidual, byNormed or x.
extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, 1)
        normBackward(const bf16* byNormed, const bf16* x, const bf16* weight, const bf16* bias, const Statistics* statistics,
                     const bf16* byResidual, bf16* byInput, bf16* normed, float* partial, int width, int tokens) {
    followPredecessor();
    __shared__ float parts[2][BACKWARD_THREADS / 32][2];  // taken in turn, so that one meeting for each row is enough
    float weightSums[BACKWARD_VECTORS][8], biasSums[BACKWARD_VECTORS][8];
    UNROLL for (int k = 0; k < BACKWARD_VECTORS; k++) UNROLL for (int j = 0; j < 8; j++) {
        weightSums[k][j] = biasSums[k][j] = 0.0f;
    }
    int turn = 0;
    // Dealt to the blocks first, so that few rows are spread over all of them.
    for (int first = blockIdx.x; first < tokens; first += gridDim.x * blockDim.y, turn ^= 1) {
        int row = first + threadIdx.y * gridDim.x;
        if (row >= tokens) {  // compute-sanitizer's racecheck takes warps that came to unequally many barriers to be unordered later
            if (blockDim.x > 32) {
                meetRow();
            }
            continue;
        }
        u32 at = (u32) row * width;
        uint4 input[BACKWARD_VECTORS], gradient[BACKWARD_VECTORS], residual[BACKWARD_VECTORS];
        FOR_VECTORS(BACKWARD_VECTORS) {
            input[k] = load(x + at + i);
            gradient[k] = load(byNormed + at + i);
            residual[k] = byResidual ? load(byResidual + at + i) : zeros();
        }
        float mean = meanOf(statistics[row]), factor = factorOf(statistics[row]);
        float sums[1 + LAYER_NORM] = {};  // of g w xhat; of g w
        FOR_VECTORS(BACKWARD_VECTORS) {
            float xhat[8], g[8], w[8];
            unpack(xhat, input[k]);
            unpack(g, gradient[k]);
            loadAffine(w, weight, i);
            UNROLL for (int j = 0; j < 8; j++) {
                xhat[j] = (xhat[j] - mean) * factor;
                weightSums[k][j] += g[j] * xhat[j];
                biasSums[k][j] += g[j];
                sums[0] += g[j] * w[j] * xhat[j];
                sums[LAYER_NORM] += LAYER_NORM ? g[j] * w[j] : 0.0f;
            }
        }
        rowSums(sums, parts[turn]);
        float slope = sums[0] / width, shift = LAYER_NORM ? sums[LAYER_NORM] / width : 0.0f;
        FOR_VECTORS(BACKWARD_VECTORS) {
            float xhat[8], g[8], w[8], change[8];
            unpack(xhat, input[k]);
            unpack(g, gradient[k]);
            unpack(change, residual[k]);
            loadAffine(w, weight, i);
            UNROLL for (int j = 0; j < 8; j++) {
                xhat[j] = (xhat[j] - mean) * factor;
                change[j] += factor * (g[j] * w[j] - shift - xhat[j] * slope);
            }
            store(byInput + at + i, pack(change));
            if (normed) {
                store(normed + at + i, normedVector(xhat, w, bias, i));
            }
        }
    }
    if (partial) {
        float* to = partial + (long long) blockIdx.x * (1 + LAYER_NORM) * width;
        leavePartial(weightSums, to, width);
        if (LAYER_NORM) {
            leavePartial(biasSums, to + width, width);
        }
    }
}
