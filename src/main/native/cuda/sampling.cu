// Sampling: one token and its log-prob for each (sample, logits row) pair.
//
// A draw is an exponential race (the Gumbel-max trick in its other form): with e(t) ~ Exp(1) independent, arg max of
// logit(t) / temperature - log e(t) has the softmax distribution. -log e is Gumbel noise. e(t) is a pure function of
// (seed, sample key, position, token), so a token depends on nothing but its row and its key, and the row is read once, in any
// order, by any number of CTAs.
//
// Random numbers. (seed, sample key, position) are hashed to 64 bits as CounterRandom does; these and the token's index are the
// counter of Philox4x32 with 7 rounds and a constant key (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011:
// crush-resistant from 7 rounds on). Cheaper than a 32-bit mixer per token, since one call serves 8 tokens: each takes 16 bits,
// the top of a 64-bit uniform v in (0, 1), whose other 48 bits come from a call of the token's own if they matter at all.
// e = -log(1 - v): the winners are those with e next to 0, where v is exact down to 2^-64; 1 - v is never 0.
//
// No logarithm in the common case. Since e >= v, a token can only win if v <= weight(t) * 2^(-score of the best so far), and
// weight(t) = 2^(x scale - base) is needed anyhow for the log-prob. So a token costs one exponential, one 16-bit comparison and
// its share of a hash; the few that pass (about one per tile at first, then ever fewer) get their score computed in full. The
// test errs on the side of passing, so what has been seen before never changes the winner.
//
// Same bits in any batch. A warp reduces a tile of 512 tokens at a time, held in registers: (largest logit, sum of weights
// relative to it) goes to memory, and the tiles are merged in a fixed order. The winner is a maximum of scores that are functions
// of the token (ties: the lowest token id). So nothing depends on how a row is split.
//
// Truncation. Tokens are ordered by logit, then by token id (the lower first); min-p, top-k and top-p each keep a prefix. The
// tiles' maxima and masses give a logit below which the cut cannot lie: the k-th largest tile maximum, or a value below which the
// tiles' masses cannot add up to 1 - topP. Only tiles that reach it are read again; what reaches it is listed in shared memory,
// sorted and cut there. If more tokens reach it than the list holds (flat rows), the same pass has counted them in a histogram,
// which bounds the cut from both sides; in the next pass what is above the bounds races as it is read, and what is between them
// is listed. So the cut is exact up to the rounding of masses: no token is ever kept by chance.
//
// Order of operations, as in the Java class Sampler: repetition penalty, mask, temperature, min-p, top-k, top-p. A row with NaN
// or +infinity, or with nothing above -1e30 left, gives token -1 and log-prob NaN. 1 / temperature is capped at 1e6.
//
// Arguments (P: the most pairs, T = ceil(vocabulary / 512) tiles, S slices; vocabulary <= 2^21)
//   pairs       [P] struct Pair (64 bytes); pairs from *pairCount on, or with slot < 0, are padding. A slot has one pair at most.
//   logits      [rows][rowStride], float32 or (LOGITS_BF16=1) bfloat16; rows 16-byte aligned, rowStride in elements >= vocabulary
//   seen        u32 [slots][ceil(vocabulary / 32)]: tokens of prompt and output, for pairs with a repetition penalty
//   masked      int [P][MAX_MASKED]: tokens that must not be sampled, the first maskedCount of a pair's
//   scaledSums  float2 [P][T]: (max, sum of weights) at temperature, after penalty and mask;  rawSums: same of the model's logits
//   best        float2 [P][S]: (score, token)
//   tokens, logprobs [P]; lastToken [slots]: the token once more (0 instead of -1), the next step's input
// Launches, in this order
//   markSeen            grid (requests), 256 threads: when requests with a penalty start or are computed again
//   samplePartial       grid (P, S), 128 threads; samplePartialEdited instead if some pair has a penalty or masked tokens.
//                       Any S from 1 to ceil(T / 4) is right; 8 * multiprocessors / P fills the device.
//   sampleTruncated     grid (P), 512 threads: if some pair truncates
//   sampleFinish        grid (P), 128 threads

#include "common.cuh"

#ifndef LOGITS_BF16
#define LOGITS_BF16 0
#endif
#ifndef MAX_MASKED
#define MAX_MASKED 32
#endif

#if LOGITS_BF16
typedef bf16 Logit;
#else
typedef float Logit;
DEVICE float toFloat(Logit x) { return x; }
#endif

enum LogprobKind { RAW, TEMPERATURE, TRUNCATED };

struct __align__(16) Pair {
    int row, slot, position, topK;                          // topK <= 0: off
    u64 seed, key;
    float temperature, topP, minP, repetitionPenalty;       // 0: greedy; 1: off; 0: off; 1: off
    int logprobKind, maskedCount, unused[2];
};

constexpr u32 ALL = 0xffffffffu;
constexpr int TILE = 512, PER_LANE = TILE / 32, VECTOR = 16 / sizeof(Logit);
constexpr int PARTIAL_THREADS = 128, FINISH_THREADS = 128, TRUNCATED_THREADS = 512;
constexpr int CAPACITY = 4096, BUCKETS = 2048;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f, LOWEST = -1e30f;

