// The end of a training step: the norm of the gradient, the decision whether the step counts, and AdamW. Nothing is read by the
// host in between; what has been decided lies in a small struct in device memory.
//
// Norm. The squares are summed in float64, in which the square of a float32 is exact, so nothing overflows or vanishes that is
// not itself beyond float32. Two stages in a fixed order: `squares` leaves one sum per block, `normAndScale` adds these. The bits
// depend on the elements, on the number of blocks and on the gradient's address modulo 16. Ranks that each hold a slice add up
// their partial sums, element by element, and their losses between the two stages; then all of them decide alike.
//   norm = sqrt(sum of g^2),  scale = norm > clip ? clip / (norm + 1e-6) : 1        (Pascanu, Mikolov and Bengio 2013)
// If norm (as float32) or loss is not finite, the step is skipped: it is counted, and `adamw` leaves weights, remainders and moments
// as they are.
//
// AdamW (Loshchilov and Hutter 2019), for each element and the t-th step that is not skipped:
//   g  = scale * gradient
//   m  = m + (1 - beta1) (g - m)                          first moment
//   v  = beta2 v + (1 - beta2) g^2                        second moment
//   w  = w - lr * decay * w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
// Decay and update are added before they are taken from w, so w is rounded once. Corrections and other factors are computed in
// float64, once for each block.
//
// Masters. w is a float32 master, of which the model's bfloat16 weight is the rounding to nearest, halves away from zero. The weight
// lies in the model; what is kept beside it are the 16 bits that rounding cut off, the remainder. Taken as a signed number it is
// master - weight in units of the master's last place, so nothing is lost: bits of master = (weight << 16) + remainder. A weight of
// zero has no remainder: whoever sets weights to zero must not find a NaN there.
//
// Moments of 16 bits (MOMENTS_BF16): the update uses m and v before they are rounded; what is kept is rounded up or down at
// random with the probabilities that leave the mean unchanged, or a slow average would stand still: with beta2 = 0.999 most steps
// change v by less than half of its last bit. Element i has the (i mod 4)-th 16 bits of CounterRandom.bits(seed, t, i / 4), the same for
// m and v, each of which keeps its mean: with 32 bits of its own for each element half of all instructions would be spent on them. So a
// run repeats bit for bit, however the elements are spread over launches and devices.
//
// Memory is the limit. Bytes for each element, read + written:
//   float32 moments 16 + 12, bfloat16 moments 12 + 8; for float32 weights the same
// Four elements an access (16 bytes of float32), VECTORS of them at a distance per thread, so that each access of a warp is
// contiguous. All of a block is under way while its factors are computed. A block has one stretch of the arrays, so that blocks go over
// them in order, at 4.2 TB/s on an H200: as many as are resident, striding through all, reach 2.7 to 3.7, as the arrays happen to lie;
// loads and stores marked as streaming 4.0; eight elements an access 4.3 with bfloat16 moments, 4.0 with float32 ones.
//
// Arguments
//   gradient       float32 [n];  first, second  Moment [n];  remainder 16 bits [n] (unused with WEIGHTS_FLOAT);  weights Weight [n]
//   n              any number, 64 bits. Pointers may have any alignment their type allows; where no offset makes all vectors
//                  aligned at once, elements are taken one by one, with the same results. Nothing outside [0, n) is touched.
//   partial        float64 [parts]: every one is written
//   clip           float64, infinity for none;  loss  float32 [1] or null
//   state          StepState, 32 bytes, zeros at the start of a training; a restored one needs `step` again
//   lr, beta1, beta2, epsilon, decay   float64, decay 0 where weights do not decay
//   seed, index    for MOMENTS_BF16: the run's seed, and which element of the whole model the first one is
// Launches, in this order, 256 threads each
//   squares        grid (parts). The same parts always, for the same bits; residentBlocks * multiprocessors (5 * 132 on an H200).
//   normAndScale   grid (1)
//   drawRemainders when weights have come from elsewhere: grid of any size, 256 threads
//   adamw          once for each run of elements with the same decay; grid ceil(n / (1024 * VECTORS))
//
// Macros: MOMENTS_BF16, WEIGHTS_FLOAT (the model itself is float32: its weights are their own masters).

#include "common.cuh"

#ifndef MOMENTS_BF16
#define MOMENTS_BF16 0
#endif
#ifndef WEIGHTS_FLOAT
#define WEIGHTS_FLOAT 0
#endif

#define UNROLL _Pragma("unroll")

#if MOMENTS_BF16
typedef bf16 Moment;
#else
typedef float Moment;
#endif
#if WEIGHTS_FLOAT
typedef float Weight;
#else
typedef bf16 Weight;
#endif

constexpr int THREADS = 256;
constexpr int VECTORS = 2;
constexpr int SQUARES_VECTORS = 4;

