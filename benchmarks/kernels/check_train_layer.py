"""usage: check_train_layer.py [FOLDER]      checks and times the kernels of train_norm.cu, train_layer.cu and train_rotary.cu"""
import math, os, re, sys
import numpy as np
import torch
import torch.nn.functional as F
import cupy

FOLDER = sys.argv[1] if len(sys.argv) > 1 else 'src/main/native/cuda'
GPU = torch.cuda.is_available()  # without one: an emulator's cupy, small shapes, no times
DEVICE = 'cuda' if GPU else 'cpu'
PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if GPU else 3
BF16, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ROWS = (1, 3, 257, 2050) if GPU else (1, 3, 37)
torch.manual_seed(1)
failures = 0
modules = {}


def read(name, seen):
    """the text with its headers, each once"""
    text = open(os.path.join(FOLDER, name)).read()

    def header(match):
        if match.group(1) in seen:
            return ''
        seen.add(match.group(1))
        return read(match.group(1), seen)
    return re.sub(r'(?m)^#include "([^"]+)"', header, text)


def kernel(file, name, **macros):
    key = (file,) + tuple(sorted(macros.items()))
    if key not in modules:
        modules[key] = cupy.RawModule(code=read(file, set()), backend='nvrtc',
                                      options=('--std=c++17',) + tuple('-D%s=%s' % i for i in key[1:]))
    return modules[key].get_function(name)


def launch(f, grid, block, *args):
    converted = []
    for a in args:
        if a is None:
            converted.append(np.uint64(0))
        elif isinstance(a, torch.Tensor):
            assert a.is_contiguous() and a.data_ptr() % 4 == 0
            converted.append(np.uint64(a.data_ptr()))
        elif isinstance(a, float):
            converted.append(np.float32(a))
        else:
            converted.append(np.int32(a))
    f(tuple(grid), tuple(block), tuple(converted))


