"""usage: check_optimizer.py FOLDER      checks and times the kernels of optimizer.cu (FOLDER has optimizer.cu and common.cuh)

Ten steps of AdamW with clipping, one of them with a gradient that is not finite, are compared with torch.optim.AdamW in float64; moments
of 16 bits bit for bit with a stochastic rounding of the float32 kernel's, done here. Arrays lie side by side in one allocation, at any
alignment, and what is between them must survive. Exits non-zero if anything fails.
"""
import math, os, sys, time
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1] if len(sys.argv) > 1 else 'src/main/native/cuda'
EMULATED = getattr(cupy, 'EMULATED', False)  # a stand-in without a GPU: smaller sizes, no times
DEVICE = 'cpu' if EMULATED else 'cuda'
THREADS = 256
STATE = np.dtype([('norm', 'f4'), ('scale', 'f4'), ('apply', 'i4'), ('skipped', 'i4'), ('step', 'i8'), ('loss', 'f4'), ('unused', 'i4')])
assert STATE.itemsize == 32
torch.manual_seed(1)
failures = 0
worst = {}
modules = {}


def source():
    def read(name):
        return open(os.path.join(FOLDER, name)).read()
    return read('optimizer.cu').replace('#include "common.cuh"', read('common.cuh'))


def kernel(name, **macros):
    key = tuple(sorted(dict(dict(MOMENTS_BF16=0, WEIGHTS_FLOAT=0, VECTORS=2), **macros).items()))
    if key not in modules:
        modules[key] = cupy.RawModule(code=source(), backend='nvrtc', options=('--std=c++17',) + tuple('-D%s=%s' % i for i in key))
    return modules[key].get_function(name)


def launch(f, grid, *args):
    """floats go as float64, ints as int32, numpy's scalars as they are"""
    converted = []
    for a in args:
        if a is None:
            converted.append(np.uint64(0))
        elif isinstance(a, torch.Tensor):
            assert a.is_contiguous()
            converted.append(np.uint64(a.data_ptr()))
        elif isinstance(a, float):
            converted.append(np.float64(a))
        elif isinstance(a, int):
            converted.append(np.int32(a))
        else:
            converted.append(a)
    f((grid,), (THREADS,), tuple(converted))


def fail(what):
    global failures
    failures += 1
    if failures <= 40:
        print('FAIL', what)


def close(name, got, want, scale, tolerance):
    """elementwise relative to scale, a number or a tensor"""
    got, want = got.double(), want.double()
    if not torch.equal(torch.isnan(got), torch.isnan(want)):
        return fail('%s: NaNs differ, %d instead of %d' % (name, torch.isnan(got).sum(), torch.isnan(want).sum()))
    difference = torch.nan_to_num((got - want).abs() / scale)
    largest, at = (0.0, 0) if got.numel() == 0 else (difference.max().item(), difference.argmax().item())
    family = name.split(':')[0]
    worst[family] = max(worst.get(family, 0.0), largest)
    if not largest <= tolerance:
        fail('%s: largest relative difference %.3g at %d of %d, %.9g instead of %.9g' %
             (name, largest, at, got.numel(), got.flatten()[at], want.flatten()[at]))


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(name, got, want):
    different = bits(got) != bits(want)
    if different.any():
        at = different.flatten().int().argmax().item()
        fail('%s: %d of %d differ, first %d: %r instead of %r' % (name, different.sum(), got.numel(), at, got.flatten()[at].item(),
                                                                 want.flatten()[at].item()))


def newState():
    return torch.zeros(STATE.itemsize, dtype=torch.uint8, device=DEVICE)


def fields(state):
    return np.frombuffer(state.cpu().numpy().tobytes(), STATE)[0]


def makeState(scale=1.0, apply=1, step=1):
    value = np.zeros(1, STATE)
    value['norm'], value['scale'], value['apply'], value['step'] = 1, scale, apply, step
    return torch.from_numpy(value.view(np.uint8).copy()).to(DEVICE)


def number(value):
    return torch.tensor([value], dtype=torch.float32, device=DEVICE)


