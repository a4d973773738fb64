// The log-prob head: what the loss needs of a chunk's logits, and the gradient of the loss by them. With x the logits of a row,
// t its target, and T the temperature,
//     z = x / T          lse = log sum_j exp z_j       p_j = exp(z_j - lse)
//     logprob = z_t - lse                              entropy = -sum_j p_j log p_j = lse - sum_j p_j z_j
// and, with g and e the gradients of the loss by the two,
//     dL/dx_j = ( g ([j = t] - p_j) - e p_j (log p_j + entropy) ) / T.
//
// Forward. Maximum, sum and first moment are taken in one pass (online softmax, Milakov and Gimelshein 2018): with a base b that
// follows the maximum of y = x log2(e) / T,
//     mass = sum_j 2^(y_j - b)      moment = sum_j 2^(y_j - b) (y_j - b)
// and a new base b' turns them into 2^(b - b') mass and 2^(b - b') (moment + (b - b') mass). Then
//     lse = log 2 (b + log2 mass)   entropy = log 2 (log2 mass - moment / mass),
// which does not subtract large numbers from each other. The probabilities need the row once more. From the L2 cache, that would
// move 10 bytes for each logit there instead of 6, and be the limit. So a row belongs to a cluster of CTAS CTAs that keep it in shared
// memory: 8 x 76 kB for 151,936 logits, three such CTAs on a multiprocessor. They exchange sums through each other's shared memory,
// with one barrier of the cluster for a row. As soon as a thread has written some columns' probabilities, it has the same columns of
// the cluster's next row copied to their place: loads are always under way, and a thread reads only what it has copied itself,
// without barriers. What finds no room is read twice, the second time from L2 (at most 50 rows are in flight on 132
// multiprocessors). Before sm_90 a CTA has a row for itself.
//
// Backward. One pass over the columns, from the probabilities, in place if wanted, or from logits. Rows with g = e = 0 (masked
// tokens) become zeros and are not read. A probability next to 1 is 1 in bfloat16, and 1 - p, the largest gradient of its row, would
// be 0; so the target's gradient is computed from the log-prob: 1 - p = -expm1(logprob).
//
// Where no entropy is asked for, dL/dx = -g / T D with D = p - [j = t], whose rows differ from the probabilities in one element
// (subtractTargets). The factor of a row can wait: it goes to the rows of what D is multiplied with, and of what comes out
// (scaleRows). That leaves out the pass over the columns. But masked rows are read, and NaN in one of them, times 0, is NaN.
//
// Bits depend on the row, `vocabulary` and CTAS alone, neither on the grid nor on how much of a row is kept. -infinity is a logit like
// others. NaN, +infinity, or nothing above -1e30 after scaling: the row's results are NaN. A target outside [0, vocabulary): its
// log-prob is NaN, its gradient that of a row without a target.
//
// Arguments (R rows; pointers 16-byte aligned, strides in elements)
//   logits         float [R][stride], stride >= vocabulary, a multiple of 4
//   probabilities  bfloat16 [R][pStride], pStride >= vocabulary, a multiple of 8; beyond the vocabulary, columns up to the next
//   gradient       multiple of 8 may be written (zeros; NaN in a row of NaN), the others are left alone
//   targets        int64 [R];  logprob, logSumExp, entropy, byLogprob, byEntropy: float [R];  inverseTemperature 1 / T > 0
// Launches (256 threads); bytes for each logit
//   logprobForward             CTAS * clusters CTAs: the clusters take rows in turn, any number is right, ceil(R / 4) is good.
//                              16 * retained bytes of dynamic shared memory; retained = min(4768, w) is good, any number is right,
//                              w = ceil(ceil(vocabulary / 4) / CTAS); CTAS the smallest of 1, 2, 4, 8 with w <= 4768, or else 8.
//                              6 bytes, 4 without probabilities
//   logprobBackward            grid (ceil(vocabulary / 8192), R), R <= 65,535; 4 bytes
//   logprobBackwardFromLogits  grid (ceil(vocabulary / 4096), R), R <= 65,535; 6 bytes
//   subtractTargets            grid (ceil(R / 256))
//   scaleRows                  grid (ceil(R width / 2048)), for rows of width elements, a multiple of 8; R width < 2^34