DEVICE float exp2Fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2Fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE u64 multiplyWide(u32 x, u32 y) {
    u64 z;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(z) : "r"(x), "r"(y));
    return z;
}

DEVICE uint4 loadVector(const void* pointer) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

// Loads that stay where they are written, so that they do not wait for each other: the latency of a small batch is little else.
DEVICE uint4 loadNow(const uint4* pointer) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

DEVICE float2 loadNow(const float2* pointer) {
    float2 v;
    asm volatile("ld.volatile.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(pointer));
    return v;
}

DEVICE Pair loadPair(const Pair* pointer) {
    union { uint4 vectors[4]; Pair pair; } u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u.vectors[i] = loadNow((const uint4*) pointer + i);
    }
    return u.pair;
}

DEVICE u32 laneId() { return threadIdx.x % 32; }
DEVICE int tileCount(int vocabulary) { return (vocabulary + TILE - 1) / TILE; }

DEVICE bool truncates(const Pair& pair, int vocabulary) {
    return pair.temperature > 0 && ((pair.topK > 0 && pair.topK < vocabulary) || pair.topP < 1 || pair.minP > 0);
}

DEVICE bool edits(const Pair& pair) { return pair.repetitionPenalty != 1 || pair.maskedCount > 0; }

template <typename Word>
DEVICE Word* seenOf(Word* seen, const Pair& pair, int vocabulary) {
    return seen + (long long) pair.slot * ((vocabulary + 31) / 32);
}

// Turns a logit into a binary exponent. Greedy decoding takes temperature 1.
DEVICE float scaleOf(const Pair& pair) {
    return pair.temperature > 0 ? fmaxf(fminf(LOG2E / pair.temperature, 1e6f * LOG2E), 1e-30f) : LOG2E;
}

// Whether the log-prob needs sums of its own: of the model's logits, where the race runs on something else.
DEVICE bool needsRaw(const Pair& pair) { return pair.logprobKind == RAW && (scaleOf(pair) != LOG2E || edits(pair)); }

// The exponent that weights are relative to. Rounded once: sums and those who read them must agree on it.
DEVICE float baseOf(float top, float scale) { return __fmul_rn(fmaxf(top, LOWEST), scale); }

// ---- tiles: 16 logits per lane -----------------------------------------------------------------------------------------------

// The token of a lane's i-th logit; ascending in i. In both layouts logits i and i + 8 are 256 tokens apart.
DEVICE int tokenOf(int tile, int i) {
    return tile * TILE + (i / 8) * 256 + laneId() * VECTOR + (VECTOR == 8 ? i % 8 : (i % 8 / 4) * 128 + i % 4);
}

DEVICE void unpack(float* x, uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (VECTOR == 8) {
            x[2 * j] = lowFloat(words[j]);
            x[2 * j + 1] = highFloat(words[j]);
        } else {
            x[j] = __uint_as_float(words[j]);
        }
    }
}

// -infinity past the end of the row.
DEVICE void loadTile(float (&x)[PER_LANE], const Logit* row, int tile, int vocabulary) {
    const Logit* from = row + tokenOf(tile, 0);
    if ((tile + 1) * TILE <= vocabulary) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i += VECTOR) {
            unpack(x + i, loadVector(from + (tokenOf(0, i) - tokenOf(0, 0))));
        }
    } else {
#pragma unroll
        for (int i = 0; i < PER_LANE; i += VECTOR) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (tokenOf(tile, i) < vocabulary) {
                v = loadVector(from + (tokenOf(0, i) - tokenOf(0, 0)));
            }
            unpack(x + i, v);
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            x[i] = tokenOf(tile, i) < vocabulary ? x[i] : -infinity();
        }
    }
}

DEVICE float penalised(float x, float penalty) { return x > 0 ? __fdiv_rn(x, penalty) : x * penalty; }

// Applies penalty and mask to a tile; `seen` is the slot's, `masked` the pair's. False if a logit was NaN or +infinity.
DEVICE bool edit(float (&x)[PER_LANE], const Pair& pair, const u32* seen, const int* masked, int tile, int vocabulary) {
    bool sound = true;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        sound &= x[i] < infinity();
    }
    if (pair.repetitionPenalty != 1) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i += 4) {
            const int token = tokenOf(tile, i);
            const u32 bits = token < vocabulary ? seen[token / 32] >> token % 32 : 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (bits >> j & 1) {
                    x[i + j] = penalised(x[i + j], pair.repetitionPenalty);
                }
            }
        }
    }
    for (int m = 0; m < pair.maskedCount; m++) {
        if (masked[m] / TILE == tile) {
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                x[i] = tokenOf(tile, i) == masked[m] ? -infinity() : x[i];
            }
        }
    }
    return sound;
}

// Bits whose unsigned order is that of the floats (-0 below 0: add 0 before, where that matters).
DEVICE u32 imageOf(float x) {
    const u32 bits = __float_as_uint(x);
    return bits ^ ((u32) ((int) bits >> 31) | 0x80000000u);
}

DEVICE float valueOf(u32 image) { return __uint_as_float(image ^ (image >> 31 ? 0x80000000u : ALL)); }

