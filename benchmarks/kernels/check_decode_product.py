"""usage: check_decode_product.py FOLDER [rows=16,64,...]      checks and times decode_product.cu (FOLDER holds it and the headers)

First every feature of the kernel (two and three warpgroups, gates, float output, SPLIT), with bounded waits and on inputs that show
which element went where: if one fails, nothing else is tried.
Checks: against float64; bits between ROWS, runs and neighbours; padding; columns beyond n; a chain of dependent launches.
Times, for the given rows up to 256 (64,128,192,256): products of four models in captured graphs with programmatic dependent launches
that go round over more than 200 MB of weights, torch.mm beside them (without the activation, for gate-up); then whole layers.
A variant is written TILExROWS/SPLIT:STAGES.
"""
import collections, concurrent.futures, ctypes, functools, glob, math, os, sys, time
import torch

FOLDER = sys.argv[1]
SIZES = [int(rows) for rows in sys.argv[2].removeprefix('rows=').split(',')] if len(sys.argv) > 2 else [64, 128, 192, 256]
DEVICE, BF16 = 'cuda', torch.bfloat16
SMS = torch.cuda.get_device_properties(0).multi_processor_count
SHARED = 232448  # bytes of shared memory that a CTA may have
ROWS = (16, 32, 64, 96, 128, 192, 256)
NAMES = ('multiply', 'multiplyToFloat', 'multiplyGated')
# A gate at a rounding boundary may round to the other side than the reference's, and its silu and out with it: steps of bfloat16 that
# make up to 2e-2 of the value where the gate is positive.
TOLERANCES = {'multiply': 1e-2, 'multiplyToFloat': 1e-4, 'multiplyGated': 2e-2}
torch.manual_seed(1)
failures = 0


def check(ok, what):
    global failures
    if not ok:
        failures += 1
        print('FAIL', what, flush=True)
    return ok


# ---- variants, compilation, launches ----

class Variant(collections.namedtuple('Variant', 'tile rows split stages bounded')):
    def __str__(self):
        return '%dx%d/%d:%d' % self[:4]

    @property
    def threads(self):
        return 2 * self.tile + 128

    @property
    def shared(self):
        exchange = self.split * -(-self.rows // 8 // self.split) * 2 * self.tile * 16 if self.split > 1 else 0
        return 1024 + max(self.stages * (self.tile + self.rows) * 128, exchange) + self.tile // 64 * 2 * 4608


def variant(tile, rows, split=1, stages=None, bounded=False):
    """with as many stages as fit, at most 8"""
    return Variant(tile, rows, split, stages or min(8, (SHARED - 1024 - 256 - tile // 64 * 9216) // ((tile + rows) * 128)), bounded)


@functools.cache
def driver():
    torch.zeros(1, device=DEVICE)
    return ctypes.CDLL('libcuda.so.1')


@functools.cache
def nvrtc():
    places = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), 'nvidia', '*', 'lib')
    for name in ('libnvrtc-builtins.so.*', 'libnvrtc.so.*'):
        found = [f for f in sorted(glob.glob(os.path.join(places, name))) if '.alt.' not in f]
        library = ctypes.CDLL(found[-1] if found else 'libnvrtc.so', ctypes.RTLD_GLOBAL)
    return library


def require(code, what):
    if code != 0:
        raise RuntimeError('%s: CUDA error %d' % (what, code))


@functools.cache
def cubin(v):
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    read = lambda name: open(os.path.join(FOLDER, name), 'rb').read()
    headers = ('common.cuh', 'vectors.cuh', 'hopper.cuh')
    library.nvrtcCreateProgram(ctypes.byref(program), read('decode_product.cu'), b'decode_product.cu', len(headers),
                               (ctypes.c_char_p * len(headers))(*[read(name) for name in headers]),
                               (ctypes.c_char_p * len(headers))(*[name.encode() for name in headers]))
    options = ['--gpu-architecture=sm_90a', '--std=c++17', '-DTILE=%d' % v.tile, '-DROWS=%d' % v.rows, '-DSPLIT=%d' % v.split,
               '-DSTAGES=%d' % v.stages] + (['-DSPIN_LIMIT=100000'] if v.bounded else [])
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
    what = 'CUBIN' if code == 0 else 'ProgramLog'
    getattr(library, 'nvrtcGet%sSize' % what)(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(library, 'nvrtcGet' + what)(program, result)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if code != 0:
        raise RuntimeError('%s: %s' % (v, result.value.decode()))
    return result.raw


def prepare(variants):
    """compiles on all cores"""
    nvrtc()
    began, variants = time.time(), set(variants)
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool:
        list(pool.map(cubin, variants))
    print('%d variants compiled in %.1f s' % (len(variants), time.time() - began), flush=True)


@functools.cache
def module(v):
    loaded = ctypes.c_void_p()
    require(driver().cuModuleLoadData(ctypes.byref(loaded), cubin(v)), 'loading %s' % (v,))
    return loaded


@functools.cache
def function(v, name):
    f = ctypes.c_void_p()
    require(driver().cuModuleGetFunction(ctypes.byref(f), module(v), name.encode()), name)
    require(driver().cuFuncSetAttribute(f, 8, v.shared), 'shared memory of %s' % (v,))  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    return f


class Attribute(ctypes.Structure):
    _fields_ = [('id', ctypes.c_int), ('pad', ctypes.c_int), ('value', ctypes.c_int), ('rest', ctypes.c_char * 60)]


class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ('gx', 'gy', 'gz', 'bx', 'by', 'bz', 'shared')] + [
        ('stream', ctypes.c_void_p), ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint)]


@functools.cache
def resident(v, name):
    """how many CTAs of the variant the device holds at a time"""
    count = ctypes.c_int()
    require(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(count), function(v, name), v.threads, ctypes.c_size_t(v.shared)), 'occupancy of %s' % (v,))
    return SMS * count.value


