"""usage: check_few_rows.py FOLDER [tune]      checks and times few_rows.cu (FOLDER holds it and common.cuh)

Checks: against float64, bits between ROWS and between grids, padding, columns beyond n, chains of dependent launches.
Times: microseconds and GB/s of weights of the products of four models, in captured graphs that go round over more than 200 MB of
weights; `dependent` is with -DDEPENDENT_LAUNCH=1 and the launch attribute, `torch` is torch.mm in a captured graph (without the
activation, for gate-up). `tune` times variants instead (microseconds; warps N: the grid's formula with N in place of 24).
"""
import ctypes, math, os, sys, time
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1]
TUNE = len(sys.argv) > 2 and sys.argv[2] == 'tune'
EMULATED = getattr(cupy, 'EMULATED', False)  # a stand-in without a GPU: smaller shapes, no times
DEVICE = 'cpu' if EMULATED else 'cuda'
BF16 = torch.bfloat16
SMS = 132 if EMULATED else torch.cuda.get_device_properties(0).multi_processor_count
torch.manual_seed(1)
failures = 0
modules = {}


def check(ok, what):
    global failures
    if not ok:
        failures += 1
        print('FAIL', what, flush=True)


def source():
    common = open(os.path.join(FOLDER, 'common.cuh')).read()
    return common + '\n//CUT\n' + open(os.path.join(FOLDER, 'few_rows.cu')).read().replace('#include "common.cuh"', '')


def kernel(name, **macros):
    key = tuple(sorted(macros.items()))
    if key not in modules:
        modules[key] = cupy.RawModule(code=source(), backend='nvrtc', options=('--std=c++17',) + tuple('-D%s=%s' % i for i in key))
    return modules[key].get_function(name)


def shape(name, k, n, share=24):
    """block and grid, by the formulas of few_rows.cu"""
    step = 32 * 8 // (2 if name == 'multiplyGated' else 1)
    steps = -(-k // step)
    warps = -(-steps // -(-steps // 12))
    tiles = -(-n // 8)
    resident = SMS * max(1, share // warps)
    return 32 * warps, -(-tiles // -(-tiles // resident))


def arguments(name, x, weight, out, k, n):
    stride = out.stride(0)
    norm = [np.uint64(0), np.float32(0)]  # none
    last = {'multiply': [np.int32(stride)] + norm, 'multiplyToFloat': [np.int64(stride)], 'multiplyGated': norm}[name]
    return tuple([np.uint64(x.data_ptr()), np.uint64(weight.data_ptr()), np.uint64(out.data_ptr()), np.int32(k), np.int32(n)] + last
                 + [np.zeros(4, np.uint64)])  # nothing is fetched for a product that follows


def run(name, rows, x, weight, out, k, n, grid=None):
    block, blocks = shape(name, k, n)
    kernel(name, ROWS=rows)((grid or blocks,), (block,), arguments(name, x, weight, out, k, n))


# ---- launches with the attribute of programmatic stream serialization ----

class Attribute(ctypes.Structure):
    _fields_ = [('id', ctypes.c_int), ('pad', ctypes.c_int), ('value', ctypes.c_int), ('rest', ctypes.c_char * 60)]


class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ('gx', 'gy', 'gz', 'bx', 'by', 'bz', 'shared')] + [
        ('stream', ctypes.c_void_p), ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint)]


def launchDependent(f, grid, block, args, stream):
    if not hasattr(launchDependent, 'library'):
        launchDependent.library = ctypes.CDLL('libcuda.so.1')
    attribute = Attribute(6, 0, 1)
    config = Config(grid, 1, 1, block, 1, 1, 0, stream, ctypes.addressof(attribute), 1)
    held = [ctypes.create_string_buffer(a.tobytes(), a.nbytes) for a in args]
    pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(h) for h in held])
    rc = launchDependent.library.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(f.kernel.ptr), pointers, None)
    if rc != 0:
        raise RuntimeError('cuLaunchKernelEx: %d' % rc)


def capture(launches, dependent):
    """A graph of (kernel, grid, block, arguments), in order; all but the first depend programmatically if `dependent`."""
    stream = cupy.cuda.Stream(non_blocking=True)
    for launch in launches:
        launch[0].kernel  # loads the module, which a capture had better not
    torch.cuda.synchronize()
    with stream:
        stream.begin_capture()
        for i, (f, grid, block, args) in enumerate(launches):
            if dependent and i > 0:
                launchDependent(f, grid, block, args, stream.ptr)
            else:
                f((grid,), (block,), args)
        graph = stream.end_capture()
    return stream, graph


