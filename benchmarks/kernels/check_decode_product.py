"""usage: check_decode_product.py FOLDER [quick]      checks and times decode_product.cu (FOLDER holds it and the headers)

First contact: every feature of the kernel (two and three warpgroups, gates, float output, SPLIT, SHARE) in a process of its own, built
with bounded waits and on inputs that show which element went where; later steps leave out what fails there.
Checks: against float64; bits between ROWS, runs and neighbours; padding; columns beyond n; a chain of dependent launches.
Times: products of four models in captured graphs with programmatic dependent launches that go round over more than 200 MB of
weights, torch.mm beside them (without the activation, for gate-up); then whole layers. `quick` times 256 rows only.
A variant is written TILExROWS/SPLIT*SHARE:STAGES.
"""
import collections, concurrent.futures, ctypes, glob, math, os, subprocess, sys, time
import torch

FOLDER = sys.argv[1]
KIND = sys.argv[3] if len(sys.argv) > 3 and sys.argv[2] == 'first' else None
QUICK = 'quick' in sys.argv[2:]
EMULATED = not torch.cuda.is_available()  # no times, and products that torch computes: a test of this script
DEVICE = 'cpu' if EMULATED else 'cuda'
BF16 = torch.bfloat16
SMS = 132 if EMULATED else torch.cuda.get_device_properties(0).multi_processor_count
SHARED = 232448  # bytes of shared memory that a CTA may have
torch.manual_seed(1)
failures = 0


def check(ok, what):
    global failures
    if not ok:
        failures += 1
        print('FAIL', what, flush=True)
    return ok


# ---- variants, compilation, launches ----

class Variant(collections.namedtuple('Variant', 'tile rows split share stages')):
    def __str__(self):
        return '%dx%d/%d*%d:%d' % self

    @property
    def cluster(self):
        return self.split * self.share

    @property
    def threads(self):
        return 2 * self.tile + 128

    @property
    def shared(self):
        exchange = self.split * -(-self.rows // 8 // self.split) * 2 * self.tile * 16 if self.split > 1 else 0
        return 1024 + max(self.stages * (self.tile + self.rows) * 128, exchange) + self.tile // 64 * 2 * 4608


def variant(tile, rows, split=1, share=1, stages=None):
    """with as many stages as fit, at most 8"""
    if stages is None:
        stages = min(8, (SHARED - 1024 - 256 - tile // 64 * 9216) // ((tile + rows) * 128))
    return Variant(tile, rows, split, share, stages)


def possible(v):
    return (v.rows % (8 * v.share) == 0 and v.cluster <= 8 and v.stages >= 2 and v.shared + 256 <= SHARED
            and (v.tile <= 128 or v.rows in (16, 32, 64, 96, 128, 160, 192, 256)))


def nvrtc():
    if not hasattr(nvrtc, 'library'):
        places = os.path.join(os.path.dirname(os.path.dirname(torch.__file__)), 'nvidia', '*', 'lib')
        for name in ('libnvrtc-builtins.so.*', 'libnvrtc.so.*'):
            found = [f for f in sorted(glob.glob(os.path.join(places, name))) if '.alt.' not in f]
            library = ctypes.CDLL(found[-1] if found else 'libnvrtc.so', ctypes.RTLD_GLOBAL)
        nvrtc.library = library
    return nvrtc.library


def compileVariant(key):
    """cubin of a variant; key is (variant, bounded waits)"""
    v, bounded = key
    library = nvrtc()
    read = lambda name: open(os.path.join(FOLDER, name), 'rb').read()
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), read('decode_product.cu'), b'decode_product.cu', 2,
                               (ctypes.c_char_p * 2)(read('common.cuh'), read('hopper.cuh')),
                               (ctypes.c_char_p * 2)(b'common.cuh', b'hopper.cuh'))
    options = ['--gpu-architecture=sm_90a', '--std=c++17', '-DTILE=%d' % v.tile, '-DROWS=%d' % v.rows, '-DSPLIT=%d' % v.split,
               '-DSHARE=%d' % v.share, '-DSTAGES=%d' % v.stages] + (['-DSPIN_LIMIT=100000'] if bounded else [])
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
    size = ctypes.c_size_t()
    if code != 0:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError('%s: %s' % (v, log.value.decode()))
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


cubins, modules, functions = {}, {}, {}


def prepare(variants, bounded=False):
    """compiles on all cores"""
    keys = [k for k in dict.fromkeys((v, bounded) for v in variants) if k not in cubins]
    began = time.time()
    if len(keys) > 1:
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count(), len(keys), 16)) as pool:
            cubins.update(zip(keys, pool.map(compileVariant, keys)))
    elif keys:
        cubins[keys[0]] = compileVariant(keys[0])
    if keys and KIND is None:
        print('%d variants compiled in %.1f s' % (len(keys), time.time() - began), flush=True)