def carve(specs):
    """arrays (type, length, offset in elements from a 16-byte boundary) side by side; and the pool, with what is theirs marked"""
    at, places = 64, []
    for dtype, n, offset in specs:
        size = torch.empty(0, dtype=dtype).element_size()
        start = (at + 15) // 16 * 16 + offset * size
        places.append((start, start + n * size, dtype))
        at = start + n * size + 16
    pool = torch.randint(256, (at + 64,), device=DEVICE, dtype=torch.uint8)
    assert pool.data_ptr() % 16 == 0
    owned = torch.zeros(at + 64, device=DEVICE, dtype=torch.bool)
    views = []
    for start, end, dtype in places:
        views.append(pool[start:end].view(dtype))
        owned[start:end] = True
    return views, pool, owned


# ---- norm ------------------------------------------------------------------------------------------------------------------


def sumOfSquares(gradient, parts):
    partial = torch.full((parts + 1,), math.nan, dtype=torch.float64, device=DEVICE)
    launch(kernel('squares'), parts, gradient, np.int64(gradient.numel()), partial, parts)
    if not torch.isnan(partial[parts]):
        fail('squares: wrote beyond its partial sums')
    return partial[:parts]


def testSquares():
    sizes = (0, 1, 2, 3, 4, 5, 7, 1023, 4096, 4099, 100003) + (() if EMULATED else (3000001, 30000007))
    for n in sizes:
        for offset in range(4):
            for parts in (1, 7, 660) if n > 5 and not EMULATED else (1, 3):
                for scale in (1.0, 1e-25, 1e25):
                    name = 'squares: n=%d offset=%d parts=%d scale=%g' % (n, offset, parts, scale)
                    buffer = torch.full((n + offset + 5,), math.nan, device=DEVICE)
                    gradient = buffer[offset:offset + n]
                    gradient.copy_(torch.randn(n, device=DEVICE) * scale)
                    partial = sumOfSquares(gradient, parts)
                    want = gradient.double().square().sum()
                    close(name, partial.sum(), want, max(want.item(), 1e-300), 1e-13)
                    same(name + ' again', sumOfSquares(gradient, parts), partial)
                    if n > 0 and scale == 1:
                        for bad in (math.nan, math.inf, -math.inf):
                            at = torch.randint(n, (1,)).item()
                            kept = gradient[at].clone()
                            gradient[at] = bad
                            if math.isfinite(sumOfSquares(gradient, parts).sum().item()):
                                fail('%s: %r at %d was lost' % (name, bad, at))
                            gradient[at] = kept


def testNormAndScale():
    f = kernel('normAndScale')
    state = newState()
    step = skipped = 0
    for parts in (1, 5, 256, 257, 660, 1056):
        for clip in (1.0, 0.03, math.inf):
            for loss in (None, 0.5, -3e38, math.nan, math.inf):
                for kind in ('usual', 'small', 'zero', 'NaN', 'inf', 'beyond'):
                    name = 'normAndScale: parts=%d clip=%g loss=%r %s' % (parts, clip, loss, kind)
                    partial = torch.rand(parts, dtype=torch.float64, device=DEVICE) * {'small': 1e-9, 'zero': 0.0}.get(kind, 10.0)
                    if kind in ('NaN', 'inf', 'beyond'):
                        partial[-1] = {'NaN': math.nan, 'inf': math.inf, 'beyond': 1e80}[kind]
                    launch(f, 1, partial, parts, clip, None if loss is None else number(loss), state)
                    got = fields(state)
                    norm = math.sqrt(partial.sum().item()) if kind != 'NaN' else math.nan
                    with np.errstate(over='ignore'):
                        finite = bool(np.isfinite(np.float32(norm))) and (loss is None or math.isfinite(loss))
                        step, skipped = step + finite, skipped + (not finite)
                        want = (np.float32(norm), np.float32(clip / (norm + 1e-6) if norm > clip else 1), finite, skipped, step,
                                np.float32(loss or 0))
                    for field, value in zip(STATE.names, want):
                        if field == 'scale' and not finite:
                            continue  # nobody reads it
                        exact = field in ('apply', 'skipped', 'step')
                        if not (got[field] == value if exact else np.isclose(got[field], value, rtol=3e-7, atol=0, equal_nan=True)):
                            fail('%s: %s is %r instead of %r' % (name, field, got[field], value))
                        elif not exact and value and np.isfinite(value):
                            difference = abs(float(got[field]) / float(value) - 1)
                            worst['normAndScale'] = max(worst.get('normAndScale', 0.0), difference)