DEVICE float laneTop(const float (&x)[PER_LANE]) {
    float top[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
    for (int i = 4; i < PER_LANE; i++) {
        top[i % 4] = fmaxf(top[i % 4], x[i]);
    }
    return fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
}

DEVICE float warpTop(float top) { return valueOf(__reduce_max_sync(ALL, imageOf(top))); }

// ---- the race ----------------------------------------------------------------------------------------------------------------

struct Race {
    u64 key;
    float scale;  // of logits
    float best;   // this lane's highest score, and its token
    int token;
    u32* bar;     // in shared memory: image of what some score of the block has reached. When it is read changes no result.
};

// SplitMix64's finaliser; see CounterRandom.
DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

DEVICE Race raceOf(const Pair& pair, u32* bar) {
    const u64 gamma = 0x9E3779B97F4A7C15ull;
    const u64 h = mix((mix(pair.seed + gamma) ^ pair.key) + gamma);
    return {mix((h ^ (u64) (long long) pair.position) + gamma), scaleOf(pair), -infinity(), -1, bar};
}

// Philox4x32-7 of the counter (index, key, stream); the constant key schedule folds into the instructions.
DEVICE void philox(u32* r, u64 key, u32 index, u32 stream) {
    u32 a = index, b = (u32) (key >> 32), c = (u32) key, d = stream;
#pragma unroll
    for (u32 round = 0; round < 7; round++) {
        const u64 p = multiplyWide(a, 0xD2511F53u), q = multiplyWide(c, 0xCD9E8D57u);
        a = (u32) (q >> 32) ^ b ^ (round * 0x9E3779B9u);
        b = (u32) q;
        c = (u32) (p >> 32) ^ d ^ (round * 0xBB67AE85u);
        d = (u32) p;
    }
    r[0] = a, r[1] = b, r[2] = c, r[3] = d;
}

// The call that holds the coarse bits of a token, its neighbours in groups of 4 and those 256 on.
DEVICE u32 callOf(u32 token) { return token / TILE * (TILE / 8) + token % 256 / 4; }

DEVICE float scoreOf(const Race& race, float x, int token) {
    u32 coarse[4], fine[4];
    philox(coarse, race.key, callOf(token), 0);
    philox(fine, race.key, token, 1);
    const u32 word = token & 2 ? (token & 1 ? coarse[3] : coarse[2]) : token & 1 ? coarse[1] : coarse[0];
    const u64 n = (u64) (token & 256 ? word >> 16 : word & 0xffff) << 48 | (u64) fine[0] << 16 | fine[1] >> 16;
    const float unit = 5.42101086e-20f;  // 2^-64
    const float e = n >> 63 ? -logf((float) (~n | 1) * unit) : -log1pf(-(float) (n | 1) * unit);
    return fmaf(x, race.scale, -log2Fast(e));
}

// On ties the lower token; none (-1) is the highest.
DEVICE void challenge(Race& race, float score, int token) {
    if (score > race.best || (score == race.best && (u32) token < (u32) race.token)) {
        race.best = score;
        race.token = token;
    }
}

DEVICE u32 coarseBits(const u32 (&r)[8], int i) { return i < 8 ? r[i % 8] & 0xffff : r[i % 8] >> 16; }

// 2^23 + the coarse bits, in one instruction: the float whose last bits they are.
DEVICE float coarseFloat(const u32 (&r)[8], int i) {
    return __uint_as_float(__byte_perm(r[i % 8], 0x4b000000u, i < 8 ? 0x7410 : 0x7432));
}

DEVICE float raiseBar(Race& race, float score) {
    const float highest = warpTop(score);
    if (laneId() == 0) {
        atomicMax(race.bar, imageOf(highest));
    }
    return highest;
}

// This lane's sum of 2^(x scale - base); with RACING the tile's tokens enter the race.
template <bool RACING>
DEVICE float weigh(Race& race, const float (&x)[PER_LANE], float base, int tile) {
    float sums[4];
    if (!RACING) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float weight = exp2Fast(fmaf(x[i], race.scale, -base));
            sums[i % 4] = i < 4 ? weight : sums[i % 4] + weight;
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    u32 r[8];
    philox(r, race.key, callOf(tokenOf(tile, 0)), 0);
    philox(r + 4, race.key, callOf(tokenOf(tile, 4)), 0);
    float bar = valueOf(__shfl_sync(ALL, *(volatile u32*) race.bar, 0));
    if (bar == -infinity()) {
        // The first tile: v < u / 2^16 <= 1/2 implies e < 2 ln(2) u / 2^16, so some score is at least this.
        float bound = -infinity();
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const u32 u = coarseBits(r, i) + 1;
            bound = u <= 32768 ? fmaxf(bound, fmaf(x[i], race.scale, -log2Fast((float) u))) : bound;
        }
        bar = raiseBar(race, bound + 15.52f);
    }
    // A score is rounded at about |score| 2^-23: leave room.
    const float room = 1e-3f + 1e-6f * (fabsf(bar) + fabsf(base));
    const float limit = 65536 * exp2Fast(base - bar + room);
    bool hit = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const float weight = exp2Fast(fmaf(x[i], race.scale, -base));
        sums[i % 4] = i < 4 ? weight : sums[i % 4] + weight;
        hit |= coarseFloat(r, i) <= fmaf(weight, limit, 8388608.0f);
    }
    if (__any_sync(ALL, hit)) {
        u32 hits = 0;  // the same test in logarithms; repeating it literally would make the compiler keep 32 values for it
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            hits |= (log2Fast((float) coarseBits(r, i)) <= fmaf(x[i], race.scale, 16 - bar + room) ? 1u : 0u) << i;
        }
        for (; hits != 0; hits &= hits - 1) {
            const int at = __ffs(hits) - 1;
            float logit = x[0];
#pragma unroll
            for (int i = 1; i < PER_LANE; i++) {
                logit = i == at ? x[i] : logit;
            }
            const int token = tokenOf(tile, at);
            challenge(race, scoreOf(race, logit, token), token);
        }
        raiseBar(race, race.best);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The best of all threads, in thread 0.
