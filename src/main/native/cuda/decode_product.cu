// Products of the rows of a decoding step, some 8 to 256, with a weight matrix on sm_90:
// out[rows, n] = x[rows, k] weight[n, k]^T, bfloat16 in, float32 sums. (few_rows.cu has the same for one to four rows.)
//
// Such a product takes 2 to 70 microseconds and is bounded by the weights' bytes and the tensor cores at about the same time,
// so what is lost at its ends counts: the launch, the first loads, multiprocessors without a tile. Hence
//   - the weight rows are the M of WGMMA, 64 for each warpgroup, and the rows of x its N, which may be any multiple of 8 up to
//     256;
//   - a producing thread fills a ring of stages by TMA (64 elements of k: the 128 bytes of the swizzle), 1 to 3 warpgroups
//     consume it, each with the products of one stage under way while the next is awaited (warp specialisation, as in CUTLASS);
//   - the kernel is launched while the preceding one still runs (programmatic dependent launch): the weights' part of the ring
//     is asked for at once, x only after griddepcontrol.wait. Weights must not be written by kernels before this one in the
//     stream;
//   - where tiles are too few for the device, SPLIT CTAs of a cluster share the k of a tile. Each sends its sums to the CTAs
//     that finish them, every SPLIT-th of the rows each, through distributed shared memory; they are added in the order of k;
//   - with SPLIT 1 a CTA goes on with further tiles, whose loads run under the epilogue of the last one.
//
// A row's result depends on nothing but that row: the order of the sums is given by k and SPLIT, not by ROWS, TILE or the grid.
//
// Epilogue. A lane has four sums of every eight rows: weight rows g and g + 8 of the warp's 16, g = lane / 4, and rows of x 2
// (lane % 4) and the next. This is the transpose of what memory wants, and goes through a buffer of the warpgroup to 16-byte
// stores. In multiplyGated the map of the weights interleaves eight gate rows with the eight up rows that belong to them, so
// that a lane has both.
//
// multiplyRotated goes on from the transposed sums with what rotateAndWrite of layer.cu does to queries, keys and values, and yields
// its bits; the step saves a kernel. A tile holds whole heads, whose warpgroups share a buffer. All that the epilogue reads beside the
// sums is under way before these are there: warps that have nothing else to do look up each row's page and have its cosines and sines
// brought to the L2 cache, and vectors are loaded to registers while the cluster exchanges sums. This kernel admits its successor only
// once its predecessor is complete, as decode attention, which follows, reads what kernels before this one wrote without waiting.
//
// The RMS norm before a product costs no kernel. multiplyAdded, the product before it, adds its result to the residual stream, multiplies
// the sum by the norm's weight, and leaves sums of squares of 64 columns each; the product after it takes these rows, and multiplies its
// own sums by the row's factor, which idle warps compute meanwhile (RowNorm). Partial sums are added in the order of columns.
//
// Layouts, row-major: weight [n][k] (multiplyGated [2 n][k], the gates first, n a multiple of 8), x [rows or more][k], both
// aligned to 16 bytes, k a multiple of 8; out [rows][outStride], of which n columns are written. multiplyRotated: see there.
//
// Tensor maps (cuTensorMapEncodeTiled), all bfloat16 with element strides of 1, no interleave, CU_TENSOR_MAP_SWIZZLE_128B, L2
// promotion of 128 bytes and no NaN fill; innermost dimension first, strides in bytes without the innermost:
//   x       sizes (k, rows that exist), strides (2 k), box (64, ROWS)
//   weight  sizes (k, n), strides (2 k), box (64, TILE); in multiplyGated
//           sizes (k, 8, 2, n / 8), strides (2 k, 2 k n, 16 k), box (64, 8, 2, TILE / 16)
//
// Launch. C = TILE columns of out (multiplyGated: TILE / 2), tiles = ceil(n / C) * ceil(rows / ROWS). Block 2 * TILE + 128 threads.
// Grid: SPLIT > 1: SPLIT * tiles, in clusters of SPLIT CTAs (the kernel's attribute; the launch needs none);
//       SPLIT 1: ceil(tiles / ceil(tiles / resident)), resident = CTAs that the device holds at a time.
// Dynamic shared memory, with E = SPLIT > 1 ? SPLIT * ceil(ROWS / 8 / SPLIT) * 32 * TILE : 0:
//   1024 + max(STAGES * (TILE + ROWS) * 128, E) + TILE / 64 * 9216, in multiplyRotated + 192 * ceil(ROWS / 8 / SPLIT), in multiplyGated
//   + 64 * ceil(ROWS / 8 / SPLIT),
// at most 232448 - 256. rows may exceed ROWS (several tiles of rows).
//
// With the macros HEAD_DIM (64, or 128 where TILE is), HEADS, KV_HEADS and BLOCK_SIZE there is multiplyRotated, and nothing else.

