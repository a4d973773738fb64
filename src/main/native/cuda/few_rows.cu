// Products of one to four rows with a weight matrix, out = x weight^T: decoding for very few sequences, where reading the weights
// once at the memory's speed is all there is.
//
// The kernels of a layer are so short (1 to 10 microseconds) that the time to the first weight counts as much as the rate after
// it. By Little's law the rate itself needs some 32 KB under way per multiprocessor. So the work is cut such that most products
// are a single wave of CTAs which ask for all of their share of the matrix in their first instructions, and only then for x.
//
// Work. A tile is 8 weight rows (8 gate rows and the 8 up rows that belong to them, in multiplyGated). The warps of a CTA share
// its k among them: in a step a warp takes LOADS 16-byte vectors per lane, 4 KB, from
//   multiply, multiplyToFloat   8 rows x 256 elements of k,        multiplyGated   16 rows x 128 elements,
// and the steps are dealt to the warps round robin. A CTA takes tiles at the stride of the grid. The registers of a step that has
// been multiplied are refilled for the next one, of whichever tile, before the warps meet to add up their parts.
//
// Arithmetic. Even a few rows would cost more instructions than a multiprocessor has time for if each weight were converted and
// multiplied on its own, so the tensor cores do it (m16n8k16, bfloat16 in, float32 out), with the rows of x as columns of B. A lane's
// vector is used as it comes from memory: four lanes hold 32 consecutive elements of one weight row, a vector being (x, y, z, w) of
// two elements each. As fragment A this is [16 x 16], whose row g has the elements x and z of weight row g, and row g + 8 has y and
// w. One product with the x and z of the input is right in the upper 8 rows and the other, with y and w, in the lower 8; the other
// half of each accumulator is ignored. Any order of k is as good as another if both factors have the same, so the weights are never
// moved between registers. B has eight columns for at most four rows: in multiply its columns 0-3 hold the part of x for one vector
// and columns 4-7 that for the next, which has accumulators of its own. It halves the registers of x; multiplyGated has few anyway.
//
// What a row of x yields does not depend on its neighbours: the bits are the same for all ROWS and all grids. The split depends
// on k alone (and on LOADS, MAX_WARPS), and the warps' parts are added in their order.
//
// The RMS norm before a product costs no kernel: multiplyAdded adds its result to the residual stream, multiplies the sum by the norm's
// weight, and leaves sums of squares of 8 columns each; multiply and multiplyGated take these rows and multiply their own sums by the
// row's factor (Norm). What they need for it is asked for before the products begin and looked at when they are done.
//
// Layouts, all row-major: x [ROWS][k], aligned to 16 bytes; weight [n][k] (multiplyGated: [2 n][k], the gates first), likewise; out
// [ROWS][outStride] of which n columns are written (multiplyGated: [ROWS][n]). k is a multiple of 8, n any number. The host pads
// rows up to ROWS; what the padding holds is indifferent to the others.
//
// Launch. Per step STEP = 256 elements of k (multiplyGated: 128),
//   steps = ceil(k / STEP), warps = ceil(steps / ceil(steps / 12)): block 32 * warps, no dynamic shared memory;
//   tiles = ceil(n / 8), resident = multiprocessors * floor(24 / warps): grid ceil(tiles / ceil(tiles / resident)).
// Another grid gives the same bits, another block need not. ROWS is 1, 2 or 4.
//
// DEPENDENT_LAUNCH 1 (sm_90): for launches with the attribute of programmatic stream serialization. Weights are asked for while
// the preceding kernel still runs, so they must have been written before that one began; x is awaited, as is the moment to write.

#include "common.cuh"

#ifndef ROWS
#define ROWS 1
#endif
#ifndef LOADS
#define LOADS 8  // vectors of weights under way per lane
#endif
#ifndef MAX_WARPS
#define MAX_WARPS 12  // of a CTA, two of which fit a multiprocessor
#endif
#ifndef ROUND_STEPS
#define ROUND_STEPS 1  // multiplyGated rounds where libtorch's separate operations do (layer.cu)
#endif
#ifndef DEPENDENT_LAUNCH
#define DEPENDENT_LAUNCH 0
#endif
#ifndef L2_PREFETCH
#define L2_PREFETCH 128  // 64, 128 or 256 bytes; a request has 64 of each row, the next one the other half of the lines
#endif

static_assert(ROWS == 1 || ROWS == 2 || ROWS == 4, "B has eight columns for two copies of the rows");
static_assert(LOADS % 2 == 0, "shared by two groups, or taken in pairs");

#define UNROLL _Pragma("unroll")
#define TEXT(x) #x
#define PREFETCH(bytes) ".L2::" TEXT(bytes) "B"