DEVICE void meet(Race& race, float2* shared) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const float score = __shfl_xor_sync(ALL, race.best, offset);
        challenge(race, score, __shfl_xor_sync(ALL, race.token, offset));
    }
    if (laneId() == 0) {
        shared[threadIdx.x / 32] = make_float2(race.best, __int_as_float(race.token));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; w++) {
            challenge(race, shared[w].x, __float_as_int(shared[w].y));
        }
    }
}

// ---- one pass over the logits ------------------------------------------------------------------------------------------------

template <bool EDITED>
DEVICE void partial(const Pair* pairs, const int* pairCount, const Logit* logits, long long rowStride, int vocabulary,
                    const u32* seen, const int* masked, float2* scaledSums, float2* rawSums, float2* best) {
    __shared__ float2 shared[PARTIAL_THREADS / 32];
    __shared__ u32 bar;
    const int index = blockIdx.x, tiles = tileCount(vocabulary);
    const Pair pair = loadPair(pairs + index);
    if (index >= *pairCount | pair.slot < 0) {
        return;
    }
    if (threadIdx.x == 0) {
        bar = imageOf(-infinity());
    }
    __syncthreads();
    const Logit* row = logits + pair.row * rowStride;
    const bool racing = pair.temperature > 0 && !truncates(pair, vocabulary), separate = needsRaw(pair);
    const int first = tiles * blockIdx.y / gridDim.y, last = tiles * (blockIdx.y + 1) / gridDim.y;
    Race race = raceOf(pair, &bar);
    for (int tile = first + threadIdx.x / 32; tile < last; tile += PARTIAL_THREADS / 32) {
        float x[PER_LANE];
        loadTile(x, row, tile, vocabulary);
        if (separate) {
            Race untouched = {0, LOG2E};
            const float top = warpTop(laneTop(x));
            const float sum = warpSum(weigh<false>(untouched, x, baseOf(top, LOG2E), tile));
            if (laneId() == 0) {
                rawSums[(long long) index * tiles + tile] = make_float2(top, sum);
            }
        }
        bool sound = true;
        if (EDITED && edits(pair)) {
            sound = edit(x, pair, seenOf(seen, pair, vocabulary), masked + index * MAX_MASKED, tile, vocabulary);
        }
        const float mine = laneTop(x), top = warpTop(mine), base = baseOf(top, race.scale);
        float sum;
        if (racing) {
            sum = weigh<true>(race, x, base, tile);
        } else {
            sum = weigh<false>(race, x, base, tile);
            if (mine > race.best) {
                race.best = mine;
#pragma unroll
                for (int i = PER_LANE - 1; i >= 0; i--) {
                    race.token = x[i] == mine ? tokenOf(tile, i) : race.token;
                }
            }
        }
        sum = warpSum(sound ? sum : infinity() - infinity());
        if (laneId() == 0) {
            scaledSums[(long long) index * tiles + tile] = make_float2(top, sum);
        }
    }
    meet(race, shared);
    if (threadIdx.x == 0) {
        best[(long long) index * gridDim.y + blockIdx.y] = make_float2(race.best, __int_as_float(race.token));
    }
}

extern "C" __global__ void __launch_bounds__(PARTIAL_THREADS, 8) samplePartial(
        const Pair* pairs, const int* pairCount, const Logit* logits, long long rowStride, int vocabulary, const u32* seen,
        const int* masked, float2* scaledSums, float2* rawSums, float2* best) {
    followPredecessor();
    partial<false>(pairs, pairCount, logits, rowStride, vocabulary, seen, masked, scaledSums, rawSums, best);
}

extern "C" __global__ void __launch_bounds__(PARTIAL_THREADS, 6) samplePartialEdited(
        const Pair* pairs, const int* pairCount, const Logit* logits, long long rowStride, int vocabulary, const u32* seen,
        const int* masked, float2* scaledSums, float2* rawSums, float2* best) {
    followPredecessor();
    partial<true>(pairs, pairCount, logits, rowStride, vocabulary, seen, masked, scaledSums, rawSums, best);
}

// ---- a pair's end ------------------------------------------------------------------------------------------------------------