#include "common.cuh"

#ifndef CTAS
#define CTAS 8
#endif
#if __CUDA_ARCH__ >= 900
#define CLUSTER CTAS
#define CLUSTERED __cluster_dims__(CTAS, 1, 1)
#else
#define CLUSTER 1
#define CLUSTERED
#endif

#define UNROLL _Pragma("unroll")
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BATCH = 4;  // vectors of 4 logits that a thread has in registers at a time
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // the base before any logit: finite, so that differences are
constexpr float FLOOR = -160.0f;  // exponents whose power is 0, and finite, so that 0 times them is, too

DEVICE float exp2Fast(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

DEVICE float log2Fast(float x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// x, but not less than FLOOR; NaN stays NaN.
DEVICE float notBelowFloor(float x) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(FLOOR));
    return x;
}

// ---- sums of a row ---------------------------------------------------------------------------------------------------------

struct __align__(16) Sums { float base, mass, moment, unused; };

// The same sums relative to a base that is not lower.
DEVICE Sums rebased(Sums s, float base) {
    float change = notBelowFloor(s.base - base), factor = exp2Fast(change);
    return {base, factor * s.mass, factor * fmaf(s.mass, change, s.moment)};
}

// Takes y = scale * x into the sums. The base is rounded, which is harmless, since all who use the sums use it.
DEVICE void include(Sums& s, const float (&x)[4 * BATCH], float scale) {
    float top[4], mass[4], moment[4];
    UNROLL for (int i = 0; i < 4 * BATCH; i++) {
        top[i % 4] = i < 4 ? x[i] : fmaxf(top[i % 4], x[i]);
    }
    float highest = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
    s = rebased(s, fmaxf(s.base, highest * scale));
    UNROLL for (int i = 0; i < 4 * BATCH; i++) {
        float y = notBelowFloor(fmaf(x[i], scale, -s.base)), power = exp2Fast(y);
        mass[i % 4] = i < 4 ? power : mass[i % 4] + power;
        moment[i % 4] = i < 4 ? power * y : fmaf(power, y, moment[i % 4]);
    }
    s.mass += (mass[0] + mass[1]) + (mass[2] + mass[3]);
    s.moment += (moment[0] + moment[1]) + (moment[2] + moment[3]);
}

DEVICE Sums warpSums(Sums s) {
    s = rebased(s, warpMax(s.base));
    return {s.base, warpSum(s.mass), warpSum(s.moment)};
}

struct Exchange {
    Sums warps[WARPS];
    Sums slices[2][CLUSTER];  // by turns: the next row's are written before the last CTA has read this one's
};

// A barrier for the cluster's threads, behind which all see what was sent. That has a fence of its own: for the probabilities just
// written none is needed, and to wait for them would cost time.
DEVICE void clusterSync() {
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Writes to the same place in the shared memory of the cluster's CTA `rank`.
DEVICE void send(Sums* to, int rank, Sums s) {
#if CLUSTER > 1
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(sharedAddress(to)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %3};\nfence.acq_rel.cluster;"
                 ::"r"(remote), "f"(s.base), "f"(s.mass), "f"(s.moment) : "memory");
#else
    *to = s;
#endif
}

// The sums of the whole row, for all threads of the cluster.
DEVICE Sums rowSums(Sums s, Exchange& exchange, int rank, u32 turn) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    exchange.warps[warp] = warpSums(s);  // all lanes write the same
    __syncthreads();
    if (warp == 0) {
        s = warpSums(lane < WARPS ? exchange.warps[lane] : Sums{LOWEST});
        if (lane < CLUSTER) {
            send(&exchange.slices[turn][rank], lane, s);
        }
    }
    clusterSync();
    const Sums* slices = exchange.slices[turn];
    Sums all = {LOWEST};
    UNROLL for (int i = 0; i < CLUSTER; i++) {
        all.base = fmaxf(all.base, slices[i].base);
    }
    UNROLL for (int i = 0; i < CLUSTER; i++) {
        Sums slice = rebased(slices[i], all.base);
        all.mass += slice.mass;
        all.moment += slice.moment;
    }
    all.mass = all.mass > 0.0f ? all.mass : infinity() - infinity();
    return all;
}

