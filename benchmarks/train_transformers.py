"""The work of GpuTraining by transformers on the same GPU: an optimizer step on 8 sequences of 4,096 tokens, bfloat16 weights, gradients and
moments, SDPA attention, fused AdamW; with Liger's kernels where they are installed.
usage: train_transformers.py SHAPE...   (SHAPE: qwen3-0.6b, qwen2.5-0.5b, qwen2.5-1.5b, qwen3-8b)"""
import gc, sys, time, torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

LENGTH, SEQUENCES, WARM_UP, STEPS, PEAK = 4096, 8, 2, 4, 989e12
SHAPES = {
    'qwen3-0.6b': (Qwen3Config, 1024, 28, 16, 8, 128, 3072, True), 'qwen2.5-0.5b': (Qwen2Config, 896, 24, 14, 2, 64, 4864, True),
    'qwen2.5-1.5b': (Qwen2Config, 1536, 28, 12, 2, 128, 8960, True), 'qwen3-8b': (Qwen3Config, 4096, 36, 32, 8, 128, 12288, False)}
try:
    import liger_kernel.transformers as liger
except ImportError:
    liger = None


def run(shape, sequences, checkpointing):
    make, hidden, layers, heads, kvHeads, dim, inner, tied = SHAPES[shape]
    config = make(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kvHeads, head_dim=dim,
                  intermediate_size=inner, vocab_size=151936, tie_word_embeddings=tied, max_position_embeddings=40960, rope_theta=1e6)
    if liger:
        (liger.apply_liger_kernel_to_qwen3 if make is Qwen3Config else liger.apply_liger_kernel_to_qwen2)(fused_linear_cross_entropy=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device('cuda'):
        model = AutoModelForCausalLM.from_config(config, attn_implementation='sdpa').train()
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 150000, (SEQUENCES, LENGTH), device='cuda')
    times = []
    for i in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        start = time.time()
        for part in ids.split(sequences):
            (model(input_ids=part, labels=part).loss * (len(part) / SEQUENCES)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.time() - start)
    median = sorted(times[WARM_UP:])[STEPS // 2]
    flops = 6 * parameters * ids.numel() + 6 * layers * heads * dim * LENGTH ** 2 * SEQUENCES
    print(f'{shape}, {SEQUENCES} sequences of {LENGTH:,}: {ids.numel() / median:.0f} tokens/s, {median:.3f} s a step, {100 * flops / median / PEAK:.1f} % of '
          f'the peak, {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB; {sequences} at a time, checkpointing {checkpointing}, Liger {bool(liger)}', flush=True)


for shape in sys.argv[1:]:
    for sequences, checkpointing in ((8, False), (4, False), (4, True)):
        torch.cuda.reset_peak_memory_stats()
        try:
            run(shape, sequences, checkpointing)
        except torch.cuda.OutOfMemoryError:
            print(f'{shape}: out of memory with {sequences} at a time, checkpointing {checkpointing}', flush=True)
        gc.collect()
        torch.cuda.empty_cache()