// The warps' values, one per lane, in every warp; 0 past the last.
DEVICE float exchange(float x, float* shared) {
    __syncthreads();
    if (laneId() == 31) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return laneId() < blockDim.x / 32 ? shared[laneId()] : 0;
}

// Over the block, the same in all threads.
DEVICE float blockSum(float x, float* shared) { return warpSum(exchange(warpSum(x), shared)); }

struct Total {
    float top, base, mass;  // of a row: largest logit; sum of 2^(x scale - base)
};

DEVICE Total mergeTiles(const float2* sums, int tiles, float scale, float* shared) {
    float top = -infinity();
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
        top = fmaxf(top, sums[t].x);
    }
    top = exchange(warpTop(top), shared);
    top = warpTop(laneId() < blockDim.x / 32 ? top : -infinity());
    const float base = baseOf(top, scale);
    float mass = 0;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
        mass += sums[t].y * exp2Fast(baseOf(sums[t].x, scale) - base);
    }
    return {top, base, blockSum(mass, shared)};
}

// By one thread. `kept` is the mass that is left after truncation, relative to the base of `scaled`.
DEVICE void finish(const Pair& pair, int index, int token, const Total& scaled, const Total& raw, float kept, const Logit* row,
                   int vocabulary, u32* seen, int* tokens, float* logprobs, int* lastToken) {
    float logprob = infinity() - infinity();
    if (!(scaled.mass > 0) || token < 0) {
        token = -1;
    } else {
        float x = toFloat(row[token]);
        float scale = LOG2E;
        Total total = raw;
        u32* word = seenOf(seen, pair, vocabulary) + token / 32;
        const u32 bit = 1u << token % 32;
        if (pair.logprobKind != RAW) {
            x = pair.repetitionPenalty != 1 && (*word & bit) ? penalised(x, pair.repetitionPenalty) : x;
            scale = scaleOf(pair);
            total = scaled;
            total.mass = pair.logprobKind == TRUNCATED ? kept : scaled.mass;
        }
        const bool certain = pair.temperature == 0 && pair.logprobKind == TRUNCATED;
        logprob = certain ? 0 : LN2 * (fmaf(x, scale, -total.base) - log2f(total.mass));
        if (pair.repetitionPenalty != 1) {
            atomicOr(word, bit);
        }
    }
    tokens[index] = token;
    logprobs[index] = logprob;
    lastToken[pair.slot] = max(token, 0);
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS) sampleFinish(
        const Pair* pairs, const int* pairCount, const Logit* logits, long long rowStride, int vocabulary, u32* seen,
        const float2* scaledSums, const float2* rawSums, const float2* best, int slices, int* tokens, float* logprobs,
        int* lastToken) {
    followPredecessor();
    __shared__ float2 shared[FINISH_THREADS / 32];
    const int index = blockIdx.x, tiles = tileCount(vocabulary);
    const Pair pair = loadPair(pairs + index);
    const int count = *pairCount;
    best += (long long) index * slices;
    const float2 candidate = loadNow(best + min(threadIdx.x, slices - 1));
    const Total scaled = mergeTiles(scaledSums + (long long) index * tiles, tiles, scaleOf(pair), (float*) shared);
    if (index >= count || pair.slot < 0 || truncates(pair, vocabulary)) {
        return;
    }
    Total raw = scaled;
    if (needsRaw(pair)) {
        raw = mergeTiles(rawSums + (long long) index * tiles, tiles, LOG2E, (float*) shared);
    }
    Race race = {0, 0, candidate.x, __float_as_int(candidate.y)};
    for (int s = threadIdx.x + FINISH_THREADS; s < slices; s += FINISH_THREADS) {
        challenge(race, best[s].x, __float_as_int(best[s].y));
    }
    __syncthreads();
    meet(race, shared);
    if (threadIdx.x == 0) {
        finish(pair, index, race.token, scaled, raw, scaled.mass, logits + pair.row * rowStride, vocabulary, seen, tokens, logprobs,
               lastToken);
    }
}

// Request i's tokens so far are tokens[starts[i]] ... tokens[starts[i + 1] - 1]; what its slot held before is forgotten.
extern "C" __global__ void __launch_bounds__(256) markSeen(u32* seen, int vocabulary, const int* slots, const int* starts,
                                                           const int* tokens, const int* count) {
    followPredecessor();
    const int words = (vocabulary + 31) / 32;
    if (blockIdx.x >= *count || slots[blockIdx.x] < 0) {
        return;
    }
    u32* mine = seen + (long long) slots[blockIdx.x] * words;
    for (int w = threadIdx.x; w < words; w += blockDim.x) {
        mine[w] = 0;
    }
    __syncthreads();
    for (int i = starts[blockIdx.x] + threadIdx.x; i < starts[blockIdx.x + 1]; i += blockDim.x) {
        atomicOr(mine + tokens[i] / 32, 1u << tokens[i] % 32);
    }
}

// ---- truncation --------------------------------------------------------------------------------------------------------------