# ---- AdamW -----------------------------------------------------------------------------------------------------------------


def join(weights, remainder):
    """the float32 masters"""
    upper = weights.view(torch.int16).int() << 16
    return torch.where(upper & 0x7fffffff == 0, upper, upper + remainder.int()).view(torch.float32)


def rounded(masters):
    """to bfloat16, halves away from zero"""
    return (masters.view(torch.int32) + 0x8000 >> 16).short().view(torch.bfloat16)


class Optimizer:
    """The arrays of a run of elements, side by side."""

    def __init__(self, n, offsets=(0, 0, 0, 0, 0), index=0, seed=0, vectors=2, **macros):
        self.n, self.index, self.seed, self.macros = n, index, seed, dict(macros, VECTORS=vectors)
        self.floatWeights = macros.get('WEIGHTS_FLOAT', 0)
        moment = torch.bfloat16 if macros.get('MOMENTS_BF16', 0) else torch.float32
        weight = torch.float32 if self.floatWeights else torch.bfloat16
        types = (torch.float32, moment, moment, torch.int16, weight)
        lengths = (n, n, n, 0 if self.floatWeights else n, n)
        (self.gradient, self.first, self.second, self.remainder, self.weights), self.pool, self.owned = carve(
            list(zip(types, lengths, offsets)))
        self.outside = self.pool.clone()
        self.first.zero_()
        self.second.zero_()

    def start(self, weights):
        self.weights.copy_(weights)
        self.remainder.zero_()
        return self

    def like(self, other):
        for a, b in zip(self.arrays(), other.arrays()):
            a.copy_(b)
        return self

    def arrays(self):
        return self.gradient, self.first, self.second, self.remainder, self.weights

    def exact(self):
        return self.weights if self.floatWeights else join(self.weights, self.remainder)

    def step(self, state, lr=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, clear=0, grid=3, seed=None):
        launch(kernel('adamw', **self.macros), grid, self.gradient, self.first, self.second,
               None if self.floatWeights else self.remainder, self.weights, np.int64(self.n), lr, beta1, beta2, epsilon, decay, clear,
               np.uint64(self.seed if seed is None else seed), np.int64(self.index), state)

    def guard(self, name):
        if not torch.equal(self.pool[~self.owned], self.outside[~self.owned]):
            fail('%s: bytes outside the arrays were written' % name)


def magnitudes(n):
    """from far below epsilon to 1; some elements never have a gradient"""
    x = 10 ** (-12 * torch.rand(n, device=DEVICE))
    x[::7] = 0
    return x


TOGETHER = ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (3, 7, 3, 3, 3))
APART = ((0, 0, 0, 0, 1), (0, 1, 0, 2, 0), (1, 2, 3, 0, 5))


