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
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
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
