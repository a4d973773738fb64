"""transformers' greedy answers on a GPU, for CompareWithTransformers to hold against Tandem's.
usage: transformers_answers.py qwen3-0.6b DIR   writes a checkpoint of that shape with random weights; answers in bfloat16, and the
                                                log-probs of the same tokens in float32 as a yardstick of what rounding does
       transformers_answers.py chat DIR         DIR is a model with a chat template; answers in float32"""
import json, os, random, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea.", "Explain in two sentences why the sky is blue.", "List three fruits.",
             "How do I boil an egg?", "Tell me a short story about a dog.", "What is 7 times 8?", "Who wrote Hamlet?", "Translate 'good morning' into Spanish.",
             "Give me a tip for sleeping well.", "What does a compiler do?", "Name a planet with rings.", "Why do leaves fall in autumn?",
             "Summarise the plot of Cinderella in one sentence.", "What should I pack for a hike?", "Is a tomato a fruit?"]
what, folder = sys.argv[1:]
start = time.time()


def randomModel():
    config = Qwen3Config(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                         intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
                         rope_theta=1e6, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(0)
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
    return model, [[r.randint(0, 150000) for _ in range(r.choice([1, 7, 33, 128, 500, 900]))] for _ in range(12)], None


def chatModel():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").cuda()
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False) for q in QUESTIONS]
    return model, [tokenizer(t, add_special_tokens=False).input_ids for t in texts], QUESTIONS


def logprobs(ids):
    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[0].float(), -1)


assert what in ("qwen3-0.6b", "chat")
model, prompts, questions = chatModel() if what == "chat" else randomModel()
count, answers, sequences = 64 if what == "chat" else 48, [], []
for i, ids in enumerate(prompts):
    x = torch.tensor([ids], device="cuda")
    with torch.inference_mode():
        out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=count, do_sample=False, pad_token_id=0)
    all, new, at = logprobs(out), out[0, len(ids):].tolist(), list(range(len(ids) - 1, out.shape[1] - 1))
    top = all.topk(2, -1).values
    sequences.append((out, new, at))
    answers.append(dict(prompt=ids, tokens=new, logprobs=[all[p, t].item() for p, t in zip(at, new)], margins=[(top[p, 0] - top[p, 1]).item() for p in at]))
    if questions:
        answers[-1]["question"] = questions[i]
if what != "chat":
    model.float()
    torch.backends.cuda.matmul.allow_tf32 = False
    for answer, (out, new, at) in zip(answers, sequences):
        all = logprobs(out)
        answer["float32"] = [all[p, t].item() for p, t in zip(at, new)]
json.dump(dict(dtype="FLOAT32" if what == "chat" else "BFLOAT16", answers=answers), open(os.path.join(folder, "answers.json"), "w"))
print(f"answers after {time.time() - start:.1f} s", flush=True)