// Where the cut is looked for. What is above is kept, what is below is not.
struct Range {
    u64 low, high;               // keys, both included
    bool whole;                  // nothing is above
    bool linear;                 // the histogram's buckets have equal widths in logits, else in keys
    float largest, scale, base;  // of the row
    float lowest, width;         // logit of low; of a linear bucket
    int shift;                   // log2 of the width of one in keys
};

struct Workspace {
    u64 list[CAPACITY];
    u32 histogram[BUCKETS];
    float2 reduced[TRUNCATED_THREADS / 32];
    Pair pair;
    Total scaled;
    Range range;
    float total, aboveMass;  // what top-p takes its share of, negative until that is known; the mass above the range
    u32 listed, above, bar;
    int first, last, cut;
};

// Keys order tokens by logit (-0 is 0), then the lower token first.
DEVICE u64 keyOf(float x, int token) { return (u64) imageOf(x + 0.0f) << 32 | (u32) ~token; }
DEVICE u64 lowestKey(float x) { return (u64) imageOf(x + 0.0f) << 32; }
DEVICE u64 highestKey(float x) { return lowestKey(x) | ALL; }
DEVICE float logitOf(u64 key) { return valueOf((u32) (key >> 32)); }

DEVICE float weightOf(const Range& range, float x) { return exp2Fast(fmaf(x, range.scale, -range.base)); }

DEVICE u32 bucketOf(const Range& range, float x, u64 key) {
    return range.linear ? min((u32) __fdividef(range.largest - x, range.width), BUCKETS - 1)
                        : (u32) ((range.high - key) >> range.shift);
}

// The upper edge of a bucket, which is the lower one of the bucket before.
DEVICE float edgeOf(const Range& range, int bucket) {
    if (range.linear) {
        return bucket == BUCKETS ? range.lowest : range.largest - bucket * range.width;
    }
    return logitOf(range.high - min(range.high - range.low, (u64) bucket << range.shift));
}

// By one thread.
DEVICE void setRange(Range& range, u64 low, u64 high, bool whole, bool linear) {
    range.low = low;
    range.high = high;
    range.whole = whole;
    range.lowest = logitOf(low);
    range.width = fminf(range.largest - range.lowest, 92 / range.scale) / BUCKETS;
    range.linear = linear && range.width > 0;
    range.shift = max(0, 53 - __clzll(high - low));
}

// Descending; a bitonic network (Batcher 1968).
DEVICE void sortKeys(u64* keys, int count) {
    int size = 1;
    while (size < count) {
        size *= 2;
    }
    for (int i = count + threadIdx.x; i < size; i += blockDim.x) {
        keys[i] = 0;
    }
    for (int width = 2; width <= size; width *= 2) {
        for (int step = width / 2; step > 0; step /= 2) {
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const u64 p = keys[a], q = keys[b];
                if ((p < q) == ((a & width) == 0)) {
                    keys[a] = q;
                    keys[b] = p;
                }
            }
        }
    }
    __syncthreads();
}

// The sum of x over the threads before this one; also over all.
DEVICE float sumBefore(float x, float& total, float* shared) {
    float through = x;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const float y = __shfl_up_sync(ALL, through, offset);
        through += laneId() >= offset ? y : 0;
    }
    const float before = __shfl_up_sync(ALL, through, 1);
    const float warps = exchange(through, shared);
    total = warpSum(warps);
    return warpSum(laneId() < threadIdx.x / 32 ? warps : 0) + (laneId() == 0 ? 0 : before);
}

// A key that the cut is not below, from the tiles' maxima and masses alone.
DEVICE u64 boundFromTiles(Workspace& work, const Total& scaled, const float2* sums, int tiles, bool byCount) {
    const float scale = scaleOf(work.pair);
    if (byCount && work.pair.topK <= tiles) {
        for (int t = threadIdx.x; t < tiles; t += TRUNCATED_THREADS) {
            work.list[t] = lowestKey(sums[t].x);
        }
        sortKeys(work.list, tiles);
        return work.list[work.pair.topK - 1];
    }
    if (byCount || work.pair.minP > 0) {
        return 0;
    }
    // The tokens below a weight w, a power of 2^(1/2): in tiles whose maximum is below w, all; in the others, all but the
    // maximum, each at most w. Four threads share a w.
    float2* masses = (float2*) work.list;
    for (int t = threadIdx.x; t < tiles; t += TRUNCATED_THREADS) {
        const float largest = exp2Fast(baseOf(sums[t].x, scale) - scaled.base);
        masses[t] = make_float2(sums[t].y * largest, largest);
    }
    if (threadIdx.x == 0) {
        work.cut = TRUNCATED_THREADS;
    }
    __syncthreads();
    const int step = threadIdx.x / 4;
    const float weight = exp2Fast(-0.5f * step);
    float below = 0;
    for (int t = threadIdx.x % 4; t < tiles; t += 4) {
        const float rest = fminf(fmaxf(masses[t].x - masses[t].y, 0.0f), (TILE - 1) * weight);
        below += masses[t].y < weight ? masses[t].x : rest;
    }
    below += __shfl_xor_sync(ALL, below, 1);
    below += __shfl_xor_sync(ALL, below, 2);
    if (below <= (1 - work.pair.topP - 2e-6f) * scaled.mass) {
        atomicMin(&work.cut, step);
    }
    __syncthreads();
    return work.cut == TRUNCATED_THREADS ? 0
         : lowestKey(scaled.top - 0.5f * work.cut / scale - 1e-6f * fabsf(scaled.top));
}