DEVICE float stored(float x) { return ROUND_STEPS ? roundBf16(x) : x; }

// 16 bytes that nobody will read again, past the L1 cache.
DEVICE uint4 stream(const bf16* from) {
    uint4 vector;
    asm volatile("ld.global.nc.L1::no_allocate" PREFETCH(L2_PREFETCH) ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w) : "l"(from));
    return vector;
}

DEVICE void startDependents() {
#if DEPENDENT_LAUNCH && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What comes before is not moved behind: the weights' loads are to be issued first in either case.
DEVICE void awaitPreceding() {
#if DEPENDENT_LAUNCH && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#else
    asm volatile("" ::: "memory");
#endif
}

// The lane's vectors of a step, `distance` elements apart; zeros from the element `left` on.
template <bool once, int distance, int vectors>
DEVICE void load(uint4 (&to)[vectors], const bf16* from, int left) {
    UNROLL for (int i = 0; i < vectors; i++) {
        to[i] = make_uint4(0, 0, 0, 0);
        if (distance * i < left) {
            const bf16* at = from + distance * i;
            to[i] = once ? stream(at) : *reinterpret_cast<const uint4*>(at);
        }
    }
}

// The norm of the rows of x, which come times its weight but not times its factor: that is one number for a row, and multiplies its sums.
struct Norm {
    const float* squares;  // [ROWS][k / 8], sums of squares of 8 elements each, at most two for each thread; null: there is no norm
    float epsilon;
};

// Calls finish(row, column, sums, ahead) for each element of out, sums [GROUPS] being its products with weight rows column and, if GROUPS
// is 2, n + column, and ahead what ask(row, column) gave before the products began.
template <int GROUPS, typename Ask, typename Finish>
DEVICE void multiplyTiles(const bf16* x, const bf16* weight, int k, int n, Norm norm, Ask ask, Finish finish) {
    const int VECTORS = LOADS / GROUPS, STEP = 32 * VECTORS;
    const int CHAINS = 2 / GROUPS;  // vectors whose parts of x share B
    const int WHOLE = 1 << 30;
    __shared__ float partials[2][MAX_WARPS][GROUPS][ROWS][8], squares[MAX_WARPS][ROWS];
    int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int tiles = (n + 7) / 8, first = warp * STEP;

    uint4 weights[GROUPS][VECTORS];
    auto loadWeights = [&](int tile, int from) {
        UNROLL for (int group = 0; group < GROUPS; group++) {
            int row = min(tile * 8 + g, n - 1) + group * n;
            const bf16* at = weight + (long long) row * k + from + 8 * t;
            if (from + STEP <= k) {
                load<true, 32>(weights[group], at, WHOLE);
            } else {
                load<true, 32>(weights[group], at, k - from - 8 * t);
            }
        }
    };

    startDependents();
    if (blockIdx.x < tiles) {
        loadWeights(blockIdx.x, first);
    }
    awaitPreceding();
    // Columns of B without a row are ignored: copies of others, they cost no memory access.
    int start = 32 * (g * CHAINS / 8) + 8 * t;
    const bf16* input = x + g % ROWS * k + start;
    float early[ROWS][2], factor = 1.0f;
    UNROLL for (int row = 0; row < ROWS; row++) UNROLL for (int j = 0; j < 2; j++) {
        int i = threadIdx.x + j * blockDim.x;
        early[row][j] = norm.squares && i < k / 8 ? norm.squares[row * (k / 8) + i] : 0.0f;
    }
    for (int tile = blockIdx.x, buffer = 0; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        int row = threadIdx.x / 8, column = tile * 8 + threadIdx.x % 8;
        bool finishes = row < ROWS && column < n;
        decltype(ask(0, 0)) ahead = {};
        if (finishes) {
            ahead = ask(row, column);
        }
        float c[GROUPS][CHAINS][2][4] = {};
        for (int from = first; from < k; from += warps * STEP) {
            uint4 part[VECTORS / CHAINS];
            if (from + STEP <= k) {
                load<false, 32 * CHAINS>(part, input + from, WHOLE);
            } else {
                load<false, 32 * CHAINS>(part, input + from, k - from - start);
            }
            UNROLL for (int i = 0; i < VECTORS; i++) UNROLL for (int group = 0; group < GROUPS; group++) {
                uint4 v = weights[group][i];
                u32 a[4] = {v.x, v.y, v.z, v.w};
                multiplyAdd(c[group][i % CHAINS][0], a, part[i / CHAINS].x, part[i / CHAINS].z);
                multiplyAdd(c[group][i % CHAINS][1], a, part[i / CHAINS].y, part[i / CHAINS].w);
            }
            bool last = from + warps * STEP >= k;
            int nextTile = last ? tile + gridDim.x : tile;
            if (nextTile < tiles) {
                loadWeights(nextTile, last ? first : from + warps * STEP);
            }
        }
        // The lane's columns are 2 t and 2 t + 1; with two chains the second one's are four further on.
        UNROLL for (int group = 0; group < GROUPS; group++) UNROLL for (int j = 0; j < 2; j++) {
            float sum = c[group][0][0][j] + c[group][0][1][2 + j];
            if (CHAINS == 2) {
                float other = c[group][CHAINS - 1][0][j] + c[group][CHAINS - 1][1][2 + j];
                sum += __shfl_xor_sync(0xffffffffu, other, 2);
            }
            if (2 * t + j < ROWS) {
                partials[buffer][warp][group][2 * t + j][g] = sum;
            }
        }
        if (norm.squares && tile == blockIdx.x) {
            UNROLL for (int i = 0; i < ROWS; i++) {
                float sum = warpSum(early[i][0] + early[i][1]);
                if (threadIdx.x % 32 == 0) {
                    squares[warp][i] = sum;
                }
            }
        }
        // One barrier per tile suffices: the buffer is written again only after the next tile's.
        __syncthreads();
        if (norm.squares && tile == blockIdx.x && row < ROWS) {
            float sum = 0.0f;
            UNROLL for (int i = 0; i < MAX_WARPS; i++) if (i < warps) {
                sum += squares[i][row];
            }
            factor = rsqrtf(sum / k + norm.epsilon);
        }
        if (finishes) {
            float sums[GROUPS] = {};
            UNROLL for (int i = 0; i < MAX_WARPS; i++) UNROLL for (int group = 0; group < GROUPS; group++) if (i < warps) {
                sums[group] += partials[buffer][i][group][row][threadIdx.x % 8];
            }
            UNROLL for (int group = 0; group < GROUPS; group++) {
                sums[group] *= factor;
            }
            finish(row, column, sums, ahead);
        }
    }
}

struct Nothing {};
DEVICE Nothing askNothing(int, int) { return {}; }

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
        multiply(const bf16* x, const bf16* weight, bf16* out, int k, int n, int outStride, const float* squares, float normEpsilon) {
    multiplyTiles<1>(x, weight, k, n, {squares, normEpsilon}, askNothing, [&](int row, int column, const float (&sums)[1], Nothing) {
        out[(long long) row * outStride + column] = toBf16(sums[0]);
    });
}

// For logits.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
        multiplyToFloat(const bf16* x, const bf16* weight, float* out, int k, int n, long long outStride) {
    multiplyTiles<1>(x, weight, k, n, {}, askNothing, [&](int row, int column, const float (&sums)[1], Nothing) {
        out[row * outStride + column] = sums[0];
    });
}

// out = silu(gate) * up.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
        multiplyGated(const bf16* x, const bf16* weight, bf16* out, int k, int n, const float* squares, float normEpsilon) {
    multiplyTiles<2>(x, weight, k, n, {squares, normEpsilon}, askNothing, [&](int row, int column, const float (&sums)[2], Nothing) {
        float gate = stored(sums[0]), up = stored(sums[1]);
        out[(long long) row * n + column] = toBf16(stored(__fdividef(gate, 1.0f + __expf(-gate))) * up);
    });
}

// residual [ROWS][n] += x weight^T, n a multiple of 8. norm [n] null: no more. Else scaled [ROWS][n] = residual * norm, and sums of squares
// of residual go to squares [ROWS][n / 8].
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS, 2)
        multiplyAdded(const bf16* x, const bf16* weight, bf16* residual, int k, int n, const bf16* norm, bf16* scaled, float* squares) {
    multiplyTiles<1>(
            x, weight, k, n, {},
            [&](int row, int column) {
                return make_float2(toFloat(residual[row * n + column]), norm ? toFloat(norm[column]) : 0.0f);
            },
            [&](int row, int column, const float (&sums)[1], float2 ahead) {
                float sum = roundBf16(ahead.x + roundBf16(sums[0]));
                residual[row * n + column] = toBf16(sum);
                if (norm) {
                    scaled[row * n + column] = toBf16(sum * ahead.y);
                    float square = sum * sum;
                    UNROLL for (int offset = 4; offset > 0; offset /= 2) {
                        square += __shfl_xor_sync(0xffffffffu >> (32 - 8 * ROWS), square, offset);
                    }
                    if (column % 8 == 0) {
                        squares[row * (n / 8) + column / 8] = square;
                    }
                }
            });
}
