// What every kernel needs and no header of the toolkit is at hand for: bfloat16, 16-byte vectors, warp reductions, asynchronous
// copies, matrix fragments. Compiled by NVRTC, so nothing is included.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // bit pattern

#define DEVICE static __device__ __forceinline__

DEVICE float toFloat(bf16 x) { return __uint_as_float((u32) x << 16); }
DEVICE float lowFloat(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float highFloat(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even: low in bits 0-15.
DEVICE u32 packBf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE bf16 toBf16(float x) { return (bf16) packBf16(x, 0.0f); }

// The value that x has after a round trip through bfloat16: what libtorch sees between two of its operations.
DEVICE float roundBf16(float x) { return lowFloat(packBf16(x, 0.0f)); }

// ---- launches ahead of time (sm_90) -----------------------------------------------------------------------------------------

// First thing in every kernel. A kernel may be launched while the one before it in the stream still runs (programmatic dependent
// launch), which hides most of a launch's latency; here it waits until that one is complete and its writes are visible, and lets the
// next one be launched in turn. Because every kernel does this before anything else, order is kept along the whole stream. Beware of
// const pointers that are __restrict__, and of ld.global.nc: they say that memory does not change while the kernel runs, and the
// compiler then loads from it before the wait.
DEVICE void awaitPredecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void admitSuccessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void followPredecessor() {
    admitSuccessor();
    awaitPredecessor();
}

DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- warps: all 32 lanes take part -----------------------------------------------------------------------------------------

DEVICE float warpSum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

DEVICE float warpMax(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}

// ---- asynchronous copies from global to shared memory (sm_80) --------------------------------------------------------------

DEVICE u32 sharedAddress(const void* pointer) { return (u32) __cvta_generic_to_shared(pointer); }

// 16 bytes past the L1 cache; zeros instead when `valid` is false.
DEVICE void copyAsync16(u32 shared, const void* global, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

DEVICE void commitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are still under way.
template <int pending>
DEVICE void waitCopies() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// ---- matrix fragments ------------------------------------------------------------------------------------------------------

DEVICE void loadMatrix4(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

DEVICE void loadMatrix4Transposed(u32 (&r)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared) : "memory");
}

// An 8 x 8 matrix of 16-bit elements, one pair of a row in each lane, transposed within the warp.
DEVICE u32 transposeMatrix(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// c [16 x 8] += a [16 x 16] b [16 x 8], bfloat16 in, float32 out.
DEVICE void multiplyAdd(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
