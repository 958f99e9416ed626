"""Perplexity by transformers: hf_perplexity.py MODEL TEXT WINDOW WINDOWS (bfloat16, two threads; counted are the forward passes)"""
import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers

model, text, window, windows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
dtype = getattr(torch, os.environ.get("DTYPE", "bfloat16"))
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
m = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
ids = tokenizer(open(text, encoding="utf-8").read(), return_tensors="pt").input_ids
total = 0.0
start = time.perf_counter()
with torch.no_grad():
    for i in range(windows):
        x = ids[:, i * window : (i + 1) * window]
        logits = m(x).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
seconds = time.perf_counter() - start
perplexity = float(torch.tensor(total / (windows * (window - 1))).double().exp())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"version": transformers.__version__, "perplexity": perplexity, "seconds": seconds, "peak": peak}))
