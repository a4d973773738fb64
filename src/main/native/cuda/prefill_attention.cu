// Causal attention of prompts, fresh, chunked or behind cached prefixes, over the pages of the KV cache.
//
// The algorithm is FlashAttention-2 (Dao 2023): a CTA holds a tile of query rows, walks over the keys in tiles, and keeps for
// each row the running maximum, the sum of exponentials and the output, which it rescales when the maximum grows (online
// softmax, Milakov and Gimelshein 2018; in base 2). Matrix products are mma.m16n8k16 with float32 accumulators. What is
// particular here:
//
//   Grouped queries. The GROUP query heads of a KV head share a tile: row r is query r / GROUP, head r % GROUP. Keys and values
//   are read once for the group, short prompts fill the tile, and less of a tile lies beyond the diagonal.
//   Pages. Key tiles begin at multiples of TILE_KEYS from position 0, so a tile is whole pages or lies within one. Block
//   numbers are read one tile before they are needed. Two stages of keys and values; one barrier for each tile.
//   Keys from the first to the last, never the other way round: a row's arithmetic then depends on its position alone. Tiles
//   beyond the row multiply by 1 and add 0. Hence the result of a token is the same bit for bit however its prompt was cut into
//   chunks, whether its prefix came from the cache, and whatever else is in the batch.
//   Nothing at or beyond the last position of the tile's queries is read, zeros stand in for it: unwritten parts of pages may
//   hold NaNs, and block table entries there may be anything.
//
// Shared memory: queries [TILE_ROWS], then twice keys [TILE_KEYS], twice values [TILE_KEYS], each row HEAD_DIM + 8 elements.
// The padding makes the stride an odd number of 16-byte words, which frees ldmatrix and the copies of bank conflicts as an
// exclusive-or of the addresses would, for every HEAD_DIM and with constant offsets.
//
// Launch: grid (KV_HEADS, tiles), block 2 * TILE_ROWS / ROW_TILES threads, dynamic shared memory (TILE_ROWS + 4 * TILE_KEYS) *
// (HEAD_DIM + 8) * 2 bytes. Heads come first so that the order of the list is the order of execution: the host puts the tiles
// with most keys first. A sequence of n new tokens has ceil(n / TILE_QUERIES) tiles of TILE_QUERIES = floor(TILE_ROWS / GROUP)
// queries. A tile of sequence -1 is padding.
//
// Macros: HEAD_DIM (64, 96, 128, 256), HEADS, KV_HEADS, BLOCK_SIZE (a power of two, at least 16); TILE_ROWS, TILE_KEYS,
// ROW_TILES (16-row tiles of a warp: with two, each fragment of keys and values is used twice) and RESIDENT (CTAs on a
// multiprocessor).

#include "common.cuh"

#ifndef TILE_ROWS
#define TILE_ROWS 128
#endif
#ifndef TILE_KEYS
#define TILE_KEYS (HEAD_DIM > 128 ? 32 : 64)
#endif
#ifndef ROW_TILES
#define ROW_TILES (HEAD_DIM > 128 ? 1 : 2)
#endif
#ifndef RESIDENT
#define RESIDENT (HEAD_DIM > 128 ? 1 : 2)
#endif

#define UNROLL _Pragma("unroll")

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int TILE_QUERIES = TILE_ROWS / GROUP;
constexpr int WARP_ROWS = 16 * ROW_TILES;
constexpr int THREADS = 32 * (TILE_ROWS / WARP_ROWS);
constexpr int STRIDE = HEAD_DIM + 8;
constexpr int CHUNKS = HEAD_DIM / 8;  // 16-byte pieces of a row
constexpr int COPY_LANES = HEAD_DIM == 96 ? 16 : CHUNKS;  // threads that copy one row
constexpr int COPY_ROWS = 32 / COPY_LANES;  // rows that a warp copies at once
constexpr int WARP_KEYS = TILE_KEYS / (THREADS / 32);  // keys of a tile that a warp copies
constexpr long long PAGE_HEAD = (long long) BLOCK_SIZE * HEAD_DIM;  // elements of one head's page, keys or values
// Fragments of the queries stay in registers where these suffice.
constexpr bool KEEP_QUERIES = ROW_TILES * HEAD_DIM <= 128;