def testAgainstTorch():
    sizes = (1, 3, 8, 1000, 4099) if EMULATED else (1, 3, 8, 1000, 4099, 100003, 2000001)
    for floatWeights in (0, 1):
        for momentsBf16 in (0, 1):
            for n in sizes:
                for case, (decay, clear, clip, beta2, epsilon) in enumerate(
                        ((0.1, 0, 1.0, 0.95, 1e-8), (0.0, 1, math.inf, 0.999, 1e-8), (1.0, 1, 1e-3, 0.99, 1e-5))):
                    offsets = (TOGETHER + APART)[(case + n + 2 * momentsBf16) % 6]
                    name = 'weights=%s moments=%s n=%d decay=%g clip=%g offsets=%r' % (
                        ('bf16', 'float')[floatWeights], ('float', 'bf16')[momentsBf16], n, decay, clip, offsets)
                    run = Optimizer(n, offsets, WEIGHTS_FLOAT=floatWeights, MOMENTS_BF16=momentsBf16, seed=5)
                    initial = (torch.randn(n, device=DEVICE) * 0.05).bfloat16()
                    run.start(initial)
                    oracle = torch.nn.Parameter(initial.double())
                    lr = 1e-3
                    adamw = torch.optim.AdamW([oracle], lr=lr, betas=(0.9, beta2), eps=epsilon, weight_decay=decay, foreach=False)
                    sizeOf, highest, state = magnitudes(n), torch.zeros(n, dtype=torch.float64, device=DEVICE), newState()
                    applied = 0
                    for step in range(11):
                        run.gradient.copy_(torch.randn(n, device=DEVICE) * sizeOf * (1e-4 if step % 3 == 1 else 1.0))
                        loss = 0.7
                        if step == 4:
                            run.gradient[n // 2] = (math.nan, math.inf, math.nan)[case]
                        if step == 7 and case == 1:
                            loss = math.nan
                        before = [a.clone() for a in run.arrays()]
                        norm = run.gradient.double().square().sum().sqrt().item()
                        launch(kernel('normAndScale'), 1, sumOfSquares(run.gradient, 5), 5, clip, number(loss), state)
                        run.step(state, lr, 0.9, beta2, epsilon, decay, clear, grid=(1, 3, 50)[step % 3])
                        finite = math.isfinite(norm) and math.isfinite(loss)
                        applied += finite
                        got = fields(state)
                        if (got['apply'], got['step'], got['skipped']) != (finite, applied, step + 1 - applied):
                            fail('%s: step %d: state is %r' % (name, step, got))
                        if finite:
                            g = before[0].double() * (clip / (norm + 1e-6) if norm > clip else 1.0)
                            oracle.grad = g
                            highest = torch.maximum(highest, g.abs())
                            adamw.step()
                        else:
                            for label, a, b in zip(('first', 'second', 'remainder', 'weights'), run.arrays()[1:], before[1:]):
                                same('%s: skipped step: %s' % (name, label), a, b)
                        if clear:
                            same('%s: cleared' % name, run.gradient, torch.zeros_like(run.gradient))
                        else:
                            same('%s: gradient' % name, run.gradient, before[0])
                    run.guard(name)
                    expected = adamw.state[oracle]
                    label = name.split(' n=')[0]
                    scale = highest + 1e-30
                    close(label + ' first:' + name, run.first, expected['exp_avg'], scale, 0.02 if momentsBf16 else 2e-6)
                    # Squares of what clipping leaves of the smallest gradients are beyond float32.
                    close(label + ' second:' + name, run.second, expected['exp_avg_sq'], scale.square() + 1e-31, 0.03 if momentsBf16 else 2e-6)
                    movement = oracle.detach() - initial.double()
                    close(label + ' movement:' + name, run.exact().double() - initial.double(), movement,
                          10 * lr, 0.02 if momentsBf16 else 2e-5)


def testBits():
    """The same bits for any grid, number of vectors, alignment and cut; and when run again."""
    for macros in ({}, {'MOMENTS_BF16': 1}, {'WEIGHTS_FLOAT': 1}, {'MOMENTS_BF16': 1, 'WEIGHTS_FLOAT': 1}):
        for n in (4099, 9000) if EMULATED else (4099, 300001):
            name = '%r n=%d' % (macros, n)
            index, seed = 2 ** 33 + 5, 2 ** 63 + 12345
            start = Optimizer(n, **macros).start(torch.randn(n, device=DEVICE).bfloat16() * 0.05)
            start.gradient.copy_(torch.randn(n, device=DEVICE) * magnitudes(n))
            start.first.copy_(torch.randn(n, device=DEVICE) * 1e-3)
            start.second.copy_(torch.rand(n, device=DEVICE) * 1e-6)
            start.remainder.copy_(torch.randint(-2 ** 15, 2 ** 15, start.remainder.shape, device=DEVICE))
            state = makeState(scale=0.37, step=123)

            def run(offsets=(0, 0, 0, 0, 0), vectors=2, grid=7):
                made = Optimizer(n, offsets, index=index, seed=seed, vectors=vectors, **macros).like(start)
                made.step(state, grid=grid)
                made.guard(name)
                return made

            first = run()
            if not start.floatWeights:
                single = Optimizer(n, index=index, seed=seed, **dict(macros, WEIGHTS_FLOAT=1)).start(start.exact())
                for a, b in zip(single.arrays()[:3], start.arrays()):
                    a.copy_(b)
                single.step(state)
                same(name + ': masters', first.exact(), single.weights)
                same(name + ': rounding of the masters', first.weights, rounded(single.weights))

            def compare(what, other):
                for label, a, b in zip(('gradient', 'first', 'second', 'remainder', 'weights'), other.arrays(), first.arrays()):
                    same('%s: %s: %s' % (name, what, label), a, b)

            compare('again', run())
            for grid in (1, 2, 1000):
                compare('grid %d' % grid, run(grid=grid))
            for vectors in (1, 4) if macros.get('WEIGHTS_FLOAT', 0) == 0 else ():
                compare('%d vectors' % vectors, run(vectors=vectors))
            for offsets in TOGETHER + APART:
                compare('offsets %r' % (offsets,), run(offsets=offsets))
            pieces = Optimizer(n, index=index, seed=seed, **macros).like(start)
            cuts = [0, 1, 6, 1000, 1003, 2048, n - 1, n]
            whole = pieces.arrays()
            for a, b in zip(cuts, cuts[1:]):
                pieces.gradient, pieces.first, pieces.second, pieces.remainder, pieces.weights = (x[a:b] for x in whole)
                pieces.n, pieces.index = b - a, index + a
                pieces.step(state, grid=2)
            pieces.gradient, pieces.first, pieces.second, pieces.remainder, pieces.weights = whole
            compare('pieces', pieces)
            nothing = Optimizer(n, **macros).like(start)
            nothing.n = 0
            nothing.step(state, clear=1)
            for a, b in zip(nothing.arrays(), start.arrays()):
                same(name + ': no elements', a, b)
            skipping = Optimizer(n, **macros).like(start)
            skipping.step(makeState(apply=0), clear=0)
            for a, b in zip(skipping.arrays(), start.arrays()):
                same(name + ': skipped', a, b)


def randomBits(seed, step, index):
    """CounterRandom.bits"""
    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over='ignore'):
        h = mix(np.array([seed], np.uint64) + gamma)
        h = mix((h ^ np.uint64(step)) + gamma)
        return mix((h ^ index.astype(np.uint64)) + gamma)


