"""usage: attention_candidates.py      milliseconds and TFLOP/s of libtorch's attention kernels for training, forward and backward

FlashAttention-2 over packed sequences, and cuDNN's attention over a dense batch and over packed sequences, causal, bfloat16."""
import time, torch

SHAPES = {'Qwen3-0.6B': (16, 8, 128), 'Qwen2.5-0.5B': (14, 2, 64), 'Qwen2.5-1.5B': (12, 2, 128), 'Qwen3-8B': (32, 8, 128)}
LENGTHS = {'2 x 4096': [4096] * 2, '8 x 1024': [1024] * 8, '10 of 200 to 1500': [200, 1500, 700, 900, 1100, 430, 1300, 820, 610, 632]}
aten = torch.ops.aten


def timed(work, repeats=5):
    work(), torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record(), torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def flash(q, k, v, g, cumulated, longest, scale):
    def forward():
        return aten._flash_attention_forward(q, k, v, cumulated, cumulated, longest, longest, 0.0, True, False, scale=scale)
    out, lse, state, unused, _ = forward()
    return out, forward, lambda: aten._flash_attention_backward(g, q, k, v, out, lse, cumulated, cumulated, longest, longest, 0.0, True, state, unused, scale=scale)


def cudnnPacked(q, k, v, g, cumulated, longest, scale):
    def forward():
        return aten._cudnn_attention_forward(q, k, v, None, cumulated, cumulated, longest, longest, True, 0.0, True, False, scale=scale)
    out, lse, _, _, _, _, seed, offset, _ = forward()
    return out, forward, lambda: aten._cudnn_attention_backward(g, q, k, v, out, lse, seed, offset, None, cumulated, cumulated, longest, longest, 0.0, True, scale=scale)


def cudnnDense(q, k, v, g, cumulated, longest, scale):
    dense = lambda x: x.view(-1, longest, x.shape[1], x.shape[2]).transpose(1, 2)
    q, k, v, g = dense(q), dense(k), dense(v), dense(g)
    def forward():
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    out, lse, a, b, m, n, seed, offset, _ = forward()
    return out, forward, lambda: aten._scaled_dot_product_cudnn_attention_backward(g, q, k, v, out, lse, seed, offset, None, a, b, m, n, 0.0, True, scale=scale)


torch.manual_seed(0)
for model, (heads, kvHeads, dim) in SHAPES.items():
    for name, lengths in LENGTHS.items():
        total, longest, scale = sum(lengths), max(lengths), dim ** -0.5
        make = lambda h: torch.randn(total, h, dim, device='cuda', dtype=torch.bfloat16)
        q, k, v, g = make(heads), make(kvHeads), make(kvHeads), make(heads)
        cumulated = torch.tensor([0] + [sum(lengths[:i + 1]) for i in range(len(lengths))], device='cuda', dtype=torch.int32)
        flops = sum(2 * heads * dim * n * n for n in lengths)  # two products, half of each masked
        reference = None
        for label, kernel in (('flash packed', flash), ('cudnn packed', cudnnPacked), ('cudnn dense', cudnnDense)):
            if kernel is cudnnDense and len(set(lengths)) > 1:
                continue
            try:
                out, forward, backward = kernel(q, k, v, g, cumulated, longest, scale)
                flat = (out.transpose(1, 2) if out.dim() == 4 else out).reshape(total, heads, dim).float()
                reference = flat if reference is None else reference
                a, b = timed(forward), timed(backward)
                print('%-13s %-18s %-13s forward %.3f ms (%.0f TFLOP/s), backward %.3f ms (%.0f), differs from the first by %.1e' % (
                    model, name, label, a, flops / a / 1e9, b, 2.5 * flops / b / 1e9, (flat - reference).abs().max().item()), flush=True)
            except Exception as e:
                print('%-13s %-18s %-13s %s' % (model, name, label, str(e).splitlines()[0][:150]), flush=True)
