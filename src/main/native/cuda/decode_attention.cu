// Paged decode attention: one new token per row attends over all keys and values of its row, which lie in pages.
//
// Every key and value is read once and used for GROUP = HEADS / KV_HEADS multiply-adds per element, so the memory's bandwidth is
// the only limit that counts; all of the design serves to keep enough reads under way at all times.
//
// Work. A row's context is cut into splits (flash decoding, Dao et al. 2023) of one length for all rows of a step: SPLIT tokens, which
// costs the least bandwidth, or as much less as it takes to have about wantedItems of them, so that a few rows busy all CTAs, too.
// With wantedItems = 0 the cuts are always at the same places, and a row's result has the same bits whatever else is in the batch.
// planDecode lists the (row, split) items of a step once, long ones first; all layers use the list. A unit is one item for one kv
// head. The grid is persistent: a CTA takes units at the stride of the grid, in alternating direction, so that the CTAs' shares of
// the descending list come out nearly equal.
//
// Pipeline. Tokens are dealt to the warps in tiles of 16, round robin. A tile's keys (and its values) of one kv head are one
// contiguous piece of a page. Each warp copies its own tiles asynchronously into its own ring of STAGES stages and waits for
// nobody else. The ring runs on across the ends of units: what the next units are (row, tokens, pages) is fetched several units
// ahead into a queue in shared memory, so reads stay in flight while a unit is being finished. All warps take the same number of
// steps in a unit (a step past the end of the unit copies nothing), which keeps rings and copy groups in step with the queue.
//
// Arithmetic. The tokens are the rows of the tensor cores' tile and the query heads its 8 columns: S^T = K Q^T, then
// O^T += V^T P^T (m16n8k16, bfloat16 in, float32 out), so no part of the larger side of the tile is padding. A column's statistics
// of the online softmax (Milakov & Gimelshein 2018; base 2) live in the lanes that also hold this column of O^T. P^T changes from
// accumulator to operand by a transposition within the warp. Tokens past the end are zeros (never page contents: 0 * NaN = NaN)
// and masked. At the end of a unit the warps' results are merged through shared memory, in the order of the warps.
//
// Rows of several splits. A split's normalised output and log-sum-exp go to `partials`; the CTA that counts in last for a
// (row, kv head) merges them in a fixed order and zeroes the counter for the next launch. Counting and merging a unit are put off
// to the end of the following two units, so that nobody waits for the memory fence.
//
// Layouts. query, out [rows][HEADS][HEAD_DIM]; kv: pages, element ((((block * layers + layer) * 2 + {0 key, 1 value}) * KV_HEADS +
// kvHead) * BLOCK_SIZE + token) * HEAD_DIM + d; blockTable [slots][maxBlocksPerSlot]; rowSlot, rowLength [maxRows], where rows past
// *rowCount, of a negative slot or of length 0 are padding: their output is left as it is. The length includes the new token.
//   work      8 ints x maxItems: row, slot, split, tokens in this split, splits of the row, number of the partial, 0, first page
//   workCount 1 int
//   partials  floats: maxItems x HEADS x (HEAD_DIM + 4): output, base-2 log-sum-exp, 3 unused
//   counters  maxRows x KV_HEADS ints, zero before the first launch and after every launch
//   oldPages  not 0: the kernel right before this one, which lets this one start early, writes of what is read here only the query
//             and each row's newest key and value; everything else was complete when that one let this one start, and is read
//             before it ends. 0: nothing is read before
// where maxItems bounds the number of items, as max(wantedItems, (tokens of all rows) / SPLIT) + maxRows always does.
//
// Launches. planDecode: 1 block of PLAN_THREADS. decodeAttention: blocks of 32 * WARPS threads, multiprocessors x resident blocks
// of them (any number is right), with dynamic shared memory of
//   WARPS * STAGES * 64 * HEAD_DIM + 4 * WARPS * GROUP * (HEAD_DIM + 6) + 4 * QUEUE * (8 + SPLIT / BLOCK_SIZE) + 16 bytes,
// where QUEUE is 8, or 16 if STAGES > 4.

#include "common.cuh"

