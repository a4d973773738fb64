"""200 training steps of a small Qwen3 by transformers on a GPU, for LossCurve to hold Tandem's against: float32 weights, bfloat16 autocast,
AdamW(0.9, 0.95, 1e-8), clipping at 1, learning rate 3e-4. Two runs with different seeds of weights and data show how far curves lie apart.
usage: loss_curve.py DIR   writes DIR/model (bfloat16), DIR/tokens.bin (int32) and DIR/losses.json"""
import json, os, sys, torch
from transformers import AutoModelForCausalLM, Qwen3Config

STEPS, SEQUENCES, LENGTH, VOCABULARY, KNOWN = 200, 8, 513, 32768, 2000
folder = sys.argv[1]
torch.backends.cuda.matmul.allow_tf32 = False


def tokens(seed):
    """Each token but one in ten follows from the one before it, by a rule that is the same for all seeds."""
    g = torch.Generator().manual_seed(seed)
    rule = torch.randint(0, KNOWN, (KNOWN,), generator=torch.Generator().manual_seed(12345))
    all = torch.randint(0, KNOWN, (STEPS, SEQUENCES, LENGTH), generator=g)
    follows = torch.rand(all.shape, generator=g) < 0.9
    for i in range(1, LENGTH):
        all[:, :, i] = torch.where(follows[:, :, i], rule[all[:, :, i - 1]], all[:, :, i])
    return all


def run(seed):
    config = Qwen3Config(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=1536,
                         vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").bfloat16()
    data = tokens(seed)
    if seed == 0:
        model.save_pretrained(os.path.join(folder, "model"))
        data.int().numpy().tofile(os.path.join(folder, "tokens.bin"))
    model = model.float().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)
    losses = []
    for batch in data.cuda():
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


os.makedirs(folder, exist_ok=True)
losses = [run(0), run(1)]
json.dump(dict(sequences=SEQUENCES, length=LENGTH, losses=losses), open(os.path.join(folder, "losses.json"), "w"))
print(" ".join(f"{losses[0][i]:.3f}/{losses[1][i]:.3f}" for i in range(0, STEPS, 20)))