def testStochasticRounding():
    n = 20001 if EMULATED else 1000003
    for floatWeights in (0, 1):
        for seed, step, index in ((0, 1, 0), (2 ** 63 + 77, 1000000, 2 ** 34 + 3)):
            name = 'stochastic rounding weights=%d step=%d' % (floatWeights, step)
            initial = torch.randn(n, device=DEVICE).bfloat16()
            gradient = torch.randn(n, device=DEVICE) * magnitudes(n)
            momentum, square = torch.randn(n, device=DEVICE).bfloat16(), (torch.rand(n, device=DEVICE) * 2).bfloat16()
            square[3] = math.inf
            results = []
            for moments in (0, 1):
                run = Optimizer(n, index=index, seed=seed, WEIGHTS_FLOAT=floatWeights, MOMENTS_BF16=moments).start(initial)
                run.gradient.copy_(gradient)
                run.first.copy_(momentum)
                run.second.copy_(square)
                run.step(makeState(step=step))
                run.guard(name)
                results.append(run)
            exact, rounded = results
            same(name + ': exact weights', rounded.exact(), exact.exact())
            same(name + ': weights', rounded.weights, exact.weights)
            noise = randomBits(seed, step, np.arange(index, index + n, dtype=np.int64)).astype(np.uint64)
            for label, shift in (('first', 0), ('second', 16)):
                full = getattr(exact, label).cpu().numpy()
                word = full.view(np.uint32).astype(np.uint64) + (noise >> np.uint64(shift) & np.uint64(0xffff))
                want = np.where(np.isfinite(full), word, full.view(np.uint32)) >> np.uint64(16)
                got = getattr(rounded, label).cpu().view(torch.int16).numpy().view(np.uint16)
                if (got != want).any():
                    at = (got != want).argmax()
                    fail('%s: %s: %d of %d differ, first %d: %x instead of %x' % (name, label, (got != want).sum(), n, at, got[at], want[at]))
                # The mean is kept: in units of the last place the errors' mean is 0, their deviation at most 1/2.
                ok = np.isfinite(full) & (np.abs(full) > 1e-30)
                kept = (got.astype(np.uint32) << 16).view(np.float32)
                unit = np.exp2(np.floor(np.log2(np.abs(full[ok].astype(np.float64)))) - 7)
                mean = ((kept[ok].astype(np.float64) - full[ok]) / unit).mean()
                limit = 5 * 0.5 / math.sqrt(ok.sum())
                worst['bias of stochastic rounding'] = max(worst.get('bias of stochastic rounding', 0.0), abs(mean))
                if abs(mean) > limit:
                    fail('%s: %s: mean error is %.3g of the last place, at most %.3g is chance' % (name, label, mean, limit))
            other = Optimizer(n, index=index, seed=seed + 1, WEIGHTS_FLOAT=floatWeights, MOMENTS_BF16=1).start(initial)
            other.gradient.copy_(gradient)
            other.first.copy_(momentum)
            other.second.copy_(square)
            other.step(makeState(step=step))
            if torch.equal(bits(other.first), bits(rounded.first)):
                fail(name + ': another seed gives the same moments')