#ifndef SPLIT
#define SPLIT 256  // tokens, at most; a multiple of BLOCK_SIZE
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES (HEAD_DIM <= 64 ? 4 : HEAD_DIM <= 96 ? 3 : 2)
#endif
#ifndef RESIDENT_BLOCKS
#define RESIDENT_BLOCKS (HEAD_DIM <= 128 ? 3 : 1)  // per multiprocessor, as far as registers are concerned
#endif
#ifndef EVICT_FIRST
#define EVICT_FIRST 0  // keys and values leave the L2 cache before queries, partials and weights do
#endif
#ifndef PLAN_THREADS
#define PLAN_THREADS 256
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int COLUMN_TILES = (GROUP + 7) / 8;
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr int ROW_BYTES = 2 * HEAD_DIM;
constexpr int TILE_TOKENS = 16, TILE_BYTES = TILE_TOKENS * ROW_BYTES, STAGE_BYTES = 2 * TILE_BYTES;
constexpr int CHUNKS = HEAD_DIM / 8;                       // of 16 bytes, per token
constexpr int SWIZZLE = HEAD_DIM % 64 == 0 ? 7 : 3;        // bits of a chunk's number that are permuted
constexpr int HEADS_BYTES = KV_HEADS * BLOCK_SIZE * ROW_BYTES;  // the keys of a page: from a key to its value
constexpr int SHORTEST_SPLIT = BLOCK_SIZE > WARPS * TILE_TOKENS ? BLOCK_SIZE : WARPS * TILE_TOKENS;
constexpr int PAGES = SPLIT / BLOCK_SIZE;                  // per unit, at most
constexpr int PAGES_PER_LANE = (PAGES + 31) / 32;
constexpr int AHEAD = STAGES + 1;                          // units in the queue, beginning with the present one
constexpr int QUEUE = STAGES > 4 ? 16 : 8;                 // at least AHEAD + 3: the two before, and the one to come
constexpr int PADDED_DIM = HEAD_DIM + 4;                   // keeps 16-byte alignment, spreads heads over the banks
constexpr int VECTORS = HEAD_DIM / 4;                      // of 4 elements, per head
constexpr int OUTPUTS = GROUP * VECTORS;                   // of 4 elements, per unit
constexpr u32 ALL = 0xffffffffu;

static_assert(HEADS % KV_HEADS == 0 && GROUP <= 16 && HEAD_DIM % 32 == 0, "shape");
static_assert(SPLIT >= SHORTEST_SPLIT && (SPLIT & (SPLIT - 1)) == 0 && BLOCK_SIZE % TILE_TOKENS == 0 && (BLOCK_SIZE & (BLOCK_SIZE - 1)) == 0, "pages");
static_assert(QUEUE >= AHEAD + 3, "queue");

enum { ROW, SLOT, SPLIT_INDEX, TOKENS, SPLITS, PARTIAL, KV_HEAD, FIRST_PAGE, ITEM_INTS, UNIT_INTS = ITEM_INTS + PAGES };

#define UNROLL _Pragma("unroll")

// ---- plan --------------------------------------------------------------------------------------------------------------------

// Sum of `value` over the threads before this one; `total` over all.
DEVICE int sumBefore(int value, int* warpTotals, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = value;
    UNROLL for (int offset = 1; offset < 32; offset *= 2) {
        const int below = __shfl_up_sync(ALL, before, offset);
        before += lane >= offset ? below : 0;
    }
    __syncthreads();  // an earlier call's totals have been read
    if (lane == 31) {
        warpTotals[warp] = before;
    }
    __syncthreads();
    before -= value;
    total = 0;
    for (int w = 0; w < PLAN_THREADS / 32; w++) {
        before += w < warp ? warpTotals[w] : 0;
        total += warpTotals[w];
    }
    return before;
}