// ---- forward ---------------------------------------------------------------------------------------------------------------

// A CTA's columns of its rows, in vectors of four. A thread's are those that have its number modulo THREADS. The first `retained`
// are kept in shared memory. length is in floats; what is beyond counts as -infinity.
struct Slice { float4* kept; int retained, length; };

#define FOR_VECTORS(batch) UNROLL for (int k = 0, i = (batch) * BATCH * THREADS + threadIdx.x; k < BATCH; k++, i += THREADS)

DEVICE void loadBatch(float (&x)[4 * BATCH], const Slice& slice, const float* from, int batch) {
    float4 four[BATCH];
    if ((batch + 1) * BATCH * THREADS <= slice.retained && 4 * (batch + 1) * BATCH * THREADS <= slice.length) {
        FOR_VECTORS(batch) {
            four[k] = slice.kept[i];
        }
    } else {
        FOR_VECTORS(batch) {
            four[k] = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
            if (4 * i < slice.length) {
                four[k] = i < slice.retained ? slice.kept[i] : reinterpret_cast<const float4*>(from)[i];
                four[k].y = 4 * i + 1 < slice.length ? four[k].y : -infinity();
                four[k].z = 4 * i + 2 < slice.length ? four[k].z : -infinity();
                four[k].w = 4 * i + 3 < slice.length ? four[k].w : -infinity();
            }
        }
    }
    UNROLL for (int k = 0; k < BATCH; k++) {
        x[4 * k] = four[k].x, x[4 * k + 1] = four[k].y, x[4 * k + 2] = four[k].z, x[4 * k + 3] = four[k].w;
    }
}

DEVICE void copyBatch(const Slice& slice, const float* from, int batch) {
    FOR_VECTORS(batch) {
        if (i < slice.retained && 4 * i < slice.length) {
            copyAsync16(sharedAddress(slice.kept + i), from + 4 * i, true);
        }
    }
    commitCopies();
}

// Waits until at most `pending` of the batches copied last are still under way.
DEVICE void awaitCopies(int pending) {
    pending >= 3 ? waitCopies<3>() : pending == 2 ? waitCopies<2>() : pending == 1 ? waitCopies<1>() : waitCopies<0>();
}

// p = 2^(scale x - offset). A warp writes 256 contiguous bytes at a time.
DEVICE void writeBatch(bf16* to, const Slice& slice, const float* from, int batch, float scale, float offset) {
    float x[4 * BATCH];
    loadBatch(x, slice, from, batch);
    FOR_VECTORS(batch) {
        float p[4];
        UNROLL for (int j = 0; j < 4; j++) {
            p[j] = exp2Fast(fmaf(x[4 * k + j], scale, -offset));
        }
        if (4 * i < slice.length) {
            *reinterpret_cast<uint2*>(to + 4 * i) = make_uint2(packBf16(p[0], p[1]), packBf16(p[2], p[3]));
        }
    }
}