def driver():
    if not hasattr(driver, 'library'):
        driver.library = ctypes.CDLL('libcuda.so.1')
        torch.zeros(1, device=DEVICE)
    return driver.library


def require(code, what):
    if code != 0:
        raise RuntimeError('%s: CUDA error %d' % (what, code))


def module(v, bounded=False):
    key = (v, bounded)
    if key not in modules:
        prepare([v], bounded)
        modules[key] = ctypes.c_void_p()
        require(driver().cuModuleLoadData(ctypes.byref(modules[key]), cubins[key]), 'loading %s' % v)
    return modules[key]


def function(v, name, bounded=False):
    key = (v, name, bounded)
    if key not in functions:
        f = ctypes.c_void_p()
        require(driver().cuModuleGetFunction(ctypes.byref(f), module(v, bounded), name.encode()), name)
        require(driver().cuFuncSetAttribute(f, 8, v.shared), 'shared memory of %s' % v)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        functions[key] = f
    return functions[key]


class Attribute(ctypes.Structure):
    _fields_ = [('id', ctypes.c_int), ('pad', ctypes.c_int), ('value', ctypes.c_int * 3), ('rest', ctypes.c_char * 52)]


class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ('gx', 'gy', 'gz', 'bx', 'by', 'bz', 'shared')] + [
        ('stream', ctypes.c_void_p), ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint)]


def residentClusters(v, name):
    """how many clusters of the variant the device holds at a time"""
    if EMULATED:
        return SMS // v.cluster
    if (v, name) not in residentClusters.known:
        attribute = Attribute(4, 0, (ctypes.c_int * 3)(v.cluster, 1, 1))
        config = Config(v.cluster, 1, 1, v.threads, 1, 1, v.shared, None, ctypes.addressof(attribute), 1)
        count = ctypes.c_int()
        code = driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), function(v, name), ctypes.byref(config))
        residentClusters.known[v, name] = count.value if code == 0 and count.value > 0 else SMS // v.cluster
    return residentClusters.known[v, name]


residentClusters.known = {}


def work(v, name, rows, n):
    """tiles of a cluster, as decode_product.cu counts them"""
    columns = v.tile // 2 if name == 'multiplyGated' else v.tile
    return -(-n // (columns * v.share)) * -(-rows // v.rows)


def gridOf(v, name, rows, n):
    tiles = work(v, name, rows, n)
    if v.split > 1:
        return tiles * v.cluster
    resident = residentClusters(v, name)
    return -(-tiles // -(-tiles // resident)) * v.cluster


def tensorMap(address, sizes, strides, box):
    """sizes and box in elements, the innermost dimension first; strides in bytes, of all but the innermost"""
    memory = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(memory) + 63) // 64 * 64
    rank = len(sizes)
    require(driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), 9, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank), 0, 3, 2, 0), 'tensor map %s %s %s' % (sizes, strides, box))
    return ctypes.string_at(at, 128)


