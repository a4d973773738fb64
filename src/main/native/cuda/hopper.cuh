// Hopper's asynchronous machinery in PTX, of which NVRTC has no headers at hand: barriers in shared memory that count bytes,
// clusters, copies of tiles by TMA, products of a warpgroup. For sm_90a only; elsewhere just TensorMap is declared. WIDTH is
// the number of columns of an instruction (m64nWIDTHk16): 16, 32, 64, 96, 128, 192 or 256.

struct alignas(64) TensorMap { u64 words[16]; };

#if __CUDA_ARCH__ >= 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1

// ---- barriers in shared memory ---------------------------------------------------------------------------------------------

#ifdef SPIN_LIMIT
__device__ u32 stuck[4];  // the first wait given up, for tests: 1, its CTA, its thread, twice the barrier's index plus the parity
#endif

DEVICE void awaitPhase(u32 barrier, u32 parity, int index) {
#ifdef SPIN_LIMIT
    for (int i = 0; i < SPIN_LIMIT && !(i > 100 && *(volatile u32*) stuck); i++) {
#else
    for (;;) {
#endif
        u32 done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
        if (done) {
            return;
        }
    }
#ifdef SPIN_LIMIT
    if (atomicExch(stuck, 1u) == 0) {
        stuck[1] = blockIdx.x, stuck[2] = threadIdx.x, stuck[3] = index * 2 + parity;
    }
#endif
}

// The thread's arrival, which also announces the bytes that the copies will bring.
DEVICE void expectBytes(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE u32 addressIn(u32 shared, int rank) {
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

DEVICE void clusterSync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- copies ----------------------------------------------------------------------------------------------------------------

const u64 EVICT_FIRST = 0x12F0000000000000, EVICT_NORMAL = 0x1000000000000000, EVICT_LAST = 0x14F0000000000000;

DEVICE void copyTile(u32 to, const TensorMap* map, int column, int row, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}

// From the map of four dimensions that lays eight gate rows and their eight up rows by turns.
DEVICE void copyPairs(u32 to, const TensorMap* map, int column, int octet, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%2, %3, %3, %4}], [%5], %6;"
                 ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(octet), "r"(barrier), "l"(policy) : "memory");
}

// ---- products of a warpgroup -----------------------------------------------------------------------------------------------

#define TEXT(x) TEXT_(x)
#define TEXT_(x) #x
#define JOIN(a, b) JOIN_(a, b)
#define JOIN_(a, b) a##b

// The accumulators of m64nWIDTHk16: their numbers as operands after the two descriptors, and the operands.
#define NUMBERS_16 "%2,%3,%4,%5,%6,%7,%8,%9"
#define NUMBERS_32 NUMBERS_16 ",%10,%11,%12,%13,%14,%15,%16,%17"
#define NUMBERS_64 NUMBERS_32 ",%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33"
#define NUMBERS_96 NUMBERS_64 ",%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49"
#define NUMBERS_128 NUMBERS_96 ",%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65"
#define NUMBERS_192 NUMBERS_128 ",%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81" \
    ",%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97"
#define NUMBERS_256 NUMBERS_192 ",%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113" \
    ",%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127,%128,%129"
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS_16 FOUR(0), FOUR(4)
#define SUMS_32 SUMS_16, FOUR(8), FOUR(12)
#define SUMS_64 SUMS_32, FOUR(16), FOUR(20), FOUR(24), FOUR(28)
#define SUMS_96 SUMS_64, FOUR(32), FOUR(36), FOUR(40), FOUR(44)
#define SUMS_128 SUMS_96, FOUR(48), FOUR(52), FOUR(56), FOUR(60)
#define SUMS_192 SUMS_128, FOUR(64), FOUR(68), FOUR(72), FOUR(76), FOUR(80), FOUR(84), FOUR(88), FOUR(92)
#define SUMS_256 SUMS_192, FOUR(96), FOUR(100), FOUR(104), FOUR(108), FOUR(112), FOUR(116), FOUR(120), FOUR(124)

// c [64 x WIDTH] += a [64 x 16] b [WIDTH x 16]^T, all of the warpgroup, asynchronously.
DEVICE void multiplyGroup(float (&c)[WIDTH / 2], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(WIDTH) "k16.f32.bf16.bf16 {" JOIN(NUMBERS_, WIDTH) "}, %0, %1, 1, 1, 1, 0, 0;"
                 : "+l"(a), "+l"(b), JOIN(SUMS_, WIDTH));
}

// Rows of 128 bytes, swizzled, the next eight 1024 bytes further on. 16 elements of k are 2 units of the address.
DEVICE u64 descriptor(u32 shared) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | (shared >> 4 & 0x3fff); }

template <int pending>
DEVICE void awaitProducts() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

#endif
