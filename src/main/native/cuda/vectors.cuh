// What the kernels of a layer share, in generation and in training: rows of bfloat16 as 16-byte vectors of eight floats.

#include "common.cuh"

#ifndef ROUND_STEPS
#define ROUND_STEPS 0
#endif

#define UNROLL _Pragma("unroll")

// Between two operations that libtorch keeps apart: with the same ROUND_STEPS, training and generation compute the same numbers.
DEVICE float stored(float x) { return ROUND_STEPS ? roundBf16(x) : x; }

DEVICE uint4 load(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }

DEVICE void store(bf16* to, uint4 vector) { *reinterpret_cast<uint4*>(to) = vector; }

DEVICE uint4 zeros() { return make_uint4(0, 0, 0, 0); }

DEVICE void unpack(float (&x)[8], uint4 vector) {
    u32 pairs[4] = {vector.x, vector.y, vector.z, vector.w};
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = i % 2 == 0 ? lowFloat(pairs[i / 2]) : highFloat(pairs[i / 2]);
    }
}

DEVICE uint4 pack(const float (&x)[8]) {
    return make_uint4(packBf16(x[0], x[1]), packBf16(x[2], x[3]), packBf16(x[4], x[5]), packBf16(x[6], x[7]));
}

// x = bf16(x + y), whatever ROUND_STEPS says: such sums are stored, as residuals, keys and values.
DEVICE void add(float (&x)[8], uint4 vector) {
    float y[8];
    unpack(y, vector);
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = roundBf16(x[i] + y[i]);
    }
}