def testManyElements():
    """More than 2^31 elements: windows of them against runs of their own."""
    n = 2 ** 31 + 2051
    if EMULATED or torch.cuda.mem_get_info()[0] < 60e9:
        return print('more than 2^31 elements: not enough memory, left out')
    gradient, first = (torch.empty(n, device=DEVICE).normal_() for i in range(2))
    second = torch.empty(n, device=DEVICE).uniform_()
    weights = torch.empty(n, device=DEVICE, dtype=torch.bfloat16).normal_()
    remainder = torch.randint(-2 ** 15, 2 ** 15, (n,), device=DEVICE, dtype=torch.int16)
    arrays = (gradient, first, second, remainder, weights)
    partial = sumOfSquares(gradient, 660)
    want = sum(gradient[i:i + 2 ** 27].double().square().sum().item() for i in range(0, n, 2 ** 27))
    close('squares: 2^31', partial.sum().cpu(), torch.tensor(want, dtype=torch.float64), want, 1e-12)
    windows = [(a, min(a + 2048, n)) for a in (0, 2 ** 29 - 1024, 2 ** 30 - 1024, 2 ** 31 - 1024, n - 1027)]
    before = [[x[a:b].clone() for x in arrays] for a, b in windows]
    state = makeState(scale=0.5, step=3)
    f = kernel('adamw', VECTORS=2)

    def step(views):
        launch(f, 528, *views, np.int64(views[0].numel()), 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, np.uint64(0), np.int64(0), state)

    step(arrays)
    for (a, b), views in zip(windows, before):
        step(views)
        for label, got, x in zip(('gradient', 'first', 'second', 'remainder', 'weights'), arrays, views):
            same('2^31 elements, from %d: %s' % (a, label), got[a:b], x)
    if gradient.count_nonzero().item() != 0:
        fail('2^31 elements: %d of the gradient are not cleared' % gradient.count_nonzero().item())


# ---- times -----------------------------------------------------------------------------------------------------------------


def measure(runs, repeats=15, calls=4):
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


def bytesOf(clear, MOMENTS_BF16=0, WEIGHTS_FLOAT=0):
    moments = 4 if MOMENTS_BF16 else 8
    return (4 + moments + 4) + (moments + 4 + 4 * clear)