struct __align__(16) StepState {
    float norm;      // before clipping
    float scale;     // of the gradient
    int apply;       // whether norm and loss are finite
    int skipped;     // steps so far in which they were not
    long long step;  // steps so far in which they were
    float loss;
    int unused;
};

// ---- four elements at a time -----------------------------------------------------------------------------------------------

// All is used once in a step: nothing is kept in the first-level cache.
DEVICE void load(float (&x)[4], const float* from) {
    float4 four = __ldcg(reinterpret_cast<const float4*>(from));
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

DEVICE void load(float (&x)[4], const bf16* from) {
    uint2 four = __ldcg(reinterpret_cast<const uint2*>(from));
    x[0] = lowFloat(four.x), x[1] = highFloat(four.x), x[2] = lowFloat(four.y), x[3] = highFloat(four.y);
}

DEVICE void store(float* to, const float (&x)[4]) {
    __stcg(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
}

// The upper halves of these.
DEVICE void storeUpper(bf16* to, u32 a, u32 b, u32 c, u32 d) {
    __stcg(reinterpret_cast<uint2*>(to), make_uint2(__byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x7632)));
}

DEVICE float toFloat(float x) { return x; }

// ---- masters ---------------------------------------------------------------------------------------------------------------

DEVICE bool isFinite(float x) { return (~__float_as_uint(x) & 0x7f800000u) != 0; }

#if WEIGHTS_FLOAT  // they are their own masters
DEVICE void loadMasters(float (&x)[4], const float* weights, const bf16*, long long at) { load(x, weights + at); }
DEVICE void storeMasters(float* weights, bf16*, long long at, const float (&x)[4]) { store(weights + at, x); }
DEVICE float loadMaster(const float* weights, const bf16*, long long at) { return weights[at]; }
DEVICE void storeMaster(float* weights, bf16*, long long at, float x) { weights[at] = x; }
#else
// weight: the upper half of a float32
DEVICE float join(u32 weight, u32 remainder) {
    return __uint_as_float(weight + ((weight & 0x7fffffffu) ? (int) (short) remainder : 0));
}

// The upper half is the weight; the remainder is the master's lower half. A NaN stays one.
DEVICE u32 rounded(float master) { return master != master ? 0x7fff0000u : __float_as_uint(master) + 0x8000u; }

DEVICE void loadMasters(float (&x)[4], const bf16* weights, const bf16* remainder, long long at) {
    const uint2 w = __ldcg(reinterpret_cast<const uint2*>(weights + at)), r = __ldcg(reinterpret_cast<const uint2*>(remainder + at));
    x[0] = join(w.x << 16, r.x), x[1] = join(w.x & 0xffff0000u, r.x >> 16);
    x[2] = join(w.y << 16, r.y), x[3] = join(w.y & 0xffff0000u, r.y >> 16);
}

DEVICE void storeMasters(bf16* weights, bf16* remainder, long long at, const float (&x)[4]) {
    storeUpper(weights + at, rounded(x[0]), rounded(x[1]), rounded(x[2]), rounded(x[3]));
    const u32 a = __float_as_uint(x[0]), b = __float_as_uint(x[1]), c = __float_as_uint(x[2]), d = __float_as_uint(x[3]);
    __stcg(reinterpret_cast<uint2*>(remainder + at), make_uint2(__byte_perm(a, b, 0x5410), __byte_perm(c, d, 0x5410)));
}

DEVICE float loadMaster(const bf16* weights, const bf16* remainder, long long at) {
    return join((u32) weights[at] << 16, remainder[at]);
}

DEVICE void storeMaster(bf16* weights, bf16* remainder, long long at, float x) {
    weights[at] = (bf16) (rounded(x) >> 16), remainder[at] = (bf16) __float_as_uint(x);
}
#endif

// ---- runs of elements ------------------------------------------------------------------------------------------------------

template <typename T>
DEVICE bool aligned(const T* pointer) { return (u64) pointer % (4 * sizeof(T)) == 0; }

// How n elements are cut: `lead` before the first aligned vector, the vectors, and `rest`, in which the lead is counted.
struct Cut {
    long long lead, vectors, rest;

    // The element of the i-th of the rest.
    __device__ long long restAt(long long i) const { return i < lead ? i : i + 4 * vectors; }
};

DEVICE long long leadOf(const float* pointer, long long n) { return min((long long) (-((u64) pointer / 4) & 3), n); }

DEVICE Cut cutAt(long long lead, long long n) {
    const long long vectors = (n - lead) / 4;
    return {lead, vectors, n - 4 * vectors};
}

// ---- norm ------------------------------------------------------------------------------------------------------------------

// The sum over the block, in thread 0.
DEVICE double blockSum(double x) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
    }
    return sums[0];
}