#ifndef ROWS
#define ROWS 64    // of x in a tile: 16, 32, 64, 96, 128, 192 or 256
#endif
#ifndef TILE
#define TILE 128   // weight rows in a tile: 64, 128 or 192
#endif
#ifndef SPLIT
#define SPLIT 1    // CTAs that share k, at most 8
#endif
#ifndef STAGES
#define STAGES 4   // of the ring, at least 2
#endif
#ifndef ROUND_STEPS
#define ROUND_STEPS 1  // the epilogues round where libtorch's separate operations do (layer.cu)
#endif

#include "vectors.cuh"

// Columns of an instruction. With three warpgroups ptxas has 128 registers at the entry (before setmaxnreg) and refuses 128 sums.
#if TILE > 128 && ROWS == 256
#define WIDTH 128
#else
#define WIDTH ROWS
#endif

#include "hopper.cuh"

#ifdef HOPPER

const int BLOCK = 64;                              // elements of k in a stage: the 128 bytes of the swizzle
const int GROUPS = TILE / 64;                      // consuming warpgroups
const int CONSUMERS = 128 * GROUPS;
const int WEIGHT_BYTES = TILE * BLOCK * 2, STAGE = (TILE + ROWS) * BLOCK * 2;
const int PIECES = ROWS / WIDTH;                   // instructions that make up the rows
const int OCTETS = ROWS / 8, OWN = (OCTETS + SPLIT - 1) / SPLIT;  // of rows: in all, and at most those that a CTA finishes
const int EXCHANGE = SPLIT > 1 ? SPLIT * OWN * CONSUMERS * 16 : 0;
const int RING = STAGES * STAGE > EXCHANGE ? STAGES * STAGE : EXCHANGE;
const int STAGING = 4608;                          // bytes of one of a warpgroup's two output buffers
const int COUNT = 8 * OWN;                         // of rows that a CTA finishes, at most

static_assert(TILE % 64 == 0 && TILE <= 192 && SPLIT <= 8, "weight rows of a tile, CTAs of a cluster");

// ---- results ---------------------------------------------------------------------------------------------------------------

#define METHOD __device__ __forceinline__

// Eight rows of the warp's 16 weight rows, transposed. `to` is the lane's: of row lane % 8, from element lane / 8 % 2 * 8 on.
DEVICE void storeTransposed(bf16* to, const float (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                 ::"r"(sharedAddress(to)), "r"(packBf16(v[0], v[1])), "r"(packBf16(v[2], v[3])) : "memory");
}

// Threads of which each arrives at one of the named barriers; 0 is that of __syncthreads.
DEVICE void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// The norm of the rows of x, which come times its weight but not times its factor: that is one number for a row, and multiplies its sums.
struct RowNorm {
    const float* squares;  // [width / 64][stride]: of each row the sums of squares of 64 columns each; null: there is no norm
    int stride;
    float epsilon;
    int width;