// Lists and counts a tile's tokens in the range; -infinity takes the place of all that are not above.
DEVICE void collect(Workspace& work, float (&x)[PER_LANE], int tile, float& mass) {
    const Range& range = work.range;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (x[i] >= range.lowest) {
            const u64 key = keyOf(x[i], tokenOf(tile, i));
            if (key > range.high) {
                atomicAdd(&work.above, 1);
                continue;
            }
            if (key >= range.low) {
                const u32 at = atomicAdd(&work.listed, 1);
                if (at < CAPACITY) {
                    work.list[at] = key;
                }
                atomicAdd(&work.histogram[bucketOf(range, x[i], key)], 1);
                mass += weightOf(range, x[i]);
            }
        }
        x[i] = -infinity();
    }
}

// Leaves the buckets that the cut can be in, of a range of more tokens than can be listed: a bucket's tokens weigh at most as its
// upper and at least as its lower edge. `need` is the count or mass, from the top of the range, that the cut is at, out of `all`.
DEVICE void narrow(Workspace& work, bool byCount, float all, float need, bool hasty) {
    constexpr int SHARE = BUCKETS / TRUNCATED_THREADS;
    const Range range = work.range;
    const int from = threadIdx.x * SHARE;
    float* shared = (float*) work.reduced;
    float most = 0, least = 0, count = 0;
#pragma unroll 1
    for (int b = from; b < from + SHARE; b++) {
        most += work.histogram[b] * (byCount ? 1 : weightOf(range, edgeOf(range, b)));
        least += work.histogram[b] * (byCount ? 1 : weightOf(range, edgeOf(range, b + 1)));
    }
    float mostOfAll, leastOfAll;
    most = sumBefore(most, mostOfAll, shared);
    least = sumBefore(least, leastOfAll, shared);
#pragma unroll 1
    for (int b = from; b < from + SHARE; b++) {
        most += work.histogram[b] * (byCount ? 1 : weightOf(range, edgeOf(range, b)));
        least += work.histogram[b] * (byCount ? 1 : weightOf(range, edgeOf(range, b + 1)));
        // Up to this bucket: bounds from the buckets themselves, and from those that follow.
        if (fminf(most, all - (leastOfAll - least)) >= need) {
            atomicMin(&work.first, b);
        }
        if (fmaxf(least, all - (mostOfAll - most)) >= need) {
            atomicMin(&work.last, b);
        }
    }
    __syncthreads();
    const int first = work.first, last = hasty ? first : max(work.last, first);
#pragma unroll 1
    for (int b = from; b < from + SHARE; b++) {
        count += b <= last ? work.histogram[b] : 0;
    }
    count = blockSum(count, shared);
    if (threadIdx.x == 0) {
        const float margin = range.width * 0.01f;  // for the rounding of edges
        u64 low = range.low, high = range.high;
        if (last < BUCKETS - 1) {
            low = range.linear ? max(low, lowestKey(edgeOf(range, last + 1) - margin))
                               : high - ((u64) (last + 1) << range.shift) + 1;
        }
        const bool whole = range.whole && (first == 0 || count <= CAPACITY);
        if (!whole && first > 0) {
            high = range.linear ? min(high, highestKey(edgeOf(range, first) + margin)) : high - ((u64) first << range.shift);
        }
        setRange(work.range, low, high, whole, false);
    }
}

DEVICE float massOf(const Workspace& work, int from, int to) {
    float mass = 0;
#pragma unroll 1
    for (int i = from; i < to; i++) {
        mass += weightOf(work.range, logitOf(work.list[i]));
    }
    return mass;
}

// How many of the first `count` in the sorted list it takes to reach the mass `need`; all if they do not.
DEVICE int cutByMass(Workspace& work, int count, float need) {
    const int part = (count + TRUNCATED_THREADS - 1) / TRUNCATED_THREADS;
    const int from = threadIdx.x * part, to = min(from + part, count);
    if (threadIdx.x == 0) {
        work.cut = count;
    }
    float all, mass = sumBefore(massOf(work, from, to), all, (float*) work.reduced);
#pragma unroll 1
    for (int i = from; i < to; i++) {
        mass += weightOf(work.range, logitOf(work.list[i]));
        if (mass >= need) {
            atomicMin(&work.cut, i + 1);
            break;
        }
    }
    __syncthreads();
    return work.cut;
}

