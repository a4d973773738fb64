// What a head of queries, keys or values goes through between its product and attention, and where it goes: for the kernels that do it
// after the product (layer.cu) and within it (decode_product.cu), which must round alike. To be included after vectors.cuh, with the
// macros HEAD_DIM, HEADS, KV_HEADS and BLOCK_SIZE.

const int HALF = HEAD_DIM / 2, ALL_HEADS = HEADS + 2 * KV_HEADS;
// Threads of a head: each has eight elements of its first half and their partners in the second, so that the rotation needs
// no exchange. A power of two, for the norm's shuffles; of HEAD_DIM 96 two in eight idle.
const int HEAD_LANES = HEAD_DIM == 64 ? 4 : HEAD_DIM <= 128 ? 8 : 16;

DEVICE void loadFloats(float (&x)[8], const float* from) {
    UNROLL for (int i = 0; i < 8; i += 4) {
        float4 four = *reinterpret_cast<const float4*>(from + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

DEVICE void storedAll(float (&x)[8]) {
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = stored(x[i]);
    }
}

// The factor of the head's RMSNorm. All lanes of a warp take part.
DEVICE float normFactor(const float (&x)[2][8], float epsilon) {
    float squares = 0.0f;
    UNROLL for (int i = 0; i < 8; i++) {
        squares += x[0][i] * x[0][i] + x[1][i] * x[1][i];
    }
    UNROLL for (int offset = HEAD_LANES / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    return rsqrtf(squares / HEAD_DIM + epsilon);
}

DEVICE void scaleBy(float (&x)[8], float factor, uint4 weight) {
    float w[8];
    unpack(w, weight);
    UNROLL for (int i = 0; i < 8; i++) {
        x[i] = stored(x[i] * factor * w[i]);
    }
}

// By cosines and sines that are rounded already.
DEVICE void rotate(float (&x)[2][8], const float (&c)[8], const float (&s)[8]) {
    UNROLL for (int i = 0; i < 8; i++) {
        float a = x[0][i], b = x[1][i];
        x[0][i] = stored(a * c[i]) - stored(b * s[i]);
        x[1][i] = stored(b * c[i]) + stored(a * s[i]);
    }
}

// A head of a token in query [T][HEADS][HEAD_DIM], or in its page, kv [block][layer][K, V][KV_HEADS][BLOCK_SIZE][HEAD_DIM], which has
// the keys' heads before the values' heads as qkv has.
DEVICE bf16* placeOf(int head, int token, bf16* query, int position, long long page, bf16* kv, int layer, int layers) {
    long long pageRow = ((page * layers + layer) * (2 * KV_HEADS) + head - HEADS) * BLOCK_SIZE + position % BLOCK_SIZE;
    return head < HEADS ? query + ((long long) token * HEADS + head) * HEAD_DIM : kv + pageRow * HEAD_DIM;
}
