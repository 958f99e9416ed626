"""llm-compressor's GPTQ, int4 symmetric groups: llmcompressor_gptq.py MODEL JSONL OUT GROUP WINDOWS LENGTH

The texts of JSONL joined by blank lines and cut into windows. Counted is `oneshot`. One JSON line.
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

model, source, out, group, windows, length = sys.argv[1:4] + [int(v) for v in sys.argv[4:7]]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
tokenizer = AutoTokenizer.from_pretrained(model)
m = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
text = "\n\n".join(json.loads(line)["text"] for line in open(source, encoding="utf-8"))
ids = tokenizer(text, return_tensors="pt").input_ids[0]
rows = [ids[i * length : (i + 1) * length].tolist() for i in range(windows)]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * windows})
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, actorder="static")
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
start = time.perf_counter()
recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
llmcompressor.oneshot(model=m, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=windows)
seconds = time.perf_counter() - start
m.save_pretrained(out, save_compressed=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"version": llmcompressor.__version__, "seconds": seconds, "peak": peak}))