extern "C" __global__ void __launch_bounds__(TRUNCATED_THREADS, 2) sampleTruncated(
        const Pair* pairs, const int* pairCount, const Logit* logits, long long rowStride, int vocabulary, u32* seen,
        const int* masked, const float2* scaledSums, const float2* rawSums, int* tokens, float* logprobs, int* lastToken) {
    followPredecessor();
    __shared__ Workspace work;
    const Pair& pair = work.pair;
    const Range& range = work.range;
    float* shared = (float*) work.reduced;
    const int index = blockIdx.x, tiles = tileCount(vocabulary), warp = threadIdx.x / 32;
    const float2* sums = scaledSums + (long long) index * tiles;
    const Pair loaded = loadPair(pairs + index);
    if (index >= *pairCount | loaded.slot < 0 | !truncates(loaded, vocabulary)) {
        return;
    }
    if (threadIdx.x == 0) {
        work.pair = loaded;
    }
    const Total merged = mergeTiles(sums, tiles, scaleOf(loaded), shared);
    if (threadIdx.x == 0) {
        work.scaled = merged;
    }
    __syncthreads();
    const Total& scaled = work.scaled;
    const Logit* row = logits + pair.row * rowStride;
    const bool byMass = pair.topP < 1, broken = !(scaled.mass > 0);
    bool byCount = pair.topK > 0 && pair.topK < vocabulary;
    const u64 bound = boundFromTiles(work, scaled, sums, tiles, byCount);
    if (threadIdx.x == 0) {
        work.total = byCount || pair.minP > 0 ? -1 : scaled.mass;
        work.range.largest = scaled.top;
        work.range.base = scaled.base;
        work.range.scale = scaleOf(pair);
        const float least = pair.minP > 0 ? fmaxf(scaled.top + logf(pair.minP) * (LOG2E / scaleOf(pair)), LOWEST) : LOWEST;
        const u64 low = max(bound, lowestKey(least)) | (u32) -vocabulary;
        const bool search = byCount || byMass;
        setRange(work.range, low, search ? highestKey(scaled.top) : low - 1, search, true);
    }

    Race race = raceOf(pair, &work.bar);
    int kept = 0;
    for (int pass = 0; !broken; pass++) {
        __syncthreads();
#pragma unroll 1
        for (int b = threadIdx.x; b < BUCKETS; b += TRUNCATED_THREADS) {
            work.histogram[b] = 0;
        }
        if (threadIdx.x == 0) {
            work.listed = work.above = 0;
            work.first = work.last = BUCKETS - 1;
            work.bar = imageOf(-infinity());
        }
        __syncthreads();
        race = raceOf(pair, &work.bar);
        float mass = 0, aboveMass = 0;
        for (int first = warp; first < tiles; first += TRUNCATED_THREADS) {
            const int mine = first + laneId() * (TRUNCATED_THREADS / 32);
            u32 reach = __ballot_sync(ALL, mine < tiles && sums[min(mine, tiles - 1)].x >= range.lowest);
            for (; reach != 0; reach &= reach - 1) {
                const int tile = first + (__ffs(reach) - 1) * (TRUNCATED_THREADS / 32);
                float x[PER_LANE];
                loadTile(x, row, tile, vocabulary);
                if (edits(pair)) {
                    edit(x, pair, seenOf(seen, pair, vocabulary), masked + index * MAX_MASKED, tile, vocabulary);
                }
                collect(work, x, tile, mass);
                if (!range.whole) {
                    aboveMass += weigh<true>(race, x, range.base, tile);
                }
            }
        }
        aboveMass = blockSum(aboveMass, shared);
        mass = blockSum(mass, shared);
        if (threadIdx.x == 0) {
            work.aboveMass = aboveMass;
            work.total = work.total < 0 && !byCount ? aboveMass + mass : work.total;
        }
        __syncthreads();
        kept = work.listed;
        if (kept > CAPACITY) {
            const float need = byCount ? pair.topK - (int) work.above : pair.topP * work.total - work.aboveMass;
            narrow(work, byCount, byCount ? kept : mass, need, pass > 5);
            continue;
        }
        sortKeys(work.list, kept);
        if (byCount) {
            kept = min(kept, pair.topK - (int) work.above);
            byCount = false;
            const int part = (kept + TRUNCATED_THREADS - 1) / TRUNCATED_THREADS, from = threadIdx.x * part;
            const float mass = blockSum(massOf(work, from, min(from + part, kept)), shared);
            if (threadIdx.x == 0) {
                work.total = work.aboveMass + mass;
            }
            const bool again = byMass && !range.whole;
            __syncthreads();
            if (again) {
                if (threadIdx.x == 0) {
                    setRange(work.range, kept > 0 ? work.list[kept - 1] : range.high + 1, highestKey(scaled.top), true, true);
                }
                continue;
            }
        }
        if (byMass) {
            kept = cutByMass(work, kept, pair.topP * work.total - work.aboveMass);
        }
        break;
    }

    float mass = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < kept; i += TRUNCATED_THREADS) {
        const float x = logitOf(work.list[i]);
        const int token = ~(u32) work.list[i];
        mass += weightOf(range, x);
        challenge(race, scoreOf(race, x, token), token);
    }
    mass = work.aboveMass + blockSum(mass, shared);
    Total raw = scaled;
    if (needsRaw(pair)) {
        raw = mergeTiles(rawSums + (long long) index * tiles, tiles, LOG2E, shared);
    }
    __syncthreads();
    meet(race, work.reduced);
    if (threadIdx.x == 0) {
        finish(pair, index, race.token, scaled, raw, mass, row, vocabulary, seen, tokens, logprobs, lastToken);
    }
}