extern "C" __global__ void __launch_bounds__(THREADS, 5)
        squares(const float* gradient, long long n, double* partial, int parts) {
    followPredecessor();
    const Cut cut = cutAt(leadOf(gradient, n), n);
    const float* from = gradient + cut.lead;
    const long long stride = (long long) parts * THREADS;
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (long long at = (long long) blockIdx.x * (SQUARES_VECTORS * THREADS) + threadIdx.x; at < cut.vectors;
         at += SQUARES_VECTORS * stride) {
        float x[SQUARES_VECTORS][4];
        UNROLL for (int k = 0; k < SQUARES_VECTORS; k++) {
            if (at + k * THREADS < cut.vectors) {
                load(x[k], from + 4 * (at + k * THREADS));
            } else {
                x[k][0] = x[k][1] = x[k][2] = x[k][3] = 0.0f;
            }
        }
        UNROLL for (int k = 0; k < SQUARES_VECTORS; k++) UNROLL for (int i = 0; i < 4; i++) {
            sums[i] = fma((double) x[k][i], (double) x[k][i], sums[i]);
        }
    }
    for (long long i = (long long) blockIdx.x * THREADS + threadIdx.x; i < cut.rest; i += stride) {
        const double x = gradient[cut.restAt(i)];
        sums[0] = fma(x, x, sums[0]);
    }
    const double sum = blockSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
        normAndScale(const double* partial, int parts, double clip, const float* loss, StepState* state) {
    followPredecessor();
    double sum = 0.0;
    UNROLL for (int i = threadIdx.x; i < parts; i += THREADS) {
        sum += partial[i];
    }
    sum = blockSum(sum);
    if (threadIdx.x == 0) {
        const double norm = sqrt(sum);
        const float lossValue = loss ? *loss : 0.0f;
        const bool finite = isFinite((float) norm) && isFinite(lossValue);
        state->norm = (float) norm;
        state->scale = norm > clip ? (float) (clip / (norm + 1e-6)) : 1.0f;
        state->apply = finite;
        state->skipped += !finite;
        state->step += finite;
        state->loss = lossValue;
    }
}

// ---- AdamW -----------------------------------------------------------------------------------------------------------------

// What is the same for all elements.
struct Factors {
    float scale, beta2, complement1, complement2;    // complements: 1 - beta
    float rate, inverseCorrection, epsilon, lrDecay;
    u64 key;                                         // of the random bits
    int apply;
};

// SplitMix64's finaliser and increment; see CounterRandom.
constexpr u64 GAMMA = 0x9E3779B97F4A7C15ull;

DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

DEVICE Factors factorsOf(const StepState* state, double lr, double beta1, double beta2, double epsilon, double decay, u64 seed) {
    const StepState now = *state;
    // Powers by squaring: a fraction of pow's latency, in which the block waits; the error is step * 2^-53 at most.
    double power1 = 1.0, power2 = 1.0, square1 = beta1, square2 = beta2;
    for (long long rest = now.step; rest > 0; rest >>= 1) {
        if (rest & 1) {
            power1 *= square1;
            power2 *= square2;
        }
        square1 *= square1;
        square2 *= square2;
    }
    Factors f;
    f.scale = now.scale;
    f.beta2 = (float) beta2;
    f.complement1 = (float) (1.0 - beta1);
    f.complement2 = (float) (1.0 - beta2);
    f.rate = (float) (lr / (1.0 - power1));
    f.inverseCorrection = (float) (1.0 / sqrt(1.0 - power2));
    f.epsilon = (float) epsilon;
    f.lrDecay = (float) (lr * decay);
    f.key = mix((mix(seed + GAMMA) ^ (u64) now.step) + GAMMA);
    f.apply = now.apply;
    return f;
}

// For each of four elements 16 bits of noise, the first's the lowest.
DEVICE u64 noiseOf(const Factors& f, u64 element) {
    const u32 shift = 16 * (element & 3);
    u64 bits = mix((f.key ^ (element / 4)) + GAMMA);
    if (shift) {  // in all vectors of a run or in none
        bits = bits >> shift | mix((f.key ^ (element / 4 + 1)) + GAMMA) << (64 - shift);
    }
    return bits;
}

// The upper half is x rounded to a bfloat16 next to it: the 16 bits of noise carry into it with the probability of the part cut off. They
// leave an infinity what it is; a NaN there would be one of the weight, which is lost with it.
DEVICE u32 roundRandomly(float x, u64 noise) { return __float_as_uint(x) + ((u32) noise & 0xffff); }

DEVICE void storeMoments(bf16* to, const float (&x)[4], u64 noise) {
    storeUpper(to, roundRandomly(x[0], noise), roundRandomly(x[1], noise >> 16), roundRandomly(x[2], noise >> 32),
               roundRandomly(x[3], noise >> 48));
}

DEVICE void storeMoments(float* to, const float (&x)[4], u64) { store(to, x); }
DEVICE void storeMoment(bf16* to, float x, u64 noise) { *to = (bf16) (roundRandomly(x, noise) >> 16); }
DEVICE void storeMoment(float* to, float x, u64) { *to = x; }

// x / (sqrt(y) * factor + epsilon), not rounded to the last bit, but without branches, for zeros, of which rows of tokens that never occur
// are full, and for subnormal numbers, which count as zeros. What it yields is scaled by the learning rate, and its last bits do not reach
// the weight.
DEVICE float quotient(float x, float y, float factor, float epsilon) {
    float root, reciprocal;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(y));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(fmaf(root, factor, epsilon)));
    return x * reciprocal;
}