class Product:
    """a launch with everything it needs; x [at least rows][k], weight [n or 2 n][k], out [rows][...]"""

    def __init__(self, v, name, x, weight, out, rows, k, n, bounded=False, grid=None):
        self.v, self.name, self.tensors, self.sizes = v, name, (x, weight, out), (rows, k, n)
        if EMULATED:
            return
        self.grid = grid or gridOf(v, name, rows, n)
        self.function = function(v, name, bounded)
        xMap = tensorMap(x.data_ptr(), (k, x.shape[0]), (2 * k,), (64, v.rows // v.share))
        if name == 'multiplyGated':
            weightMap = tensorMap(weight.data_ptr(), (k, 8, 2, n // 8), (2 * k, 2 * k * n, 16 * k), (64, 8, 2, v.tile // 16))
        else:
            weightMap = tensorMap(weight.data_ptr(), (k, n), (2 * k,), (64, v.tile))
        stride = ctypes.c_int64(out.stride(0)) if name == 'multiplyToFloat' else ctypes.c_int32(out.stride(0))
        self.held = [ctypes.create_string_buffer(xMap, 128), ctypes.create_string_buffer(weightMap, 128), ctypes.c_uint64(out.data_ptr()),
                     ctypes.c_int32(rows), ctypes.c_int32(k), ctypes.c_int32(n), stride]
        self.pointers = (ctypes.c_void_p * len(self.held))(*[ctypes.addressof(h) for h in self.held])

    def launch(self, dependent=False):
        if EMULATED:
            x, weight, out = self.tensors
            rows, k, n = self.sizes
            y = x[:rows].nan_to_num(0).float() @ weight.float().t()
            out[:rows, :n] = (reference(self.name, x[:rows], weight, n) if self.name == 'multiplyGated' else y).to(out.dtype)
            return
        attribute = Attribute(6, 0, (ctypes.c_int * 3)(1, 0, 0))
        config = Config(self.grid, 1, 1, self.v.threads, 1, 1, self.v.shared, torch.cuda.current_stream().cuda_stream,
                        ctypes.addressof(attribute), 1 if dependent else 0)
        require(driver().cuLaunchKernelEx(ctypes.byref(config), self.function, self.pointers, None), 'launch of %s %s' % (self.name, self.v))


def synchronize():
    if not EMULATED:
        torch.cuda.synchronize()


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


def where(wrong):
    """a short description of which elements are wrong"""
    rows, columns = wrong.any(1).nonzero().flatten().tolist(), wrong.any(0).nonzero().flatten().tolist()
    short = lambda l: str(l) if len(l) < 12 else '%s ... %s (%d)' % (str(l[:8])[:-1], str(l[-3:])[1:], len(l))
    return '%d of %d wrong; rows %s; columns %s; rows mod 8 %s; columns mod 16 %s; columns / 64 %s' % (
        int(wrong.sum()), wrong.numel(), short(rows), short(columns), sorted({r % 8 for r in rows}), sorted({c % 16 for c in columns}),
        short(sorted({c // 64 for c in columns})))


def outOf(name, rows, n, pad=8):
    return torch.full((rows, n + pad), math.nan, device=DEVICE, dtype=torch.float32 if name == 'multiplyToFloat' else BF16)


def compare(label, got, want, tolerance=1e-2):
    wrong = ~((got.double() - want).abs() <= tolerance * want.abs().max())
    if wrong.any():
        r, c = wrong.nonzero()[0].tolist()
        check(False, '%s: %s; [%d][%d] is %.5g, not %.5g' % (label, where(wrong), r, c, got[r, c].item(), want[r, c].item()))
    return not wrong.any()


# ---- first contact ----

KINDS = collections.OrderedDict([
    ('plain', ('multiply', variant(64, 64))), ('groups', ('multiply', variant(128, 256))), ('float', ('multiplyToFloat', variant(64, 64))),
    ('gated', ('multiplyGated', variant(128, 64))), ('three', ('multiply', variant(192, 256))), ('split', ('multiply', variant(64, 64, 4))),
    ('share', ('multiply', variant(64, 64, 1, 2))), ('both', ('multiply', variant(128, 128, 2, 2)))])


def stuck(v):
    if EMULATED:
        return None
    address, size = ctypes.c_uint64(), ctypes.c_size_t()
    require(driver().cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module(v, True), b'stuck'), 'stuck')
    values = (ctypes.c_uint32 * 4)()
    require(driver().cuMemcpyDtoH_v2(values, address, 16), 'stuck')
    if values[0] == 0:
        return None
    index = values[3] // 2
    return 'a wait was given up: CTA %d, thread %d, barrier %s of stage %d, parity %d' % (
        values[1], values[2], 'full' if index < v.stages else 'empty', index % v.stages, values[3] % 2)


def oneHot(name, v, rows, k, n):
    """x has a single one in each row, so that out names the element of weight (column, k) that came there"""
    place = (torch.arange(rows) * 37 + 11) % k
    x = torch.zeros(rows, k, dtype=BF16)
    x[torch.arange(rows), place] = 1
    x = x.to(DEVICE)
    column, element = torch.arange(n).view(n, 1).expand(n, k), torch.arange(k).view(1, k).expand(n, k)
    digits = []
    for values in (column % 256, column // 256, element % 256, element // 256):
        weight = values.to(BF16).to(DEVICE).contiguous()
        out = outOf(name, rows, n)
        Product(v, name, x, weight, out, rows, k, n, True).launch()
        synchronize()
        if stuck(v):
            return check(False, '%s %s: %s' % (name, v, stuck(v)))
        digits.append(out[:, :n].double().cpu())
    columns, elements = digits[0] + 256 * digits[1], digits[2] + 256 * digits[3]
    wrong = (columns != torch.arange(n).view(1, n)) | (elements != place.view(rows, 1))
    if wrong.any():
        check(False, '%s %s k=%d n=%d, one-hot rows: %s' % (name, v, k, n, where(wrong)))
        for r, c in wrong.nonzero()[:: max(1, int(wrong.sum()) // 16)][:16].tolist():
            e = elements[r, c].item()
            source = (place == e).nonzero().flatten().tolist()
            print('    out[%d][%d] should have column %d and k %d, has column %s, k %s (of row %s)' % (
                r, c, c, place[r], columns[r, c].item(), e, source[:3]))
    return not wrong.any()


def firstContact(kind):
    name, v = KINDS[kind]
    if name != 'multiplyGated':
        for rows, k, n in ((min(v.rows, 8), 64, v.tile), (v.rows, 64, v.tile * v.share), (v.rows, 64 * v.stages, v.tile * 2),
                           (v.rows, 64 * v.stages * 2 * v.split, v.tile * 3), (v.rows - 3, 1000, 1000)):
            if not oneHot(name, v, rows, k, n):
                break
    for rows, k, n in ((8, 64, v.tile), (v.rows, 1024, 1024), (v.rows, 1024, 24 * v.tile)):
        x, weight = followedByNan(rows, k), followedByNan(2 * n if name == 'multiplyGated' else n, k, scale=1 / math.sqrt(k))
        out = outOf(name, rows, n)
        Product(v, name, x, weight, out, rows, k, n, True).launch()
        synchronize()
        check(not stuck(v), '%s %s: %s' % (name, v, stuck(v)))
        if not compare('%s %s k=%d n=%d rows=%d' % (name, v, k, n, rows), out[:, :n], reference(name, x, weight, n)):
            break


def contact():
    """the kinds that work"""
    print('first contact, each in a process', flush=True)
    processes = [(kind, subprocess.Popen([sys.executable, os.path.abspath(__file__), FOLDER, 'first', kind], stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, text=True)) for kind in KINDS]
    works = set()
    for kind, process in processes:
        try:
            text = process.communicate(timeout=90)[0]
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            text, code = process.communicate()[0] + '\ntimed out', -1
        print('  %-7s %s %s: %s' % ((kind,) + KINDS[kind] + ('works' if code == 0 else 'FAILS (%d)' % code,)), flush=True)
        if code == 0:
            works.add(kind)
        else:
            check(False, 'first contact ' + kind)
            print('    ' + '\n    '.join(text.strip().split('\n')[-30:]), flush=True)
    return works


def allowed(v, works):
    return ((v.tile < 128 or 'groups' in works) and (v.tile < 192 or 'three' in works) and (v.split == 1 or 'split' in works)
            and (v.share == 1 or 'share' in works) and (v.split == 1 or v.share == 1 or 'both' in works))


# ---- checks ----

worst = {}


def checkProduct(v, name, rows, k, n, pad=8):
    label = '%s %s rows=%d k=%d n=%d' % (name, v, rows, k, n)
    weight = followedByNan(2 * n if name == 'multiplyGated' else n, k, scale=1 / math.sqrt(k))
    padded = -(-rows // v.rows) * v.rows
    x = torch.full((padded, k), math.nan, device=DEVICE, dtype=BF16)
    x[:rows] = random(rows, k)
    out = outOf(name, padded, n, pad)
    product = Product(v, name, x, weight, out, rows, k, n)
    product.launch()
    got, want = out[:rows, :n], reference(name, x[:rows], weight, n)
    check(bool(torch.isnan(out[:, n:]).all()), label + ': columns beyond n written')
    check(bool(torch.isnan(out[rows:]).all()), label + ': rows beyond the last one written')
    if compare(label, got, want, 1e-4 if name == 'multiplyToFloat' else 1e-2):
        worst[name] = max(worst.get(name, 0.0), ((got.double() - want).abs().max() / want.abs().max()).item())
    again = outOf(name, padded, n, pad)
    other = Product(v, name, x[:rows].clone(), weight, again, rows, k, n)
    for i in range(3):
        again.fill_(math.nan)
        other.launch()
        check(same(again[:rows, :n], got), label + ': bits of another run')
    return x, weight, got


def checks(works):
    names = ['multiply', 'multiplyToFloat', 'multiplyGated']
    cases = []
    every = (16, 32, 64, 96, 128, 160, 192, 224, 256)
    for i, rows in enumerate(every):
        for tile, split, share in ((64, 1, 1), (128, 1, 1), (128, 4, 1), (64, 8, 1), (64, 2, 2), (128, 1, 2)):
            v = variant(tile, rows, split, share)
            cases.append((v, names[i % 3], max(1, rows - 3), (896, 1024, 3072)[(i + tile // 64) % 3], 1000))
    for tile in (64, 128, 192):
        for split in (1, 2, 4, 8):
            for share in (1, 2, 4):
                v = variant(tile, 64, split, share)
                cases += [(v, names[(split + share) % 3], 64, 1024, 1000), (v, names[(split + share + 1) % 3], 37, 72, 1000)]
    for v in (variant(192, 256), variant(192, 192), variant(192, 256, 2), variant(192, 256, 1, 2), variant(128, 256, 2, 2)):
        cases += [(v, name, 250, 3072, 1000) for name in names]
    for v in (variant(64, 64), variant(128, 128), variant(64, 128, 4), variant(128, 64, 1, 2)):  # several tiles of rows; odd widths
        cases += [(v, 'multiply', 250, 896, 1152), (v, 'multiplyToFloat', 129, 1024, 999), (v, 'multiply', 1, 1536, 17),
                  (v, 'multiplyGated', 255, 1024, 1000), (v, 'multiply', 8, 8, 1)]
    for v in (variant(64, 64, stages=2), variant(64, 128, stages=4), variant(128, 256, stages=3)):
        cases += [(v, 'multiply', v.rows, 3080, 40000), (v, 'multiplyToFloat', v.rows - 5, 896, 40001), (v, 'multiplyGated', v.rows, 1024, 16384)]
    needed = {'multiplyToFloat': 'float', 'multiplyGated': 'gated', 'multiply': 'plain'}
    cases = [c for c in cases if possible(c[0]) and allowed(c[0], works) and needed[c[1]] in works]
    if EMULATED:
        cases = cases[::12]
    else:
        prepare([c[0] for c in cases])
    began = time.time()
    for v, name, rows, k, n in cases:
        checkProduct(v, name, rows, k, n, 7 if n % 8 else 8)
    print('%d products, largest differences relative to the largest value: %s' % (
        len(cases), {k: '%.2g' % v for k, v in worst.items()}), flush=True)
    # The bits of a row: whatever ROWS and the other rows.
    for tile, split, share in ((64, 1, 1), (128, 4, 1), (64, 2, 2), (192, 1, 1)):
        if not allowed(variant(tile, 64, split, share), works):
            continue
        k, n = 1024, 1000
        x, weight, want = random(256, k), random(n, k, scale=1 / 32), None
        for rows in every[:2] if EMULATED else every[::-1]:
            v = variant(tile, rows, split, share)
            if possible(v):
                out = outOf('multiply', rows, n)
                Product(v, 'multiply', x[:rows].clone(), weight, out, rows, k, n).launch()
                want = out if want is None else want
                check(EMULATED or same(out[:, :n], want[:rows, :n]), 'bits of ROWS %d with TILE %d SPLIT %d' % (rows, tile, split))
        if not EMULATED:
            v, out = variant(tile, 256, split, share), outOf('multiply', 256, n)
            Product(v, 'multiply', torch.cat([random(100, k), x[100:101], random(155, k)]), weight, out, 256, k, n).launch()
            check(same(out[100:101, :n], want[100:101, :n]), 'bits of a row among others, TILE %d SPLIT %d' % (tile, split))
    synchronize()
    print('checks: %d failures, %.1f s' % (failures, time.time() - began), flush=True)


def chain(works):
    """Fifty products, each of the one before, in two buffers by turns: programmatic dependence must not show."""
    k = 1024
    weights = [random(k, k, scale=1 / 32) for i in range(25)]
    for v in (variant(64, 64), variant(64, 64, stages=4), variant(128, 256, 4), variant(64, 128, 4, 1, 4), variant(64, 128, 2, 2, 4),
              variant(64, 128, 1, 2), variant(128, 64, 8)):
        if not allowed(v, works):
            continue
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
        check(bool(torch.isfinite(results[0]).all()) and results[0].abs().max().item() > 1e-6, 'chain %s: values degenerate' % v)
        check(same(*results), 'chain %s: bits differ between dependent launches and others' % v)
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
    tiles, steps = work(v, name, rows, n), -(-k // 64 // v.split)
    together = 2 if v.tile == 64 and v.shared <= 113000 else 1
    waves = -(-tiles * v.cluster // (SMS // v.cluster * v.cluster))
    step = max(v.tile // 64 * 2 * max(v.rows, 32), (v.tile + v.rows / v.share) * 128 / 34, (v.tile + v.rows) * 128 / 60, v.tile * 128 / 19)
    exchange = 800 + v.tile * v.rows * 4 * (v.split - 1) / v.split / 16 if v.split > 1 else 0
    return (waves * (steps * step + v.tile * v.rows * (4 if name == 'multiplyToFloat' else 2) / 40 + 300) + exchange + 1500) / 1700


def candidates(name, rows, k, n, works, count=8):
    found = []
    for tile in (64, 128, 192):
        for part in {rows, max(32, rows // 2)}:
            for split in (1, 2, 4, 8):
                for share in (1, 2, 4):
                    stages = [None]
                    if tile == 64 and part <= 128:  # two CTAs, of this product and of the next one, on a multiprocessor
                        stages.append(min(8, 104000 // ((tile + part) * 128)))
                    for s in stages:
                        v = variant(tile, part, split, share, s)
                        if possible(v) and allowed(v, works):
                            found.append((estimate(v, name, rows, k, n), v))
    chosen = [v for t, v in sorted(found)]
    # Sharing is the least certain part of the estimate: some of each.
    best = dict.fromkeys(chosen[:count - 3])
    best.update(dict.fromkeys([v for v in chosen if v.share == 1][:4]))
    best.update(dict.fromkeys([v for v in chosen if v.share > 1][:2]))
    best.update(dict.fromkeys([v for v in chosen if v.split == 1][:1]))
    return list(best)


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
    def __init__(self, works):
        self.works = works
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
        x = random(rows, k)
        out = torch.empty(rows, n, device=DEVICE, dtype=torch.float32 if name == 'multiplyToFloat' else BF16)
        launches = [Product(v, name, x, w, out, rows, k, n) for w in weights]
        count = max(30 if n < 100_000 else 4, len(weights))
        return timeGraph(capture([lambda may, p=launches[i % len(launches)]: p.launch(may) for i in range(count)]), count)

    def torchs(self, rows, k, count):
        weights = self.weights(count, k)
        x, out = random(rows, k), torch.empty(rows, count, device=DEVICE, dtype=BF16)
        launches = max(30 if count < 100_000 else 4, len(weights))
        torch.mm(x, weights[0].t(), out=out)
        return timeGraph(capture([lambda may, w=weights[i % len(weights)]: torch.mm(x, w.t(), out=out) for i in range(launches)]), launches)

    def table(self):
        sizes = (256,) if QUICK else (64, 128, 192, 256)
        shapes = [(rows, model, p) for rows in sizes for model, d in MODELS.items() for p in products(*d)
                  if not (p[0] == 'head' and model.startswith('Qwen2.5'))]
        chosen = {(rows, model, p[0]): candidates(p[1], rows, p[2], p[3], self.works) for rows, model, p in shapes}
        prepare([v for variants in chosen.values() for v in variants])
        print('resident clusters: %s' % {c: residentClusters(variant(128, 128, c), 'multiply') for c in (1, 2, 4, 8)}, flush=True)
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
            for rows in (256,) if QUICK else (64, 256):
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
    works = set(KINDS) if EMULATED else contact()
    if 'plain' not in works:
        print('nothing else is worth trying')
        return
    checks(works)
    if not EMULATED:
        chain(works)
        if failures:
            print('%d failures so far; times follow all the same' % failures)
        times = Times(works)
        times.table()
        times.layers()
    print('%d failures, %.0f s in all' % (failures, time.time() - started))


if __name__ == '__main__':
    if KIND:
        firstContact(KIND)
    else:
        main()
    sys.exit(1 if failures else 0)