def tilesOf(v, name, rows, n):
    return -(-n // (v.tile // 2 if name == 'multiplyGated' else v.tile)) * -(-rows // v.rows)


def gridOf(v, name, rows, n):
    tiles = tilesOf(v, name, rows, n)
    return tiles * v.split if v.split > 1 else -(-tiles // -(-tiles // resident(v, name)))


def tensorMap(address, sizes, strides, box):
    """sizes and box in elements, the innermost dimension first; strides in bytes, of all but the innermost"""
    memory = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(memory) + 63) // 64 * 64
    rank = len(sizes)
    require(driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), 9, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, 3, 2, 0), 'tensor map %s %s %s' % (sizes, strides, box))
    return ctypes.create_string_buffer(ctypes.string_at(at, 128), 128)


class Product:
    """a launch with everything it needs; x [at least rows][k], weight [n or 2 n][k], out [rows][...]"""

    def __init__(self, v, name, x, weight, out, rows, k, n):
        self.v, self.name, self.tensors, self.grid, self.function = v, name, (x, weight, out), gridOf(v, name, rows, n), function(v, name)
        if name == 'multiplyGated':
            weightMap = tensorMap(weight.data_ptr(), (k, 8, 2, n // 8), (2 * k, 2 * k * n, 16 * k), (64, 8, 2, v.tile // 16))
        else:
            weightMap = tensorMap(weight.data_ptr(), (k, n), (2 * k,), (64, v.tile))
        self.held = [tensorMap(x.data_ptr(), (k, x.shape[0]), (2 * k,), (64, v.rows)), weightMap, ctypes.c_uint64(out.data_ptr()),
                     ctypes.c_int32(rows), ctypes.c_int32(k), ctypes.c_int32(n),
                     (ctypes.c_int64 if name == 'multiplyToFloat' else ctypes.c_int32)(out.stride(0))]
        if name == 'multiplyGated':  # no norm
            self.held += [ctypes.c_uint64(0), ctypes.c_int32(0), ctypes.c_float(0)]
        self.held.append((ctypes.c_uint64 * 4)())  # nothing is fetched for a product that follows
        self.pointers = (ctypes.c_void_p * len(self.held))(*[ctypes.addressof(h) for h in self.held])

    def launch(self, dependent=False):
        attribute = Attribute(6, 0, 1)
        config = Config(self.grid, 1, 1, self.v.threads, 1, 1, self.v.shared, torch.cuda.current_stream().cuda_stream,
                        ctypes.addressof(attribute), 1 if dependent else 0)
        require(driver().cuLaunchKernelEx(ctypes.byref(config), self.function, self.pointers, None), 'launch of %s %s' % (self.name, self.v))


def capture(launches):
    """a graph of functions, each called with whether it may depend programmatically"""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i, launch in enumerate(launches):
            launch(i > 0)
    return graph


# ---- inputs and references ----

def random(*size, scale=1.0):
    return (torch.randn(size, device=DEVICE) * scale).to(BF16)


def followedByNan(rows, k, scale=1.0):
    """a matrix in memory that goes on with NaN, which reads beyond its end would bring in"""
    memory = torch.full((rows * k + 4096,), math.nan, device=DEVICE, dtype=BF16)
    memory[:rows * k] = random(rows * k, scale=scale)
    return memory[:rows * k].view(rows, k)


def weightOf(name, n, k):
    return followedByNan(2 * n if name == 'multiplyGated' else n, k, 1 / math.sqrt(k))


def outOf(name, rows, n, pad=8):
    return torch.full((rows, n + pad), math.nan, device=DEVICE, dtype=torch.float32 if name == 'multiplyToFloat' else BF16)


def same(a, b):
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def reference(name, x, weight, n):
    y = x.double() @ weight.double().t()
    if name != 'multiplyGated':
        return y
    gate, up = y[:, :n].to(BF16), y[:, n:].to(BF16)
    return (torch.nn.functional.silu(gate.double()).to(BF16).double() * up.double()).to(BF16).double()


def where(wrong):
    """a short description of which elements are wrong"""
    rows, columns = wrong.any(1).nonzero().flatten().tolist(), wrong.any(0).nonzero().flatten().tolist()
    short = lambda l: str(l) if len(l) < 12 else '%s ... %s (%d)' % (str(l[:8])[:-1], str(l[-3:])[1:], len(l))
    return '%d of %d wrong; rows %s; columns %s; rows mod 8 %s; columns mod 16 %s; columns / 64 %s' % (
        int(wrong.sum()), wrong.numel(), short(rows), short(columns), sorted({r % 8 for r in rows}), sorted({c % 16 for c in columns}),
        short(sorted({c // 64 for c in columns})))


worst = {}


def compare(label, name, got, want):
    """notes the difference relative to the largest value"""
    difference = (got.double() - want).abs() / want.abs().max()
    wrong = ~(difference <= TOLERANCES[name])
    if wrong.any():
        r, c = wrong.nonzero()[0].tolist()
        return check(False, '%s: %s; [%d][%d] is %.5g, not %.5g' % (label, where(wrong), r, c, got[r, c].item(), want[r, c].item()))
    worst[name] = max(worst.get(name, 0.0), difference.max().item())
    return True


# ---- every feature, simplest first ----

FEATURES = [('multiply', variant(64, 64, bounded=True)), ('multiply', variant(128, 256, bounded=True)),
            ('multiplyToFloat', variant(64, 64, bounded=True)), ('multiplyGated', variant(128, 64, bounded=True)),
            ('multiply', variant(192, 256, bounded=True)), ('multiply', variant(64, 64, 4, bounded=True))]


def launchBounded(label, product):
    """whether no wait was given up"""
    product.launch()
    torch.cuda.synchronize()
    address, size, values = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_uint32 * 4)()
    require(driver().cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module(product.v), b'stuck'), 'stuck')
    require(driver().cuMemcpyDtoH_v2(values, address, 16), 'stuck')
    stages = product.v.stages
    return check(values[0] == 0, '%s: CTA %d, thread %d gave up barrier %s of stage %d, parity %d' % (
        label, values[1], values[2], 'full' if values[3] // 2 < stages else 'empty', values[3] // 2 % stages, values[3] % 2))


def oneHot(label, v, name, rows, k, n):
    """x has a single one in each row, so that out names the element of weight (column, k) that came there"""
    place = (torch.arange(rows, device=DEVICE) * 37 + 11) % k
    x = torch.nn.functional.one_hot(place, k).to(BF16)
    column, element = torch.arange(n, device=DEVICE).view(n, 1).expand(n, k), torch.arange(k, device=DEVICE).expand(n, k)
    digits = []
    for values in (column % 256, column // 256, element % 256, element // 256):
        out = outOf(name, rows, n)
        if not launchBounded(label, Product(v, name, x, values.to(BF16).contiguous(), out, rows, k, n)):
            return False
        digits.append(out[:, :n].double())
    columns, elements = digits[0] + 256 * digits[1], digits[2] + 256 * digits[3]
    wrong = (columns != torch.arange(n, device=DEVICE)) | (elements != place.view(rows, 1))
    some = ['[%d][%d] has column %g, k %g instead of %d' % (r, c, columns[r, c], elements[r, c], place[r])
            for r, c in wrong.nonzero()[::max(1, int(wrong.sum()) // 8)].tolist()]
    return check(not wrong.any(), '%s: %s' % (label, '\n    '.join([where(wrong)] + some)))


def features():
    prepare([v for name, v in FEATURES])
    for name, v in FEATURES:
        print('%s %s' % (name, v), flush=True)
        if name != 'multiplyGated':
            for rows, k, n in ((8, 64, v.tile), (v.rows, 64, v.tile), (v.rows, 64 * v.stages, v.tile * 2),
                               (v.rows, 128 * v.stages * v.split, v.tile * 3), (v.rows - 3, 1000, 1000)):
                if not oneHot('%s %s one-hot rows=%d k=%d n=%d' % (name, v, rows, k, n), v, name, rows, k, n):
                    return False
        for rows, k, n in ((8, 64, v.tile), (v.rows, 1024, 1024), (v.rows, 1024, 24 * v.tile)):
            label = '%s %s rows=%d k=%d n=%d' % (name, v, rows, k, n)
            x, weight, out = followedByNan(rows, k), weightOf(name, n, k), outOf(name, rows, n)
            if not (launchBounded(label, Product(v, name, x, weight, out, rows, k, n))
                    and compare(label, name, out[:, :n], reference(name, x, weight, n))):
                return False
    return True


# ---- checks ----

def checkProduct(v, name, rows, k, n):
    label = '%s %s rows=%d k=%d n=%d' % (name, v, rows, k, n)
    weight, padded, pad = weightOf(name, n, k), -(-rows // v.rows) * v.rows, 7 if n % 8 else 8
    x = torch.full((padded, k), math.nan, device=DEVICE, dtype=BF16)
    x[:rows] = random(rows, k)
    out = outOf(name, padded, n, pad)
    Product(v, name, x, weight, out, rows, k, n).launch()
    got = out[:rows, :n]
    check(bool(torch.isnan(out[:, n:]).all()), label + ': columns beyond n written')
    check(bool(torch.isnan(out[rows:]).all()), label + ': rows beyond the last one written')
    compare(label, name, got, reference(name, x[:rows], weight, n))
    again = outOf(name, padded, n, pad)
    other = Product(v, name, x[:rows].clone(), weight, again, rows, k, n)
    for i in range(3):
        again.fill_(math.nan)
        other.launch()
        check(same(again[:rows, :n], got), label + ': bits of another run')


def checks():
    cases = []
    for i, rows in enumerate(ROWS):
        for tile, split in ((64, 1), (128, 1), (128, 4), (64, 8)):
            cases.append((variant(tile, rows, split), NAMES[i % 3], max(1, rows - 3), (896, 1024, 3072)[(i + tile // 64) % 3], 1000))
    for tile in (64, 128, 192):
        for split in (1, 2, 4, 8):
            cases += [(variant(tile, 64, split), name, *size) for name in NAMES for size in ((64, 1024, 1000), (37, 72, 1000))]
    for v in (variant(192, 256), variant(192, 192), variant(192, 256, 2)):
        cases += [(v, name, 250, 3072, 1000) for name in NAMES]
    for v in (variant(64, 64), variant(128, 128), variant(64, 128, 4)):  # several tiles of rows; odd widths
        cases += [(v, 'multiply', 250, 896, 1152), (v, 'multiplyToFloat', 129, 1024, 999), (v, 'multiply', 1, 1536, 17),
                  (v, 'multiplyGated', 255, 1024, 1000), (v, 'multiply', 8, 8, 1)]
    for v in (variant(64, 64, stages=2), variant(64, 128, stages=4), variant(128, 256, stages=3)):  # several tiles of a CTA
        cases += [(v, 'multiply', v.rows, 3080, 40000), (v, 'multiplyToFloat', v.rows - 5, 896, 40001),
                  (v, 'multiplyGated', v.rows, 1024, 16384)]
    prepare([case[0] for case in cases])
    for case in cases:
        checkProduct(*case)
    print('%d products, largest differences relative to the largest value: %s' % (
        len(cases), {k: '%.2g' % v for k, v in worst.items()}), flush=True)
    # The bits of a row: whatever ROWS and the other rows.
    for tile, split in ((64, 1), (64, 2), (128, 4), (192, 1)):
        k, n = 1024, 1000
        x, weight, want = random(256, k), weightOf('multiply', n, k), None
        for rows in ROWS[::-1]:
            v, out = variant(tile, rows, split), outOf('multiply', rows, n)
            Product(v, 'multiply', x[:rows].clone(), weight, out, rows, k, n).launch()
            want = out if want is None else want
            check(same(out[:, :n], want[:rows, :n]), 'bits of ROWS %d with TILE %d SPLIT %d' % (rows, tile, split))
        v, out = variant(tile, 256, split), outOf('multiply', 256, n)
        Product(v, 'multiply', torch.cat([random(100, k), x[100:101], random(155, k)]), weight, out, 256, k, n).launch()
        check(same(out[100:101, :n], want[100:101, :n]), 'bits of a row among others, TILE %d SPLIT %d' % (tile, split))
    torch.cuda.synchronize()
    print('checks: %d failures' % failures, flush=True)


def chain():
    """Fifty products, each of the one before, in two buffers by turns: programmatic dependence must not show."""
    k = 1024
    weights = [random(k, k, scale=1 / 32) for i in range(25)]
    for v in (variant(64, 64), variant(64, 64, stages=4), variant(128, 256, 4), variant(64, 128, 4, 4), variant(64, 128, 2, 4),
              variant(64, 128), variant(128, 64, 8)):
        rows, results = v.rows, []
        for dependent in (False, True):
            buffers = [torch.sin(torch.arange(rows * k, device=DEVICE)).view(rows, k).to(BF16), torch.zeros(rows, k, device=DEVICE, dtype=BF16)]
            start = buffers[0].clone()
            products = [Product(v, 'multiply', buffers[i % 2], weights[i % 25], buffers[1 - i % 2], rows, k, k) for i in range(50)]
            graph = capture([lambda may, p=p: p.launch(dependent and may) for p in products])
            for i in range(20):
                buffers[0].copy_(start)
                graph.replay()
            torch.cuda.synchronize()
            results.append(buffers[0].clone())
        check(bool(torch.isfinite(results[0]).all()) and results[0].abs().max().item() > 1e-6, 'chain %s: values degenerate' % (v,))
        check(same(*results), 'chain %s: bits differ between dependent launches and others' % (v,))
    print('chains: %d failures' % failures, flush=True)


# ---- times ----

MODELS = {'Qwen3-0.6B': (1024, 4096, 2048, 3072), 'Qwen2.5-0.5B': (896, 1152, 896, 4864),
          'Qwen2.5-1.5B': (1536, 2048, 1536, 8960), 'Qwen3-8B': (4096, 6144, 4096, 12288)}
LAYERS = {'Qwen3-0.6B': 28, 'Qwen3-8B': 36}
VOCABULARY = 151936


def products(hidden, qkv, attended, inner):
    return [('qkv', 'multiply', hidden, qkv), ('o', 'multiply', attended, hidden), ('gate-up', 'multiplyGated', hidden, inner),
            ('down', 'multiply', inner, hidden), ('head', 'multiplyToFloat', hidden, VOCABULARY)]


def estimate(v, name, rows, k, n):
    """microseconds, roughly: only to choose what is worth measuring"""
    waves, steps = -(-tilesOf(v, name, rows, n) * v.split // (SMS // v.split * v.split)), -(-k // 64 // v.split)
    step = max(v.tile // 64 * 2 * max(v.rows, 32), (v.tile + v.rows) * 128 / 34, v.tile * 128 / 19)
    exchange = 800 + v.tile * v.rows * 4 * (v.split - 1) / v.split / 16 if v.split > 1 else 0
    return (waves * (steps * step + v.tile * v.rows * (4 if name == 'multiplyToFloat' else 2) / 40 + 300) + exchange + 1500) / 1700


def candidates(name, rows, k, n):
    """the six that promise most, and the best without a cluster"""
    whole = min(r for r in ROWS if r >= rows)
    found = set()
    for tile in (64, 128, 192):
        for part in {whole, whole // 2}.intersection(ROWS):
            for split in (1, 2, 4, 8):
                found.add(variant(tile, part, split))
                if tile == 64 and part <= 128:  # two CTAs, of this product and of the next one, on a multiprocessor
                    found.add(variant(tile, part, split, min(8, 104000 // ((tile + part) * 128))))
    found = sorted(found, key=lambda v: (estimate(v, name, rows, k, n), v))
    return list(dict.fromkeys(found[:6] + [v for v in found if v.split == 1][:1]))


def timeGraph(graph, count, repeats=5):
    """microseconds per launch within the graph"""
    graph.replay()
    times = []
    for i in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return sorted(times)[len(times) // 2]


class Times:
    def __init__(self):
        self.memory = torch.empty(7_100_000_000, device=DEVICE, dtype=BF16)
        for piece in self.memory.split(1_000_000_000):
            piece.normal_(0, 0.02)
        self.best = {}

    def weights(self, count, k):
        """as many matrices as fill 200 MB, two at least"""
        size = count * k
        return [self.memory[i * size:(i + 1) * size].view(count, k) for i in range(max(2, -(-100_000_000 // size)))]

    def ours(self, v, name, rows, k, n):
        weights = self.weights(2 * n if name == 'multiplyGated' else n, k)
        x, out = random(rows, k), outOf(name, rows, n, 0)
        launches = [Product(v, name, x, w, out, rows, k, n) for w in weights]
        count = max(30 if n < 100_000 else 4, len(weights))
        return timeGraph(capture([lambda may, p=launches[i % len(launches)]: p.launch(may) for i in range(count)]), count)

    def torchs(self, rows, k, n):
        weights = self.weights(n, k)
        x, out = random(rows, k), outOf('multiply', rows, n, 0)
        count = max(30 if n < 100_000 else 4, len(weights))
        torch.mm(x, weights[0].t(), out=out)
        return timeGraph(capture([lambda may, w=weights[i % len(weights)]: torch.mm(x, w.t(), out=out) for i in range(count)]), count)

    def table(self):
        shapes = [(rows, model, p) for rows in SIZES for model, d in MODELS.items() for p in products(*d)
                  if not (p[0] == 'head' and model.startswith('Qwen2.5'))]
        chosen = {(rows, model, p[0]): candidates(p[1], rows, p[2], p[3]) for rows, model, p in shapes}
        prepare([v for variants in chosen.values() for v in variants])
        print('%-13s %4s %-8s %6s %6s %8s %-16s %8s %7s %7s   all variants' % (
            'model', 'rows', 'product', 'k', 'n', 'us', 'best', 'torch', 'bytes', 'FLOPs'))
        totals = collections.defaultdict(lambda: [0.0] * 4)
        for rows, model, (label, name, k, n) in shapes:
            count = 2 * n if name == 'multiplyGated' else n
            moved = 2 * count * k + 2 * rows * k + (4 if name == 'multiplyToFloat' else 2) * rows * n
            times = sorted((self.ours(v, name, rows, k, n), v) for v in chosen[rows, model, label])
            self.best[model, rows, label] = times[0][1]
            line = [times[0][0], self.torchs(rows, k, count), moved / 4.3e6, 2 * rows * k * count / 750e6]
            if label != 'head':
                totals[rows, model] = [a + b for a, b in zip(totals[rows, model], line)]
            print('%-13s %4d %-8s %6d %6d %8.2f %-16s %8.2f %7.2f %7.2f   %s' % (
                model, rows, label, k, count, line[0], times[0][1], line[1], line[2], line[3],
                ' '.join('%s %.2f' % (v, t) for t, v in times)), flush=True)
            if label == 'down':
                print('%-13s %4d %-8s %13s %8.2f %16s %8.2f %7.2f %7.2f' % ((model, rows, 'layer', '') + (
                    totals[rows, model][0], '') + tuple(totals[rows, model][1:])), flush=True)

    def layers(self):
        """the products of all layers with weights of their own, each reading what the one before wrote, without all between"""
        for model, layers in LAYERS.items():
            dimensions = MODELS[model]
            for rows in SIZES:
                wide = [torch.zeros(rows * size, device=DEVICE, dtype=BF16) for size in (
                    dimensions[0], max(dimensions[1], dimensions[2]), dimensions[0], max(dimensions[3], dimensions[0]))]
                launches, theirs, at = [], [], 0
                both = torch.empty(rows, 2 * dimensions[3], device=DEVICE, dtype=BF16)
                for layer in range(layers):
                    for i, (label, name, k, n) in enumerate(products(*dimensions)[:4]):
                        count = 2 * n if name == 'multiplyGated' else n
                        weight = self.memory[at:at + count * k].view(count, k)
                        at += count * k
                        x, out = wide[i][:rows * k].view(rows, k), wide[(i + 1) % 4][:rows * n].view(rows, n)
                        launches.append(Product(self.best[model, rows, label], name, x, weight, out, rows, k, n))
                        theirs.append((x, weight.t(), both if name == 'multiplyGated' else out))
                torch.mm(theirs[0][0], theirs[0][1], out=theirs[0][2])
                results = [timeGraph(capture([lambda may, p=p: p.launch(may and dependent) for p in launches]), layers)
                           for dependent in (True, False)]
                results.append(timeGraph(capture([lambda may, t=t: torch.mm(t[0], t[1], out=t[2]) for t in theirs]), layers))
                print('%s, rows %d, the four products of a layer in turn over %d layers: %.2f us; launches not dependent %.2f; torch %.2f' % (
                    (model, rows, layers) + tuple(results)), flush=True)


def main():
    started = time.time()
    if features():
        checks()
        chain()
        times = Times()
        times.table()
        times.layers()
    print('%d failures, %.0f s in all' % (failures, time.time() - started))


main()
sys.exit(1 if failures else 0)
