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
// Layouts, row-major: weight [n][k] (multiplyGated [2 n][k], the gates first, n a multiple of 8), x [rows or more][k], both
// aligned to 16 bytes, k a multiple of 8; out [rows][outStride], of which n columns are written.
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
//   1024 + max(STAGES * (TILE + ROWS) * 128, E) + TILE / 64 * 9216, at most 232448 - 256.
// rows may exceed ROWS (several tiles of rows).

#include "common.cuh"

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
#define ROUND_STEPS 1  // multiplyGated rounds where libtorch's separate operations do (layer.cu)
#endif

#define UNROLL _Pragma("unroll")

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

static_assert(TILE % 64 == 0 && TILE <= 192 && SPLIT <= 8, "weight rows of a tile, CTAs of a cluster");

// ---- results ---------------------------------------------------------------------------------------------------------------

DEVICE float stored(float x) { return ROUND_STEPS ? roundBf16(x) : x; }

DEVICE float gated(float gate, float up) {
    gate = stored(gate);
    return stored(__fdividef(gate, 1.0f + __expf(-gate))) * stored(up);
}

template <typename T, bool GATED>
struct Output {
    static const int COLUMNS = GATED ? 32 : 64, PITCH = COLUMNS + 16 / sizeof(T), BATCH = 32 * 2 / sizeof(T);
    static_assert(BATCH * PITCH * sizeof(T) <= STAGING, "buffer");