// logprob, logSumExp, entropy [R]; probabilities may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 3) CLUSTERED
        logprobForward(const float* logits, long long stride, int vocabulary, float inverseTemperature, const long long* targets,
                       float* logprob, float* logSumExp, float* entropy, bf16* probabilities, long long pStride, int rows,
                       int retained) {
    followPredecessor();
    extern __shared__ __align__(16) float4 kept[];
    __shared__ Exchange exchange;
    const int rank = blockIdx.x % CLUSTER, clusters = gridDim.x / CLUSTER;
    const int width = ((vocabulary + 3) / 4 + CLUSTER - 1) / CLUSTER, first = 4 * rank * width;
    const int batches = (width + BATCH * THREADS - 1) / (BATCH * THREADS);
    const Slice slice = {kept, retained, max(0, min(vocabulary - first, 4 * width))};
    const float scale = inverseTemperature * LOG2E;
    int row = blockIdx.x / CLUSTER;
    const float* from = logits + row * stride + first;
    for (int batch = 0; batch < batches && row < rows; batch++) {
        copyBatch(slice, from, batch);
    }
    clusterSync();  // the others' shared memory is there
    for (u32 turn = 0; row < rows; turn ^= 1) {
        // Early: these are two reads of memory, one after the other.
        const bool writer = rank == 0 && threadIdx.x == 0;
        const long long target = writer ? targets[row] : -1;
        const float chosen = target >= 0 && target < vocabulary ? from[target] : infinity() - infinity();
        Sums sums = {LOWEST};
        for (int batch = 0; batch < batches; batch++) {
            float x[4 * BATCH];
            awaitCopies(batches - 1 - batch);
            loadBatch(x, slice, from, batch);
            include(sums, x, scale);
        }
        sums = rowSums(sums, exchange, rank, turn);
        if (writer) {
            float logMass = logf(sums.mass);
            logprob[row] = fmaf(fmaf(chosen, scale, -sums.base), LN2, -logMass);
            logSumExp[row] = fmaf(sums.base, LN2, logMass);
            entropy[row] = logMass - LN2 * (sums.moment / sums.mass);
        }
        bf16* to = probabilities ? probabilities + row * pStride + first : nullptr;
        const float offset = sums.base + log2Fast(sums.mass);
        const float* next = from + clusters * stride;
        row += clusters;
        for (int batch = 0; batch < batches; batch++) {
            if (to) {
                writeBatch(to, slice, from, batch, scale, offset);
            }
            if (row < rows) {
                copyBatch(slice, next, batch);  // over what this thread has just read
            }
        }
        from = next;
    }
}

// ---- backward --------------------------------------------------------------------------------------------------------------

// A row's gradient from 16-byte vectors of its logits or probabilities. With g, e divided by T and shift = e entropy it is
// -p_j (g + shift + e log p_j), but for the target.
template <bool FROM_LOGITS>
DEVICE void backward(const void* row, float scale, float offset, bf16* gradient, int vocabulary, long long target, float logprob,
                     float g, float e, float entropy) {
    constexpr int WIDTH = FROM_LOGITS ? 4 : 8;
    const bool masked = g == 0.0f && e == 0.0f, hasTarget = target >= 0 && target < vocabulary;
    const float shift = e == 0.0f ? 0.0f : e * entropy;  // an entropy that is not asked for may be NaN
    const int first = blockIdx.x * BATCH * THREADS + threadIdx.x;
    uint4 vectors[BATCH];
    UNROLL for (int k = 0; k < BATCH; k++) {
        int i = first + k * THREADS;
        vectors[k] = make_uint4(0, 0, 0, 0);
        if (WIDTH * i < vocabulary && !masked) {
            vectors[k] = reinterpret_cast<const uint4*>(row)[i];
        }
    }
    UNROLL for (int k = 0; k < BATCH; k++) {
        int column = WIDTH * (first + k * THREADS);
        const u32 words[4] = {vectors[k].x, vectors[k].y, vectors[k].z, vectors[k].w};
        float y[WIDTH];
        UNROLL for (int j = 0; j < WIDTH; j++) {
            float exponent;  // of p to base 2
            if (FROM_LOGITS) {
                exponent = notBelowFloor(fmaf(__uint_as_float(words[j % 4]), scale, -offset));
                y[j] = exp2Fast(exponent);
            } else {
                y[j] = j % 2 == 0 ? lowFloat(words[j / 2]) : highFloat(words[j / 2]);
                exponent = e == 0.0f ? 0.0f : log2Fast(fmaxf(y[j], 1.2e-38f));
            }
            y[j] = masked || column + j >= vocabulary ? 0.0f : -y[j] * fmaf(exponent, e * LN2, g + shift);
        }
        if (column < vocabulary) {
            u32 out[4] = {packBf16(y[0], y[1]), packBf16(y[2], y[3])};
            if (FROM_LOGITS) {
                *reinterpret_cast<uint2*>(gradient + column) = make_uint2(out[0], out[1]);
            } else {
                out[2] = packBf16(y[WIDTH - 4], y[WIDTH - 3]), out[3] = packBf16(y[WIDTH - 2], y[WIDTH - 1]);
                *reinterpret_cast<uint4*>(gradient + column) = make_uint4(out[0], out[1], out[2], out[3]);
            }
        }
    }
    // The thread that has just written the vector around the target corrects it.
    int distance = (int) target / WIDTH - first;
    if (!masked && hasTarget && distance >= 0 && distance < BATCH * THREADS && distance % THREADS == 0) {
        float p = expf(logprob);
        gradient[target] = toBf16(-g * expm1f(logprob) - (p == 0.0f ? 0.0f : p * fmaf(e, logprob, shift)));
    }
}