def ceil(a, b):
    return -(-a // b)


def random(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(BF16)


fences = []


def poison(*shape, dtype=BF16):
    """all NaN, as is what follows in memory"""
    count = math.prod(shape)
    whole = torch.full((count + 64,), math.nan, device=DEVICE, dtype=dtype)
    fences.append(whole[count:])
    return whole[:count].view(shape)


def fail(text):
    global failures
    failures += 1
    if failures <= 60:
        print('FAIL ' + text, flush=True)


worst = {}


def checkFences(name):
    if not all(torch.isnan(f).all().item() for f in fences):
        fail(name + ': wrote past the end')
    fences.clear()


def close(name, got, want, relative, absolute):
    """|got - want| <= relative |want| + absolute * the root mean square of want"""
    got, want = got.double(), want.double()
    difference = (got - want).abs()
    limit = relative * want.abs() + absolute * want.square().mean().sqrt() + 1e-30
    ratio = torch.nan_to_num(difference / limit, nan=math.inf).flatten()
    at = int(ratio.argmax())
    family = name.split(' ')[0]
    before = worst.get(family, (0, 0.0, 0.0))
    worst[family] = (before[0] + 1, max(before[1], difference.max().item()), max(before[2], ratio[at].item()))
    if not ratio[at] <= 1:
        place = [int(i) for i in np.unravel_index(at, tuple(want.shape))]
        fail('%s: %.6g instead of %.6g at %s of %s, %d of %d elements are off; largest difference %.3g' % (
            name, got.flatten()[at], want.flatten()[at], place, list(want.shape), int((ratio > 1).sum()), ratio.numel(),
            difference.max().item()))


def closeBf16(name, got, want, absolute=1e-4, roundings=1):
    close(name, got, want, roundings * 2.0 ** -8 * 1.01, absolute)  # half of the last bit each time


def closeFloat(name, got, want, absolute=5e-6):
    close(name, got, want, 5e-6, absolute)


def differing(got, want):
    kind = torch.int16 if got.dtype == BF16 else torch.int32
    return (got.contiguous().view(kind) != want.contiguous().view(kind)).float().mean().item()


def same(name, got, want, share=0.0):
    """bit for bit, but for a share of the elements"""
    different = differing(got, want)
    if different > share:
        fail('%s: %.6f of the elements differ' % (name, different))


siblings = {}


def likeGeneration(name, got, want):
    """layer.cu's bits, up to how the compiler contracts products and sums"""
    siblings[name] = max(siblings.get(name, 0.0), differing(got, want))
    same(name + ' against layer.cu', got, want, 0.01)


def report(test):
    print('%s: %d failures so far; comparisons, largest difference, the same as part of what is tolerated:' %
          (test.__name__, failures))
    for family, (count, difference, ratio) in worst.items():
        print('    %-24s %5d %10.3g %8.2f' % (family, count, difference, ratio))
    for name, share in siblings.items():
        print('    %-24s %.6f of the elements are not those of layer.cu' % (name, share))
    sys.stdout.flush()
    worst.clear()
    siblings.clear()


# ---- launches, as the sources give them ------------------------------------------------------------------------------------


def normForward(layerNorm, x, addend, sum, weight, bias, normed, statistics, epsilon, y=None):
    rows, width = x.shape
    lanes = 32 * ceil(width, 1024)
    y = y or max(1, 128 // lanes)
    launch(kernel('train_norm.cu', 'normForward', LAYER_NORM=layerNorm), (ceil(rows, y),), (lanes, y), x, addend, sum, weight, bias,
           normed, statistics, width, epsilon, rows)


def normGrid(layerNorm, rows, width):
    lanes = 32 * ceil(width, 512 if layerNorm else 1024)
    y = (640 if layerNorm else 512) // lanes
    return min(PROCESSORS, rows), (lanes, y)


def normBackward(layerNorm, by, x, weight, bias, statistics, residual, out, normed, partial):
    rows, width = x.shape
    grid, block = normGrid(layerNorm, rows, width)
    launch(kernel('train_norm.cu', 'normBackward', LAYER_NORM=layerNorm), (grid,), block, by, x, weight, bias, statistics, residual,
           out, normed, partial, width, rows)


def sumPartials(partial, start, columns, into, accumulate):
    """of columns start ... of partial [P][stride]"""
    launch(kernel('train_layer.cu', 'sumPartials', GATED=1, ACTIVATION=0), (ceil(columns, 32),), (8, 32), partial.flatten()[start:],
           partial.shape[0], partial.shape[1], into, columns, accumulate)


def gated(name, macros, rows, width, *pointers):
    launch(kernel('train_layer.cu', name, **macros), (ceil(rows * width, 4096),), (256,), *pointers, width, rows)


def columnGrid(rows, width):
    strips = ceil(width, 256)
    return strips, min(ceil(rows, 32), ceil(4 * PROCESSORS, strips))


def columnSums(x, partial):
    rows, width = x.shape
    launch(kernel('train_layer.cu', 'columnSums', GATED=1, ACTIVATION=0), columnGrid(rows, width), (32, 8), x, partial, width, rows)


def generation(name, rounding):
    """layer.cu, with LayerNorm where it rounds; few specialisations, for the time they take to compile"""
    return kernel('layer.cu', name, LAYER_NORM=rounding, POST_NORM=0, FINAL_NORM=1, GATED=1, ACTIVATION=0, HEADS=16, KV_HEADS=8,
                  HEAD_DIM=128, BLOCK_SIZE=64, ROUND_STEPS=rounding)


def rounds(rounding):
    return {'ROUND_STEPS': 1} if rounding else {}


LANES = {64: 4, 96: 8, 128: 8, 256: 16}


def rotateForward(macros, shape, qkv, bias, norms, epsilon, tables, positions, outs):
    heads, kvHeads, dim = shape
    rows = qkv.shape[0]
    threads = rows * ceil(heads + 2 * kvHeads, 4) * LANES[dim]
    launch(kernel('train_rotary.cu', 'rotateForward', HEAD_DIM=dim, **macros), (ceil(threads, 256),), (256,), qkv, bias, *norms,
           epsilon, *tables, positions, *outs, heads, kvHeads, rows)


def rotaryGrid(shape, rows):
    heads, kvHeads, dim = shape
    return min(4 * PROCESSORS, ceil(rows * ceil(heads + 2 * kvHeads, 2) * LANES[dim], 128))


def rotateBackward(macros, shape, bys, qkv, bias, norms, epsilon, tables, positions, out, partial):
    heads, kvHeads, dim = shape
    launch(kernel('train_rotary.cu', 'rotateBackward', HEAD_DIM=dim, **macros), (rotaryGrid(shape, qkv.shape[0]),), (128,), *bys, qkv,
           bias, *norms, epsilon, *tables, positions, out, partial, heads, kvHeads, qkv.shape[0])


# ---- tests -----------------------------------------------------------------------------------------------------------------


def normed(x, weight, bias, layerNorm, epsilon):
    """in float64, with its statistics"""
    mean = x.mean(-1, keepdim=True) if layerNorm else 0.0
    factor = 1 / ((x - mean).square().mean(-1, keepdim=True) + epsilon).sqrt()
    y = (x - mean) * factor
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, torch.cat([mean, factor], 1) if layerNorm else factor


def leaf(x):
    return None if x is None else x.double().requires_grad_()


def testNorm():
    widths = (576, 896, 1024, 1536, 4096, 5120, 8192, 16384) if GPU else (576, 1024, 1536, 4096)
    for layerNorm in (0, 1):
        for width in widths[:-1] if layerNorm else widths:
            for rows in ROWS:
                for options in range(4):
                    name = ' layerNorm=%d width=%d rows=%d options=%d' % (layerNorm, width, rows, options)
                    epsilon = 1e-5
                    x = random(rows, width, scale=2) + random(rows, 1)
                    addend = random(rows, width) if options % 2 else None
                    x[rows // 2] = 0
                    weight = random(width) if options < 3 or not layerNorm else None
                    bias = random(width) if layerNorm and weight is not None else None
                    sum = poison(rows, width)
                    out = poison(rows, width)
                    statistics = poison(rows, 1 + layerNorm, dtype=FLOAT)
                    normForward(layerNorm, x, addend, sum, weight, bias, out, statistics, epsilon)
                    total = x if addend is None else x + addend
                    if addend is None:
                        assert torch.isnan(sum).all(), 'sum was written'
                    else:
                        same('sum' + name, sum, total)
                    s, w, b = leaf(total), leaf(weight), leaf(bias)
                    want, wantStatistics = normed(s, w, b, layerNorm, epsilon)
                    closeBf16('normed' + name, out, want.detach())
                    closeFloat('statistics' + name, statistics, wantStatistics.detach())
                    other, otherStatistics = poison(rows, width), poison(rows, 1 + layerNorm, dtype=FLOAT)
                    again = x.clone()
                    lanes = 32 * ceil(width, 1024)
                    normForward(layerNorm, again, addend, again, weight, bias, other, otherStatistics, epsilon, y=512 // lanes)
                    same('normed, in place, taller blocks' + name, other, out)
                    same('sum in place' + name, again, total)
                    same('statistics, taller blocks' + name, otherStatistics, statistics)

                    by = random(rows, width)
                    residual = random(rows, width) if options % 2 else None
                    grid, block = normGrid(layerNorm, rows, width)
                    partial = poison(grid, (1 + layerNorm) * width, dtype=FLOAT)
                    byInput, recomputed = poison(rows, width), poison(rows, width)
                    normBackward(layerNorm, by, total, weight, bias, statistics, residual, byInput, recomputed, partial)
                    want.backward(by.double())
                    wantInput = s.grad if residual is None else s.grad + residual.double()
                    zero = rows // 2 if addend is None else -1  # all zeros: a gradient a thousand times the others'
                    if zero >= 0:
                        closeBf16('byInputOfZeros' + name, byInput[zero], wantInput[zero])
                        wantInput[zero] = byInput[zero].double()
                    closeBf16('byInput' + name, byInput, wantInput)
                    same('normed once more' + name, recomputed, out)
                    for column, parameter in ((0, w), (width, b)):
                        if parameter is not None:
                            into = poison(width, dtype=FLOAT)
                            sumPartials(partial, column, width, into, 0)
                            closeFloat('byWeight' + name, into, parameter.grad)
                            start = torch.randn(width, device=DEVICE)
                            sumTwice = start.clone()
                            sumPartials(partial, column, width, sumTwice, 1)
                            same('accumulated' + name, sumTwice, start + into)
                    again = poison(grid, (1 + layerNorm) * width, dtype=FLOAT)
                    target = by.clone() if residual is None else residual.clone()  # in place
                    normBackward(layerNorm, target if residual is None else by, total, weight, bias, statistics,
                                 None if residual is None else target, target, None, again)
                    same('byInput in place' + name, target, byInput)
                    same('partial again' + name, again, partial)
                    normBackward(layerNorm, by, total, weight, bias, statistics, residual, target, None, None)
                    same('byInput without partial' + name, target, byInput)
                    checkFences('norm' + name)
        x = random(3, 1536)
        weight, bias = random(1536), random(1536) if layerNorm else None
        addend, out, sum = random(3, 1536), poison(3, 1536), poison(3, 1536)
        normForward(layerNorm, x, addend, sum, weight, bias, out, poison(3, 2, dtype=FLOAT), 1e-5)
        f = generation('residualNorm', layerNorm)
        other = poison(3, 1536)
        launch(f, (3,), (64, 1), x, addend, None, weight, bias, other, 1536, 1e-5,
               torch.tensor([3], dtype=torch.int32, device=DEVICE))
        same('residual against layer.cu', sum, x)
        likeGeneration('normed layerNorm=%d' % layerNorm, out, other)


def testGated():
    functions = (F.silu, torch.relu, F.gelu, lambda x: F.gelu(x, approximate='tanh'))
    for isGated, number, rounding in ((1, 0, 0), (1, 0, 1), (1, 3, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)):
        macros = dict(GATED=isGated, ACTIVATION=number, **rounds(rounding))
        for width in (576, 896, 3072, 4864) if GPU else (576, 896):
            for rows in ROWS:
                for hasBias in (False, True):
                    name = ' gated=%d function=%d rounding=%d width=%d rows=%d bias=%d' % (
                        isGated, number, rounding, width, rows, hasBias)
                    widened = random(rows, (1 + isGated) * width, scale=3)
                    widened[0, :6] = torch.tensor([0.0, -0.0, -100.0, 100.0, -30.0, 1e-30])
                    bias = random((1 + isGated) * width) if hasBias else None
                    by = random(rows, width)
                    out = poison(rows, width)
                    gated('gatedForward', macros, rows, width, widened, bias, out)
                    a = leaf(widened if bias is None else widened + bias)
                    act = functions[number](a[:, :width])
                    want = act * a[:, width:] if isGated else act
                    closeBf16(('activatedRounded' if rounding else 'activated') + name, out, want.detach(),
                              0.02 if rounding else 1e-4, roundings=1 + rounding)
                    byWidened, recomputed = poison(*widened.shape), poison(rows, width)
                    gated('gatedBackward', macros, rows, width, widened, bias, by, byWidened, recomputed)
                    want.backward(by.double())
                    closeBf16('byWidened' + name, byWidened, a.grad)
                    same('activated once more' + name, recomputed, out)
                    again = widened.clone()
                    gated('gatedBackward', macros, rows, width, again, bias, by, again, None)
                    same('byWidened in place' + name, again, byWidened)
                    if not isGated:
                        other = by.clone()
                        gated('gatedBackward', macros, rows, width, widened, bias, other, other, None)
                        same('byWidened in place of byActivated' + name, other, byWidened)
                        again = widened.clone()
                        gated('gatedForward', macros, rows, width, again, bias, again)
                        same('activated in place' + name, again, out)
                    checkFences('gated' + name)
        if isGated and number == 0:
            f = generation('activate', rounding)
            other = poison(rows, width)
            launch(f, (ceil(rows * width, 4096),), (256,), widened, bias, other, width,
                   torch.tensor([rows], dtype=torch.int32, device=DEVICE))
            likeGeneration('activated rounding=%d' % rounding, out, other)


def testColumnSums():
    for width in (8, 64, 576, 1000, 4096, 6144, 19456) if GPU else (8, 576, 1000):
        for rows in ROWS + ((32768,) if width <= 4096 and GPU else (300,)):
            name = ' width=%d rows=%d' % (width, rows)
            x = random(rows, width) + random(width)
            strips, count = columnGrid(rows, width)
            partial, again = (poison(count, width, dtype=FLOAT) for i in range(2))
            columnSums(x, partial)
            columnSums(x, again)
            same('columns partial again' + name, again, partial)
            into = poison(width, dtype=FLOAT)
            sumPartials(partial, 0, width, into, 0)
            closeFloat('columns' + name, into, x.double().sum(0))
            sumPartials(again, 0, width, into, 1)
            closeFloat('columnsTwice' + name, into, 2 * x.double().sum(0))
            checkFences('columns' + name)


def rotated(u, norms, epsilon, tables, positions, heads, kvHeads, dim):
    """[T][heads + 2 kvHeads][dim] in float64"""
    qk, v = u[:, :heads + kvHeads], u[:, heads + kvHeads:]
    if norms[0] is not None:
        qk = qk / (qk.square().mean(-1, keepdim=True) + epsilon).sqrt()
        qk = qk * torch.cat([norms[0].expand(heads, dim), norms[1].expand(kvHeads, dim)])
    if tables[0] is not None:
        c, s = (t.double()[positions][:, None, :] for t in tables)
        a, b = qk[..., :dim // 2], qk[..., dim // 2:]
        qk = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([qk, v], 1)


def testRotary():
    shapes = ((16, 8, 128), (14, 2, 64), (12, 12, 96), (16, 1, 256), (9, 3, 64), (32, 8, 128), (1, 1, 128))
    maxPositions, epsilon = 700, 1e-6
    for shape in shapes if GPU else shapes[:5]:
        heads, kvHeads, dim = shape
        allHeads = heads + 2 * kvHeads
        cosine, sine = torch.rand(2, maxPositions, dim // 2, device=DEVICE) * 2 - 1
        for rows in ROWS:
            for options in range(8):
                hasBias, hasNorm, hasRope = options & 1, options & 2, options & 4
                name = ' %s rows=%d bias=%d norm=%d rope=%d' % (shape, rows, hasBias > 0, hasNorm > 0, hasRope > 0)
                qkv = random(rows, allHeads * dim)
                qkv[rows // 2, :dim] = 0
                bias = random(allHeads * dim) if hasBias else None
                norms = (random(dim), random(dim)) if hasNorm else (None, None)
                tables = (cosine, sine) if hasRope else (None, None)
                positions = torch.randint(maxPositions, (rows,), device=DEVICE)
                outs = [poison(rows, n, dim) for n in (heads, kvHeads, kvHeads)]
                rotateForward({}, shape, qkv, bias, norms, epsilon, tables, positions, outs)
                u = leaf((qkv if bias is None else qkv + bias).view(rows, allHeads, dim))
                weights = tuple(leaf(n) for n in norms)
                want = rotated(u, weights, epsilon, tables, positions, heads, kvHeads, dim)
                for part, got, expected in zip(('query', 'key', 'value'), outs, want.split((heads, kvHeads, kvHeads), 1)):
                    closeBf16(part + name, got, expected.detach())
                bys = [random(rows, n, dim) for n in (heads, kvHeads, kvHeads)]
                want.backward(torch.cat(bys, 1).double())
                byQkv = poison(rows, allHeads * dim)
                grid = rotaryGrid(shape, rows)
                partial, again = (poison(grid, 2 * dim, dtype=FLOAT) for i in range(2))
                rotateBackward({}, shape, bys, qkv, bias, norms, epsilon, tables, positions, byQkv, partial)
                wantQkv = u.grad.reshape(rows, -1)
                if hasNorm and not hasBias:  # a head of zeros
                    closeBf16('byZeros' + name, byQkv[rows // 2, :dim], wantQkv[rows // 2, :dim])
                    wantQkv[rows // 2, :dim] = byQkv[rows // 2, :dim].double()
                closeBf16('byQkv' + name, byQkv, wantQkv)
                other = qkv.clone()
                rotateBackward({}, shape, bys, other, bias, norms, epsilon, tables, positions, other, again)
                same('byQkv in place' + name, other, byQkv)
                if hasNorm:
                    same('partial again' + name, again, partial)
                    for k in range(2):
                        into = poison(dim, dtype=FLOAT)
                        sumPartials(partial, k * dim, dim, into, 0)
                        closeFloat('byNorm' + name, into, weights[k].grad)
                checkFences('rotary' + name)
    shape, rows = (16, 8, 128), ROWS[-1]
    heads, kvHeads, dim = shape
    cosine, sine = torch.rand(2, maxPositions, dim // 2, device=DEVICE) * 2 - 1
    for rounding in (0, 1):
        qkv, bias, norms = random(rows, 32 * dim), random(32 * dim), (random(dim), random(dim))
        positions = torch.randint(512, (rows,), device=DEVICE)
        outs = [poison(rows, n, dim) for n in (heads, kvHeads, kvHeads)]
        rotateForward(rounds(rounding), shape, qkv, bias, norms, epsilon, (cosine, sine), positions, outs)
        f = generation('rotateAndWrite', rounding)
        query = poison(rows, heads, dim)
        slots = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        pages = torch.zeros(rows, 8, device=DEVICE, dtype=torch.int32)
        kv = torch.zeros(2 * kvHeads * 64 * dim, device=DEVICE, dtype=BF16)
        launch(f, (ceil(rows * 16 * 8, 256),), (256,), qkv, bias, *norms, epsilon, cosine, sine, positions.int(), slots, pages, 8, kv,
               0, 1, query, torch.tensor([rows], dtype=torch.int32, device=DEVICE))
        likeGeneration('query rounding=%d' % rounding, outs[0], query)


# ---- times -----------------------------------------------------------------------------------------------------------------


def measure(runs, repeats=20, calls=12):
    """median microseconds of a call, `runs` taken in turn, back to back: the stream is held until all are queued"""
    for run in runs:
        run()
    times = []
    for repeat in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1500000)
        start.record()
        for call in range(calls):
            runs[call % len(runs)]()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[len(times) // 2]


def benchmark():
    big = torch.empty(1 << 30, device='cuda', dtype=torch.uint8)
    other = torch.empty_like(big)
    t = measure([lambda: other.copy_(big)], 20, 4)
    copy = 2 * big.numel() / t / 1e3
    del big, other
    print('device copy of 1 GiB: %.0f GB/s' % copy)
    print('%-16s %-8s %6s %10s %8s %8s %12s' % ('kernel', 'model', 'rows', 'us', 'GB/s', '% copy', 'libtorch us'))
    for model, hidden, heads, kvHeads, inner, qkNorm in (('0.6B', 1024, 16, 8, 3072, True), ('8B', 4096, 32, 8, 12288, True),
                                                         ('1.5B', 1536, 12, 2, 8960, False)):
        for rows in (1000, 8192) if model == '0.6B' else (8192,):
            dim, shape = 128, (heads, kvHeads, 128)

            def row(name, bytes, make, libtorch):
                sets = max(2, min(8, ceil(200000000, bytes)))
                t = measure([make() for i in range(sets)])
                torch.cuda.empty_cache()
                theirs = measure([libtorch()], 7, 4) if libtorch else math.nan
                torch.cuda.empty_cache()
                print('%-16s %-8s %6d %10.2f %8.0f %8.1f %12.1f' % (name, model, rows, t, bytes / t / 1e3,
                                                                   100 * bytes / t / 1e3 / copy, theirs), flush=True)

            def forwardNorm(hasAddend):
                def make():
                    x, a, w = random(rows, hidden), random(rows, hidden) if hasAddend else None, random(hidden)
                    s, o, r = random(rows, hidden), random(rows, hidden), torch.empty(rows, device=DEVICE)
                    return lambda: normForward(0, x, a, s, w, None, o, r, 1e-6)
                return make

            def forwardNormTheirs():
                x, a, w = random(rows, hidden), random(rows, hidden), random(hidden)
                return lambda: F.rms_norm(x + a, (hidden,), w, 1e-6)

            def backwardNorm(full):
                def make():
                    by, x, a, w = random(rows, hidden), random(rows, hidden), random(rows, hidden), random(hidden)
                    o, r = random(rows, hidden), torch.rand(rows, device=DEVICE)
                    partial = torch.empty(normGrid(0, rows, hidden)[0], hidden, device=DEVICE)
                    return lambda: normBackward(0, by, x, w, None, r, a, a, o if full else None, partial)
                return make

            def backwardNormTheirs():
                x, w = random(rows, hidden).requires_grad_(), random(hidden).requires_grad_()
                a, by = random(rows, hidden), random(rows, hidden)
                y = F.rms_norm(x, (hidden,), w, 1e-6)

                def run():
                    g = torch.autograd.grad(y, (x, w), by, retain_graph=True)
                    return g[0] + a
                return run

            def forwardGated():
                x, o = random(rows, 2 * inner), random(rows, inner)
                return lambda: gated('gatedForward', dict(GATED=1, ACTIVATION=0), rows, inner, x, None, o)

            def forwardGatedTheirs():
                x = random(rows, 2 * inner)
                return lambda: F.silu(x[:, :inner]) * x[:, inner:]

            def backwardGated(full):
                def make():
                    x, by, o = random(rows, 2 * inner), random(rows, inner), random(rows, inner)
                    d = random(rows, 2 * inner)
                    return lambda: gated('gatedBackward', dict(GATED=1, ACTIVATION=0), rows, inner, x, None, by, d,
                                         o if full else None)
                return make

            def backwardGatedTheirs():
                x, by = random(rows, 2 * inner).requires_grad_(), random(rows, inner)
                y = F.silu(x[:, :inner]) * x[:, inner:]
                return lambda: torch.autograd.grad(y, x, by, retain_graph=True)

            width = (heads + 2 * kvHeads) * dim

            def columns():
                x = random(rows, width)
                partial = torch.empty(columnGrid(rows, width)[1], width, device=DEVICE)
                return lambda: columnSums(x, partial)

            def columnsTheirs():
                x = random(rows, width)
                return lambda: x.sum(0, dtype=FLOAT)

            def partials():
                partial, into = torch.empty(normGrid(0, rows, hidden)[0], hidden, device=DEVICE), torch.zeros(hidden, device=DEVICE)
                return lambda: sumPartials(partial, 0, hidden, into, 1)

            tables = tuple(torch.rand(2, 1024, dim // 2, device=DEVICE))
            positions = torch.arange(rows, device=DEVICE) % 1000
            norms = (random(dim), random(dim)) if qkNorm else (None, None)
            bias = None if qkNorm else random(width)

            def parts():
                return [random(rows, n, dim) for n in (heads, kvHeads, kvHeads)]

            def forwardRotary():
                qkv, outs = random(rows, width), parts()
                return lambda: rotateForward({}, shape, qkv, bias, norms, 1e-6, tables, positions, outs)

            def backwardRotary():
                qkv, bys, out = random(rows, width), parts(), random(rows, width)
                partial = torch.empty(rotaryGrid(shape, rows), 2 * dim, device=DEVICE)
                return lambda: rotateBackward({}, shape, bys, qkv, bias, norms, 1e-6, tables, positions, out, partial)

            c, s = (torch.cat([t, t], 1)[positions][:, None, :].to(BF16).expand(-1, heads + kvHeads, -1).contiguous() for t in tables)

            def theirs(qkv):
                x = (qkv if bias is None else qkv + bias).view(rows, -1, dim)
                qk = x[:, :heads + kvHeads]
                if qkNorm:
                    qk = torch.cat([F.rms_norm(x[:, :heads], (dim,), norms[0], 1e-6),
                                    F.rms_norm(x[:, heads:heads + kvHeads], (dim,), norms[1], 1e-6)], 1)
                partner = qk.reshape(rows, -1, 2, dim // 2).flip(2).reshape(rows, -1, dim)
                qk = qk * c + partner * s
                return qk, x[:, heads + kvHeads:]

            def forwardRotaryTheirs():
                qkv = random(rows, width)
                return lambda: theirs(qkv)

            def backwardRotaryTheirs():
                qkv = random(rows, width).requires_grad_()
                inputs = (qkv,) + (tuple(n.requires_grad_() for n in norms) if qkNorm else ())
                y = theirs(qkv)
                by = [random(*t.shape) for t in y]
                return lambda: torch.autograd.grad(y, inputs, by, retain_graph=True)

            line, plane = 2 * rows * hidden, 2 * rows * inner
            row('normForward', 2 * line, forwardNorm(False), None)
            row(' with addend', 4 * line, forwardNorm(True), forwardNormTheirs)
            row('normBackward', 4 * line, backwardNorm(False), None)
            row(' and normed', 5 * line, backwardNorm(True), backwardNormTheirs)
            row('sumPartials', 4 * normGrid(0, rows, hidden)[0] * hidden, partials, None)
            row('gatedForward', 3 * plane, forwardGated, forwardGatedTheirs)
            row('gatedBackward', 5 * plane, backwardGated(False), None)
            row(' and activated', 6 * plane, backwardGated(True), backwardGatedTheirs)
            row('columnSums', 2 * rows * width, columns, columnsTheirs)
            row('rotateForward', 4 * rows * width, forwardRotary, forwardRotaryTheirs)
            extra = 2 * rows * (heads + kvHeads) * dim if qkNorm else 0
            row('rotateBackward', 4 * rows * width + extra, backwardRotary, backwardRotaryTheirs)


for test in (testNorm, testGated, testColumnSums, testRotary):
    test()
    report(test)
print('%d failures' % failures)
if GPU:
    benchmark()
sys.exit(1 if failures else 0)