// Full splits come first, then the rows' tails in 16 classes of falling length: a stable counting sort, so the order is always
// the same. Each thread keeps a run of consecutive rows. A list of more than maxItems is dropped as a whole.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
planDecode(const int* rowSlot, const int* rowLength, const int* rowCount, int maxRows, int maxItems, int wantedItems, int4* work,
           int* workCount) {
    followPredecessor();
    constexpr int CLASSES = 17;
    __shared__ int positions[CLASSES * PLAN_THREADS];  // [class][thread]: counts, then where the thread's next item goes
    __shared__ int warpTotals[PLAN_THREADS / 32];
    const int thread = threadIdx.x;
    const int rows = min(*rowCount, maxRows), share = (rows + PLAN_THREADS - 1) / PLAN_THREADS;
    const int first = thread * share, last = min(first + share, rows);
    auto lengthOf = [&](int row) { return rowSlot[row] < 0 ? 0 : max(rowLength[row], 0); };
    int tokensHere = 0, tokensOfAll;
    for (int row = first; row < last; row++) {
        tokensHere += lengthOf(row);
    }
    sumBefore(tokensHere, warpTotals, tokensOfAll);
    int split = SHORTEST_SPLIT;
    while (split < SPLIT && tokensOfAll / split > wantedItems) {
        split *= 2;
    }
    auto classOf = [&](int tokens) { return tokens == split ? 0 : CLASSES - (tokens * 16 + split - 1) / split; };
    for (int c = 0; c < CLASSES; c++) {
        positions[c * PLAN_THREADS + thread] = 0;
    }
    int partials = 0;  // rows of one split need none
    for (int row = first; row < last; row++) {
        const int length = lengthOf(row), full = length / split, tail = length % split;
        positions[thread] += full;
        if (tail > 0) {
            positions[classOf(tail) * PLAN_THREADS + thread]++;
        }
        partials += length > split ? full + (tail > 0) : 0;
    }
    int total, sum = 0;
    int partial = sumBefore(partials, warpTotals, total);
    for (int i = thread * CLASSES; i < (thread + 1) * CLASSES; i++) {
        sum += positions[i];
    }
    int position = sumBefore(sum, warpTotals, total);
    for (int i = thread * CLASSES; i < (thread + 1) * CLASSES; i++) {
        const int count = positions[i];
        positions[i] = position;
        position += count;
    }
    if (thread == 0) {
        *workCount = total <= maxItems ? total : 0;
    }
    __syncthreads();
    for (int row = first; row < last && total <= maxItems; row++) {
        const int slot = rowSlot[row], length = lengthOf(row), splits = (length + split - 1) / split;
        for (int i = 0; i < splits; i++) {
            const int tokens = min(split, length - i * split);
            const int place = positions[classOf(tokens) * PLAN_THREADS + thread]++;
            work[2 * place] = make_int4(row, slot, i, tokens);
            work[2 * place + 1] = make_int4(splits, splits > 1 ? partial++ : 0, 0, i * (split / BLOCK_SIZE));
        }
    }
}

// ---- attention ---------------------------------------------------------------------------------------------------------------

DEVICE float exp2Fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE void multiplyAdd(float4& sum, float factor, float4 x) {
    sum.x += factor * x.x, sum.y += factor * x.y, sum.z += factor * x.z, sum.w += factor * x.w;
}

DEVICE void fenceDevice() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

DEVICE u64 evictFirstPolicy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE void copyStreamed16(u32 shared, const void* global, bool valid, u64 policy) {
#if EVICT_FIRST
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 ::"r"(shared), "l"(global), "r"(valid ? 16 : 0), "l"(policy) : "memory");
#else
    copyAsync16(shared, global, valid);
#endif
}

// Where a token's chunk lies within a tile: 8 rows of one chunk, as ldmatrix reads them, fall into 8 different bank groups.
DEVICE u32 tileOffset(u32 token, u32 chunk) {
    return token * ROW_BYTES + ((chunk ^ (SWIZZLE == 7 ? token & 7 : token >> 1 & 3)) << 4);
}

// From the address of chunk 0 or 1 of a token to that of the chunk 2 * step further on.
DEVICE u32 advance(u32 address, u32 step) { return (address ^ ((2 * step & SWIZZLE) << 4)) + ((2 * step & ~SWIZZLE) << 4); }

// Where the i-th 16 bytes that a lane copies go; a warp copies 512 contiguous bytes at a time.
DEVICE u32 copyTarget(u32 tile, u32 i, u32 lane) {
    if (32 % CHUNKS == 0) {
        return ((tile + tileOffset(lane / CHUNKS, lane % CHUNKS)) ^ ((i * (32 / CHUNKS) & SWIZZLE) << 4)) + i * 512;
    }
    return tile + tileOffset((i * 32 + lane) / CHUNKS, (i * 32 + lane) % CHUNKS);
}