static_assert(HEADS % KV_HEADS == 0 && GROUP <= TILE_ROWS, "query heads of a KV head must fit in a tile");
static_assert(TILE_ROWS % WARP_ROWS == 0, "whole warps");
static_assert(TILE_KEYS % 16 == 0 && WARP_KEYS % COPY_ROWS == 0 && BLOCK_SIZE % WARP_KEYS == 0, "a warp copies from one page");

DEVICE float exp2Approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float quadMax(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

DEVICE float quadSum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The block that holds this warp's part of the tile at `key`; past the limit the last.
DEVICE int readPage(const int* table, int key, int limit) {
    return table[min(key + (int) threadIdx.x / 32 * WARP_KEYS, limit - 1) / BLOCK_SIZE];
}

// Starts the copy of a tile of keys and of values: those that this thread copies begin at `from` in the cache and go to `keys`
// and beyond in shared memory. Zeros take the place of all but the first `count` rows.
DEVICE void copyTile(u32 keys, const bf16* from, int count) {
    UNROLL for (int row = 0; row < WARP_KEYS; row += COPY_ROWS) {
        copyAsync16(keys + 2 * row * STRIDE, from + row * HEAD_DIM, row < count);
        copyAsync16(keys + 2 * (2 * TILE_KEYS + row) * STRIDE, from + KV_HEADS * PAGE_HEAD + row * HEAD_DIM, row < count);
    }
}

// query, out [tokens][HEADS][HEAD_DIM]; kv [block][layer][K, V][KV_HEADS][BLOCK_SIZE][HEAD_DIM], into which the new keys and
// values have been written already; blockTable [slots][maxBlocksPerSlot]. Of sequence s: sequenceSlot its row of the block
// table, sequenceFirst its first new token in query, sequenceStart that token's position, sequenceTokens the number of new
// tokens. Of tile t: tileSequence its sequence, tileFirst its first query, counted from the first new token.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
        prefillAttention(const bf16* query, bf16* out, const bf16* kv, int layer, int layers, const int* blockTable,
                         int maxBlocksPerSlot, const int* sequenceSlot, const int* sequenceFirst, const int* sequenceStart,
                         const int* sequenceTokens, const int* tileSequence, const int* tileFirst, float scale) {
    followPredecessor();
    extern __shared__ __align__(16) bf16 shared[];
    __shared__ int positions[TILE_ROWS];  // of rows, -1 beyond the last; registers are scarce
    int sequence = tileSequence[blockIdx.y];
    if (sequence < 0) {
        return;
    }
    int kvHead = blockIdx.x;
    int first = tileFirst[blockIdx.y];
    int rows = min(TILE_QUERIES, sequenceTokens[sequence] - first) * GROUP;
    int slot = sequenceSlot[sequence];
    if (rows <= 0 || slot < 0) {
        return;
    }
    int start = sequenceStart[sequence] + first;  // position of the first query
    int limit = start + rows / GROUP;
    long long firstElement = ((long long) (sequenceFirst[sequence] + first) * HEADS + kvHead * GROUP) * HEAD_DIM;
    out += firstElement;
    const int* table = blockTable + (long long) slot * maxBlocksPerSlot;
    u32 blockStride = layers * 2 * KV_HEADS * PAGE_HEAD;
    int copyRow = threadIdx.x / 32 * WARP_KEYS + threadIdx.x % 32 / COPY_LANES;  // of a tile, the first that this thread copies
    int copyChunk = threadIdx.x % COPY_LANES;
    kv += ((long long) layer * 2 * KV_HEADS + kvHead) * PAGE_HEAD + copyRow % BLOCK_SIZE * HEAD_DIM + 8 * copyChunk;

    constexpr u32 TILE_BYTES = TILE_KEYS * STRIDE * 2;
    u32 queries = sharedAddress(shared);
    u32 keys = queries + TILE_ROWS * STRIDE * 2;
    u32 values = keys + 2 * TILE_BYTES;

    for (int row = threadIdx.x; row < TILE_ROWS; row += THREADS) {
        positions[row] = row < rows ? start + row / GROUP : -1;
    }
    int page = readPage(table, 0, limit);
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS;
        int from = row < rows ? (row / GROUP * HEADS + row % GROUP) * HEAD_DIM + i % CHUNKS * 8 : 0;
        copyAsync16(queries + 2 * (row * STRIDE + i % CHUNKS * 8), query + firstElement + from, row < rows);
    }
    u32 copyTo = keys + 2 * (copyRow * STRIDE + 8 * copyChunk);
    if (copyChunk < CHUNKS) {
        copyTile(copyTo, kv + (u64) page * blockStride, limit - copyRow);
    }
    commitCopies();
    page = readPage(table, TILE_KEYS, limit);

    int lane = threadIdx.x % 32;
    int warpRow = threadIdx.x / 32 * WARP_ROWS;  // first row of this warp
    int warpLimit = warpRow < rows ? start + (min(warpRow + WARP_ROWS, rows) - 1) / GROUP + 1 : 0;
    // Where this lane points ldmatrix: matrices 0-3 are rows 0-7 and 8-15 of the left half, then of the right half; for keys
    // left and right of rows 0-7, then of rows 8-15.
    u32 queryLane = queries + 2 * ((warpRow + lane % 16) * STRIDE + lane / 16 * 8);
    u32 keyLane = keys + 2 * ((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
    u32 valueLane = values + 2 * (lane % 16 * STRIDE + lane / 16 * 8);

    // Of each 16 x 8 tile a lane holds columns 2 (lane % 4) and the next, of rows lane / 4 (elements 0, 1) and lane / 4 + 8.
    float output[ROW_TILES][HEAD_DIM / 8][4] = {};
    float maximum[ROW_TILES][2], sum[ROW_TILES][2];
    UNROLL for (int m = 0; m < ROW_TILES; m++) {
        maximum[m][0] = maximum[m][1] = -infinity();
        sum[m][0] = sum[m][1] = 0.0f;
    }
    float scale2 = scale * 1.44269504f;  // log2(e)
    u32 kept[KEEP_QUERIES ? HEAD_DIM / 16 : 1][ROW_TILES][4];

    u32 stage = 0;  // offset of the current tile
    for (int key = 0; key < limit; key += TILE_KEYS, stage ^= TILE_BYTES) {
        waitCopies<0>();
        __syncthreads();  // the tile has arrived for all, and nobody reads its predecessor any more
        int next = key + TILE_KEYS;
        if (next < limit) {
            if (copyChunk < CHUNKS) {
                copyTile(copyTo + (stage ^ TILE_BYTES), kv + (u64) page * blockStride
                         + (BLOCK_SIZE > TILE_KEYS ? next % BLOCK_SIZE * HEAD_DIM : 0), limit - copyRow - next);
            }
            commitCopies();
            page = readPage(table, next + TILE_KEYS, limit);
        }
        if (KEEP_QUERIES && key == 0) {
            UNROLL for (int step = 0; step < HEAD_DIM / 16; step++) UNROLL for (int m = 0; m < ROW_TILES; m++) {
                loadMatrix4(kept[step][m], queryLane + 2 * (m * 16 * STRIDE + step * 16));
            }
        }
        if (key >= warpLimit) {
            continue;
        }

        float score[ROW_TILES][TILE_KEYS / 8][4] = {};
        UNROLL for (int step = 0; step < HEAD_DIM / 16; step++) {
            u32 q[ROW_TILES][4];
            UNROLL for (int m = 0; m < ROW_TILES; m++) {
                if (KEEP_QUERIES) {
                    UNROLL for (int i = 0; i < 4; i++) {
                        q[m][i] = kept[step][m][i];
                    }
                } else {
                    loadMatrix4(q[m], queryLane + 2 * (m * 16 * STRIDE + step * 16));
                }
            }
            UNROLL for (int n = 0; n < TILE_KEYS / 16; n++) {
                u32 k[4];
                loadMatrix4(k, keyLane + stage + 2 * (n * 16 * STRIDE + step * 16));
                UNROLL for (int m = 0; m < ROW_TILES; m++) {
                    multiplyAdd(score[m][2 * n], q[m], k[0], k[1]);
                    multiplyAdd(score[m][2 * n + 1], q[m], k[2], k[3]);
                }
            }
        }

        if (next > positions[warpRow] + 1) {  // the diagonal
            UNROLL for (int m = 0; m < ROW_TILES; m++) UNROLL for (int half = 0; half < 2; half++) {
                int visible = positions[warpRow + 16 * m + 8 * half + lane / 4] - key - 2 * (lane % 4);
                UNROLL for (int n = 0; n < TILE_KEYS / 8; n++) UNROLL for (int i = 0; i < 2; i++) {
                    if (8 * n + i > visible) {
                        score[m][n][2 * half + i] = -infinity();
                    }
                }
            }
        }

        float factor[ROW_TILES][2];
        bool grown = false;
        UNROLL for (int m = 0; m < ROW_TILES; m++) UNROLL for (int half = 0; half < 2; half++) {
            float highest = maximum[m][half];
            UNROLL for (int n = 0; n < TILE_KEYS / 8; n++) {
                highest = fmaxf(highest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
            }
            highest = quadMax(highest);  // finite: key 0 is visible to every row
            factor[m][half] = exp2Approximate((maximum[m][half] - highest) * scale2);
            grown |= highest > maximum[m][half];
            maximum[m][half] = highest;
            float part = 0.0f;
            UNROLL for (int n = 0; n < TILE_KEYS / 8; n++) UNROLL for (int i = 2 * half; i < 2 * half + 2; i++) {
                score[m][n][i] = exp2Approximate(score[m][n][i] * scale2 - highest * scale2);
                part += score[m][n][i];
            }
            sum[m][half] = sum[m][half] * factor[m][half] + part;
        }
        if (__any_sync(0xffffffffu, grown)) {  // otherwise all factors are 1
            UNROLL for (int m = 0; m < ROW_TILES; m++) UNROLL for (int n = 0; n < HEAD_DIM / 8; n++) {
                UNROLL for (int i = 0; i < 4; i++) {
                    output[m][n][i] *= factor[m][i / 2];
                }
            }
        }

        UNROLL for (int step = 0; step < TILE_KEYS / 16; step++) {
            u32 weights[ROW_TILES][4];  // two tiles of accumulators side by side are, packed, a left operand as they are
            UNROLL for (int m = 0; m < ROW_TILES; m++) UNROLL for (int i = 0; i < 4; i++) {
                const float (&tile)[4] = score[m][2 * step + i / 2];
                weights[m][i] = packBf16(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
            }
            UNROLL for (int n = 0; n < HEAD_DIM / 16; n++) {
                u32 v[4];
                loadMatrix4Transposed(v, valueLane + stage + 2 * (step * 16 * STRIDE + n * 16));
                UNROLL for (int m = 0; m < ROW_TILES; m++) {
                    multiplyAdd(output[m][2 * n], weights[m], v[0], v[1]);
                    multiplyAdd(output[m][2 * n + 1], weights[m], v[2], v[3]);
                }
            }
        }
    }

    // To whole 16-byte words through shared memory, where the queries of this warp's rows are done with.
    __syncwarp();
    UNROLL for (int m = 0; m < ROW_TILES; m++) UNROLL for (int half = 0; half < 2; half++) {
        float inverse = 1.0f / quadSum(sum[m][half]);
        bf16* row = shared + (warpRow + 16 * m + 8 * half + lane / 4) * STRIDE + 2 * (lane % 4);
        UNROLL for (int n = 0; n < HEAD_DIM / 8; n++) {
            *reinterpret_cast<u32*>(row + 8 * n) =
                    packBf16(output[m][n][2 * half] * inverse, output[m][n][2 * half + 1] * inverse);
        }
    }
    __syncwarp();
    _Pragma("unroll 4") for (int i = lane; i < WARP_ROWS * CHUNKS; i += 32) {
        int row = warpRow + i / CHUNKS;
        if (positions[row] >= 0) {
            *reinterpret_cast<uint4*>(out + (row / GROUP * HEADS + row % GROUP) * HEAD_DIM + i % CHUNKS * 8) =
                    *reinterpret_cast<const uint4*>(shared + row * STRIDE + i % CHUNKS * 8);
        }
    }
}
