"""llm-compressor's GPTQ, symmetric integers, static act-order: llmcompressor_gptq.py MODEL JSONL OUT BITS GROUP WINDOWS LENGTH

Windows as in `windows.py`. Counted is `oneshot`. One JSON line.
"""
import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import llmcompressor
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import calibration

model, source, out, bits, group, windows, length = sys.argv[1:4] + [int(v) for v in sys.argv[4:8]]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
rows, digest = calibration(AutoTokenizer.from_pretrained(model), source, windows, length)
m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * windows})
weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group, actorder="static")
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
start = time.perf_counter()
recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
llmcompressor.oneshot(model=m, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=windows)
seconds = time.perf_counter() - start
m.save_pretrained(out, save_compressed=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"version": llmcompressor.__version__, "seconds": seconds, "peak": peak, "windows": digest}))