    // The factors of `count` rows. The caller is one of `threads`.
    METHOD void prepare(float* factors, int thread, int threads, int count, int firstRow, int endRow) const {
        if (squares) {
            for (int i = thread; i < count; i += threads) {
                float sum = 0.0f;
                if (firstRow + i < endRow) {
                    _Pragma("unroll 8") for (int part = 0; part < width / 64; part++) {
                        sum += squares[(long long) part * stride + firstRow + i];
                    }
                }
                factors[i] = rsqrtf(sum / width + epsilon);
            }
        }
    }

    // Four sums of an octet of rows, as a lane has them; `factors` are the octet's.
    METHOD void apply(float (&v)[4], const float* factors) const {
        if (squares) {
            float2 f = *reinterpret_cast<const float2*>(factors + threadIdx.x % 4 * 2);
            v[0] *= f.x, v[1] *= f.y, v[2] *= f.x, v[3] *= f.y;
        }
    }
};

#ifndef HEAD_DIM

DEVICE float gated(float gate, float up) {
    gate = stored(gate);
    return stored(__fdividef(gate, 1.0f + __expf(-gate))) * stored(up);
}

template <typename T, bool GATED>
struct Output {
    T* out;
    long long stride;
    int n;
    RowNorm norm;  // where GATED

    static const bool PAIRS = GATED, ROTATES = false, PREPARES = GATED;
    static const int COLUMNS = GATED ? 32 : 64, PITCH = COLUMNS + 16 / sizeof(T), BATCH = 32 * 2 / sizeof(T);
    static_assert(BATCH * PITCH * sizeof(T) <= STAGING, "buffer");

    struct Ahead {};
    METHOD Ahead ask(const int2*, int) const { return {}; }

    METHOD void prepare(int2*, float* factors, int thread, int threads, int count, int firstRow, int endRow) const {
        norm.prepare(factors, thread, threads, count, firstRow, endRow);
    }

    // Eight rows of the warp's 16 weight rows, transposed.
    METHOD void stage(T* buffer, int row, const float (&v)[4]) const {
        int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        if constexpr (sizeof(T) == 4) {
            T* at = buffer + (row + lane % 4 * 2) * PITCH + 16 * warp + lane / 4;
            at[0] = v[0], at[PITCH] = v[1], at[8] = v[2], at[PITCH + 8] = v[3];
        } else if constexpr (GATED) {
            u32 at = sharedAddress(buffer + (row + lane % 8) * PITCH + 8 * warp);
            asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};"
                         ::"r"(at), "r"(packBf16(gated(v[0], v[2]), gated(v[1], v[3]))) : "memory");
        } else {
            storeTransposed(buffer + (row + lane % 8) * PITCH + 16 * warp + lane / 8 % 2 * 8, v);
        }
    }

    // `octets` times eight rows from `firstRow` on, as far as `endRow`, and the warpgroup's columns from `firstColumn` on.
    template <int octets, typename Value>
    METHOD void write(unsigned char* staging, const int2*, const Ahead&, int firstRow, int endRow, int firstColumn, Value value) const {
        const int LANES = 16 / sizeof(T), VECTORS = COLUMNS / LANES, STEP = 128 / VECTORS;
        int group = threadIdx.x / 128, line = threadIdx.x % 128 / VECTORS, at = threadIdx.x % VECTORS * LANES;
        int left = min(endRow - firstRow, 8 * octets) - line, width = min(n - firstColumn - at, LANES);
        bool whole = width == LANES && ((u64) out | stride * sizeof(T)) % 16 == 0;
        T* corner = out + (firstRow + line) * stride + firstColumn + at;
        meet(group + 1, 128);
        UNROLL for (int first = 0; first < octets; first += BATCH / 8) {
            T* buffer = reinterpret_cast<T*>(staging + (2 * group + first / (BATCH / 8) % 2) * STAGING);
            UNROLL for (int i = first; i < first + BATCH / 8 && i < octets; i++) {
                float v[4];
                value(i, v);
                stage(buffer, 8 * (i - first), v);
            }
            // One barrier suffices: the buffer is written again only after the other one's.
            meet(group + 1, 128);
            UNROLL for (int i = 0; i < BATCH; i += STEP) {
                const T* from = buffer + (line + i) * PITCH + at;
                T* to = corner + (8 * first + i) * stride;
                if (8 * first + i < left) {
                    if (whole) {
                        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    } else {
                        _Pragma("unroll 1") for (int j = 0; j < width; j++) {
                            to[j] = from[j];
                        }
                    }
                }
            }
        }
    }
};

