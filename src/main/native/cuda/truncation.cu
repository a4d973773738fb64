// Sampling for pairs with top-k, top-p or min-p; see sampling.cuh.

#include "sampling.cuh"

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