// gradient may be probabilities; byEntropy may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 6)
        logprobBackward(const bf16* probabilities, bf16* gradient, long long pStride, int vocabulary, const long long* targets,
                        const float* logprob, const float* byLogprob, const float* byEntropy, const float* entropy,
                        float inverseTemperature) {
    followPredecessor();
    const int row = blockIdx.y;
    backward<false>(probabilities + row * pStride, 0.0f, 0.0f, gradient + row * pStride, vocabulary, targets[row], logprob[row],
                    inverseTemperature * byLogprob[row], byEntropy ? inverseTemperature * byEntropy[row] : 0.0f, entropy[row]);
}

// The same from logits and logSumExp [R].
extern "C" __global__ void __launch_bounds__(THREADS, 6)
        logprobBackwardFromLogits(const float* logits, long long stride, const float* logSumExp, bf16* gradient, long long pStride,
                                  int vocabulary, const long long* targets, const float* logprob, const float* byLogprob,
                                  const float* byEntropy, const float* entropy, float inverseTemperature) {
    followPredecessor();
    const int row = blockIdx.y;
    backward<true>(logits + row * stride, inverseTemperature * LOG2E, logSumExp[row] * LOG2E, gradient + row * pStride, vocabulary,
                   targets[row], logprob[row], inverseTemperature * byLogprob[row],
                   byEntropy ? inverseTemperature * byEntropy[row] : 0.0f, entropy[row]);
}

// probabilities to D, in place. Rows whose target is outside the vocabulary stay.
extern "C" __global__ void __launch_bounds__(THREADS) subtractTargets(bf16* probabilities, long long pStride, int vocabulary,
                                                                      const long long* targets, const float* logprob, int rows) {
    followPredecessor();
    const int row = blockIdx.x * THREADS + threadIdx.x;
    const long long target = row < rows ? targets[row] : -1;
    if (target >= 0 && target < vocabulary) {
        probabilities[row * pStride + target] = toBf16(expm1f(logprob[row]));
    }
}

// out = factor byRow[row] x, bfloat16 [R][width]; out may be x. Where the factors are 0, so is the result.
extern "C" __global__ void __launch_bounds__(THREADS) scaleRows(const bf16* x, const float* byRow, float factor, bf16* out, int width,
                                                                int rows) {
    followPredecessor();
    const u32 i = blockIdx.x * THREADS + threadIdx.x, row = i / (width / 8);
    if (row >= rows) {
        return;
    }
    const float scale = factor * byRow[row];
    auto scaled = [&](u32 pair) { return scale == 0.0f ? 0 : packBf16(scale * lowFloat(pair), scale * highFloat(pair)); };
    const uint4 v = reinterpret_cast<const uint4*>(x)[i];
    reinterpret_cast<uint4*>(out)[i] = make_uint4(scaled(v.x), scaled(v.y), scaled(v.z), scaled(v.w));
}