DEVICE void update(const Factors& f, float gradient, float& first, float& second, float& weight) {
    const float g = __fmul_rn(gradient, f.scale);  // not contracted with what follows, anywhere
    first = fmaf(f.complement1, g - first, first);
    second = fmaf(f.complement2 * g, g, f.beta2 * second);
    weight -= fmaf(f.rate, quotient(first, second, f.inverseCorrection, f.epsilon), f.lrDecay * weight);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
        adamw(const float* gradient, Moment* first, Moment* second, bf16* remainder, Weight* weights, long long n, double lr, double beta1,
              double beta2, double epsilon, double decay, u64 seed, long long index, const StepState* state) {
    followPredecessor();
    __shared__ Factors shared;
    const long long lead = leadOf(gradient, n);
    const bool together = aligned(first + lead) && aligned(second + lead) && aligned(weights + lead) &&
                          (WEIGHTS_FLOAT || aligned(remainder + lead));
    const Cut cut = together ? cutAt(lead, n) : Cut{n, 0, n};

    const long long start = (long long) blockIdx.x * (VECTORS * THREADS) + threadIdx.x;
    float g[VECTORS][4], m[VECTORS][4], v[VECTORS][4], w[VECTORS][4];
    UNROLL for (int k = 0; k < VECTORS; k++) if (start + k * THREADS < cut.vectors) {
        const long long at = cut.lead + 4 * (start + k * THREADS);
        load(g[k], gradient + at);
        load(m[k], first + at);
        load(v[k], second + at);
        loadMasters(w[k], weights, remainder, at);
    }
    if (threadIdx.x == 0) {
        shared = factorsOf(state, lr, beta1, beta2, epsilon, decay, seed);
    }
    __syncthreads();
    const Factors f = shared;
    if (!f.apply) {
        return;
    }
    UNROLL for (int k = 0; k < VECTORS; k++) if (start + k * THREADS < cut.vectors) {
        const long long at = cut.lead + 4 * (start + k * THREADS);
        UNROLL for (int i = 0; i < 4; i++) {
            update(f, g[k][i], m[k][i], v[k][i], w[k][i]);
        }
        const u64 noise = MOMENTS_BF16 ? noiseOf(f, index + at) : 0;
        storeMoments(first + at, m[k], noise);
        storeMoments(second + at, v[k], noise);
        storeMasters(weights, remainder, at, w[k]);
    }
    for (long long i = (long long) blockIdx.x * THREADS + threadIdx.x; i < cut.rest; i += (long long) gridDim.x * THREADS) {
        const long long at = cut.restAt(i);
        float mean = toFloat(first[at]), square = toFloat(second[at]);
        float weight = loadMaster(weights, remainder, at);
        update(f, gradient[at], mean, square, weight);
        const u64 noise = MOMENTS_BF16 ? noiseOf(f, index + at) : 0;
        storeMoment(first + at, mean, noise);
        storeMoment(second + at, square, noise);
        storeMaster(weights, remainder, at, weight);
    }
}

// ---- masters of new weights ------------------------------------------------------------------------------------------------

#if !WEIGHTS_FLOAT
// For each weight one of the float32 numbers that round to it, all equally likely; its bits by CounterRandom.bits(seed, 0, index).
extern "C" __global__ void __launch_bounds__(THREADS) drawRemainders(const bf16* weights, bf16* remainders, long long n, u64 seed,
                                                                     long long index) {
    followPredecessor();
    const u64 key = mix((mix(seed + GAMMA) ^ 0) + GAMMA);
    for (long long i = (long long) blockIdx.x * THREADS + threadIdx.x; i < n; i += (long long) gridDim.x * THREADS) {
        const bool drawn = (weights[i] & 0x7fff) != 0 && (weights[i] & 0x7f80) != 0x7f80;
        const u32 noise = (u32) mix((key ^ (u64) (index + i)) + GAMMA) & 0xffff;
        remainders[i] = drawn ? (bf16) ((noise * 0xffffu >> 16) - 0x7fff) : 0;
    }
}
#endif
