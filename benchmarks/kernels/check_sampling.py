"""usage: python check_sampling.py FOLDER      checks and times sampling.cu and truncation.cu (FOLDER holds the sources)

Tokens are compared with an exact reference of the random race in float64, log-probs and the mass that truncation keeps with float64,
distributions with chi-square tests on 200,000 draws, and bits between batches and splits. Exits non-zero if anything fails.
"""
import math, os, sys, time
import numpy as np
import torch
import cupy

FOLDER = sys.argv[1]
EMULATED = getattr(cupy, 'EMULATED', False)  # a stand-in without a GPU: smaller sizes, no times
DEV = 'cpu' if EMULATED else 'cuda'
RAW, TEMPERATURE, TRUNCATED = 0, 1, 2
MAX_MASKED = 32
PAIR = np.dtype([('row', 'i4'), ('slot', 'i4'), ('position', 'i4'), ('topK', 'i4'), ('seed', 'u8'), ('key', 'u8'),
                 ('temperature', 'f4'), ('topP', 'f4'), ('minP', 'f4'), ('repetitionPenalty', 'f4'),
                 ('logprobKind', 'i4'), ('maskedCount', 'i4'), ('unused', 'i4', (2,))])
assert PAIR.itemsize == 64
DEFAULT = dict(row=0, slot=0, position=0, topK=0, seed=1, key=2, temperature=1.0, topP=1.0, minP=0.0, repetitionPenalty=1.0,
               logprobKind=RAW, maskedCount=0)
failures = 0
worst = {}


def check(ok, what):
    global failures
    if not ok:
        failures += 1
        if failures <= 40:
            print('FAILED:', what)


def note(name, value):
    worst[name] = max(worst.get(name, 0.0), float(value))


def source():
    def read(name):
        return open(os.path.join(FOLDER, name)).read()
    text = read('sampling.cu') + read('truncation.cu').replace('#include "sampling.cuh"', '')
    return text.replace('#include "sampling.cuh"', read('sampling.cuh')).replace('#include "common.cuh"', read('common.cuh'))


MODULES = {bf16: cupy.RawModule(code=source(), backend='nvrtc', options=('--std=c++17', '-DLOGITS_BF16=%d' % bf16,
                                '-DMAX_MASKED=%d' % MAX_MASKED)) for bf16 in (0, 1)}


def pointer(tensor):
    return np.uint64(tensor.data_ptr())


def device(array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEV)


