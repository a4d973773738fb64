"""usage: check_layer.py FOLDER      checks and times the kernels of layer.cu (FOLDER has layer.cu and the headers)"""
import math, os, sys
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1]
GPU = torch.cuda.is_available()  # without one: an emulator's cupy, small shapes, no times
DEVICE = 'cuda' if GPU else 'cpu'
BF16 = torch.bfloat16
torch.manual_seed(1)
failures = 0


def read(name):
    return open(os.path.join(FOLDER, name)).read()


modules = {}


def kernel(name, **macros):
    defaults = dict(HEAD_DIM=128, HEADS=16, KV_HEADS=8, BLOCK_SIZE=64)
    if set(macros) & {'LAYER_NORM', 'POST_NORM', 'FINAL_NORM', 'GATED', 'ACTIVATION'}:
        defaults.update(LAYER_NORM=0, POST_NORM=0, FINAL_NORM=1, GATED=1, ACTIVATION=0)
    defaults.update(macros)
    key = tuple(sorted(defaults.items()))
    if key not in modules:
        vectors = read('vectors.cuh').replace('#include "common.cuh"', '')  # after layer.cu's own ROUND_STEPS
        code = read('common.cuh') + '\n//CUT\n' + read('layer.cu').replace('#include "vectors.cuh"', vectors).replace(
            '#include "rotation.cuh"', read('rotation.cuh'))
        modules[key] = cupy.RawModule(code=code, backend='nvrtc',
                                      options=('--std=c++17',) + tuple('-D%s=%s' % i for i in key))
    return modules[key].get_function(name)


def launch(f, grid, block, *args):
    converted = []
    for a in args:
        if a is None:
            converted.append(np.uint64(0))
        elif isinstance(a, torch.Tensor):
            assert a.is_contiguous()
            converted.append(np.uint64(a.data_ptr()))
        elif isinstance(a, float):
            converted.append(np.float32(a))
        else:
            converted.append(np.int32(a))
    f(grid, block, tuple(converted))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(BF16)


def poison(*shape, dtype=BF16):
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


worst = {}


def close(name, got, want, tolerance=1e-2):
    """got and want agree where want is a number and both are NaN elsewhere; relative to the scale of want."""
    global failures
    got, want = got.double(), want.double()
    nans = torch.equal(torch.isnan(got), torch.isnan(want))
    difference = (torch.nan_to_num(got) - torch.nan_to_num(want)).abs().max().item() if got.numel() else 0.0
    scale = max(torch.nan_to_num(want).abs().max().item() if want.numel() else 0.0, 1e-6)
    family = name.split(' ')[0]
    worst[family] = max(worst.get(family, 0.0), difference / scale)
    if not nans or not difference / scale <= tolerance:
        failures += 1
        print('FAIL %s: largest difference %.3g of %.3g, NaNs %s' % (name, difference, scale, 'agree' if nans else 'DIFFER'))


def same(name, got, want, share=0.0):
    """bit for bit, but for a share of the elements"""
    global failures
    different = (got.contiguous().view(torch.int16) != want.contiguous().view(torch.int16)).float().mean().item()
    if different > share:
        failures += 1
        print('FAIL %s: %.5f of the elements differ' % (name, different))