def benchmark():
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    big = torch.empty(1 << 30, device='cuda', dtype=torch.uint8)
    other = torch.empty_like(big)
    copy = 2 * big.numel() / measure([lambda: other.copy_(big)]) / 1e3
    print('device copy of 1 GiB: %.0f GB/s' % copy)
    del big, other
    state = makeState(scale=0.5, step=1000)

    def resident(f):
        return min(8, 65536 // (THREADS * ((f.num_regs + 7) // 8 * 8))) * multiprocessors

    def gridOf(n, vectors):
        return max(1, -(-n // (4 * THREADS * vectors)))

    def adam(n, sets, vectors=2, grid=None, clear=0, **macros):
        made = [Optimizer(n, vectors=vectors, **macros).start(torch.zeros(n, device='cuda')) for i in range(sets)]
        for x in made:
            x.gradient.normal_()
            x.first.normal_()
            x.second.uniform_()
        return [lambda x=x: x.step(state, clear=clear, grid=grid or gridOf(n, vectors)) for x in made]

    def line(name, n, t, bytes):
        print('%-36s %12d %10.2f %8.0f %6.0f %%' % (name, n, t, bytes / t / 1e3, bytes / t / 1e3 / copy * 100), flush=True)

    print('%-36s %12s %10s %8s %8s' % ('kernel', 'elements', 'us', 'GB/s', 'of copy'))
    for n in (1024, 1024 * 6144, 4096 * 24576, 151936 * 1024):
        sets = 3 if n < 1 << 23 else 1
        gradients = [torch.randn(n, device='cuda') for i in range(sets if sets == 1 else 6)]
        f = kernel('squares')
        for parts in sorted({resident(f), 2 * resident(f)} | ({8 * resident(f)} if sets == 1 else set())):
            partial = torch.empty(parts, dtype=torch.float64, device='cuda')
            runs = [lambda g=g: launch(f, parts, g, np.int64(n), partial, parts) for g in gradients]
            line('squares, %d parts' % parts, n, measure(runs, calls=12 if sets > 1 else 4), 4 * n)
        line('libtorch: vector_norm', n, measure([lambda g=g: torch.linalg.vector_norm(g) for g in gradients]), 4 * n)
        for name, macros, clear in (('adamw', {}, 0), ('adamw, clearing', {}, 1), ('adamw, bf16 moments', {'MOMENTS_BF16': 1}, 0),
                                    ('adamw, bf16 moments, clearing', {'MOMENTS_BF16': 1}, 1),
                                    ('adamw, float weights', {'WEIGHTS_FLOAT': 1}, 0)):
            runs = adam(n, sets, clear=clear, **macros)
            line(name, n, measure(runs, calls=12 if sets > 1 else 4), n * bytesOf(clear, **macros))
            del runs
        g, m, v, w, scratch = gradients[0], *(torch.rand(n, device='cuda') for i in range(4))
        model = torch.empty(n, device='cuda', dtype=torch.bfloat16)

        def composed():
            g.mul_(1.0)
            w.mul_(0.9999)
            m.lerp_(g, 0.1)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
            torch.sqrt(v, out=scratch).mul_(1.01).add_(1e-8)
            w.addcdiv_(m, scratch, value=-1e-3)
            model.copy_(w)
            g.zero_()

        line('libtorch: operations, clearing', n, measure([composed]), 34 * n)
        parameter = torch.nn.Parameter(w)
        parameter.grad = g
        fused = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

        def fusedStep():
            fused.step()
            model.copy_(parameter.detach())
            g.zero_()

        line('libtorch: fused, copy, clearing', n, measure([fusedStep]), 34 * n)
        del g, m, v, w, scratch, model, parameter, fused, gradients
        torch.cuda.empty_cache()
    n = 4096 * 24576
    print('adamw, clearing, %d elements: GB/s by vectors (rows) and blocks' % n)
    for vectors in (1, 2, 4):
        f = kernel('adamw', VECTORS=vectors)
        cells = []
        for times in (1, 2, 4, 16, None):
            grid = -(-n // (4 * THREADS * vectors)) if times is None else times * resident(f)
            t = measure(adam(n, 1, vectors, grid, 1))
            cells.append('%d: %.0f' % (grid, n * bytesOf(1) / t / 1e3))
        print('%d vectors, %d registers   %s' % (vectors, f.num_regs, '   '.join(cells)), flush=True)
    partial, loss = torch.rand(660, dtype=torch.float64, device='cuda'), number(1.0)
    f = kernel('normAndScale')
    print('normAndScale of 660 parts: %.2f us' % measure([lambda: launch(f, 1, partial, 660, 1.0, loss, state)], calls=12))


began = time.time()
for test in (testSquares, testNormAndScale, testAgainstTorch, testBits, testStochasticRounding, testManyElements):
    test()
    print('%s: %d failures so far, %.1f s' % (test.__name__, failures, time.time() - began), flush=True)
    if not EMULATED:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
print('largest differences, relative to the scale of the result:')
for name, value in sorted(worst.items()):
    print('  %-60s %.2g' % (name, value))
print('%d failures' % failures)
if not EMULATED:
    with torch.no_grad():
        benchmark()
    print('%.1f s' % (time.time() - began))
sys.exit(1 if failures else 0)