// Merges the warps' results for 4 elements of one head: sums relative to each warp's own maximum, in the order of the warps.
// Returns the base-2 log-sum-exp.
DEVICE float mergeWarps(const float* outputs, const float2* statistics, int index, float4& value) {
    const int head = index / VECTORS, d = index % VECTORS * 4;
    float maximum = -infinity(), sum = 0;
    UNROLL for (int w = 0; w < WARPS; w++) {
        maximum = fmaxf(maximum, statistics[w * GROUP + head].x);
    }
    float4 merged = make_float4(0, 0, 0, 0);
    UNROLL for (int w = 0; w < WARPS; w++) {
        const float2 own = statistics[w * GROUP + head];
        const float factor = exp2Fast(own.x - maximum);
        sum += factor * own.y;
        multiplyAdd(merged, factor, *(const float4*) (outputs + (w * GROUP + head) * PADDED_DIM + d));
    }
    value = make_float4(0, 0, 0, 0);
    multiplyAdd(value, __fdividef(1, sum), merged);
    return maximum + __log2f(sum);
}

DEVICE void storeOutput(bf16* out, const int* unit, int index, float4 value) {
    bf16* to = out + ((long long) unit[ROW] * HEADS + unit[KV_HEAD] * GROUP) * HEAD_DIM + index * 4;
    *(uint2*) to = make_uint2(packBf16(value.x, value.y), packBf16(value.z, value.w));
}