// To the residual stream, and on to the norm that follows. n is a multiple of 64.
struct Residual {
    bf16* residual;        // [rows][n]
    int n;
    const bf16* weight;    // of the norm, [n]; null: there is none, and what follows is not written
    bf16* scaled;          // [rows][n], the new residual times the norm's weight
    float* squares;        // [n / 64][squaresStride], sums of squares of the new residual
    int squaresStride;

    static const bool PAIRS = false, ROTATES = false, PREPARES = false;
    static const int COLUMNS = 64, PITCH = COLUMNS + 8, BATCH = 32, STEP = 16;
    static_assert(BATCH * PITCH * 2 <= STAGING, "buffer");

    struct Ahead {};
    METHOD Ahead ask(const int2*, int) const { return {}; }

    template <int octets, typename Value>
    METHOD void write(unsigned char* staging, const int2*, const Ahead&, int firstRow, int endRow, int firstColumn, Value value) const {
        int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        int line = threadIdx.x % 128 / 8, column = firstColumn + threadIdx.x % 8 * 8;
        int left = column < n ? min(endRow - firstRow, 8 * octets) - line : 0;
        long long corner = (long long) (firstRow + line) * n + column;
        uint4 next[BATCH / STEP];
        auto ask = [&](int row) {
            UNROLL for (int i = 0; i < BATCH / STEP; i++) {
                int at = row + i * STEP;
                next[i] = at < left ? load(residual + corner + (long long) at * n) : zeros();
            }
        };
        ask(0);
        uint4 scale = weight && left > 0 ? load(weight + column) : zeros();
        meet(group + 1, 128);
        UNROLL for (int first = 0; first < octets; first += BATCH / 8) {
            bf16* buffer = reinterpret_cast<bf16*>(staging + (2 * group + first / (BATCH / 8) % 2) * STAGING);
            UNROLL for (int i = first; i < first + BATCH / 8 && i < octets; i++) {
                float v[4];
                value(i, v);
                storeTransposed(buffer + (8 * (i - first) + lane % 8) * PITCH + 16 * warp + lane / 8 % 2 * 8, v);
            }
            uint4 now[BATCH / STEP];
            UNROLL for (int i = 0; i < BATCH / STEP; i++) {
                now[i] = next[i];
            }
            if (first + BATCH / 8 < octets) {
                ask(8 * first + BATCH);
            }
            // One barrier suffices, as in Output.
            meet(group + 1, 128);
            UNROLL for (int i = 0; i < BATCH / STEP; i++) {
                int row = 8 * first + i * STEP;
                bool present = row < left;
                float x[8], w[8], sum = 0.0f;
                unpack(x, now[i]);
                if (present) {
                    add(x, load(buffer + (line + i * STEP) * PITCH + threadIdx.x % 8 * 8));
                }
                UNROLL for (int j = 0; j < 8; j++) {
                    sum += x[j] * x[j];
                }
                UNROLL for (int offset = 4; offset > 0; offset /= 2) {
                    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
                }
                if (present) {
                    long long at = corner + (long long) row * n;
                    store(residual + at, pack(x));
                    if (weight) {
                        unpack(w, scale);
                        UNROLL for (int j = 0; j < 8; j++) {
                            w[j] *= x[j];
                        }
                        store(scaled + at, pack(w));
                        if (lane % 8 == 0) {
                            squares[(long long) (firstColumn / 64) * squaresStride + firstRow + line + row] = sum;
                        }
                    }
                }
            }
        }
    }
};

#else

#include "rotation.cuh"

