// Sampling: the pass over the logits and the draw, for pairs without truncation; see sampling.cuh.

#include "sampling.cuh"

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