// A warp's share of a row's splits, left as it leaves its share of a unit's tiles.
DEVICE void gatherSplits(const float* partials, const int* unit, int warp, int lane, float* outputs, float2* statistics) {
    constexpr int LOADS = 4;  // under way together
    const int splits = unit[SPLITS];
    const long long first = (long long) (unit[PARTIAL] - unit[SPLIT_INDEX]) * HEADS + unit[KV_HEAD] * GROUP;
    for (int index = lane; index < OUTPUTS; index += 32) {
        const int head = index / VECTORS, d = index % VECTORS * 4;
        float maximum = -infinity(), sum = 0;
        float4 value = make_float4(0, 0, 0, 0);
        for (int split = warp; split < splits; split += LOADS * WARPS) {
            float4 x[LOADS];
            float weight[LOADS], raised = maximum;
            UNROLL for (int i = 0; i < LOADS; i++) {
                const int s = split + i * WARPS;
                const float* record = partials + (first + (long long) s * HEADS + head) * PADDED_DIM;
                x[i] = s < splits ? *(const float4*) (record + d) : make_float4(0, 0, 0, 0);
                weight[i] = s < splits ? record[HEAD_DIM] : -infinity();
            }
            UNROLL for (int i = 0; i < LOADS; i++) {
                raised = fmaxf(raised, weight[i]);
            }
            const float4 old = value;
            const float correction = exp2Fast(maximum - raised);
            maximum = raised;
            sum *= correction;
            value = make_float4(0, 0, 0, 0);
            multiplyAdd(value, correction, old);
            UNROLL for (int i = 0; i < LOADS; i++) {
                const float factor = exp2Fast(weight[i] - raised);
                sum += factor;
                multiplyAdd(value, factor, x[i]);
            }
        }
        *(float4*) (outputs + (warp * GROUP + head) * PADDED_DIM + d) = value;
        if (d == 0) {
            statistics[warp * GROUP + head] = make_float2(maximum, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
decodeAttention(const bf16* query, bf16* out, const bf16* kv, int layer, int layers,
                const int* blockTable, int maxBlocksPerSlot, const int* work,
                const int* workCount, int maxItems, float* partials, int* counters, float scale, int oldPages) {
    admitSuccessor();
    if (!oldPages) {
        awaitPredecessor();
    }
    extern __shared__ __align__(128) unsigned char sharedMemory[];
    float* outputs = (float*) (sharedMemory + WARPS * STAGES * STAGE_BYTES);  // [warp][head][PADDED_DIM]
    float2* statistics = (float2*) (outputs + WARPS * GROUP * PADDED_DIM);    // [warp][head]: maximum, sum
    int* queue = (int*) (statistics + WARPS * GROUP);                         // [unit % QUEUE][UNIT_INTS]
    int* arrivedLast = queue + QUEUE * UNIT_INTS;
    const int warp = __shfl_sync(ALL, (int) threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int units = *workCount * KV_HEADS;
    auto unitAt = [&](u32 n) { return queue + n % QUEUE * UNIT_INTS; };

    // -- The queue: word `lane` of the n-th unit of this CTA, read without waiting for the count; all zeros past the end.
    auto loadItem = [&](u32 n) {
        const u32 index = n * gridDim.x + (n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        const int item = min((int) (index / KV_HEADS), maxItems - 1);
        const int word = lane == KV_HEAD ? (int) (index % KV_HEADS) : lane < ITEM_INTS ? work[item * ITEM_INTS + lane] : 0;
        return index < (u32) units ? word : 0;
    };
    auto loadPages = [&](int word, int (&pages)[PAGES_PER_LANE]) {
        const int slot = __shfl_sync(ALL, word, SLOT), firstPage = __shfl_sync(ALL, word, FIRST_PAGE);
        const int tokens = __shfl_sync(ALL, word, TOKENS);
        const int* table = blockTable + (long long) slot * maxBlocksPerSlot + firstPage;
        UNROLL for (int i = 0; i < PAGES_PER_LANE; i++) {
            pages[i] = (lane + 32 * i) * BLOCK_SIZE < tokens ? table[lane + 32 * i] : 0;
        }
    };
    auto storeUnit = [&](u32 n, int word, const int (&pages)[PAGES_PER_LANE]) {
        if (lane < ITEM_INTS) {
            unitAt(n)[lane] = word;
        }
        UNROLL for (int i = 0; i < PAGES_PER_LANE; i++) {
            if (lane + 32 * i < PAGES) {
                unitAt(n)[ITEM_INTS + lane + 32 * i] = pages[i];
            }
        }
    };
    // The first units are shared out among the warps; from then on the last warp fetches one unit's item and the pages of the
    // unit before it per unit done, and enters the unit before that in the queue.
    constexpr int FIRST_UNITS = (AHEAD + 2 + WARPS - 1) / WARPS;
    int word = loadItem(AHEAD), nextWord = loadItem(AHEAD + 1), firstWords[FIRST_UNITS];
    int pages[PAGES_PER_LANE], firstPages[FIRST_UNITS][PAGES_PER_LANE];
    UNROLL for (int i = 0; i < FIRST_UNITS; i++) {
        firstWords[i] = loadItem(warp + i * WARPS);
    }
    if (blockIdx.x >= units) {
        awaitPredecessor();  // the next kernel takes the end of this one for that of all before it
        return;
    }
    UNROLL for (int i = 0; i < FIRST_UNITS; i++) {
        loadPages(firstWords[i], firstPages[i]);
    }
    loadPages(word, pages);
    UNROLL for (int i = 0; i < FIRST_UNITS; i++) {
        if (warp + i * WARPS < AHEAD) {
            storeUnit(warp + i * WARPS, firstWords[i], firstPages[i]);
        }
    }
    *arrivedLast = 0;
    __syncthreads();

    // -- The copying side of this warp's ring: always STAGES steps ahead.
    const u64 policy = EVICT_FIRST ? evictFirstPolicy() : 0;
    const u32 ring = sharedAddress(sharedMemory) + warp * (STAGES * STAGE_BYTES);
    const char* layerPages = (const char*) kv + (long long) layer * (2 * HEADS_BYTES) + lane * 16;
    const char* source = layerPages;
    u32 copyUnit = 0, copyStep = 0;
    int copyTokens = 0;
    bool copiesNewest = false;  // the row's last token, or what comes after it
    auto stepsOf = [](u32 tokens) { return max(1u, (tokens + WARPS * TILE_TOKENS - 1) / (WARPS * TILE_TOKENS)); };
    auto nextSource = [&]() {
        const int* unit = unitAt(copyUnit);
        const u32 first = (copyStep * WARPS + warp) * TILE_TOKENS, tokens = unit[TOKENS];
        copyTokens = (int) (tokens - first);
        copiesNewest = copyTokens <= TILE_TOKENS && unit[SPLIT_INDEX] + 1 == unit[SPLITS];
        if (copyTokens > 0) {
            source = layerPages + (u64) (u32) unit[ITEM_INTS + first / BLOCK_SIZE] * ((u32) layers * (2 * HEADS_BYTES)) +
                     (unit[KV_HEAD] * BLOCK_SIZE + first % BLOCK_SIZE) * ROW_BYTES;
        }
        const bool ends = ++copyStep >= stepsOf(tokens);
        copyUnit += ends;
        copyStep = ends ? 0 : copyStep;
    };
    auto copyTile = [&](u32 tile, const char* from) {
        if (copyTokens > 0) {
            UNROLL for (int i = 0; i < TILE_BYTES / 512; i++) {
                copyStreamed16(copyTarget(tile, i, lane), from + i * 512, (i * 32 + lane) / CHUNKS < copyTokens, policy);
            }
        }
        commitCopies();
    };
    UNROLL for (int i = 0; i < STAGES; i++) {
        nextSource();
        if (copiesNewest) {
            awaitPredecessor();
        }
        copyTile(ring + i * STAGE_BYTES, source);
        copyTile(ring + i * STAGE_BYTES + TILE_BYTES, source + HEADS_BYTES);
    }
    awaitPredecessor();

    // -- Q^T as the right-hand operand: column lane / 4, and pairs of elements from lane % 4; zeros past the group.
    u32 q[COLUMN_TILES][DIM_TILES][2];
    auto loadQuery = [&](const int* unit) {
        UNROLL for (int c = 0; c < COLUMN_TILES; c++) {
            const int column = c * 8 + lane / 4;
            const bool valid = column < GROUP && unit[TOKENS] > 0;
            const long long head = (long long) unit[ROW] * HEADS + unit[KV_HEAD] * GROUP + column;
            const u32* from = (const u32*) (query + head * HEAD_DIM) + lane % 4;
            UNROLL for (int k = 0; k < DIM_TILES; k++) {
                q[c][k][0] = valid ? from[8 * k] : 0;
                q[c][k][1] = valid ? from[8 * k + 4] : 0;
            }
        }
    };
    loadQuery(unitAt(0));

    const float scaleLog2 = scale * 1.4426950408889634f;
    const u32 keyOffset = tileOffset(lane % 16, lane / 16);
    const u32 valueOffset = TILE_BYTES + tileOffset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    u32 stage = ring;
    int ended = 0;
    for (u32 n = 0; ended < 2; n++) {  // two rounds after the last unit: its counting and its merging
        const int* unit = unitAt(n);
        const int tokens = unit[TOKENS];
        float maximum[COLUMN_TILES][2], sum[COLUMN_TILES][2], o[COLUMN_TILES][DIM_TILES][4] = {};
        UNROLL for (int c = 0; c < COLUMN_TILES; c++) {
            maximum[c][0] = maximum[c][1] = -infinity();
            sum[c][0] = sum[c][1] = 0;
        }
        const int steps = tokens > 0 ? stepsOf(tokens) : 0;
        for (int step = 0; step < steps; step++) {
            const int valid = tokens - (step * WARPS + warp) * TILE_TOKENS;
            float s[2][COLUMN_TILES][4] = {};  // two chains of additions, to wait less for each other
            waitCopies<2 * STAGES - 1>();
            __syncwarp();
            if (valid > 0) {
                UNROLL for (int k = 0; k < DIM_TILES; k++) {
                    u32 keys[4];
                    loadMatrix4(keys, advance(stage + keyOffset, k));
                    UNROLL for (int c = 0; c < COLUMN_TILES; c++) {
                        multiplyAdd(s[k % 2][c], keys, q[c][k][0], q[c][k][1]);
                    }
                }
            }
            __syncwarp();
            nextSource();
            copyTile(stage, source);

            u32 p[COLUMN_TILES][2];
            UNROLL for (int c = 0; c < COLUMN_TILES && valid > 0; c++) {
                float correction[2], x[4];
                UNROLL for (int i = 0; i < 4; i++) {
                    x[i] = lane / 4 + i / 2 * 8 < valid ? s[0][c][i] + s[1][c][i] : -infinity();
                }
                UNROLL for (int i = 0; i < 2; i++) {
                    float largest = fmaxf(x[i], x[i + 2]);
                    UNROLL for (int offset = 4; offset < 32; offset *= 2) {
                        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, offset));
                    }
                    const float raised = fmaxf(maximum[c][i], largest * scaleLog2);
                    correction[i] = exp2Fast(maximum[c][i] - raised);
                    maximum[c][i] = raised;
                    x[i] = exp2Fast(x[i] * scaleLog2 - raised);
                    x[i + 2] = exp2Fast(x[i + 2] * scaleLog2 - raised);
                    sum[c][i] = sum[c][i] * correction[i] + (x[i] + x[i + 2]);  // of this lane's tokens
                }
                UNROLL for (int k = 0; k < DIM_TILES; k++) {
                    UNROLL for (int i = 0; i < 4; i++) {
                        o[c][k][i] *= correction[i % 2];
                    }
                }
                p[c][0] = transposeMatrix(packBf16(x[0], x[1]));
                p[c][1] = transposeMatrix(packBf16(x[2], x[3]));
            }
            waitCopies<2 * STAGES - 1>();
            __syncwarp();
            if (valid > 0) {
                UNROLL for (int k = 0; k < DIM_TILES; k++) {
                    u32 values[4];
                    loadMatrix4Transposed(values, advance(stage + valueOffset, k));
                    UNROLL for (int c = 0; c < COLUMN_TILES; c++) {
                        multiplyAdd(o[c][k], values, p[c][0], p[c][1]);
                    }
                }
            }
            __syncwarp();
            copyTile(stage + TILE_BYTES, source + HEADS_BYTES);
            stage = stage == ring + (STAGES - 1) * STAGE_BYTES ? ring : stage + STAGE_BYTES;
        }
        loadQuery(unitAt(n + 1));
        ended += steps == 0;

        __syncthreads();  // all warps have read the merge area and written the partials of unit n - 1
        const bool mergeRow = *arrivedLast;
        UNROLL for (int c = 0; c < COLUMN_TILES && steps > 0; c++) {
            UNROLL for (int i = 0; i < 2; i++) {
                UNROLL for (int offset = 4; offset < 32; offset *= 2) {
                    sum[c][i] += __shfl_xor_sync(ALL, sum[c][i], offset);
                }
                const int head = c * 8 + lane % 4 * 2 + i;
                if (head < GROUP) {
                    float* output = outputs + (warp * GROUP + head) * PADDED_DIM + lane / 4;
                    UNROLL for (int k = 0; k < DIM_TILES; k++) {
                        output[16 * k] = o[c][k][i];
                        output[16 * k + 8] = o[c][k][i + 2];
                    }
                    statistics[warp * GROUP + head] = make_float2(maximum[c][i], sum[c][i]);
                }
            }
        }
        if (warp == WARPS - 1) {
            storeUnit(n + AHEAD, word, pages);
        }
        __syncthreads();
        if (warp == WARPS - 1) {
            word = nextWord;
            loadPages(word, pages);
            nextWord = loadItem(n + AHEAD + 2);
        }
        const int* counted = unitAt(n - 1);
        if (threadIdx.x == 0 && n > 0) {  // known to all after the next barrier
            bool last = false;
            if (counted[SPLITS] > 1) {
                int* counter = counters + counted[ROW] * KV_HEADS + counted[KV_HEAD];
                fenceDevice();
                last = atomicAdd(counter, 1) == counted[SPLITS] - 1;
                if (last) {
                    fenceDevice();
                    *counter = 0;
                }
            }
            *arrivedLast = last;
        }
        for (int index = threadIdx.x; index < OUTPUTS && steps > 0; index += THREADS) {
            const int head = unit[KV_HEAD] * GROUP + index / VECTORS, d = index % VECTORS * 4;
            float4 value;
            const float logSum = mergeWarps(outputs, statistics, index, value);
            if (unit[SPLITS] == 1) {
                storeOutput(out, unit, index, value);
            } else {
                float* record = partials + ((long long) unit[PARTIAL] * HEADS + head) * PADDED_DIM;
                *(float4*) (record + d) = value;
                if (d == 0) {
                    record[HEAD_DIM] = logSum;
                }
            }
        }
        if (mergeRow) {
            __syncthreads();
            gatherSplits(partials, unitAt(n - 2), warp, lane, outputs, statistics);
            __syncthreads();
            for (int index = threadIdx.x; index < OUTPUTS; index += THREADS) {
                float4 value;
                mergeWarps(outputs, statistics, index, value);
                storeOutput(out, unitAt(n - 2), index, value);
            }
        }
    }
}