struct Rotation {
    const bf16 *bias, *queryNorm, *keyNorm;
    float epsilon;
    const float *cosine, *sine;
    const int *positions, *slots, *blockTable;
    int maxBlocksPerSlot;
    bf16* kv;
    int layer, layers;
    bf16* query;
    const int* tokenCount;
    RowNorm norm;

    static const bool PAIRS = false, ROTATES = true, PREPARES = true;
    static const int COLUMNS = 64, PITCH = HEAD_DIM + 8, BATCH = 32;
    static const int TEAM = 2 * HEAD_DIM;  // threads that finish a head: those of its warpgroups
    static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 && TILE == 128, "whole heads in a tile");
    static_assert(BATCH * HEAD_LANES == TEAM && BATCH * PITCH * 2 <= STAGING * (HEAD_DIM / 64), "buffer");

    // What is asked for before the sums are there.
    struct Factors {
        float cosine[8], sine[8];
    };
    struct Ahead {
        uint4 bias[2], norm[2];
        Factors factors;
    };

    // The rows' positions, negative where nothing is to be written, and pages. For idle warps, of which the caller is one of `threads`.
    METHOD void prepare(int2* places, float* factors, int thread, int threads, int count, int firstRow, int endRow) const {
        norm.prepare(factors, thread, threads, count, firstRow, endRow);
        int end = min(endRow, *tokenCount);
        for (int i = thread; i < count; i += threads) {
            int row = firstRow + i, slot = row < end ? slots[row] : -1, position = row < end ? positions[row] : 0;
            if (slot >= 0 && cosine) {
                UNROLL for (int j = 0; j < HALF; j += 32) {
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(cosine + (long long) position * HALF + j));
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(sine + (long long) position * HALF + j));
                }
            }
            places[i] = slot < 0 ? make_int2(-1, 0)
                                 : make_int2(position, blockTable[(long long) slot * maxBlocksPerSlot + position / BLOCK_SIZE]);
        }
    }

    // A thread's number that the compiler does not know: nothing that follows from it takes registers during the products.
    DEVICE int thread() {
        int x;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
        return x;
    }

    METHOD Factors factors(int position, int head, int element) const {
        Factors found;
        if (cosine && head < HEADS + KV_HEADS && position >= 0) {
            loadFloats(found.cosine, cosine + (long long) position * HALF + element);
            loadFloats(found.sine, sine + (long long) position * HALF + element);
        }
        return found;
    }

    // For the warpgroup's columns from `firstColumn` on.
    METHOD Ahead ask(const int2* places, int firstColumn) const {
        int head = firstColumn / HEAD_DIM, in = thread() % TEAM, line = in / HEAD_LANES, element = in % HEAD_LANES * 8;
        Ahead found;
        if (bias && head < ALL_HEADS) {
            UNROLL for (int half = 0; half < 2; half++) {
                found.bias[half] = load(bias + head * HEAD_DIM + element + half * HALF);
            }
        }
        if (queryNorm && head < HEADS + KV_HEADS) {
            UNROLL for (int half = 0; half < 2; half++) {
                found.norm[half] = load((head < HEADS ? queryNorm : keyNorm) + element + half * HALF);
            }
        }
        found.factors = factors(line < COUNT ? places[line].x : -1, head, element);
        return found;
    }

    template <int octets, typename Value>
    METHOD void write(unsigned char* staging, const int2* places, const Ahead& ahead, int firstRow, int, int firstColumn,
                      Value value) const {
        int all = thread(), head = firstColumn / HEAD_DIM, team = all / TEAM, warp = all % 128 / 32, lane = all % 32;
        int line = all % TEAM / HEAD_LANES, element = all % HEAD_LANES * 8;
        bool turns = head < HEADS + KV_HEADS;
        bf16* buffers = reinterpret_cast<bf16*>(staging + team * (HEAD_DIM / 64 * 2 * STAGING));
        int stagedAt = lane % 8 * PITCH + firstColumn % HEAD_DIM + 16 * warp + lane / 8 % 2 * 8;
        Factors next = ahead.factors;
        // Sums in registers need numbers that are known; those of a cluster are in memory.
        _Pragma("unroll (SPLIT > 1 ? 1 : octets)") for (int first = 0; first < octets; first += BATCH / 8) {
            bf16* buffer = buffers + first / (BATCH / 8) % 2 * (BATCH * PITCH);
            UNROLL for (int i = 0; i < BATCH / 8; i++) {
                if (first + i < octets) {
                    float v[4];
                    value(first + i, v);
                    storeTransposed(buffer + 8 * i * PITCH + stagedAt, v);
                }
            }
            Factors now = next;
            int row = 8 * first + line;
            if (first + BATCH / 8 < octets) {
                next = factors(row + BATCH < 8 * octets ? places[row + BATCH].x : -1, head, element);
            }
            // One barrier suffices, as in Output.
            meet(team + 1, TEAM);
            int2 place = row < 8 * octets ? places[row] : make_int2(-1, 0);
            bool present = place.x >= 0 && head < ALL_HEADS;
            if (!__any_sync(0xffffffffu, present)) {
                continue;
            }
            float x[2][8];
            UNROLL for (int half = 0; half < 2; half++) {
                unpack(x[half], load(buffer + line * PITCH + element + half * HALF));
                if (bias) {
                    add(x[half], ahead.bias[half]);
                }
            }
            if (queryNorm && turns) {
                float factor = normFactor(x, epsilon);
                scaleBy(x[0], factor, ahead.norm[0]);
                scaleBy(x[1], factor, ahead.norm[1]);
            }
            if (cosine && turns) {
                storedAll(now.cosine);
                storedAll(now.sine);
                rotate(x, now.cosine, now.sine);
            }
            if (present) {
                bf16* to = placeOf(head, firstRow + row, query, place.x, place.y, kv, layer, layers) + element;
                store(to, pack(x[0]));
                store(to + HALF, pack(x[1]));
            }
        }
    }
};

