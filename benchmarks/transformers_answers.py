"""Writes a checkpoint of a published shape with random weights and transformers' greedy answers to it, for CompareWithTransformers.
usage: transformers_answers.py SHAPE DIR     (SHAPE: qwen3-0.6b; needs torch, transformers and a GPU)"""
import json, os, random, sys, time, torch
from transformers import AutoModelForCausalLM, Qwen3Config

shape, folder = sys.argv[1:]
assert shape == "qwen3-0.6b"
config = Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                     intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
                     rope_theta=1e6, eos_token_id=None, bos_token_id=None)
torch.manual_seed(0)
start = time.time()
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
torch.set_default_dtype(torch.float32)
with torch.no_grad():  # sharper than the initial 0.02, so that greedy decoding has margins
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.mul_(2.5)
os.makedirs(folder, exist_ok=True)
model.save_pretrained(folder)
print(f"checkpoint after {time.time() - start:.1f} s", flush=True)
r = random.Random(7)
answers = []
for i in range(16):
    ids = [r.randint(0, 150000) for _ in range(r.choice([1, 7, 33, 128, 500, 900]))]
    x = torch.tensor([ids], device="cuda")
    with torch.inference_mode():
        out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=0)
        logits = model(out).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)
    new = out[0, len(ids):].tolist()
    top = logprobs.topk(2, -1).values
    at = list(range(len(ids) - 1, out.shape[1] - 1))
    answers.append(dict(prompt=ids, tokens=new, logprobs=[logprobs[p, t].item() for p, t in zip(at, new)],
                        margins=[(top[p, 0] - top[p, 1]).item() for p in at]))
json.dump(answers, open(os.path.join(folder, "answers.json"), "w"))
print(f"answers after {time.time() - start:.1f} s", flush=True)