def rowLaunch(width, rows, y=1):
    lanes = 32 * ((width + 1023) // 1024)
    return (-(-rows // y),), (lanes, y)


ROWS = (1, 3, 257) if GPU else (1, 3, 9)
WIDTHS = (576, 896, 1024, 1536, 4096, 8192) if GPU else (576, 1024, 1536, 4096)
PAD = 5  # rows of the grid beyond the count


def testEmbed():
    f = kernel('embed')
    for width in WIDTHS:
        for rows in ROWS:
            for learned in (False, True):
                table, positionTable = random(1000, width), random(300, width)
                tokens = torch.randint(1000, (rows + PAD,), device=DEVICE, dtype=torch.int32)
                positions = torch.randint(290, (rows + PAD,), device=DEVICE, dtype=torch.int32)
                out = poison(rows + PAD, width)
                launch(f, *rowLaunch(width, rows + PAD), tokens, positions, table, positionTable if learned else None, 2, out,
                       width, ints(rows))
                want = table[tokens.long()]
                if learned:
                    want = want + positionTable[positions.long() + 2]
                want[rows:] = math.nan
                same('embed', out[:rows], want[:rows])
                close('embed', out, want)
                if learned:  # onto what is there
                    projected = random(rows + PAD, width)
                    want = projected + positionTable[positions.long() + 2]
                    want[rows:] = projected[rows:]
                    launch(f, *rowLaunch(width, rows + PAD), tokens, positions, None, positionTable, 2, projected, width, ints(rows))
                    same('embed positions only', projected, want)


def norm(x, weight, bias, layerNorm, epsilon):
    x = x.double()
    if layerNorm:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    if weight is not None:
        x = x * weight.double()
    return x if bias is None else x + bias.double()


def testNorm():
    for layerNorm in (0, 1):
        for postNorm in (0, 1):
            f = kernel('residualNorm', LAYER_NORM=layerNorm, POST_NORM=postNorm)
            g = kernel('gatherNorm', LAYER_NORM=layerNorm, POST_NORM=postNorm)
            h = kernel('gatherNorm', LAYER_NORM=layerNorm, POST_NORM=postNorm, FINAL_NORM=0)
            for width in WIDTHS:
                for rows in ROWS:
                    for options in range(4):
                        hasAddend, hasBias = options > 0, options > 1
                        affine = not (layerNorm and options == 3)
                        name = 'norm layerNorm=%d postNorm=%d width=%d rows=%d options=%d' % (layerNorm, postNorm, width, rows, options)
                        residual = random(rows + PAD, width, scale=3) + 0.5
                        addend = random(rows + PAD, width) if hasAddend else None
                        addendBias = random(width) if hasBias else None
                        weight = random(width) if affine else None
                        bias = random(width) if layerNorm and affine else None
                        out = poison(rows + PAD, width)
                        total = residual
                        if hasAddend:
                            total = residual + (addend + addendBias if hasBias else addend)
                        want = norm(total, weight, bias, layerNorm, 1e-5)
                        want[rows:] = math.nan
                        after = residual.clone()
                        launch(f, *rowLaunch(width, rows + PAD), after, addend, addendBias, weight, bias, out, width, 1e-5, ints(rows))
                        close(name, out, want)
                        same(name + ' padding', after[rows:], residual[rows:])
                        if postNorm:
                            same(name + ' residual', after[:rows], out[:rows])
                        else:
                            same(name + ' residual', after[:rows], total[:rows])
                        # the last row alone; many rows in a CTA; in place of the addend
                        again = residual[rows - 1:rows].clone()
                        alone = poison(1, width)
                        launch(f, *rowLaunch(width, 1), again, addend[rows - 1:rows] if hasAddend else None, addendBias, weight,
                               bias, alone, width, 1e-5, ints(1))
                        same(name + ' alone', alone, out[rows - 1:rows])
                        if width <= 1024:
                            again = residual.clone()
                            other = poison(rows + PAD, width)
                            launch(f, *rowLaunch(width, rows + PAD, 4), again, addend, addendBias, weight, bias, other, width, 1e-5,
                                   ints(rows))
                            same(name + ' y=4', other[:rows], out[:rows])
                            close(name + ' y=4', other, want)
                        if hasAddend:
                            again, other = residual.clone(), addend.clone()
                            launch(f, *rowLaunch(width, rows + PAD), again, other, addendBias, weight, bias, other, width, 1e-5,
                                   ints(rows))
                            same(name + ' in place', other[:rows], out[:rows])
                        index = torch.randint(rows, (7,), device=DEVICE, dtype=torch.int32)
                        index[2] = -1
                        for k, gather in ((0, g), (1, h)):
                            picked = poison(7, width)
                            before = residual.clone()
                            launch(gather, *rowLaunch(width, 7), before, addend, addendBias, weight, bias, picked, width, 1e-5, index,
                                   ints(5))
                            expected = (out if k == 0 else total)[index.long()]
                            same(name + ' gather', picked[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
                            assert torch.isnan(picked[[2, 5, 6]]).all(), 'gather wrote padding'
                            same(name + ' gather residual', before, residual)


def step(x, rounding):
    return x.to(BF16).double() if rounding else x


def rotate(qkv, bias, queryNorm, keyNorm, epsilon, cosine, sine, positions, heads, kvHeads, dim, rounding):
    """[T][heads + 2 kvHeads][dim] in double precision, rounded to bfloat16 after each operation on demand"""
    x = qkv.double().reshape(-1, heads + 2 * kvHeads, dim)
    if bias is not None:
        x = (x + bias.double().reshape(1, -1, dim)).to(BF16).double()
    qk, v = x[:, :heads + kvHeads], x[:, heads + kvHeads:]
    if queryNorm is not None:
        qk = qk / (qk.square().mean(-1, keepdim=True) + epsilon).sqrt()
        weight = torch.cat([queryNorm.expand(heads, dim), keyNorm.expand(kvHeads, dim)]).double()
        qk = step(qk * weight, rounding)
    if cosine is not None:
        c, s = (step(t.double()[positions.long()], rounding)[:, None, :] for t in (cosine, sine))
        a, b = qk[..., :dim // 2], qk[..., dim // 2:]
        qk = torch.cat([step(a * c, rounding) - step(b * s, rounding), step(b * c, rounding) + step(a * s, rounding)], -1)
    return torch.cat([qk, v], 1)


SHAPES = ((16, 8, 128, 64), (14, 2, 64, 16), (32, 32, 96, 32), (8, 4, 256, 128), (9, 3, 64, 64))


def testRotate():
    slots, layers, layer, maxPositions = (7, 3, 1, 512) if GPU else (3, 2, 1, 64)
    for heads, kvHeads, dim, blockSize in SHAPES:
        maxBlocks = maxPositions // blockSize + 2
        blocks = slots * maxBlocks
        cosine, sine = torch.rand(2, maxPositions, dim // 2, device=DEVICE) * 2 - 1
        for rounding in (0, 1):
            shape = dict(HEAD_DIM=dim, HEADS=heads, KV_HEADS=kvHeads, BLOCK_SIZE=blockSize)
            f = kernel('rotateAndWrite', ROUND_STEPS=rounding, **shape)
            for rows in ROWS:
                for options in range(8):
                    hasBias, hasNorm, hasRope = options & 1, options & 2, options & 4
                    name = 'rotate%d %s rows=%d options=%d' % (rounding, (heads, kvHeads, dim), rows, options)
                    width = (heads + 2 * kvHeads) * dim
                    qkv = random(rows + PAD, width)
                    bias = random(width) if hasBias else None
                    queryNorm, keyNorm = (random(dim), random(dim)) if hasNorm else (None, None)
                    limit = maxPositions
                    # pairs of slot and position are distinct, as in a step
                    places = torch.randperm(slots * limit, device=DEVICE)[:rows + PAD]
                    slot, positions = (places // limit).int(), (places % limit).int()
                    if rows > 1:
                        slot[1] = -1
                        positions[1] = 2 ** 30
                    slot[rows:] = 2 ** 30  # not to be read
                    table = torch.randperm(blocks, device=DEVICE).reshape(slots, maxBlocks).int()
                    kv = poison(blocks, layers, 2, kvHeads, blockSize, dim)
                    query = poison(rows + PAD, heads, dim)
                    after = qkv.clone()
                    units = (heads + 2 * kvHeads + 1) // 2
                    lanes = {64: 4, 96: 8, 128: 8, 256: 16}[dim]
                    launch(f, (-(-(rows + PAD) * units * lanes // 256),), (256,), after, bias, queryNorm, keyNorm, 1e-6,
                           cosine if hasRope else None, sine if hasRope else None, positions, slot, table, maxBlocks, kv, layer,
                           layers, query, ints(rows))
                    live = [i for i in range(rows) if i != 1]
                    want = rotate(qkv[live], bias, queryNorm, keyNorm, 1e-6, cosine if hasRope else None, sine, positions[live],
                                  heads, kvHeads, dim, rounding)
                    wantQuery = poison(rows + PAD, heads, dim, dtype=torch.float64)
                    wantQuery[live] = want[:, :heads]
                    wantQkv = qkv.double().reshape(rows + PAD, -1, dim).clone()
                    wantQkv[live, heads:] = want[:, heads:]
                    wantKv = poison(*kv.shape, dtype=torch.float64)
                    block = table[slot[live].long(), (positions[live] // blockSize).long()].long()
                    at = (positions[live] % blockSize).long()
                    wantKv[block, layer, 0, :, at] = want[:, heads:heads + kvHeads]
                    wantKv[block, layer, 1, :, at] = want[:, heads + kvHeads:]
                    for part, got, expected in (('query', query, wantQuery), ('qkv', after.reshape(wantQkv.shape), wantQkv),
                                                ('kv', kv, wantKv)):
                        close(name + ' ' + part, got, expected, 1e-2 if rounding else 4e-3)
                        if rounding:
                            mask = ~torch.isnan(expected)
                            same(name + ' exact ' + part, got[mask], expected[mask].to(BF16), 2e-3 if hasNorm else 0.0)
            f = kernel('rotateAndWrite', WRITE_BACK=0, **shape)
            after = qkv.clone()
            launch(f, (-(-(rows + PAD) * units * lanes // 256),), (256,), after, bias, queryNorm, keyNorm, 1e-6, cosine, sine,
                   positions, slot, table, maxBlocks, kv, layer, layers, query, ints(rows))
            same('rotate without writing back', after, qkv)


def testActivate():
    functions = (torch.nn.functional.silu, torch.relu, torch.nn.functional.gelu,
                 lambda x: torch.nn.functional.gelu(x, approximate='tanh'))
    for gated in (0, 1):
        for number, function in enumerate(functions):
            for rounding in (0, 1):
                f = kernel('activate', GATED=gated, ACTIVATION=number, ROUND_STEPS=rounding)
                for width in (576, 896, 3072, 4864) if GPU else (576, 896):
                    for rows in ROWS:
                        for hasBias in (False, True):
                            name = 'activate%d gated=%d function=%d width=%d rows=%d' % (rounding, gated, number, width, rows)
                            x = random(rows + PAD, (1 + gated) * width, scale=3)
                            x[0, :4] = torch.tensor([0.0, -100.0, 100.0, 3e38])
                            if gated:
                                x[0, width:width + 4] = 1.0
                            bias = random((1 + gated) * width) if hasBias else None
                            out = poison(rows + PAD, width)
                            launch(f, (-(-(rows + PAD) * width // 4096),), (256,), x, bias, out, width, ints(rows))
                            y = x + bias if hasBias else x
                            y = y.double()
                            want = function(y[:, :width])
                            if gated:
                                want = step(want, rounding) * y[:, width:]
                            want[rows:] = math.nan
                            small = want.clone()
                            got = out.clone()
                            got[0, 3] = small[0, 3] = 0  # its size would hide the others
                            close(name, got, small)
                            relative = ((got[:rows].double() - small[:rows]).abs() / (small[:rows].abs() + 1e-2)).max().item()
                            if relative > (1e-2 if rounding else 6e-3):
                                close(name + ' relative', torch.tensor(relative), torch.tensor(0.0))
                            if rounding:
                                reference = function(y[:, :width].to(BF16).float()).to(BF16)
                                if gated:
                                    reference = reference * y[:, width:].to(BF16)
                                same(name + ' exact', out[:rows], reference[:rows], 2e-3 if number < 2 else 0.02 if GPU else 0.15)
                            if not gated:
                                launch(f, (-(-(rows + PAD) * width // 4096),), (256,), x, bias, x, width, ints(rows))
                                same(name + ' in place', x[:rows], out[:rows])


# ---- times -----------------------------------------------------------------------------------------------------------------


def measure(runs, repeats=25, calls=12):
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


def benchmark():
    big = torch.empty(1 << 29, device='cuda', dtype=torch.uint8)
    other = torch.empty_like(big)
    t = measure([lambda: other.copy_(big)], 20, 4)
    print('device copy of 512 MiB: %.0f GB/s' % (2 * big.numel() / t / 1e3))
    none = ints(0)
    f = kernel('activate')
    x = random(64, 1024)
    print('launch that does nothing: %.2f us' % measure([lambda: launch(f, (1,), (256,), x, None, x, 512, none)]))
    print('%-14s %-10s %6s %10s %10s' % ('kernel', 'model', 'rows', 'us', 'GB/s'))
    for model, hidden, heads, kvHeads, inner in (('0.6B', 1024, 16, 8, 3072), ('8B', 4096, 32, 8, 12288)):
        dim, blockSize, layers = 128, 64, 1
        for rows in (1, 256, 8192):
            count = ints(rows)
            y = 4 if hidden <= 1024 and rows > 528 else 1

            def report(name, bytes, make):
                sets = 1 if rows < 1024 else max(2, min(6, math.ceil(160e6 / bytes)))
                t = measure([make() for i in range(sets)])
                print('%-14s %-10s %6d %10.2f %10.0f' % (name, model, rows, t, bytes / t / 1e3))

            def embed():
                tokens = torch.randint(32000, (rows,), device=DEVICE, dtype=torch.int32)
                table, out = random(32000, hidden), random(rows, hidden)
                f = kernel('embed')
                return lambda: launch(f, *rowLaunch(hidden, rows, y), tokens, tokens, table, None, 0, out, hidden, count)

            def residual():
                r, a, w, o = random(rows, hidden), random(rows, hidden, scale=0.01), random(hidden), random(rows, hidden)
                f = kernel('residualNorm')
                return lambda: launch(f, *rowLaunch(hidden, rows, y), r, a, None, w, None, o, hidden, 1e-6, count)

            def gather():
                r, a, w, o = random(rows, hidden), random(rows, hidden), random(hidden), random(rows, hidden)
                index = torch.arange(rows, device=DEVICE, dtype=torch.int32)
                f = kernel('gatherNorm')
                return lambda: launch(f, *rowLaunch(hidden, rows, y), r, a, None, w, None, o, hidden, 1e-6, index, count)

            def rotary(back, qkNorm):
                def make():
                    perSlot = 1024 if rows >= 1024 else 1
                    slots = -(-rows // perSlot)
                    tokens = torch.arange(rows, device=DEVICE, dtype=torch.int32)
                    slot, position = tokens // perSlot, tokens % perSlot + (0 if perSlot > 1 else 700)
                    table = torch.randperm(slots * 16, device=DEVICE).int().reshape(slots, 16)
                    kv = torch.zeros(slots * 16, layers, 2, kvHeads, blockSize, dim, device=DEVICE, dtype=BF16)
                    qkv, query = random(rows, (heads + 2 * kvHeads) * dim), random(rows, heads * dim)
                    c, s = torch.rand(2, 1024, dim // 2, device=DEVICE)
                    w = random(dim) if qkNorm else None
                    f = kernel('rotateAndWrite', HEADS=heads, KV_HEADS=kvHeads, WRITE_BACK=back)
                    units = (heads + 2 * kvHeads + 1) // 2
                    grid = (-(-rows * units * 8 // 256),)
                    return lambda: launch(f, grid, (256,), qkv, None, w, w, 1e-6, c, s, position, slot, table, 16, kv, 0, layers,
                                          query, count)
                return make

            def activation():
                x, o = random(rows, 2 * inner), random(rows, inner)
                f = kernel('activate')
                return lambda: launch(f, (-(-rows * inner // 4096),), (256,), x, None, o, inner, count)

            line = rows * hidden * 2
            all = rows * (heads + 2 * kvHeads) * dim * 2
            report('embed', 2 * line, embed)
            report('residualNorm', 4 * line, residual)
            report('gatherNorm', 3 * line, gather)
            report('rotate back', 2 * all + rows * kvHeads * dim * 2, rotary(1, True))
            report('rotate', 2 * all, rotary(0, True))
            report('rotate no norm', 2 * all, rotary(0, False))
            report('activate', 3 * rows * inner * 2, activation)


for test in (testEmbed, testNorm, testRotate, testActivate):
    test()
    print('%s: %d failures so far' % (test.__name__, failures), flush=True)
print('largest differences, relative to the scale of the result:', {k: '%.2g' % v for k, v in worst.items()})
print('%d failures' % failures)
if GPU:
    benchmark()
sys.exit(1 if failures else 0)
