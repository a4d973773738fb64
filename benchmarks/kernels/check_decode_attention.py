"""Paged decode attention: correctness, then bandwidth. usage: check_decode_attention.py FOLDER_OF_SOURCES [check|bench|sweep ...]
Without further arguments all three parts run. Needs one GPU with about 40 GiB free."""
import concurrent.futures
import math
import os
import statistics
import sys
import time

import cupy
import numpy
import torch

FOLDER = sys.argv[1] if len(sys.argv) > 1 else '.'
PARTS = sys.argv[2:] or ['check', 'bench', 'sweep']
GPU = torch.device('cuda')
SECONDS = time.time()
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count
SHARED_PER_MULTIPROCESSOR = 228 * 1024
FAILURES = []


def source():
    text = open(os.path.join(FOLDER, 'decode_attention.cu')).read()
    common = open(os.path.join(FOLDER, 'common.cuh')).read()
    assert '#include "common.cuh"' in text
    return text.replace('#include "common.cuh"', common)


SOURCE = source()


def fail(message):
    FAILURES.append(message)
    print('FAILED:', message, flush=True)


class Kernels:
    """Both entry points compiled for one shape; the defaults of the macros are those of decode_attention.cu."""

    def __init__(self, heads, kv_heads, head_dim, block, split=256, warps=4, stages=None, resident=None, evict=0, units=0):
        stages = stages or (4 if head_dim <= 64 else 3 if head_dim <= 96 else 2)
        resident = resident or (3 if head_dim <= 128 else 1)
        self.heads, self.kv_heads, self.head_dim, self.block, self.split = heads, kv_heads, head_dim, block, split
        self.warps, self.stages, self.resident, self.evict, self.units = warps, stages, resident, evict, units
        group = heads // kv_heads
        queue = 16 if stages > 4 else 8
        self.shared = (warps * stages * 64 * head_dim + 4 * warps * group * (head_dim + 6)
                       + 4 * queue * (8 + split // block) + 16)
        self.module = None

    def name(self):
        return f'split {self.split} warps {self.warps} stages {self.stages} bound {self.resident} evict-first {self.evict} units {self.units}'

    def compile(self):
        if self.module is None:
            options = ('--std=c++17', f'-DHEAD_DIM={self.head_dim}', f'-DHEADS={self.heads}', f'-DKV_HEADS={self.kv_heads}',
                       f'-DBLOCK_SIZE={self.block}', f'-DSPLIT={self.split}', f'-DWARPS={self.warps}',
                       f'-DSTAGES={self.stages}', f'-DRESIDENT_BLOCKS={self.resident}', f'-DEVICT_FIRST={self.evict}')
            self.module = cupy.RawModule(code=SOURCE, options=options, backend='nvrtc')
            self.plan_kernel = self.module.get_function('planDecode')
            self.kernel = self.module.get_function('decodeAttention')
            self.kernel.max_dynamic_shared_size_bytes = self.shared
            self.kernel.preferred_shared_memory_carveout = 100
            registers = self.warps * ((self.kernel.num_regs * 32 + 255) // 256 * 256)
            self.residents = max(1, min(65536 // registers, SHARED_PER_MULTIPROCESSOR // (self.shared + 1024),
                                        2048 // (32 * self.warps)))
            self.grid = MULTIPROCESSORS * self.residents
        return self

    def wanted(self):
        """items of a step: so many units to a block of the grid, and no fewer than the longest splits make"""
        return self.units * self.grid // self.kv_heads

    def split_of(self, tokens):
        split = max(16 * self.warps, self.block)
        while split < self.split and tokens // split > self.wanted():
            split *= 2
        return split

    def plan(self, batch):
        self.plan_kernel((1,), (256,), (pointer(batch.row_slot), pointer(batch.row_length), pointer(batch.row_count),
                                        numpy.int32(batch.max_rows), numpy.int32(batch.max_items), numpy.int32(self.wanted()),
                                        pointer(batch.work), pointer(batch.work_count)))

    def attend(self, batch, layer, grid=None):
        self.kernel((grid or self.grid,), (32 * self.warps,),
                    (pointer(batch.query), pointer(batch.out), pointer(batch.kv), numpy.int32(layer), numpy.int32(batch.layers),
                     pointer(batch.table), numpy.int32(batch.table.shape[1]), pointer(batch.work), pointer(batch.work_count),
                     numpy.int32(batch.max_items), pointer(batch.partials), pointer(batch.counters),
                     numpy.float32(1 / math.sqrt(self.head_dim)), numpy.int32(0), numpy.zeros(4, numpy.uint64)), shared_mem=self.shared)


def pointer(tensor):
    return numpy.uint64(tensor.data_ptr())


class Batch:
    """The device-side state of one step: rows (-1 = padding), slots' block tables, workspaces."""

    def __init__(self, kernels, lengths, slots, table, kv, layers, extra_rows=2):
        k = kernels
        rows = len(lengths)
        self.max_rows, self.layers, self.kv, self.table = rows + extra_rows, layers, kv, table
        self.lengths, self.slots = lengths, slots
        ints = dict(dtype=torch.int32, device=GPU)
        self.row_slot = torch.tensor(slots + [0] * extra_rows, **ints)  # beyond the count: looks valid, must not be touched
        self.row_length = torch.tensor(lengths + [77] * extra_rows, **ints)
        self.row_count = torch.tensor([rows], **ints)
        split = k.split_of(sum(n for n, s in zip(lengths, slots) if s >= 0))
        self.items = sum(-(-n // split) for n, s in zip(lengths, slots) if s >= 0)
        self.max_items = self.items + 1
        self.work = torch.full((self.max_items + 1, 8), -12345, **ints)
        self.work_count = torch.full((1,), -1, **ints)
        self.partials = torch.full((self.max_items * k.heads * (k.head_dim + 4) + 64,), math.nan, device=GPU)
        self.counters = torch.zeros(self.max_rows * k.kv_heads, **ints)
        self.query = torch.randn(self.max_rows, k.heads * k.head_dim, device=GPU).to(torch.bfloat16)
        self.out = torch.full_like(self.query, math.nan)


def compile_all(all_kernels):
    started = time.time()

    def one(kernels):
        with cupy.cuda.Device(0):
            kernels.compile()

    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(one, k) for k in all_kernels]:
                future.result()
    except Exception as e:
        print(f'compiling in parallel failed ({e!r}): one after the other', flush=True)
        for k in all_kernels:
            one(k)
    print(f'compiled {len(all_kernels)} variants in {time.time() - started:.1f} s', flush=True)


def bits(tensor):
    return tensor.view(torch.int16)


# ---- correctness ------------------------------------------------------------------------------------------------------------

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700, 4096, 32768]


def paged_cache(k, lengths, layers, layer):
    """A cache where only the tokens within the lengths of one layer hold numbers; all else is NaN."""
    pages = [-(-n // k.block) for n in lengths]
    total = sum(pages) + 5
    kv = torch.full((total, layers, 2, k.kv_heads, k.block, k.head_dim), math.nan, dtype=torch.bfloat16, device=GPU)
    order = torch.randperm(total)
    width = max(pages) + 1
    table = torch.full((len(lengths) + 3, width), 0x3fffffff, dtype=torch.int32)  # an entry past the end must not be used
    slots = torch.randperm(len(lengths) + 3)[:len(lengths)].tolist()
    next_page = 0
    for length, slot, count in zip(lengths, slots, pages):
        mine = order[next_page:next_page + count]
        next_page += count
        table[slot, :count] = mine.to(torch.int32)
        data = torch.randn(count, 2, k.kv_heads, k.block, k.head_dim, device=GPU).to(torch.bfloat16)
        if length % k.block:
            data[-1, :, :, length % k.block:] = math.nan
        kv[mine.to(GPU), layer] = data
    return kv, table.to(GPU), slots


def reference(k, batch, row, layer):
    length, slot = batch.lengths[row], batch.slots[row]
    count = -(-length // k.block)
    pages = batch.table[slot, :count].long()
    data = batch.kv[pages, layer].double()  # [pages][2][kvHeads][block][headDim]
    data = data.permute(1, 2, 0, 3, 4).reshape(2, k.kv_heads, count * k.block, k.head_dim)[:, :, :length]
    query = batch.query[row].double().view(k.kv_heads, k.heads // k.kv_heads, k.head_dim)
    scores = query @ data[0].transpose(1, 2) / math.sqrt(k.head_dim)
    return (torch.softmax(scores, 2) @ data[1]).reshape(-1)


def check(k):
    label = f'heads {k.heads}/{k.kv_heads} headDim {k.head_dim} block {k.block} split {k.split} units {k.units}'
    torch.manual_seed(11)
    layers, layer = 3, 1
    kv, table, slots = paged_cache(k, LENGTHS, layers, layer)
    lengths, row_slots = list(LENGTHS), list(slots)
    for place in (0, 5, len(lengths) + 2):  # padding rows among the others
        lengths.insert(place, 333)
        row_slots.insert(place, -1)
    lengths.insert(3, 0)  # a row of no tokens
    row_slots.insert(3, 1)
    batch = Batch(k, lengths, row_slots, table, kv, layers)
    k.plan(batch)
    items = batch.work_count.item()
    if items != batch.items or (batch.work[batch.items:] != -12345).any().item():
        fail(f'{label}: {items} items instead of {batch.items}')
    worst, first_out = 0.0, None
    for grid in (k.grid, 7, 1000):
        batch.out.fill_(math.nan)
        k.attend(batch, layer, grid)
        if batch.counters.any().item():
            fail(f'{label}: counters not zero after a launch')
            batch.counters.zero_()
        if first_out is None:
            first_out = batch.out.clone()
        elif not torch.equal(bits(first_out), bits(batch.out)):
            fail(f'{label}: other bits with a grid of {grid}')
    for row in range(batch.max_rows):
        if row >= len(lengths) or row_slots[row] < 0 or lengths[row] == 0:
            if not first_out[row].isnan().all().item():
                fail(f'{label}: padding row {row} was written')
            continue
        want = reference(k, batch, row, layer)
        difference = ((first_out[row].double() - want).abs().max() / want.abs().max()).item()
        if not difference < 1e-2:
            fail(f'{label}: length {lengths[row]} differs by {difference:.2e}')
        worst = max(worst, difference if difference == difference else math.inf)

    # The same row alone and among 256 others, where that does not change the splits.
    others = [int(n) for n in torch.randint(1, 1500, (256,))]
    kept = [700, 4096, 17, 1025]
    all_lengths = others[:100] + kept + others[100:]
    kv, table, slots = paged_cache(k, all_lengths, 1, 0)
    crowd = Batch(k, all_lengths, slots, table, kv, 1)
    k.plan(crowd)
    k.attend(crowd, 0)
    for i in range(len(kept)):
        alone = Batch(k, [all_lengths[100 + i]], [slots[100 + i]], table, kv, 1)
        alone.query[0] = crowd.query[100 + i]
        k.plan(alone)
        k.attend(alone, 0)
        if alone.out[0].isnan().any().item() or not k.units and not torch.equal(bits(alone.out[0]), bits(crowd.out[100 + i])):
            fail(f'{label}: length {kept[i]} has other bits alone than among 256 others')
    if crowd.counters.any().item():
        fail(f'{label}: counters not zero after the large batch')
    small = Batch(k, [700], [slots[100]], table, kv, 1)  # a list that does not fit must be dropped
    small.max_items = 1
    k.plan(small)
    if small.work_count.item() != 0 and small.items > 1:
        fail(f'{label}: a list that does not fit was kept')
    print(f'{label}: largest difference {worst:.2e} of the output scale, {k.kernel.num_regs} registers, '
          f'{k.kernel.local_size_bytes} B local, {k.shared} B shared, {k.residents} resident', flush=True)


# ---- bandwidth ---------------------------------------------------------------------------------------------------------------

CACHE_ELEMENTS = 14 << 30  # 28 GiB


def median_time(launch, count, repeats):
    """Seconds per launch of `count` launches queued behind some idling, so that the host's pace does not matter."""
    times = []
    for i in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_500_000 if count <= 64 else 3_000_000)
        begin.record()
        for j in range(count):
            launch(j)
        end.record()
        end.synchronize()
        if i > 0:
            times.append(begin.elapsed_time(end) * 1e-3 / count)
    return statistics.median(times)


def copy_bandwidth():
    size = 2 << 30
    a = torch.empty(size, dtype=torch.uint8, device=GPU).fill_(1)
    b = torch.empty_like(a)
    return 2 * size / median_time(lambda j: b.copy_(a) if j % 2 else a.copy_(b), 4, 20)


class Workload:
    """A batch over randomly assigned pages of many layers: at least 28 and at least 200 MB, as far as the cache goes."""

    def __init__(self, k, cache, lengths, copy):
        pages = [-(-n // k.block) for n in lengths]
        page_elements = 2 * k.kv_heads * k.block * k.head_dim
        wanted = max(28, (100 << 20) // (sum(pages) * page_elements) + 1)
        self.layers = max(1, min(wanted, cache.numel() // (sum(pages) * page_elements)))
        blocks = min(cache.numel() // (self.layers * page_elements), 4 * sum(pages) + 64)
        self.turn = 0
        order = torch.randperm(blocks)[:sum(pages)].to(torch.int32)
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        position = 0
        for row, count in enumerate(pages):
            table[row, :count] = order[position:position + count]
            position += count
        self.cache, self.lengths, self.table, self.copy = cache, lengths, table.to(GPU), copy
        self.bytes = sum(lengths) * k.kv_heads * k.head_dim * 4

    def measure(self, k, repeats):
        batch = Batch(k, self.lengths, list(range(len(self.lengths))), self.table, self.cache, self.layers, 0)
        k.plan(batch)

        def launch(_):
            self.turn += 1
            k.attend(batch, self.turn % self.layers)

        seconds = median_time(launch, max(4, min(self.layers, 28)), repeats)
        if batch.out.isnan().any().item() or batch.counters.any().item():
            fail(f'{k.name()}: NaN or counters in a benchmark')
        return seconds, self.bytes / seconds

    def plan_time(self, k):
        batch = Batch(k, self.lengths, list(range(len(self.lengths))), self.table, self.cache, self.layers, 0)
        return median_time(lambda j: k.plan(batch), 20, 5)


SHAPES = [(16, 8, 128), (32, 8, 128), (12, 2, 128), (14, 2, 64), (9, 3, 64)]


def ragged(rows, mean, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [int(n) for n in torch.randint(100, 2 * mean - 100, (rows,), generator=generator)]


def bench(cache, copy):
    print(f'\n{"heads":>9} {"dim":>4} {"batch":>5} {"context":>8} {"µs":>9} {"GB/s":>7} {"% of copy":>9}   layers, plan µs')
    for heads, kv_heads, dim in SHAPES:
        k = KERNELS[heads, kv_heads, dim]
        for rows, context in [(256, 700), (256, 'ragged'), (256, 4096), (32, 700), (32, 4096), (1, 700), (1, 4096), (1, 32768)]:
            lengths = ragged(rows, 700) if context == 'ragged' else [context] * rows
            load = Workload(k, cache, lengths, copy)
            seconds, rate = load.measure(k, 20)
            plan = f', {load.plan_time(k) * 1e6:.1f}' if heads == 16 else ''
            print(f'{heads:>5}/{kv_heads:<3} {dim:>4} {rows:>5} {context:>8} {seconds * 1e6:>9.2f} {rate / 1e9:>7.0f} '
                  f'{100 * rate / copy:>8.1f}%   {load.layers}{plan}', flush=True)


# longest split, warps, stages, bound on resident blocks, evict first, units to a block
SWEEPS = {
    (16, 8, 128): [(1024, 4, 2, 3, 0, units) for units in (0, 1, 2, 3, 4, 6, 8)] + [(2048, 4, 2, 3, 0, 4)],
    (32, 8, 128): [(1024, 4, 2, 3, 0, units) for units in (0, 2, 4, 8)],
    (12, 2, 128): [(2048, 4, 2, 3, 0, units) for units in (0, 1, 2, 3, 4, 6, 8)],
    (14, 2, 64): [(2048, 4, 4, 3, 0, units) for units in (0, 1, 2, 3, 4, 6, 8)],
}
SWEPT_LENGTHS = [[700] * 256, ragged(256, 700), [4096] * 256, ragged(155, 950), ragged(107, 1080), ragged(58, 1300), ragged(28, 1400),
                 [700] * 32, ragged(8, 1500), [400], [4096], [32768]]


def sweep(cache, copy):
    for (heads, kv_heads, dim), variants in SWEEPS.items():
        print(f'\nsweep {heads}/{kv_heads} x {dim}: µs at ' + ', '.join(f'{len(n)} x {sum(n) / len(n):.0f}' for n in SWEPT_LENGTHS))
        base = KERNELS[heads, kv_heads, dim]
        loads = [Workload(base, cache, lengths, copy) for lengths in SWEPT_LENGTHS]
        print(' '.join(f'{load.bytes / copy * 1e6:7.2f}' for load in loads), '  at the rate of a copy')
        for variant in variants:
            k = SWEPT[(heads, kv_heads, dim), variant]
            print(' '.join(f'{load.measure(k, 5)[0] * 1e6:7.2f}' for load in loads),
                  f'  {k.name()} ({k.residents} resident, {k.kernel.num_regs} registers)', flush=True)


CHECKED = [(16, 8, 128, 64, 256), (32, 8, 128, 128, 256), (12, 2, 128, 16, 256), (14, 2, 64, 64, 256), (14, 2, 64, 128, 256),
           (9, 3, 64, 32, 256), (12, 12, 64, 16, 256), (8, 2, 96, 32, 256), (8, 2, 256, 64, 256), (16, 1, 256, 128, 256),
           (16, 1, 128, 64, 512), (12, 1, 64, 64, 128)]
KERNELS = {shape: Kernels(*shape, 64) for shape in SHAPES}
SWEPT = {(shape, v): Kernels(*shape, 64, *v) for shape, variants in SWEEPS.items() for v in variants}
TO_CHECK = [Kernels(*c) for c in CHECKED] + [Kernels(16, 8, 128, 64, 512, 8, 1, 2), Kernels(14, 2, 64, 16, 1024, 2, 6, 3, 0)] + [
    Kernels(16, 8, 128, 64, 1024, units=4), Kernels(14, 2, 64, 16, 2048, units=2), Kernels(32, 8, 128, 128, 1024, units=8)]


def main():
    torch.cuda.init()
    torch.zeros(1, device=GPU)
    compile_all((TO_CHECK if 'check' in PARTS else []) + (list(KERNELS.values()) if {'bench', 'sweep'} & set(PARTS) else [])
                + (list(SWEPT.values()) if 'sweep' in PARTS else []))
    if 'check' in PARTS:
        for k in TO_CHECK:
            check(k)
        print(f'checked after {time.time() - SECONDS:.1f} s; {len(FAILURES)} failures', flush=True)
    if {'bench', 'sweep'} & set(PARTS):
        torch.cuda.empty_cache()
        copy = copy_bandwidth()
        print(f'copy of 2 GiB: {copy / 1e9:.0f} GB/s (read + written)', flush=True)
        torch.cuda.empty_cache()
        cache = torch.empty(CACHE_ELEMENTS, dtype=torch.bfloat16, device=GPU)
        for piece in cache.split(1 << 30):
            piece.normal_()
        if 'bench' in PARTS:
            bench(cache, copy)
        if 'sweep' in PARTS:
            sweep(cache, copy)
    print(f'{time.time() - SECONDS:.1f} s')
    if FAILURES:
        print(f'{len(FAILURES)} FAILURES')
        sys.exit(1)
    print('all right')


main()