#endif

// ---- the kernel ------------------------------------------------------------------------------------------------------------

template <typename Result>
DEVICE void multiplyTiles(const TensorMap* x, const TensorMap* weight, const Result& result, int rows, int k, int n) {
    const int COLUMNS = GROUPS * Result::COLUMNS;  // of out
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    u32 full = sharedAddress(barriers), empty = full + 8 * STAGES;
    u32 ring = (sharedAddress(memory) + 1023) & ~1023u;
    unsigned char* staging = memory + (ring - sharedAddress(memory)) + RING;
    int2* places = reinterpret_cast<int2*>(staging + GROUPS * 2 * STAGING);                   // Rotation's, twice
    float* factors = reinterpret_cast<float*>(places + (Result::ROTATES ? 2 * COUNT : 0));  // RowNorm's, twice

    int part = blockIdx.x % SPLIT, blocks = (k + BLOCK - 1) / BLOCK;
    int firstBlock = blocks * part / SPLIT, steps = blocks * (part + 1) / SPLIT - firstBlock;
    int rowTiles = (rows + ROWS - 1) / ROWS, tiles = (n + COLUMNS - 1) / COLUMNS * rowTiles;
    int firstTile = blockIdx.x / SPLIT, stride = SPLIT > 1 ? tiles : gridDim.x;
    auto firstColumn = [&](int tile) { return tile / rowTiles * COLUMNS; };
    auto firstRow = [&](int tile) { return tile % rowTiles * ROWS; };
    auto endRow = [&](int tile) { return min(rows, firstRow(tile) + ROWS); };
    auto finishedRow = [&](int tile) { return firstRow(tile) + part * OWN * 8; };  // the first that this CTA finishes

    auto loadWeights = [&](int stage, int tile, int step) {
        u64 policy = rowTiles == 1 ? EVICT_FIRST : EVICT_NORMAL;
        u32 to = ring + stage * STAGE, barrier = full + 8 * stage;
        expectBytes(barrier, STAGE);
        if (Result::PAIRS) {
            copyPairs(to, weight, (firstBlock + step) * BLOCK, firstColumn(tile) / 8, barrier, policy);
        } else {
            copyTile(to, weight, (firstBlock + step) * BLOCK, firstColumn(tile), barrier, policy);
        }
    };

    if (!Result::ROTATES) {
        admitSuccessor();
    }
    int early = firstTile < tiles ? min(STAGES, steps) : 0;
    bool producer = threadIdx.x == CONSUMERS;
    if (producer) {
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i), "r"(4 * GROUPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
        for (int i = 0; i < early; i++) {
            loadWeights(i, firstTile, i);
        }
        asm volatile("prefetch.tensormap [%0];" ::"l"(x) : "memory");
    }
    __syncthreads();
    awaitPredecessor();
    if (Result::ROTATES) {
        admitSuccessor();
    }

    int stage = 0;
    u32 phase = 0;
    auto advance = [&] {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    };
    if (threadIdx.x >= CONSUMERS) {
        if (TILE > 128) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        }
        if (producer) {
            for (int tile = firstTile; tile < tiles; tile += stride) {
                for (int step = 0; step < steps; step++, advance()) {
                    if (tile != firstTile || step >= early) {
                        awaitPhase(empty + 8 * stage, phase ^ 1, STAGES + stage);
                        loadWeights(stage, tile, step);
                    }
                    u32 to = ring + stage * STAGE + WEIGHT_BYTES;
                    copyTile(to, x, (firstBlock + step) * BLOCK, firstRow(tile), full + 8 * stage, EVICT_LAST);
                }
            }
        }
        if constexpr (Result::PREPARES) {
            int idle = threadIdx.x - CONSUMERS - 32;
            for (int tile = firstTile, half = 0; tile < tiles && idle >= 0; tile += stride, half ^= 1) {
                result.prepare(places + half * COUNT, factors + half * COUNT, idle, 96, COUNT, finishedRow(tile), endRow(tile));
                if (SPLIT == 1) {
                    __syncwarp();
                    meet(GROUPS + 1, CONSUMERS + 96);  // the consumers are done with the other half
                }
            }
        }
        __syncwarp();
        if (SPLIT > 1) {
            clusterSync();
            clusterSync();
        }
        return;
    }

    if (TILE > 128) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    }
    int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    auto release = [&](int stage) {
        if (lane == 0) {
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * stage) : "memory");
        }
    };
    for (int tile = firstTile, half = 0; tile < tiles; tile += stride, half ^= 1) {
        float c[PIECES][WIDTH / 2];
        UNROLL for (int i = 0; i < ROWS / 2; i++) {
            c[i / (WIDTH / 2)][i % (WIDTH / 2)] = 0.0f;
        }
        int previous = 0;
        for (int step = 0; step < steps; step++) {
            awaitPhase(full + 8 * stage, phase, stage);
            u64 a = descriptor(ring + stage * STAGE + group * 64 * BLOCK * 2), b = descriptor(ring + stage * STAGE + WEIGHT_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            UNROLL for (int i = 0; i < BLOCK / 16; i++) UNROLL for (int j = 0; j < PIECES; j++) {
                multiplyGroup(c[j], a + 2 * i, b + 2 * i + j * (WIDTH * BLOCK * 2 / 16));
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            awaitProducts<1>();
            if (step > 0) {
                release(previous);
            }
            previous = stage;
            advance();
        }
        awaitProducts<0>();
        UNROLL for (int i = 0; i < ROWS / 2; i++) {
            asm volatile("" : "+f"(c[i / (WIDTH / 2)][i % (WIDTH / 2)]) :: "memory");
        }
        if (steps > 0) {
            release(previous);
        }

        int column = firstColumn(tile) + group * Result::COLUMNS, row = finishedRow(tile), end = endRow(tile);
        auto normalised = [&](int i, float (&v)[4]) {
            if constexpr (Result::PREPARES) {
                result.norm.apply(v, factors + half * COUNT + 8 * i);
            }
        };
        if (SPLIT == 1) {
            if (Result::PREPARES) {
                meet(GROUPS + 1, CONSUMERS + 96);  // places and factors are there
            }
            auto ahead = result.ask(places + half * COUNT, column);
            result.template write<OCTETS>(staging, places + half * COUNT, ahead, row, end, column, [&](int i, float (&v)[4]) {
                UNROLL for (int j = 0; j < 4; j++) {
                    v[j] = c[i / (WIDTH / 8)][i % (WIDTH / 8) * 4 + j];
                }
                normalised(i, v);
            });
        } else {
            clusterSync();  // the products of all are complete, their rings free
            UNROLL for (int i = 0; i < OCTETS; i++) {
                u32 to = addressIn(ring + ((part * OWN + i % OWN) * CONSUMERS + threadIdx.x) * 16, i / OWN);
                const float* v = &c[i / (WIDTH / 8)][i % (WIDTH / 8) * 4];
                asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                             ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
            }
            auto ahead = result.ask(places, column);
            clusterSync();
            const float4* parts = reinterpret_cast<const float4*>(staging - RING) + threadIdx.x;
            result.template write<OWN>(staging, places, ahead, row, end, column, [&](int i, float (&v)[4]) {
                float4 sum = parts[i * CONSUMERS];
                UNROLL for (int j = 1; j < SPLIT; j++) {
                    float4 other = parts[(j * OWN + i) * CONSUMERS];
                    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                }
                v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
                normalised(i, v);
            });
            return;
        }
    }
}

#define MULTIPLY(...) multiplyTiles(&x, &weight, __VA_ARGS__, rows, k, n)
#else
#define MULTIPLY(...) asm("trap;")
#endif

#if SPLIT > 1 && defined(HOPPER)
#define KERNEL extern "C" __global__ void __launch_bounds__(2 * TILE + 128, 1) __cluster_dims__(SPLIT, 1, 1)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(2 * TILE + 128, 1)
#endif

#ifndef HEAD_DIM

KERNEL multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, bf16* out, int rows, int k, int n,
                int outStride) {
    MULTIPLY((Output<bf16, false> {out, outStride, n}));
}

