"""GPTQModel's GPTAQ, symmetric integers, GPTQ v1: gptqmodel_gptaq.py MODEL JSONL OUT BITS GROUP WINDOWS LENGTH [act-order]

Windows as in `windows.py`. Its own defaults (no act-order, scales of a group when the solver reaches it), or columns by falling Hessian
diagonal with groups fixed before, as llm-compressor's static act-order. Counted is `quantize`. One JSON line.
"""
import json
import os
import resource
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from gptqmodel.version import __version__
from transformers import AutoTokenizer
from windows import calibration

model, source, out, bits, group, windows, length = sys.argv[1:4] + [int(v) for v in sys.argv[4:8]]
order = {"desc_act": True, "static_groups": True, "act_group_aware": False} if sys.argv[8:] == ["act-order"] else {}
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
rows, digest = calibration(AutoTokenizer.from_pretrained(model), source, windows, length)
config = QuantizeConfig(bits=bits, group_size=group, gptaq=GPTAQConfig(device="cpu"), **order)
m = GPTQModel.load(model, config, device="cpu")
start = time.perf_counter()
m.quantize([{"input_ids": ids, "attention_mask": [1] * length} for ids in rows], batch_size=1)
seconds = time.perf_counter() - start
m.save(out)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"version": __version__, "seconds": seconds, "peak": peak, "windows": digest}))
