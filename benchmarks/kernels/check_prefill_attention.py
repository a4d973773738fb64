"""usage: check_prefill_attention.py FOLDER      checks and times prefill_attention.cu (FOLDER has it and common.cuh)"""
import math, os, sys
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1]
GPU = torch.cuda.is_available()  # without one: an emulator's cupy, small shapes, no times
DEVICE = 'cuda' if GPU else 'cpu'
BF16 = torch.bfloat16
torch.manual_seed(2)
failures = 0


class Kernel:
    """One module of the kernel and what its launches need to know."""
    modules = {}

    def __init__(self, heads, kvHeads, dim, blockSize, **macros):
        self.heads, self.kvHeads, self.dim, self.blockSize = heads, kvHeads, dim, blockSize
        self.tileRows = macros.get('TILE_ROWS', 128)
        tileKeys = macros.get('TILE_KEYS', 32 if dim > 128 else 64)
        rowTiles = macros.get('ROW_TILES', 1 if dim > 128 else 2)
        self.threads = 2 * self.tileRows // rowTiles
        self.shared = (self.tileRows + 4 * tileKeys) * (dim + 8) * 2
        self.tileQueries = self.tileRows // (heads // kvHeads)
        macros = dict(macros, HEAD_DIM=dim, HEADS=heads, KV_HEADS=kvHeads, BLOCK_SIZE=blockSize)
        key = tuple(sorted(macros.items()))
        if key not in Kernel.modules:
            def read(name):
                return open(os.path.join(FOLDER, name)).read()
            code = read('common.cuh') + '\n//CUT\n' + read('prefill_attention.cu').replace('#include "common.cuh"', '')
            Kernel.modules[key] = cupy.RawModule(code=code, backend='nvrtc',
                                                 options=('--std=c++17',) + tuple('-D%s=%s' % i for i in key))
        self.function = Kernel.modules[key].get_function('prefillAttention')
        self.function.max_dynamic_shared_size_bytes = self.shared

    def tiles(self, starts, counts, padding=0):
        """the host's list: tiles with most keys first"""
        tiles = [(-(start + min(first + self.tileQueries, count)), s, first) for s, (start, count) in enumerate(zip(starts, counts))
                 for first in range(0, count, self.tileQueries)]
        tiles.sort()
        return ints([t[1] for t in tiles] + [-1] * padding), ints([t[2] for t in tiles] + [0] * padding)

    def launcher(self, query, out, kv, layer, table, slots, firsts, starts, counts, padding=0):
        tileSequence, tileFirst = self.tiles(starts, counts, padding)
        tensors = [ints(x) for x in (slots, firsts, starts, counts)] + [tileSequence, tileFirst]
        args = [np.uint64(t.data_ptr()) for t in (query, out, kv)] + [np.int32(layer), np.int32(kv.shape[1])]
        args += [np.uint64(table.data_ptr()), np.int32(table.shape[1])] + [np.uint64(t.data_ptr()) for t in tensors]
        args = tuple(args + [np.float32(self.dim ** -0.5)])
        grid = (self.kvHeads, len(tileSequence))

        def launch():
            assert tensors
            self.function(grid, (self.threads,), args, shared_mem=self.shared)
        return launch


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Cache:
    """Pages full of NaNs, into which sequences are written; block tables whose unused entries are wild."""

    def __init__(self, kernel, layers, slots, maxTokens):
        self.kernel = kernel
        self.perSlot = -(-maxTokens // kernel.blockSize) + 1
        self.kv = torch.full((slots * self.perSlot, layers, 2, kernel.kvHeads, kernel.blockSize, kernel.dim), math.nan, dtype=BF16,
                             device=DEVICE)
        self.order = torch.randperm(slots * self.perSlot, device=DEVICE)
        self.table = torch.full((slots, self.perSlot), 2 ** 30, dtype=torch.int32, device=DEVICE)

    def write(self, slot, layer, k, v):
        """k, v [tokens][kvHeads][dim] from position 0"""
        size = self.kernel.blockSize
        blocks = -(-len(k) // size)
        ids = self.order[slot * self.perSlot:slot * self.perSlot + blocks]
        self.table[slot, :blocks] = ids.int()
        position = torch.arange(len(k), device=DEVICE)
        for which, x in enumerate((k, v)):
            self.kv[ids[position // size], layer, which, :, position % size] = x


def reference(query, k, v, start):
    """query [n][heads][dim] at positions start..., k and v [tokens][kvHeads][dim], in double precision"""
    n, heads, dim = query.shape
    group = heads // k.shape[1]
    out = torch.empty(n, heads, dim, dtype=torch.float64, device=DEVICE)
    mask = torch.arange(len(k), device=DEVICE)[None, :] > torch.arange(start, start + n, device=DEVICE)[:, None]
    for h in range(k.shape[1]):
        q = query[:, h * group:(h + 1) * group].double()
        scores = torch.einsum('ngd,td->gnt', q, k[:, h].double()) * dim ** -0.5
        weights = scores.masked_fill(mask, -math.inf).softmax(-1)
        out[:, h * group:(h + 1) * group] = torch.einsum('gnt,td->ngd', weights, v[:, h].double())
    return out


worst = 0.0


def compare(name, got, want):
    global failures, worst
    difference = (got.double() - want).abs().max().item()
    scale = want.abs().max().item()
    worst = max(worst, difference / scale) if difference == difference else math.nan
    if not difference <= 1e-2 * scale:
        failures += 1
        print('FAIL %s: largest difference %.3g of %.3g' % (name, difference, scale))


def expect(name, ok):
    global failures
    if not ok:
        failures += 1
        print('FAIL ' + name)


def check(heads, kvHeads, dim, blockSize, sequences, chunkings, **macros):
    """sequences: (cached, new) of each; chunkings: ways to cut the sequence of index c, whose results must be the same bits"""
    kernel = Kernel(heads, kvHeads, dim, blockSize, **macros)
    name = '%s block %d %s' % ((heads, kvHeads, dim), blockSize, macros or '')
    layers, layer, gap = 2, 1, 3  # tokens that are decoded lie between the sequences: not touched
    cache = Cache(kernel, layers, len(sequences), max(c + n for c, n in sequences))
    tokens = sum(n + gap for c, n in sequences)
    query = torch.randn(tokens, heads, dim, device=DEVICE).to(BF16)
    out = torch.full_like(query, math.nan)
    slots = torch.randperm(len(sequences)).tolist()
    firsts, starts, counts, wants, at = [], [], [], [], 0
    for slot, (cached, new) in zip(slots, sequences):
        k, v = torch.randn(2, cached + new, kvHeads, dim, device=DEVICE).to(BF16)
        k = (k.float() * 1.5).to(BF16)
        cache.write(slot, layer, k, v)
        firsts.append(at)
        starts.append(cached)
        counts.append(new)
        wants.append(reference(query[at:at + new], k, v, cached))
        at += new + gap
    if len(sequences) > 3:  # a sequence without a slot is padding, too
        slots.append(-1), firsts.append(0), starts.append(0), counts.append(5)
    kernel.launcher(query, out, cache.kv, layer, cache.table, slots, firsts, starts, counts, padding=3)()
    touched = torch.zeros(tokens, dtype=torch.bool)
    for s, (cached, new) in enumerate(sequences):
        part = slice(firsts[s], firsts[s] + new)
        touched[part] = True
        compare('%s cached %d new %d' % (name, cached, new), out[part], wants[s])
    expect(name + ': wrote other tokens', bool(torch.isnan(out.cpu()[~touched].float()).all()))
    # the same sequence cut otherwise, alone
    for s, chunks in chunkings:
        cached, new = sequences[s]
        assert sum(chunks) == new
        again = torch.full_like(query, math.nan)
        done = 0
        for chunk in chunks:
            kernel.launcher(query, again, cache.kv, layer, cache.table, [slots[s]], [firsts[s] + done], [cached + done], [chunk])()
            done += chunk
        part = slice(firsts[s], firsts[s] + new)
        expect('%s: cut into %s differs' % (name, chunks if len(chunks) < 9 else len(chunks)),
               torch.equal(again[part].contiguous().view(torch.int16), out[part].contiguous().view(torch.int16)))


VARIANTS = (dict(TILE_KEYS=32), dict(TILE_ROWS=64, TILE_KEYS=32, RESIDENT=4), dict(TILE_ROWS=256, RESIDENT=1),
            dict(ROW_TILES=1, TILE_KEYS=128, RESIDENT=1))
if GPU:
    SEQUENCES = [(0, 257), (0, 1), (0, 3), (0, 64), (0, 65), (5, 1), (100, 37), (63, 1), (64, 1), (127, 129), (1000, 130), (0, 1023),
                 (32700, 67)]
    CHUNKINGS = [(0, [100, 157]), (0, [1] * 257), (0, [16] * 16 + [1]), (9, [63, 66]), (12, [1, 66]), (11, [512, 511])]
    for shape in ((16, 8, 128), (32, 8, 128), (14, 2, 64), (28, 4, 128), (9, 3, 64), (32, 32, 96), (8, 4, 256), (16, 1, 64)):
        check(*shape, 64, SEQUENCES, CHUNKINGS)
        check(*shape, 16 if shape[0] != 32 else 128, SEQUENCES[:10], CHUNKINGS[:4])
    for variant in VARIANTS:
        check(16, 8, 128, 64, SEQUENCES[:11], CHUNKINGS[:4], **variant)
else:
    small = [(0, 70), (0, 1), (5, 1), (63, 1), (60, 9), (100, 37)]
    for shape in ((16, 8, 128), (14, 2, 64), (4, 4, 96), (4, 2, 256), (8, 1, 64)):
        for blockSize in (16, 64, 128):
            check(*shape, blockSize, small, [(0, [20, 50]), (5, [1, 36])])
    for variant in VARIANTS:
        check(4, 2, 128, 64, small, [(0, [20, 50])], **variant)
print('largest difference, relative to the scale of the result: %.2g' % worst)
print('%d failures' % failures)


# ---- times -----------------------------------------------------------------------------------------------------------------


def measure(runs, repeats=20, calls=4):
    """median microseconds of a call, `runs` taken in turn, back to back: the stream is held until all are queued"""
    for run in runs:
        run()
    times = []
    for repeat in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1000000)
        start.record()
        for call in range(calls):
            runs[call % len(runs)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[len(times) // 2]


def operations(heads, dim, cached, new):
    return 4 * heads * dim * sum(cached + i + 1 for i in range(new))


def benchmark():
    print('%-14s %-24s %-34s %9s %9s' % ('shape', 'work', 'variant', 'us', 'TFLOP/s'))
    for heads, kvHeads, dim in ((16, 8, 128), (32, 8, 128), (14, 2, 64)):
        for batch, cached, new in ((16, 0, 1024), (4, 3584, 512), (64, 0, 128), (1, 0, 16384)):
            work = batch * operations(heads, dim, cached, new)
            title = '%-14s %-24s' % ((heads, kvHeads, dim), '%d x %d behind %d' % (batch, new, cached))
            variants = [{}]
            if batch < 64:
                variants += VARIANTS
                if dim == 64:
                    variants += [dict(ROW_TILES=1), dict(RESIDENT=3), dict(TILE_KEYS=32, RESIDENT=3)]
            for variant in variants:
                kernel = Kernel(heads, kvHeads, dim, 64, **variant)
                sets = []
                for i in range(2):
                    blocks = -(-(cached + new) // 64)
                    kv = torch.randn(batch * blocks, 1, 2, kvHeads, 64, dim, device=DEVICE).to(BF16)
                    table = torch.randperm(batch * blocks, device=DEVICE).int().reshape(batch, blocks)
                    query = torch.randn(batch * new, heads, dim, device=DEVICE).to(BF16)
                    out = torch.empty_like(query)
                    run = kernel.launcher(query, out, kv, 0, table, list(range(batch)), [i * new for i in range(batch)],
                                          [cached] * batch, [new] * batch)
                    sets.append((run, kv, table, query, out))
                t = measure([s[0] for s in sets])
                print('%s %-34s %9.1f %9.1f' % (title, variant or 'default', t, work / t / 1e6), flush=True)
            if cached == 0:
                from torch.nn.attention import SDPBackend, sdpa_kernel
                attend = torch.nn.functional.scaled_dot_product_attention
                q = torch.randn(batch, new, heads, dim, device=DEVICE).to(BF16).transpose(1, 2)
                k, v = torch.randn(2, batch, new, kvHeads, dim, device=DEVICE).to(BF16).transpose(2, 3)
                options = dict(is_causal=True, enable_gqa=True)
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    try:
                        attend(q, k, v, **options)
                    except RuntimeError:
                        k, v = (x.repeat_interleave(heads // kvHeads, 1) for x in (k, v))
                        options = dict(is_causal=True)
                    t = measure([lambda: attend(q, k, v, **options)])
                print('%s %-34s %9.1f %9.1f' % (title, 'torch flash, dense', t, work / t / 1e6), flush=True)


if GPU:
    benchmark()
sys.exit(1 if failures else 0)