    // Eight rows of the warp's 16 weight rows, transposed.
    DEVICE void stage(T* buffer, int row, const float (&v)[4]) {
        int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        if constexpr (sizeof(T) == 4) {
            T* at = buffer + (row + lane % 4 * 2) * PITCH + 16 * warp + lane / 4;
            at[0] = v[0], at[PITCH] = v[1], at[8] = v[2], at[PITCH + 8] = v[3];
        } else if constexpr (GATED) {
            u32 at = sharedAddress(buffer + (row + lane % 8) * PITCH + 8 * warp);
            asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};"
                         ::"r"(at), "r"(packBf16(gated(v[0], v[2]), gated(v[1], v[3]))) : "memory");
        } else {
            u32 at = sharedAddress(buffer + (row + lane % 8) * PITCH + 16 * warp + lane / 8 % 2 * 8);
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                         ::"r"(at), "r"(packBf16(v[0], v[1])), "r"(packBf16(v[2], v[3])) : "memory");
        }
    }

    // `octets` times eight rows from `firstRow` on, as far as `endRow`, and the warpgroup's columns from `firstColumn` on.
    template <int octets, typename Value>
    DEVICE void write(unsigned char* staging, T* out, long long stride, int firstRow, int endRow, int firstColumn, int n,
                             Value value) {
        const int LANES = 16 / sizeof(T), VECTORS = COLUMNS / LANES, STEP = 128 / VECTORS;
        int group = threadIdx.x / 128, line = threadIdx.x % 128 / VECTORS, at = threadIdx.x % VECTORS * LANES;
        int left = min(endRow - firstRow, 8 * octets) - line, width = min(n - firstColumn - at, LANES);
        bool whole = width == LANES && ((u64) out | stride * sizeof(T)) % 16 == 0;
        out += (firstRow + line) * stride + firstColumn + at;
        auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); };
        meet();
        UNROLL for (int first = 0; first < octets; first += BATCH / 8) {
            T* buffer = reinterpret_cast<T*>(staging + (2 * group + first / (BATCH / 8) % 2) * STAGING);
            UNROLL for (int i = first; i < first + BATCH / 8 && i < octets; i++) {
                float v[4];
                value(i, v);
                stage(buffer, 8 * (i - first), v);
            }
            // One barrier suffices: the buffer is written again only after the other one's.
            meet();
            UNROLL for (int i = 0; i < BATCH; i += STEP) {
                const T* from = buffer + (line + i) * PITCH + at;
                T* to = out + (8 * first + i) * stride;
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

// ---- the kernel ------------------------------------------------------------------------------------------------------------

template <typename T, bool GATED>
DEVICE void multiplyTiles(const TensorMap* x, const TensorMap* weight, T* out, int rows, int k, int n, long long outStride) {
    const int COLUMNS = GATED ? TILE / 2 : TILE;  // of out
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    u32 full = sharedAddress(barriers), empty = full + 8 * STAGES;
    u32 ring = (sharedAddress(memory) + 1023) & ~1023u;
    unsigned char* staging = memory + (ring - sharedAddress(memory)) + RING;

    int part = blockIdx.x % SPLIT, blocks = (k + BLOCK - 1) / BLOCK;
    int firstBlock = blocks * part / SPLIT, steps = blocks * (part + 1) / SPLIT - firstBlock;
    int rowTiles = (rows + ROWS - 1) / ROWS, tiles = (n + COLUMNS - 1) / COLUMNS * rowTiles;
    int firstTile = blockIdx.x / SPLIT, stride = SPLIT > 1 ? tiles : gridDim.x;
    auto firstColumn = [&](int tile) { return tile / rowTiles * COLUMNS; };
    auto firstRow = [&](int tile) { return tile % rowTiles * ROWS; };

    auto loadWeights = [&](int stage, int tile, int step) {
        u64 policy = rowTiles == 1 ? EVICT_FIRST : EVICT_NORMAL;
        u32 to = ring + stage * STAGE, barrier = full + 8 * stage;
        expectBytes(barrier, STAGE);
        if (GATED) {
            copyPairs(to, weight, (firstBlock + step) * BLOCK, firstColumn(tile) / 8, barrier, policy);
        } else {
            copyTile(to, weight, (firstBlock + step) * BLOCK, firstColumn(tile), barrier, policy);
        }
    };

    asm volatile("griddepcontrol.launch_dependents;");
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
    asm volatile("griddepcontrol.wait;" ::: "memory");

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
    for (int tile = firstTile; tile < tiles; tile += stride) {
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

        int column = firstColumn(tile) + group * (COLUMNS / GROUPS), row = firstRow(tile);
        int end = min(rows, row + ROWS);
        if (SPLIT == 1) {
            Output<T, GATED>::template write<OCTETS>(staging, out, outStride, row, end, column, n, [&](int i, float (&v)[4]) {
                UNROLL for (int j = 0; j < 4; j++) {
                    v[j] = c[i / (WIDTH / 8)][i % (WIDTH / 8) * 4 + j];
                }
            });
        } else {
            clusterSync();  // the products of all are complete, their rings free
            UNROLL for (int i = 0; i < OCTETS; i++) {
                u32 to = addressIn(ring + ((part * OWN + i % OWN) * CONSUMERS + threadIdx.x) * 16, i / OWN);
                const float* v = &c[i / (WIDTH / 8)][i % (WIDTH / 8) * 4];
                asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                             ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
            }
            clusterSync();
            const float4* parts = reinterpret_cast<const float4*>(staging - RING) + threadIdx.x;
            Output<T, GATED>::template write<OWN>(staging, out, outStride, row + part * OWN * 8, end, column, n,
                                                  [&](int i, float (&v)[4]) {
                float4 sum = parts[i * CONSUMERS];
                UNROLL for (int j = 1; j < SPLIT; j++) {
                    float4 other = parts[(j * OWN + i) * CONSUMERS];
                    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                }
                v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
            });
        }
    }
}

#define MULTIPLY(type, gated) multiplyTiles<type, gated>(&x, &weight, out, rows, k, n, outStride)
#else
#define MULTIPLY(type, gated) asm("trap;")
#endif

#if SPLIT > 1 && defined(HOPPER)
#define KERNEL extern "C" __global__ void __launch_bounds__(2 * TILE + 128, 1) __cluster_dims__(SPLIT, 1, 1)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(2 * TILE + 128, 1)
#endif

KERNEL multiply(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, bf16* out, int rows, int k, int n,
                int outStride) {
    MULTIPLY(bf16, false);
}

// For logits.
KERNEL multiplyToFloat(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, float* out, int rows, int k,
                       int n, long long outStride) {
    MULTIPLY(float, false);
}

// out = silu(gate) * up.
KERNEL multiplyGated(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, bf16* out, int rows, int k, int n,
                     int outStride) {
    MULTIPLY(bf16, true);
}