class Batch:
    """The buffers of one launch sequence. pairs: numpy array of PAIR; count: valid pairs, the others are padding."""

    def __init__(self, logits, vocabulary, pairs, masked=None, seen=None, slots=None, count=None, slices=None):
        self.bf16 = int(logits.dtype == torch.bfloat16)
        self.logits, self.vocabulary, self.capacity = logits, vocabulary, len(pairs)
        assert logits.stride(0) * logits.element_size() % 16 == 0
        self.pairs = device(pairs.view(np.uint8).reshape(-1))
        self.count = device(np.array([len(pairs) if count is None else count], np.int32))
        self.slots = max(int(pairs['slot'].max()) + 1, slots or 1)
        self.seen = torch.zeros(self.slots, (vocabulary + 31) // 32, dtype=torch.int32, device=DEV) if seen is None else seen
        self.masked = torch.zeros(self.capacity, MAX_MASKED, dtype=torch.int32, device=DEV) if masked is None else masked
        self.tiles = (vocabulary + 511) // 512
        self.slices = slices or max(1, min((self.tiles + 3) // 4, 1056 // self.capacity))
        nan = float('nan')
        self.scaled = torch.full((self.capacity, self.tiles, 2), nan, device=DEV)
        self.raw = torch.full((self.capacity, self.tiles, 2), nan, device=DEV)
        self.best = torch.full((self.capacity, self.slices, 2), nan, device=DEV)
        self.tokens = torch.full((self.capacity,), -77, dtype=torch.int32, device=DEV)
        self.logprobs = torch.full((self.capacity,), 77.0, device=DEV)
        self.last = torch.full((self.slots,), -77, dtype=torch.int32, device=DEV)
        real = pairs[:int(self.count[0])]
        self.edited = bool(((real['repetitionPenalty'] != 1) | (real['maskedCount'] > 0)).any())
        top = (real['topK'] > 0) & (real['topK'] < vocabulary)
        self.truncated = bool(((real['temperature'] > 0) & (top | (real['topP'] < 1) | (real['minP'] > 0))).any())
        get = MODULES[self.bf16].get_function
        head = [pointer(self.pairs), pointer(self.count), pointer(logits), np.int64(logits.stride(0)), np.int32(vocabulary), pointer(self.seen)]
        out = [pointer(self.tokens), pointer(self.logprobs), pointer(self.last)]
        sums = [pointer(self.scaled), pointer(self.raw)]
        self.launches = [('partial', get('samplePartialEdited' if self.edited else 'samplePartial'), (self.capacity, self.slices), 128,
                          head + [pointer(self.masked)] + sums + [pointer(self.best)])]
        if self.truncated:
            self.launches.append(('truncated', get('sampleTruncated'), (self.capacity,), 512, head + [pointer(self.masked)] + sums + out))
        self.launches.append(('finish', get('sampleFinish'), (self.capacity,), 128,
                              head + sums + [pointer(self.best), np.int32(self.slices)] + out))

    def launch(self, only=None):
        for name, function, grid, threads, args in self.launches:
            if only is None or name == only:
                function(grid, (threads,), tuple(args))

    def run(self):
        self.launch()
        return self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()


def pairs_of(n, **values):
    pairs = np.zeros(n, PAIR)
    for name, value in {**DEFAULT, **values}.items():
        pairs[name] = value
    if 'slot' not in values:
        pairs['slot'] = np.arange(n)
    return pairs


# ---- references -------------------------------------------------------------------------------------------------------------

U64 = np.uint64


def mix(z):
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def race_key(pair):
    with np.errstate(over='ignore'):
        gamma = U64(0x9E3779B97F4A7C15)
        h = mix(U64(pair['seed']) + gamma)
        h = mix((h ^ U64(pair['key'])) + gamma)
        return mix((h ^ np.int64(pair['position']).astype(U64)) + gamma)


def philox(key, index, stream):
    """Four tensors of 32-bit words in int64, whose products wrap as those of unsigned numbers do"""
    low = 0xFFFFFFFF
    a = index
    b, c, d = [torch.full_like(index, int(x)) for x in (key >> U64(32), key & U64(low), stream)]
    for r in range(7):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((q >> 32) & low) ^ b ^ (r * 0x9E3779B9 & low), q & low
        c, d = ((p >> 32) & low) ^ d ^ (r * 0xBB67AE85 & low), p & low
    return torch.stack([a, b, c, d])


def exponentials(pair, t):
    """e of each token, float64; t: int64 tensor of tokens"""
    with np.errstate(over='ignore'):
        key = race_key(pair)
    word = philox(key, t // 512 * 64 + t % 256 // 4, 0).gather(0, (t % 4)[None])[0]
    coarse = torch.where((t & 256) != 0, word >> 16, word & 0xFFFF)
    fine = philox(key, t, 1)
    middle, last = fine[0], fine[1] >> 16
    v = coarse * 2.0 ** -16 + middle * 2.0 ** -48 + (last | 1) * 2.0 ** -64
    rest = (0xFFFF - coarse) * 2.0 ** -16 + (0xFFFFFFFF - middle) * 2.0 ** -48 + ((0xFFFF - last) | 1) * 2.0 ** -64
    return torch.where(coarse >= 0x8000, -torch.log(rest), -torch.log1p(-v.clamp(max=0.5)))


def edited_row(row, pair, seen, masked):
    """row: float32 tensor [vocabulary]; seen: list of tokens; the kernel's float32 arithmetic"""
    row = row.clone()
    if pair['repetitionPenalty'] != 1 and len(seen):
        ids = torch.tensor(sorted(set(seen)), device=DEV)
        x = row[ids]
        penalty = torch.tensor(float(pair['repetitionPenalty']), device=DEV)
        row[ids] = torch.where(x > 0, x / penalty, x * penalty)
    if pair['maskedCount']:
        row[torch.as_tensor(masked[:pair['maskedCount']].astype(np.int64), device=DEV)] = -math.inf
    return row


def kept_tokens(scaled, pair, slack=0.0):
    """Token ids that are kept, in descending order. scaled: float64 logits over temperature, ties as in the float32 row. slack
    moves the thresholds of min-p and top-p, where float32 may decide differently for a token at the cut."""
    v = len(scaled)
    values, order = torch.sort(scaled, descending=True, stable=True)
    n = int((values > -math.inf).sum())
    if pair['minP'] > 0:
        n = min(n, int((values - values[0] >= math.log(float(pair['minP'])) + 10 * slack).sum()))
    n = max(n, 1)
    if 0 < pair['topK'] < v:
        n = min(n, int(pair['topK']))
    if pair['topP'] < 1:
        weights = torch.exp(values[:n] - values[0])
        sums = torch.cumsum(weights, 0)
        n = min(n, int((sums < float(pair['topP']) * (1 + slack) * float(sums[-1])).sum()) + 1)
    return order[:n]


def verify(batch, logits, pairs, seen, masked, tokens, logprobs, what):
    for i, pair in enumerate(pairs):
        row = logits[pair['row'], :batch.vocabulary].float()
        bad = bool((torch.isnan(row) | (row == math.inf)).any())
        z = edited_row(row, pair, seen[i], masked[i])
        bad = bad or bool((z == math.inf).any()) or not bool((z > -math.inf).any())
        label = '%s pair %d %s' % (what, i, pair)
        if bad:
            check(tokens[i] == -1 and math.isnan(logprobs[i]), label + ' must be non-finite: %d %g' % (tokens[i], logprobs[i]))
            continue
        token = int(tokens[i])
        check(0 <= token < batch.vocabulary, label + ' token %d' % token)
        if not 0 <= token < batch.vocabulary:
            continue
        greedy = pair['temperature'] == 0
        inverse = 1.0 if greedy else 1 / float(pair['temperature'])
        scaled = z.double() * inverse
        truncates = not greedy and (pair['topP'] < 1 or pair['minP'] > 0 or 0 < pair['topK'] < batch.vocabulary)
        if greedy:
            want = int((z == z.max()).nonzero()[0])
            check(token == want, label + ' greedy %d, not %d' % (token, want))
            check_logprob(batch, pair, row, scaled, torch.zeros(()), token, logprobs[i], label)
            continue
        if not truncates:
            problem = judge(batch, pair, row, scaled, (z > -math.inf).nonzero()[:, 0], token, logprobs[i])
        else:
            for slack in (0.0, 3e-6, -3e-6):
                problem = judge(batch, pair, row, scaled, kept_tokens(scaled, pair, slack), token, logprobs[i])
                if not problem:
                    break
            note('tokens at the cut kept or not by rounding (1 = yes)', slack != 0)
        check(not problem, label + ' ' + problem)


def judge(batch, pair, row, scaled, kept, token, logprob):
    """What is wrong with a draw from the tokens kept; '' if nothing."""
    at = (kept == token).nonzero()[:, 0]
    if not len(at):
        return 'token %d (p %.3g) is not among the %d kept' % (token, math.exp(float(scaled[token] - torch.logsumexp(scaled, 0))), len(kept))
    scores = scaled[kept] - torch.log(exponentials(pair, kept))
    best = int(scores.argmax())
    gap = float(scores[best] - scores[at[0]])
    if gap > 1e-5 * (1 + abs(float(scores[best]))):
        return 'token %d, but %d wins the race by %g among %d kept' % (token, int(kept[best]), gap, len(kept))
    note('score gap of tokens that differ from the float64 race', gap)
    return check_logprob(batch, pair, row, scaled, torch.logsumexp(scaled[kept], 0), token, logprob)


def check_logprob(batch, pair, row, scaled, kept_mass, token, logprob, label=None):
    if pair['logprobKind'] == RAW:
        want = row[token].double() - torch.logsumexp(row.double(), 0)
    elif pair['logprobKind'] == TEMPERATURE:
        want = scaled[token] - torch.logsumexp(scaled, 0)
    else:
        want = torch.zeros(()) if pair['temperature'] == 0 else scaled[token] - kept_mass
    want = float(want)
    error = abs(want - float(logprob)) / (1 + 0.05 * abs(want))
    problem = '' if error < 1e-5 else 'log-prob %g, not %g' % (logprob, want)
    if label is not None:
        check(not problem, label + ' ' + problem)
    if not problem:
        note('log-prob ' + ('raw', 'temperature', 'truncated')[pair['logprobKind']], error)
    return problem


def rows_of(kind, n, vocabulary, dtype, seed):
    stride = (vocabulary + 7) // 8 * 8
    g = torch.Generator(device=DEV).manual_seed(seed)
    x = torch.randn(n, stride, generator=g, device=DEV)
    if kind == 'normal':
        x = x * 3 + 5
    elif kind == 'peaky':
        x = x * 2
        x[torch.arange(n, device=DEV), torch.randint(vocabulary, (n,), generator=g, device=DEV)] = 18.0
    elif kind == 'flat':
        x = x * 0.5
    elif kind == 'crossing':
        x = x * 1.0 - 0.2
    elif kind == 'holes':
        x = torch.where(torch.rand(n, stride, generator=g, device=DEV) < 0.7, torch.tensor(-math.inf, device=DEV), x * 3 - 20)
    elif kind == 'ties':
        x = torch.round(x * 2)
    elif kind == 'equal':
        x = torch.full((n, stride), 1.5, device=DEV)
    elif kind == 'spike':  # half of the mass on one token, the rest on very many
        x = x * 0.01
        x[:, vocabulary // 3] = math.log(vocabulary)
    elif kind == 'few':
        keep = torch.rand(n, stride, generator=g, device=DEV) < 20 / vocabulary
        keep[:, vocabulary // 2] = True
        x = torch.where(keep, x, torch.tensor(-math.inf, device=DEV))
    x[:, vocabulary:] = float('nan')  # beyond the row: never looked at
    return x.to(dtype)


# ---- checks -----------------------------------------------------------------------------------------------------------------

def random_pairs(rng, n, rows, vocabulary, truncate):
    pairs = pairs_of(n, row=rng.integers(0, rows, n), position=rng.integers(0, 1 << 17, n), seed=rng.integers(0, 1 << 63, n),
                     key=rng.integers(0, 1 << 63, n), temperature=rng.choice([0, 0.3, 0.7, 1, 1, 1.5], n), logprobKind=rng.integers(0, 3, n))
    if truncate:
        pairs['temperature'] = rng.choice([0, 0.5, 1, 1, 1.3], n)
        pairs['topK'] = rng.choice([0, 0, 1, 5, 50, 200, 1000, 6000, vocabulary - 1, vocabulary], n)
        pairs['topP'] = rng.choice([1, 1, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999], n)
        pairs['minP'] = rng.choice([0, 0, 0, 0.001, 0.1, 1], n)
    return pairs


def check_random(vocabulary, dtype, kinds, n, truncate, edit, seed):
    rng = np.random.default_rng(seed)
    for kind in kinds:
        rows = 4
        logits = rows_of(kind, rows, vocabulary, dtype, seed)
        pairs = random_pairs(rng, n, rows, vocabulary, truncate)
        seen, masked = [[] for _ in range(n)], np.zeros((n, MAX_MASKED), np.int32)
        bits = None
        if edit:
            pairs['repetitionPenalty'] = rng.choice([1, 1.2, 0.8], n)
            pairs['maskedCount'] = rng.choice([0, 1, 5, MAX_MASKED], n)
            seen = [rng.integers(0, vocabulary, rng.integers(0, 3000)).tolist() for _ in range(n)]
            for i in range(n):  # masks that matter: the likeliest tokens, and any
                top = torch.topk(logits[pairs['row'][i], :vocabulary].float(), MAX_MASKED).indices.cpu().numpy()
                masked[i] = np.where(rng.random(MAX_MASKED) < 0.5, top, rng.integers(0, vocabulary, MAX_MASKED))
            bits = mark(vocabulary, list(range(n)), seen, n)
        batch = Batch(logits, vocabulary, pairs, device(masked), bits)
        tokens, logprobs = batch.run()
        verify(batch, logits, pairs, seen, masked, tokens, logprobs, '%d %s %s%s%s' % (vocabulary, str(dtype)[6:], kind,
               ' truncated' if truncate else '', ' edited' if edit else ''))
        last = batch.last.cpu().numpy()
        check((last[pairs['slot']] == np.maximum(tokens, 0)).all(), 'lastToken')
        if edit:
            for i in range(n):
                want = set(seen[i]) | ({int(tokens[i])} if pairs['repetitionPenalty'][i] != 1 and tokens[i] >= 0 else set())
                check(bit_set(batch.seen[pairs['slot'][i]]) == want, 'bits of the tokens seen')


def bit_set(words):
    bits = np.unpackbits(words.cpu().numpy().view(np.uint8), bitorder='little')
    return set(np.nonzero(bits)[0].tolist())


def mark(vocabulary, slots, lists, total):
    seen = torch.full((total, (vocabulary + 31) // 32), -1, dtype=torch.int32, device=DEV)
    starts = device(np.cumsum([0] + [len(x) for x in lists]).astype(np.int32))
    flat = device(np.array([t for x in lists for t in x] + [0], np.int32))
    ids, count = device(np.array(slots + [-1, 0], np.int32)), device(np.array([len(slots)], np.int32))
    MODULES[0].get_function('markSeen')((len(slots) + 2,), (256,), (pointer(seen), np.int32(vocabulary), pointer(ids), pointer(starts), pointer(flat), pointer(count)))
    return seen


def check_broken():
    vocabulary = 5000
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows_of('normal', 8, vocabulary, dtype, 3)
        logits[1, 4999] = float('nan')
        logits[2, 0] = math.inf
        logits[3, :] = -math.inf
        logits[4, 600:] = -math.inf
        logits[5, :2048] = -math.inf
        logits[6, 17] = -3e38
        n = 48
        pairs = pairs_of(n, row=np.arange(n) % 8, seed=np.arange(n), logprobKind=np.arange(n) % 3)
        pairs['temperature'] = np.where(np.arange(n) // 8 % 3 == 0, 0, 0.8)
        pairs['topK'] = np.where(np.arange(n) // 8 % 3 == 2, 7, 0)
        pairs['repetitionPenalty'][24:] = 1.3
        pairs['maskedCount'][32:] = 2
        masked = np.zeros((n, MAX_MASKED), np.int32)
        masked[:, :2] = [4999, 0]  # a mask over NaN does not make the row sound
        batch = Batch(logits, vocabulary, pairs, device(masked))
        tokens, logprobs = batch.run()
        verify(batch, logits, pairs, [[]] * n, masked, tokens, logprobs, 'broken rows')
        check((tokens[pairs['row'] == 1] == -1).all() and (tokens[pairs['row'] == 4] >= 0).all(), 'which rows are broken')
        # all that is finite is masked
        logits = rows_of('few', 1, vocabulary, dtype, 4)
        finite = (logits[0, :vocabulary] > -math.inf).nonzero()[:, 0].cpu().numpy()[:MAX_MASKED]
        logits[0, torch.as_tensor(np.setdiff1d(np.arange(vocabulary), finite), device=DEV)] = -math.inf
        pairs = pairs_of(4, maskedCount=len(finite), temperature=[0, 1, 1, 1], topK=[0, 0, 3, 0], topP=[1, 1, 1, 0.9])
        masked = np.zeros((4, MAX_MASKED), np.int32)
        masked[:, :len(finite)] = finite
        tokens, logprobs = Batch(logits, vocabulary, pairs, device(masked)).run()
        check((tokens == -1).all() and np.isnan(logprobs).all(), 'everything masked')


def check_padding():
    vocabulary = 3000
    logits = rows_of('normal', 2, vocabulary, torch.float32, 5)
    pairs = pairs_of(6, slot=[0, -1, 2, 3, 4, 5], topK=[0, 0, 5, 0, 5, 0])
    pairs['row'][1] = 1 << 30
    pairs['row'][4:] = 1 << 30
    batch = Batch(logits, vocabulary, pairs, count=4)
    tokens, logprobs = batch.run()
    check((tokens[[0, 2, 3]] >= 0).all() and (tokens[[1, 4, 5]] == -77).all(), 'padding tokens %s' % tokens)
    check((logprobs[[1, 4, 5]] == 77).all() and (batch.last.cpu().numpy()[[1, 4, 5]] == -77).all(), 'padding outputs')


def check_bits():
    """The same bits alone, in company, and at any number of slices."""
    vocabulary = 6000 if EMULATED else 151936
    for dtype in (torch.float32, torch.bfloat16):
        logits = rows_of('normal', 8, vocabulary, dtype, 6)
        rng = np.random.default_rng(7)
        n = 16 if EMULATED else 256
        pairs = random_pairs(rng, n, 8, vocabulary, True)
        pairs[: n // 2] = random_pairs(rng, n // 2, 8, vocabulary, False)
        pairs['slot'] = np.arange(n)
        results = []
        for slices in (1, 2, 3, 7, 40):
            order = rng.permutation(n)
            tokens, logprobs = Batch(logits, vocabulary, pairs[order], slices=slices).run()
            back = np.argsort(order)
            results.append((tokens[back], logprobs[back].view(np.int32)))
        for tokens, bits in results[1:]:
            check((tokens == results[0][0]).all() and (bits == results[0][1]).all(), 'bits differ between slices')
        for i in range(0, n, 5):
            tokens, logprobs = Batch(logits, vocabulary, pairs[i:i + 1], slots=n).run()
            check(tokens[0] == results[0][0][i] and logprobs.view(np.int32)[0] == results[0][1][i], 'bits differ alone, pair %d' % i)


def check_distribution():
    vocabulary, finite, draws = 2048, 40, int(os.environ.get('DRAWS', 3000)) if EMULATED else 200000
    g = torch.Generator().manual_seed(8)
    ids = torch.randperm(vocabulary, generator=g)[:finite]
    row = torch.full((1, vocabulary), -math.inf)
    row[0, ids] = torch.randn(finite, generator=g) * 1.5
    logits = row.to(DEV)
    cases = [('plain, seeds', dict(seed=np.arange(draws))), ('plain, positions', dict(position=np.arange(draws))),
             ('plain, keys', dict(key=np.arange(draws) * 7919)), ('temperature 0.6', dict(seed=np.arange(draws), temperature=0.6)),
             ('temperature 2', dict(seed=np.arange(draws), temperature=2.0, logprobKind=TEMPERATURE)),
             ('top-k 10', dict(seed=np.arange(draws), topK=10)), ('top-p 0.8', dict(position=np.arange(draws), topP=0.8)),
             ('min-p 0.1', dict(seed=np.arange(draws), minP=0.1)),
             ('all three', dict(position=np.arange(draws), topK=20, topP=0.9, minP=0.02, temperature=0.9)),
             ('penalty', dict(seed=np.arange(draws), repetitionPenalty=1.5))]
    for name, values in cases:
        pairs = pairs_of(draws, slot=np.zeros(draws, np.int32), **values)
        z = row[0].clone()
        seen = None
        if name == 'penalty':
            pairs['slot'] = np.arange(draws)
            listed = ids[::2].tolist()
            seen = mark(vocabulary, [0], [listed], 1).repeat(draws, 1)
            x = z[listed]
            z[listed] = torch.where(x > 0, x / 1.5, x * 1.5)
        masked = torch.zeros(draws, MAX_MASKED, dtype=torch.int32, device=DEV)
        tokens, _ = Batch(logits, vocabulary, pairs, masked, seen, slices=1).run()
        scaled = z.double() / float(pairs['temperature'][0])
        keep = kept_tokens(scaled, pairs[0]).cpu()
        p = torch.softmax(scaled[keep], 0).numpy()
        counts = np.bincount(tokens.clip(0), minlength=vocabulary)
        check(counts.sum() == draws and counts[keep.numpy()].sum() == draws, name + ': tokens outside of the support')
        expected, found = p * draws, counts[keep.numpy()]
        small = expected < 10
        if small.any():
            expected = np.append(expected[~small], expected[small].sum())
            found = np.append(found[~small], found[small].sum())
        expected = np.maximum(expected, 1e-3)
        df = len(expected) - 1
        chi = float(((found - expected) ** 2 / expected).sum())
        # Wilson-Hilferty: chi-square to a standard normal
        normal = ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)) if df else 0.0
        print('  %-18s chi-square %7.1f with %2d degrees of freedom: %+.2f sigma' % (name, chi, df, normal))
        check(normal < 5, name + ': chi-square')


# ---- times ------------------------------------------------------------------------------------------------------------------

def microseconds(calls):
    """Median time of one call, the calls rotating; as a graph if that can be had."""
    stream = torch.cuda.Stream()
    external = cupy.cuda.ExternalStream(stream.cuda_stream) if hasattr(cupy.cuda, 'ExternalStream') else cupy.cuda.Stream.from_external(stream)
    with torch.cuda.stream(stream), external:
        for call in calls[:3]:
            call()
        stream.synchronize()
        repeat = max(1, 24 // len(calls))
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeat):
                    for call in calls:
                        call()
            launch = graph.replay
        except Exception as e:  # then launches may cost more than kernels
            print('  (no graph: %s)' % e)
            launch = lambda: [call() for _ in range(repeat) for call in calls]
        times = []
        for _ in range(24):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            launch()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / (repeat * len(calls)))
    return sorted(times[4:])[len(times[4:]) // 2]


def benchmark():
    a = torch.empty(1 << 28, dtype=torch.float32, device=DEV)
    b = torch.empty_like(a)
    copy = microseconds([lambda: b.copy_(a)])
    print('copy of 1 GiB: %.0f GB/s (bytes read and written)' % (2 * a.numel() * 4 / copy / 1e3))
    del a, b
    vocabulary = 151936
    for dtype in (torch.float32, torch.bfloat16):
        size = 4 if dtype == torch.float32 else 2
        for kind, n, cases in [
            ('normal', 256, [('T 1', {}), ('greedy', dict(temperature=0)), ('T 0.7, raw', dict(temperature=0.7)),
                             ('T 0.7, temperature', dict(temperature=0.7, logprobKind=1)), ('penalty', dict(repetitionPenalty=1.1)),
                             ('2 masked', dict(maskedCount=2)), ('top-k 50', dict(topK=50, logprobKind=2)),
                             ('top-p 0.9', dict(topP=0.9, logprobKind=2)), ('min-p 0.1', dict(minP=0.1, logprobKind=2)),
                             ('top-k 1000, top-p 0.95', dict(topK=1000, topP=0.95))]),
            ('peaky', 256, [('T 1', {}), ('top-p 0.95', dict(topP=0.95))]),
            ('flat', 256, [('T 1', {}), ('top-k 50', dict(topK=50)), ('top-p 0.9', dict(topP=0.9)), ('min-p 0.1', dict(minP=0.1))]),
            ('normal', 32, [('T 1', {}), ('top-k 50', dict(topK=50)), ('top-p 0.9', dict(topP=0.9))]),
            ('normal', 1, [('T 1', {}), ('greedy', dict(temperature=0)), ('top-k 50', dict(topK=50)), ('top-p 0.9', dict(topP=0.9)),
                           ('min-p 0.1', dict(minP=0.1))]),
            ('flat', 1, [('top-p 0.9', dict(topP=0.9))]),
        ]:
            logits = rows_of(kind, 256, vocabulary, dtype, 9)
            for name, values in cases:
                copies = max(1, min(24, 256 // n))  # so that rows do not stay in the L2 cache
                batches = [Batch(logits, vocabulary, pairs_of(n, row=c * n + np.arange(n), seed=np.arange(n) + 1000 * c, **values))
                           for c in range(copies)]
                total = microseconds([x.launch for x in batches])
                parts = [(part, microseconds([lambda x=x, part=part: x.launch(part) for x in batches])) for part, *_ in batches[0].launches]
                print('%-8s %-6s %3d rows  %-22s %7.1f us = %5.0f GB/s;  %s  (%d slices)' % (
                    str(dtype)[6:], kind, n, name, total, n * vocabulary * size / total / 1e3,
                    ', '.join('%s %.1f' % p for p in parts), batches[0].slices))
            logits = rows_of(kind, 256, vocabulary, dtype, 9) if n == 256 and kind == 'normal' else None
            if logits is not None:
                for slices in (1, 2, 4, 8, 16):
                    batch = Batch(logits, vocabulary, pairs_of(256, row=np.arange(256)), slices=slices)
                    print('%-8s partial at %2d slices: %.1f us' % (str(dtype)[6:], slices, microseconds([lambda: batch.launch('partial')])))


def main():
    start = time.time()
    both = (torch.float32, torch.bfloat16)
    everything = ['normal', 'peaky', 'flat', 'crossing', 'holes', 'ties', 'equal', 'spike', 'few']
    if EMULATED:
        for dtype in both:
            check_random(3001, dtype, ['normal', 'peaky', 'flat', 'holes', 'ties', 'few'], 12, False, False, 1)
            check_random(3001, dtype, ['normal', 'ties'], 12, False, True, 2)
            check_random(3001, dtype, ['normal', 'few'], 12, True, True, 3)
            check_random(12345, dtype, everything, 24, True, False, 4)
        if os.environ.get('LARGE'):
            for dtype in both:
                check_random(50257, dtype, everything, 40, True, False, 5)
                check_random(151936, dtype, everything, 24, True, False, 6)
    else:
        for dtype in both:
            for vocabulary in (32000, 49152, 151936, 50272, 50257):
                check_random(vocabulary, dtype, ['normal', 'peaky', 'flat', 'holes'] if vocabulary != 151936 else everything, 16, False, False, vocabulary)
                check_random(vocabulary, dtype, ['normal', 'ties'], 12, False, True, vocabulary + 1)
                check_random(vocabulary, dtype, everything, 48 if vocabulary == 151936 else 16, True, False, vocabulary + 2)
                check_random(vocabulary, dtype, ['normal', 'few'], 12, True, True, vocabulary + 3)
    print('random rows: %.1f s, %d failures' % (time.time() - start, failures))
    check_broken()
    check_padding()
    check_bits()
    print('broken rows, padding, bits: %.1f s, %d failures' % (time.time() - start, failures))
    check_distribution()
    for name, value in sorted(worst.items()):
        print('largest error, %s: %.2e' % (name, value))
    print('checks: %.1f s' % (time.time() - start))
    if not EMULATED and '--no-times' not in sys.argv:
        benchmark()
        print('all: %.1f s' % (time.time() - start))
    print('FAILED: %d' % failures if failures else 'PASSED')
    sys.exit(1 if failures else 0)


main()
