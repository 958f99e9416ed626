"""AutoRound, symmetric integers, GPTQ v1: autoround_tuning.py MODEL JSONL OUT BITS GROUP WINDOWS LENGTH ITERATIONS

Windows as in `windows.py`; else its defaults: signed gradients on rounding and ranges of a block at a time, batches of 8, bf16 where
the CPU has it. ITERATIONS is 200 by default there. `torch.compile`, on by default, is off: it changes time alone and needs a compiler.
Counted is `quantize_and_save`. One JSON line.
"""
import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import auto_round
import torch
from transformers import AutoTokenizer
from windows import calibration

model, source, out = map(os.path.abspath, sys.argv[1:4])
bits, group, windows, length, iterations = map(int, sys.argv[4:9])
# What it swaps out goes into the current folder.
os.chdir(os.path.dirname(out))
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
tokenizer = AutoTokenizer.from_pretrained(model)
rows, digest = calibration(tokenizer, source, windows, length)
tuner = auto_round.AutoRound(
    model,
    tokenizer,
    scheme=f"W{bits}A16",
    group_size=group,
    sym=True,
    dataset=list(torch.tensor(rows).split(8)),
    nsamples=windows,
    seqlen=length,
    iters=iterations,
    device_map="cpu",
    enable_torch_compile=False,
)
start = time.perf_counter()
# It names a folder below the one it is given.
_, folder = tuner.quantize_and_save(out + ".parts", format="auto_gptq")
seconds = time.perf_counter() - start
os.rename(folder, out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"version": auto_round.__version__, "seconds": seconds, "peak": peak, "windows": digest}))