def timeGraph(stream, launch, count, repeats=7, graphs=5):
    """microseconds per launch within the graph; the host is ahead of the device all the time"""
    times = []
    for i in range(repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        for j in range(2):
            launch()
        begin.record(stream)
        for j in range(graphs):
            launch()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / count / graphs)
    return sorted(times)[len(times) // 2]


# ---- checks ----

def random(*size, scale=1.0):
    return (torch.randn(size, device=DEVICE) * scale).to(BF16)


def followedByNan(*size, scale=1.0):
    """a matrix in memory that goes on with NaN, which reads beyond its end would bring in"""
    count = math.prod(size)
    memory = torch.full((count + 4096,), math.nan, device=DEVICE, dtype=BF16)
    memory[:count] = random(count, scale=scale)
    return memory[:count].view(*size)


def same(a, b):
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def reference(name, x, weight, n):
    y = x.double() @ weight.double().t()
    if name != 'multiplyGated':
        return y
    gate, up = y[:, :n].to(BF16), y[:, n:].to(BF16)
    return (torch.nn.functional.silu(gate.double()).to(BF16).double() * up.double()).to(BF16).double()


worst = {}


def testProduct(name, k, n):
    dtype = torch.float32 if name == 'multiplyToFloat' else BF16
    pad = 0 if name == 'multiplyGated' else 3
    weight = followedByNan(2 * n if name == 'multiplyGated' else n, k, scale=1 / math.sqrt(k))
    x = followedByNan(4, k)
    want = reference(name, x, weight, n)
    results = {}

    def product(rows, x, grid=None):
        out = torch.full((rows, n + pad), math.nan, device=DEVICE, dtype=dtype)
        run(name, rows, x, weight, out, k, n, grid)
        check(bool(torch.isnan(out[:, n:]).all()), '%s k=%d n=%d: columns beyond n written' % (name, k, n))
        return out[:, :n]

    four = product(4, x)
    difference = (four.double() - want).abs()
    # the gates' roundings may fall to the other side: two steps of bfloat16, of the larger factor's
    ok = bool((difference <= 1e-2 * want.abs().max()).all())
    error = (difference.max() / want.abs().max()).item()
    worst[name] = max(worst.get(name, 0.0), error if not math.isnan(error) else math.inf)
    check(ok, '%s k=%d n=%d: largest relative difference %.3g' % (name, k, n, error))
    for i in range(4):
        check(same(product(1, x[i].clone()), four[i:i + 1]), '%s k=%d n=%d: bits of ROWS 1, row %d' % (name, k, n, i))
    for i in (0, 2):
        check(same(product(2, x[i:i + 2].clone()), four[i:i + 2]), '%s k=%d n=%d: bits of ROWS 2, row %d' % (name, k, n, i))
    check(same(product(4, x, grid=max(1, shape(name, k, n)[1] // 3)), four), '%s k=%d n=%d: bits of another grid' % (name, k, n))
    check(same(product(4, x, grid=shape(name, k, n)[1] + 5), four), '%s k=%d n=%d: bits of a larger grid' % (name, k, n))
    padded = x.clone()
    padded[3] = math.nan
    three = product(4, padded)
    check(same(three[:3], four[:3]), '%s k=%d n=%d: a padding row of NaN changes others' % (name, k, n))


def testChain():
    """Fifty products, each of the one before, in two buffers by turns: programmatic dependence must not show."""
    k = 1024
    weights = [random(k, k, scale=1 / 32) for i in range(25)]
    for rows in (1, 4):
        results = []
        for dependent in (False, True):
            buffers = [random(rows, k), torch.zeros(rows, k, device=DEVICE, dtype=BF16)]
            buffers[0].copy_(torch.sin(torch.arange(rows * k, device=DEVICE)).view(rows, k))
            block, grid = shape('multiply', k, k)
            f = kernel('multiply', ROWS=rows, **({'DEPENDENT_LAUNCH': 1} if dependent else {}))
            try:
                stream, graph = capture([(f, grid, block, arguments('multiply', buffers[i % 2], weights[i % 25],
                                                                    buffers[1 - i % 2], k, k)) for i in range(50)], dependent)
            except Exception as e:
                print('dependent launches cannot be captured here:', repr(e))
                return False
            for i in range(20):
                graph.launch(stream)
            stream.synchronize()
            results.append(buffers[0].clone())
        check(bool(torch.isfinite(results[0]).all()) and results[0].abs().max().item() > 1e-6, 'chain: values degenerate')
        check(same(*results), 'chain of dependent launches, rows %d: bits differ' % rows)
    return True


def test():
    if EMULATED:
        shapes = [('multiply', 64, 9), ('multiply', 896, 17), ('multiply', 1024, 24), ('multiply', 3080, 13), ('multiply', 8, 5),
                  ('multiplyGated', 896, 11), ('multiplyGated', 1536, 16), ('multiplyGated', 4872, 9), ('multiplyGated', 40, 1),
                  ('multiplyToFloat', 1024, 33), ('multiplyToFloat', 4864, 10)]
    else:
        ks = (8, 40, 896, 1024, 1536, 2048, 3072, 3080, 4096, 4864, 8960, 12288)
        shapes = [('multiply', k, n) for k in ks for n in (1, 1025, 1152, 4096, 6151)]
        shapes += [('multiplyGated', k, n) for k in ks for n in (3, 1029, 3072, 4864)]
        shapes += [('multiplyToFloat', k, n) for k in (896, 1024, 4096) for n in (151936, 50257)]
    for s in shapes:
        testProduct(*s)
    print('%d products, largest differences relative to the largest value: %s' % (
        len(shapes), {k: '%.2g' % v for k, v in worst.items()}), flush=True)


# ---- times ----

MODELS = {'Qwen3-0.6B': (1024, 4096, 2048, 3072), 'Qwen2.5-0.5B': (896, 1152, 896, 4864),
          'Qwen2.5-1.5B': (1536, 2048, 1536, 8960), 'Qwen3-8B': (4096, 6144, 4096, 12288)}
VOCABULARY = 151936


def products(hidden, qkv, attended, inner):
    return [('qkv', 'multiply', hidden, qkv), ('o', 'multiply', attended, hidden), ('gate-up', 'multiplyGated', hidden, inner),
            ('down', 'multiply', inner, hidden), ('head', 'multiplyToFloat', hidden, VOCABULARY)]


class Times:
    def __init__(self):
        self.memory = torch.empty(1300 * 1000 * 1000, device=DEVICE, dtype=BF16).normal_(0, 0.02)

    def weights(self, count, k):
        """as many matrices as fill 200 MB, two at least"""
        copies = max(2, -(-100_000_000 // (count * k)))
        size = count * k
        if copies * size > self.memory.numel():
            copies = self.memory.numel() // size
        return [self.memory[i * size:(i + 1) * size].view(count, k) for i in range(copies)]

    def ours(self, name, rows, k, n, dependent, share=24, **macros):
        weights = self.weights(2 * n if name == 'multiplyGated' else n, k)
        x = random(rows, k)
        out = torch.empty(rows, n, device=DEVICE, dtype=torch.float32 if name == 'multiplyToFloat' else BF16)
        if dependent:
            macros['DEPENDENT_LAUNCH'] = 1
        f = kernel(name, ROWS=rows, **macros)
        block, grid = shape(name, k, n, share)
        count = max(50 if n < 100_000 else 10, len(weights))
        stream, graph = capture([(f, grid, block, arguments(name, x, weights[i % len(weights)], out, k, n)) for i in range(count)],
                                dependent)
        return timeGraph(stream, lambda: graph.launch(stream), count)

    def torchs(self, rows, k, count):
        weights = self.weights(count, k)
        x, out = random(rows, k), torch.empty(rows, count, device=DEVICE, dtype=BF16)
        launches = max(50 if count < 100_000 else 10, len(weights))
        torch.mm(x, weights[0].t(), out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                torch.mm(x, weights[i % len(weights)].t(), out=out)
        stream = torch.cuda.current_stream()
        return timeGraph(cupy.cuda.ExternalStream(stream.cuda_stream), graph.replay, launches)

    def copy(self):
        half = self.memory.numel() // 2
        a, b = self.memory[:half], torch.empty(half, device=DEVICE, dtype=BF16)
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        print('device copy: %.0f GB/s read and written; ' % (4 * half / timeGraph(stream, lambda: b.copy_(a), 1) / 1e3), end='')
        n, k = 600_000, 1024
        block, grid = shape('multiplyToFloat', k, n)
        args = arguments('multiplyToFloat', random(1, k), self.memory, b.view(torch.float32)[:n].view(1, n), k, n)
        stream, graph = capture([(kernel('multiplyToFloat', ROWS=1), grid, block, args)], False)
        t = timeGraph(stream, lambda: graph.launch(stream), 1)
        print('one product of %d rows of %d: %.0f GB/s' % (n, k, 2 * n * k / t / 1e3), flush=True)

    def table(self, dependentWorks):
        print('%-13s %-8s %6s %6s %4s %10s %7s %10s %7s %8s %7s' % (
            'model', 'product', 'k', 'n', 'rows', 'us', 'GB/s', 'dependent', 'GB/s', 'torch', 'GB/s'))
        for rows in (1, 4):
            for model, dimensions in MODELS.items():
                totals = [0.0] * 4
                for label, name, k, n in products(*dimensions):
                    count = 2 * n if name == 'multiplyGated' else n
                    bytes = 2 * count * k
                    t = [self.ours(name, rows, k, n, False), self.ours(name, rows, k, n, True) if dependentWorks else math.nan,
                         self.torchs(rows, k, count)]
                    if label != 'head':
                        totals = [a + b for a, b in zip(totals, t + [bytes / 4.3e6])]
                    print('%-13s %-8s %6d %6d %4d %10.2f %7.0f %10.2f %7.0f %8.2f %7.0f' % (
                        (model, label, k, n, rows) + tuple(v for u in t for v in (u, bytes / u / 1e3))), flush=True)
                print('%-13s layer %13s %9d %10.2f %7s %10.2f %7s %8.2f    bytes at 4.3 TB/s: %.2f' % (
                    model, '', rows, totals[0], '', totals[1], '', totals[2], totals[3]), flush=True)

    def layers(self, dependentWorks):
        """28 layers of Qwen3-0.6B, each product reading what the one before wrote, without all that lies between"""
        hidden, qkv, attended, inner = MODELS['Qwen3-0.6B']
        for rows in (1, 4):
            for dependent in (False, True) if dependentWorks else (False,):
                macros = {'DEPENDENT_LAUNCH': 1} if dependent else {}
                wide = [torch.zeros(rows * size, device=DEVICE, dtype=BF16) for size in (hidden, qkv, hidden, inner)]
                launches, at = [], 0
                for layer in range(28):
                    for i, (label, name, k, n) in enumerate(products(hidden, qkv, attended, inner)[:4]):
                        size = (2 if name == 'multiplyGated' else 1) * n * k
                        block, grid = shape(name, k, n)
                        launches.append((kernel(name, ROWS=rows, **macros), grid, block, arguments(
                            name, wide[i], self.memory[at:at + size], wide[(i + 1) % 4][:rows * n].view(rows, n), k, n)))
                        at += size
                stream, graph = capture(launches, dependent)
                print('Qwen3-0.6B, rows %d: %.2f us for the four products of a layer in turn%s' % (
                    rows, timeGraph(stream, lambda: graph.launch(stream), 28), ', dependent' if dependent else ''), flush=True)

    def tune(self):
        variants = [('default', {}), ('L2 64', dict(L2_PREFETCH=64)), ('L2 256', dict(L2_PREFETCH=256)),
                    ('warps 16', dict(share=16)), ('warps 12', dict(share=12)), ('dependent', dict(DEPENDENT_LAUNCH=1)), ('dependent 256', dict(DEPENDENT_LAUNCH=1, L2_PREFETCH=256))]
        print('%-20s' % '' + ''.join('%16s' % v for v, m in variants))
        for rows in (1, 4):
            for model, dimensions in MODELS.items():
                for label, name, k, n in products(*dimensions):
                    line = '%-13s %-8s %d' % (model, label, rows)
                    for v, macros in variants:
                        macros = dict(macros)
                        dependent = macros.pop('DEPENDENT_LAUNCH', 0) == 1
                        line += '%16.2f' % self.ours(name, rows, k, n, dependent, **macros)
                    print(line, flush=True)


started = time.time()
works = True
if not TUNE:
    test()
    works = not EMULATED and testChain()
    print('%d failures, %.0f s' % (failures, time.time() - started), flush=True)
if not EMULATED:
    times = Times()
    times.copy()
    if TUNE:
        times.tune()
    else:
        times.layers(works)
        times.table(works)
    print('%.0f s in all' % (time.time() - started))
sys.exit(1 if failures else 0)
