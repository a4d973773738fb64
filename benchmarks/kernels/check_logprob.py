"""usage: check_logprob.py [FOLDER]      checks and times the kernels of logprob.cu (FOLDER has logprob.cu and common.cuh)"""
import faulthandler, math, os, sys
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1] if len(sys.argv) > 1 else 'src/main/native/cuda'
GPU = torch.cuda.is_available()  # without one: an emulator's cupy, small shapes, no times
DEVICE = 'cuda' if GPU else 'cpu'
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
torch.manual_seed(1)
failures = 0
faulthandler.dump_traceback_later(120 if GPU else 3600, exit=True)  # a kernel that hangs: says where


def read(name):
    return open(os.path.join(FOLDER, name)).read()


KEPT = 4768  # vectors of 16 bytes, of which three CTAs find room on a multiprocessor
modules = {}


def kernel(name, ctas=8):
    if ctas not in modules:
        code = read('common.cuh') + '\n' + read('logprob.cu').replace('#include "common.cuh"', '')
        modules[ctas] = cupy.RawModule(code=code, backend='nvrtc', options=('--std=c++17', '-DCTAS=%d' % ctas))
    f = modules[ctas].get_function(name)
    if name == 'logprobForward' and GPU:
        f.max_dynamic_shared_size_bytes = 16 * KEPT
    return f


def launch(f, grid, threads, args, shared=0):
    converted = []
    for a in args:
        if a is None:
            converted.append(np.uint64(0))
        elif isinstance(a, torch.Tensor):
            converted.append(np.uint64(a.data_ptr()))
        elif isinstance(a, float):
            converted.append(np.float32(a))
        else:
            converted.append(a if isinstance(a, np.generic) else np.int32(a))
    f(grid, (threads,), tuple(converted), shared_mem=shared)


def poison(*shape, dtype=F32):
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