// For logits.
KERNEL multiplyToFloat(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, float* out, int rows, int k,
                       int n, long long outStride) {
    MULTIPLY((Output<float, false> {out, outStride, n}));
}

// out = silu(gate) * up. squares and what follows: RowNorm.
KERNEL multiplyGated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, bf16* out, int rows, int k, int n,
                     int outStride, const float* squares, int squaresStride, float normEpsilon) {
    MULTIPLY((Output<bf16, true> {out, outStride, n, {squares, squaresStride, normEpsilon, k}}));
}

// residual += x weight^T; see Residual.
KERNEL multiplyAdded(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, bf16* residual, int rows, int k, int n,
                     const bf16* norm, bf16* scaled, float* squares, int squaresStride) {
    MULTIPLY((Residual {residual, n, norm, scaled, squares, squaresStride}));
}

#else

// n = (HEADS + 2 * KV_HEADS) * HEAD_DIM: queries, keys and values of the tokens of a step, one in each row of x. What becomes of them is
// written at rotateAndWrite (layer.cu), whose arguments these are. Rows from *tokenCount on and those of slot -1 write nothing. squares and
// what follows: RowNorm.
KERNEL multiplyRotated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, int rows, int k, int n,
                       const bf16* qkvBias, const bf16* queryNorm, const bf16* keyNorm, float epsilon, const float* cosine,
                       const float* sine, const int* positions, const int* tokenSlot, const int* blockTable, int maxBlocksPerSlot,
                       bf16* kv, int layer, int layers, bf16* query, const int* tokenCount, const float* squares, int squaresStride,
                       float normEpsilon) {
    MULTIPLY((Rotation {qkvBias, queryNorm, keyNorm, epsilon, cosine, sine, positions, tokenSlot, blockTable, maxBlocksPerSlot, kv, layer,
                        layers, query, tokenCount, {squares, squaresStride, normEpsilon, k}}));
}

#endif