def up(x, multiple):
    return -(-x // multiple) * multiple


# ---- the kernels -----------------------------------------------------------------------------------------------------------


def width(vocabulary, ctas):
    return -(-(-(-vocabulary // 4)) // ctas)


def ctasOf(vocabulary):
    return next((c for c in (1, 2, 4, 8) if width(vocabulary, c) <= KEPT), 8)


class Forward:
    """one launch and what it wrote"""

    def __init__(self, x, vocabulary, inverse, targets, ctas=None, clusters=None, retained=None, withP=True, pad=3, pStride=None):
        ctas = ctas or ctasOf(vocabulary)
        rows = targets.shape[0]
        self.rows, self.vocabulary = rows, vocabulary
        clusters = clusters or -(-rows // 4)
        retained = min(KEPT, width(vocabulary, ctas)) if retained is None else retained
        self.logprob, self.logSumExp, self.entropy = (poison(rows + pad) for i in range(3))
        self.pStride = pStride or up(vocabulary, 8) + 8
        self.p = poison(rows + pad, self.pStride, dtype=BF16) if withP else None
        self.args = (x, np.int64(x.stride(0)), vocabulary, inverse, targets, self.logprob, self.logSumExp, self.entropy, self.p,
                     np.int64(self.pStride), rows, retained)
        self.f, self.grid, self.shared = kernel('logprobForward', ctas), (ctas * clusters,), 16 * retained
        self.run()

    def run(self):
        launch(self.f, self.grid, 256, self.args, self.shared)

    def results(self):
        return [('logprob', self.logprob), ('logSumExp', self.logSumExp), ('entropy', self.entropy)] + (
            [('p', self.p[:, :self.vocabulary])] if self.p is not None else [])


def backward(forward, targets, g, e, inverse, inPlace=False, fromLogits=None):
    p, rows, vocabulary = forward.p, forward.rows, forward.vocabulary
    out = p if inPlace else poison(*p.shape, dtype=BF16)
    common = (targets, forward.logprob, g, e, forward.entropy, inverse)
    stride = np.int64(forward.pStride)
    if fromLogits is None:
        launch(kernel('logprobBackward'), (-(-vocabulary // 8192), rows), 256, (p, out, stride, vocabulary) + common)
    else:
        launch(kernel('logprobBackwardFromLogits'), (-(-vocabulary // 4096), rows), 256,
               (fromLogits, np.int64(fromLogits.stride(0)), forward.logSumExp, out, stride, vocabulary) + common)
    return out


# ---- comparisons -----------------------------------------------------------------------------------------------------------

worst = {}


def within(name, got, want, tolerance):
    """|got - want| <= tolerance, element by element, where want is a number; NaN where it is NaN"""
    global failures
    got, want = got.double(), want.double()
    tolerance = torch.as_tensor(tolerance, device=want.device, dtype=F64).expand(want.shape)
    infinite = torch.isinf(want)
    difference = (got - want).abs() / tolerance
    difference = torch.where(torch.isnan(want), torch.where(torch.isnan(got), 0.0, math.inf), difference)
    difference = torch.where(infinite, torch.where(got == want, 0.0, math.inf), difference)
    difference = torch.where(torch.isnan(difference), math.inf, difference)
    share, at = difference.reshape(-1).max(0) if want.numel() else (torch.zeros(()), 0)
    family = name.split(':')[-1].strip()
    worst[family] = max(worst.get(family, 0.0), share.item())
    if not share.item() <= 1:
        failures += 1
        place = tuple(int(i) for i in np.unravel_index(int(at), tuple(want.shape)))
        print('FAIL %s: %.3g times the tolerance at %s: %.9g instead of %.9g; %d elements' % (
            name, share.item(), place, got.reshape(-1)[at].item(), want.reshape(-1)[at].item(), int((difference > 1).sum())))


def same(name, got, want):
    global failures
    integers = torch.int16 if got.dtype == BF16 else torch.int32
    different = int((got.contiguous().view(integers) != want.contiguous().view(integers)).sum())
    worst['bits'] = max(worst.get('bits', 0), different)
    if different:
        failures += 1
        print('FAIL %s: %d of %d elements differ in their bits' % (name, different, got.numel()))


def untouched(name, tensor):
    global failures
    if not bool(torch.isnan(tensor).all()):
        failures += 1
        print('FAIL %s: written beyond its end' % name)


def exact(value):
    """of a float argument"""
    return float(np.float32(value))


class Reference:
    """in float64; gradients by formula and, of finite logits, by autograd"""

    def __init__(self, x, vocabulary, inverse, targets):
        self.x, self.inverse = x[:targets.shape[0], :vocabulary].double(), exact(inverse)
        self.valid = (targets >= 0) & (targets < vocabulary)
        self.at = torch.where(self.valid, targets, 0)[:, None]
        z = self.x * self.inverse
        z[(z.amax(1) < -1e30) | torch.isinf(z.amax(1))] = math.nan
        self.logSumExp = torch.logsumexp(z, 1)
        logP = z - self.logSumExp[:, None]
        self.logprob = torch.where(self.valid, logP.gather(1, self.at)[:, 0], math.nan)
        self.p = torch.exp(logP)
        self.logP = torch.where(torch.isinf(logP), 0.0, logP)  # 0 log 0 = 0
        self.entropy = -(self.p * self.logP).sum(1)

    def formula(self, g, e):
        """the gradient, and the scale of what rounded probabilities change in it"""
        p, h = self.p, self.entropy[:, None]
        g, e = g.double()[:, None], (torch.zeros_like(g) if e is None else e).double()[:, None]
        want = -p * (g + torch.where(e == 0, 0.0, e * (self.logP + h)))
        want = want.scatter_add(1, self.at, torch.where(self.valid[:, None], g, 0.0)) * self.inverse
        scale = p * (g.abs() + e.abs() * ((self.logP + torch.nan_to_num(h)).abs() + 1)) * self.inverse
        masked = (g == 0) & (e == 0)
        return torch.where(masked, 0.0, want), torch.where(masked, 0.0, scale)

    def gradient(self, g, e):
        x = self.x.clone().requires_grad_()
        logP = torch.log_softmax(x * self.inverse, 1)
        loss = (logP.gather(1, self.at)[:, 0] * g.double()).sum()
        if e is not None:
            loss = loss - ((logP.exp() * logP).sum(1) * e.double()).sum()
        return torch.autograd.grad(loss, x)[0]


def logitsOf(rows, vocabulary, spread=3.0, extra=1):
    """NaN beyond the vocabulary"""
    x = poison(rows, up(vocabulary, 4) + 4 * extra)
    x[:, :vocabulary] = torch.randn(rows, vocabulary, device=DEVICE) * spread
    x[:, :vocabulary] += torch.randn(rows, 1, device=DEVICE) * 10
    return x


def gradients(rows):
    """for log-probs and entropies; some zero"""
    g, e = torch.randn(2, rows, device=DEVICE)
    for i in range(rows):
        if i % 4 == 1:
            g[i] = e[i] = 0
        elif i % 4 == 2:
            g[i] = 0
        elif i % 4 == 3:
            e[i] = 0
    return g, e


def checkForward(name, forward, reference):
    rows, vocabulary = forward.rows, forward.vocabulary
    size = torch.nan_to_num(reference.logSumExp, 0, 0, 0).abs()
    low = torch.nan_to_num(reference.logprob, 0, 0, 0).abs()
    within(name + ': logprob', forward.logprob[:rows], reference.logprob, 2e-6 + 3e-7 * low)
    within(name + ': logSumExp', forward.logSumExp[:rows], reference.logSumExp, 2e-6 + 3e-7 * size)
    within(name + ': entropy', forward.entropy[:rows], reference.entropy, 5e-6)
    for what, t in forward.results()[:3]:
        untouched(name + ' ' + what, t[rows:])
    if forward.p is not None:
        p = torch.nan_to_num(reference.p)
        # half a unit of bfloat16's last place, and float32's rounding of exponents up to log2 p and logSumExp
        slack = p * (2.0 ** -8 + 1e-6 + 4e-7 * (reference.logP.abs() + size[:, None])) + 1.2e-38
        within(name + ': p', forward.p[:rows, :vocabulary], reference.p, slack)
        untouched(name + ' p', forward.p[rows:])
        untouched(name + ' p', forward.p[:, up(vocabulary, 8):])


def checkBackward(name, x, forward, reference, targets, g, e, inverse, autograd=True):
    rows, vocabulary = forward.rows, forward.vocabulary
    want, doubt = reference.formula(g, e)
    if autograd:  # of the reference itself
        within(name + ': formula', reference.gradient(g, e), want, 1e-10 + 1e-9 * doubt)
    rounding = want.nan_to_num().abs() * 2.0 ** -8 + 1e-37
    atTarget = torch.zeros_like(want).scatter_(1, reference.at, 1.0) * reference.valid[:, None]
    small = reference.inverse * (g.abs() + (0 if e is None else e.abs())).double()[:, None] * 8e-6
    own = doubt.nan_to_num() * (1e-5 + 1e-6 * reference.logSumExp.nan_to_num(0, 0, 0).abs()[:, None])
    # at the target, p comes from a log-prob with its error; elsewhere from p, rounded (2^-8 with a slope of the logarithm)
    exactTolerance = rounding + own + atTarget * small
    roundedTolerance = exactTolerance + (1 - atTarget) * doubt.nan_to_num() * 2.0 ** -7
    fromP = backward(forward, targets, g, e, inverse)
    within(name + ': gradient', fromP[:rows, :vocabulary], want, roundedTolerance)
    fromLogits = backward(forward, targets, g, e, inverse, fromLogits=x)
    within(name + ': gradient from logits', fromLogits[:rows, :vocabulary], want, exactTolerance)
    for what, out in (('gradient', fromP), ('gradient from logits', fromLogits)):
        untouched(name + ' ' + what, out[rows:])
        untouched(name + ' ' + what, out[:, up(vocabulary, 8):])
        masked = torch.nonzero((g == 0) & ((e == 0) if e is not None else torch.ones_like(g).bool()))[:, 0]
        assert not out[masked, :vocabulary].any(), name + ': masked rows are not zero'
    # the same rule with the same rounded p, in float64: what the kernel itself adds
    p = forward.p[:rows, :vocabulary].double()
    eWide = torch.zeros_like(g).double()[:, None] if e is None else e.double()[:, None]
    h = forward.entropy[:rows].double()[:, None]
    term = g.double()[:, None] + torch.where(eWide == 0, 0.0, eWide * (torch.log(p.clamp(min=1.2e-38)) + h))
    ofP = torch.where((g.double()[:, None] == 0) & (eWide == 0), 0.0, -p * term * reference.inverse)
    ofP = torch.where(atTarget > 0, fromP[:rows, :vocabulary].double(), ofP)
    within(name + ': gradient of rounded p', fromP[:rows, :vocabulary], ofP, ofP.nan_to_num().abs() * 2.0 ** -8 + own + 1e-37)
    # bits: a second run, and in place
    same(name + ': gradient again', backward(forward, targets, g, e, inverse)[:rows, :vocabulary], fromP[:rows, :vocabulary])
    same(name + ': from logits again', backward(forward, targets, g, e, inverse, fromLogits=x)[:rows, :vocabulary],
         fromLogits[:rows, :vocabulary])
    kept = forward.p.clone()
    inPlace = backward(forward, targets, g, e, inverse, inPlace=True)
    same(name + ': gradient in place', inPlace[:rows, :vocabulary], fromP[:rows, :vocabulary])
    forward.p.copy_(kept)
    if e is None:  # the rows' factors apart
        launch(kernel('subtractTargets'), (-(-rows // 256),), 256,
               (forward.p, np.int64(forward.pStride), vocabulary, targets, forward.logprob, rows))
        factored = -reference.inverse * g.double()[:, None] * forward.p[:rows, :vocabulary].double()
        masked = (g == 0)[:, None].expand_as(factored)
        within(name + ': gradient by factors', torch.where(masked, 0.0, factored), want, roundedTolerance)
        forward.p.copy_(kept)


def testShapes():
    sizes = [(1, 3), (2, 5), (3, 1), (7, 4), (8, 4), (1000, 9), (1003, 9), (4097, 7), (32000, 12), (50257, 9), (128256, 5), (151936, 9)]
    sizes += [(151937, 6), (262144, 5)] if GPU else []
    for vocabulary, rows in sizes if GPU else [(v, min(r, 3 if v > 20000 else 5)) for v, r in sizes]:
        for k, inverse in enumerate((1.0, 1 / 0.7, 0.5)):
            if k == 2 and vocabulary > 40000 or k == 1 and vocabulary > 130000 and not GPU:
                continue
            name = 'V=%d R=%d 1/T=%.2f CTAS=%d' % (vocabulary, rows, inverse, ctasOf(vocabulary))
            x = logitsOf(rows, vocabulary)
            targets = torch.randint(vocabulary, (rows,), device=DEVICE)
            targets[-1] = x[-1, :vocabulary].argmax()
            if rows > 4:
                targets[1], targets[2] = 0, vocabulary - 1
                x[4, targets[4]] += 30  # p next to 1
            reference = Reference(x, vocabulary, inverse, targets)
            forward = Forward(x, vocabulary, inverse, targets)
            checkForward(name, forward, reference)
            g, e = gradients(rows)
            checkBackward(name, x, forward, reference, targets, g, e, inverse)
            checkBackward(name + ' no entropy', x, forward, reference, targets, g, None, inverse)
    report('shapes')


def testScaledRows():
    for rows, width in ((1, 8), (3, 896), (257, 1024), (1000, 4096), (3, 8200)):
        x, by = torch.randn(rows, width, device=DEVICE).to(BF16), gradients(rows)[0]
        x[by == 0] = math.nan
        want = torch.where((by == 0)[:, None], 0.0, -0.7 * by.double()[:, None] * x.double())
        out = poison(rows + 1, width, dtype=BF16)
        for target in (out, x):
            launch(kernel('scaleRows'), (-(-rows * width // 2048),), 256, (x, by, -0.7, target, width, rows))
            within('scaled rows %d x %d: scaled rows' % (rows, width), target[:rows], want, want.abs() * 2.0 ** -8 + 1e-37)
        untouched('scaled rows', out[rows:])
    report('scaled rows')


def testSpecial():
    for vocabulary in (515, 5003) if GPU else (515,):
        for ctas in (1, 8):
            for withP in (True, False):
                rows = 14
                name = 'special V=%d CTAS=%d p=%d' % (vocabulary, ctas, withP)
                x = logitsOf(rows, vocabulary)
                targets = torch.randint(vocabulary - 1, (rows,), device=DEVICE)
                v = x[:, :vocabulary]
                v[0, vocabulary - 1] = math.nan
                v[1, 3] = math.inf
                v[2] = -math.inf
                v[3, ::2] = -math.inf
                targets[3] = 1
                v[4, ::3] = -math.inf
                targets[4] = 3
                targets[5], targets[6], targets[7] = -100, vocabulary, -1
                v[8] *= 1e3
                v[9] = 0
                v[9, 7] = 100
                targets[9] = 7
                v[10] = 5
                v[11, :-1] = -math.inf
                targets[11] = vocabulary - 1
                v[12, : vocabulary // 2] = math.nan
                v[13] = -2e30
                reference = Reference(x, vocabulary, 1.25, targets)
                forward = Forward(x, vocabulary, 1.25, targets, ctas=ctas, withP=withP, clusters=3)
                checkForward(name, forward, reference)
                if withP:
                    g, e = gradients(rows)
                    e[4] = 0  # its log-prob is -infinity
                    checkBackward(name, x, forward, reference, targets, g, e, 1.25, autograd=False)
                    out = backward(forward, targets, torch.zeros_like(g), torch.zeros_like(g), 1.25)
                    within(name + ': masked', out[:rows, :vocabulary], torch.zeros_like(v), 1e-30)
    report('special values')


def testBits():
    """Neither the grid, nor what is kept, nor the neighbours change a row's bits."""
    for vocabulary, ctas, rows in ((40003, 2, 11), (151936, 8, 11), (9001, 8, 7), (20000, 4, 13)) if GPU else ((9001, 8, 5), (20000, 4, 5), (40003, 2, 3)):
        name = 'bits V=%d CTAS=%d' % (vocabulary, ctas)
        x = logitsOf(rows, vocabulary)
        targets = torch.randint(vocabulary, (rows,), device=DEVICE)
        first = Forward(x, vocabulary, 1.1, targets, ctas=ctas)
        checkForward(name, first, Reference(x, vocabulary, 1.1, targets))
        full = min(KEPT, width(vocabulary, ctas))
        others = [dict(), dict(clusters=1), dict(clusters=2), dict(clusters=rows), dict(clusters=rows + 3), dict(retained=0), dict(retained=full // 2),
                  dict(retained=full // 3, clusters=1), dict(retained=min(KEPT, full + 5)), dict(retained=1024, clusters=2)]
        if not GPU:
            others = others[1::2]
        for other in others:
            again = Forward(x, vocabulary, 1.1, targets, ctas=ctas, **other)
            for (what, a), (_, b) in zip(first.results(), again.results()):
                same('%s %s %s' % (name, other, what), b[:rows], a[:rows])
        without = Forward(x, vocabulary, 1.1, targets, ctas=ctas, withP=False, clusters=2)
        for (what, a), (_, b) in zip(first.results(), without.results()):
            same('%s without p %s' % (name, what), b[:rows], a[:rows])
        for row in (0, rows - 1):
            alone = Forward(x[row:row + 1], vocabulary, 1.1, targets[row:row + 1], ctas=ctas)
            for (what, a), (_, b) in zip(first.results(), alone.results()):
                same('%s alone %s' % (name, what), b[:1], a[row:row + 1])
    report('bits')


def testMany():
    """many rows, often: races would show"""
    vocabulary, rows = (151936, 1003) if GPU else (2000, 40)
    x = logitsOf(rows, vocabulary)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    first = Forward(x, vocabulary, 1.0, targets)
    for clusters in (None, rows, 48, 16) if GPU else (3, 7):
        for repeat in range(3 if GPU else 1):
            again = Forward(x, vocabulary, 1.0, targets, clusters=clusters)
            for (what, a), (_, b) in zip(first.results(), again.results()):
                same('many rows, clusters=%s: %s' % (clusters, what), b[:rows], a[:rows])
            del again
    wanted = torch.stack([torch.log_softmax(x[i, :vocabulary].double(), 0)[targets[i]] for i in range(rows)])
    within('many rows: logprob', first.logprob[:rows], wanted, 1e-5)
    report('many rows')


def report(test):
    if GPU:
        torch.cuda.synchronize()
    print('%s: %d failures so far; largest differences in units of the tolerance: %s' % (
        test, failures, ', '.join('%s %.2g' % i for i in worst.items())), flush=True)


# ---- times -----------------------------------------------------------------------------------------------------------------


def measure(run, repeats=9, calls=3):
    """median microseconds of a call; what it moves is larger than the cache"""
    run()
    times = []
    for repeat in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200000)
        start.record()
        for call in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return sorted(times)[len(times) // 2]


def benchmark():
    big = torch.empty(1 << 31, device='cuda', dtype=torch.uint8)
    other = torch.empty_like(big)
    copy = 2 * big.numel() / measure(lambda: other.copy_(big)) / 1e3
    del big, other
    print('device copy of 2 GiB: %.0f GB/s' % copy)
    for name in ('logprobForward', 'logprobBackward', 'logprobBackwardFromLogits'):
        f = kernel(name)
        print('%s: %d registers, %d bytes spilled' % (name, f.num_regs, f.local_size_bytes))
    print('%-46s %8s %6s %10s %8s %6s' % ('', 'V', 'rows', 'us', 'GB/s', '% copy'))

    def line(name, vocabulary, rows, bytes, run, **more):
        t = measure(run, **more)
        speed = bytes * vocabulary * rows / t / 1e3
        print('%-46s %8d %6d %10.1f %8.0f %6.1f' % (name, vocabulary, rows, t, speed, 100 * speed / copy), flush=True)

    for vocabulary, rows in ((151936, 8192), (151936, 1024), (50272, 4096), (32000, 4096), (128256, 4096), (262144, 2048)):
        x = torch.randn(rows, up(vocabulary, 4), device='cuda')
        targets = torch.randint(vocabulary, (rows,), device='cuda')
        g, e = torch.randn(2, rows, device='cuda')
        some = g * (torch.rand(rows, device='cuda') < 0.5)
        forward = Forward(x, vocabulary, 1.25, targets, pStride=up(vocabulary, 8), pad=0)
        main = vocabulary == 151936
        line('forward', vocabulary, rows, 6, forward.run)
        if main:
            for share in (1, 2, 8, 16, 64):
                f = Forward(x, vocabulary, 1.25, targets, pStride=up(vocabulary, 8), pad=0, clusters=-(-rows // share))
                line('forward, %d rows for a cluster' % share, vocabulary, rows, 6, f.run, repeats=5)
            for clusters in (40, 48, 49):
                f = Forward(x, vocabulary, 1.25, targets, pStride=up(vocabulary, 8), pad=0, clusters=clusters)
                line('forward, %d clusters' % clusters, vocabulary, rows, 6, f.run, repeats=5)
            f = Forward(x, vocabulary, 1.25, targets, pStride=up(vocabulary, 8), pad=0, retained=0)
            line('forward, nothing kept', vocabulary, rows, 6, f.run, repeats=5)
            f = Forward(x, vocabulary, 1.25, targets, withP=False)
            line('forward without p', vocabulary, rows, 4, f.run)
            del f
        stride, y = np.int64(forward.pStride), poison(rows, forward.pStride, dtype=BF16)

        def step(p, out, a, b):
            launch(kernel('logprobBackward'), (-(-vocabulary // 8192), rows), 256, (
                p, out, stride, vocabulary, targets, forward.logprob, a, b, forward.entropy, 1.25))

        def fromLogits(a, b):
            launch(kernel('logprobBackwardFromLogits'), (-(-vocabulary // 4096), rows), 256, (
                x, np.int64(x.stride(0)), forward.logSumExp, y, stride, vocabulary, targets, forward.logprob, a, b, forward.entropy, 1.25))

        line('backward', vocabulary, rows, 4, lambda: step(forward.p, y, g, e))
        if main:
            line('backward, no entropy', vocabulary, rows, 4, lambda: step(forward.p, y, g, None))
            line('backward, half of the rows masked', vocabulary, rows, 3, lambda: step(forward.p, y, some, None))
            line('backward in place', vocabulary, rows, 4, lambda: step(y, y, g, e))
        line('backward from logits', vocabulary, rows, 6, lambda: fromLogits(g, e))
        if main and rows < 8192:
            inverse = 1 / 1.25

            def compose():
                z = x / inverse
                lse = torch.logsumexp(z, 1)
                logprob = z.gather(1, targets[:, None])[:, 0] - lse
                p = (z - lse[:, None]).exp_()
                return logprob, lse - (p[:, None] @ z[:, :, None])[:, 0, 0], p.to(BF16)

            def composeBackward():
                d = x / inverse - forward.logSumExp[:, None]
                p = d.exp()
                d.add_(forward.entropy[:, None]).mul_(e[:, None]).add_(g[:, None]).mul_(p).mul_(-1)
                d.scatter_add_(1, targets[:, None], g[:, None]).div_(inverse)
                return d.to(BF16)

            line('libtorch, forward with p', vocabulary, rows, 6, compose, repeats=5)
            line('libtorch, backward from logits', vocabulary, rows, 6, composeBackward, repeats=5)
        del x, forward, y
        torch.cuda.empty_cache()


for test in (testShapes, testScaledRows, testSpecial, testBits, testMany):
    test()
print('%d failures' % failures, flush=True)
if GPU:
    benchmark()
sys.exit(1 if failures else 0)
