"""Float and activation-quantized checkpoints of lowbit, loaded by transformers and compressed-tensors.

    narrow_formats.py LOWBIT MODEL TEXT OUT [NAME ...]

For each case: `LOWBIT quantize MODEL` (a folder; calibrated on TEXT), the result loaded without a missing or an unexpected tensor, and
its logits on 64 tokens written to OUT/<case>/golden.safetensors. Then
`LOWBIT_JUDGED=OUT cargo test --release --test integration cli::golden::judged -- --nocapture` compares them with lowbit's.
transformers computes in f32, in bf16 where compressed-tensors' fp4 path knows nothing else. Needs torch, transformers, compressed-tensors.
"""

import json
import os
import shutil
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RTN = ["--method", "rtn"]
MIX = ["--module", "re:.*down_proj=w8a16:64", "--module", "re:.*o_proj=fp8-dynamic"]
CASES = {
    "w8a8-rtn": ["--scheme", "w8a8", *RTN],
    "w8a8": ["--scheme", "w8a8"],
    "w8a8-static": ["--scheme", "w8a8-static"],
    "fp8a16": ["--scheme", "fp8a16", *RTN],
    "fp8-dynamic-rtn": ["--scheme", "fp8-dynamic", *RTN],
    "fp8-dynamic": ["--scheme", "fp8-dynamic"],
    "fp8-static": ["--scheme", "fp8-static"],
    "fp8-block-rtn": ["--scheme", "fp8-block", *RTN],
    "fp8-block": ["--scheme", "fp8-block"],
    "nvfp4a16-rtn": ["--scheme", "nvfp4a16", *RTN],
    "nvfp4a16": ["--scheme", "nvfp4a16"],
    "nvfp4": ["--scheme", "nvfp4"],
    "mxfp4a16-rtn": ["--scheme", "mxfp4a16", *RTN],
    "mxfp4a16": ["--scheme", "mxfp4a16"],
    "kv-fp8": ["--scheme", "fp8-dynamic", "--kv-scheme", "fp8"],
    "kv-fp8-head": ["--scheme", "w8a16", "--group-size", "64", "--kv-scheme", "fp8-head"],
    "kv-int8": ["--scheme", "w8a8", "--kv-scheme", "int8"],
    "kv-int8-head": ["--scheme", "w8a8", "--kv-scheme", "int8-head"],
    "mixed": ["--scheme", "w4a16", "--group-size", "64", *MIX],
}


def judge(lowbit, model, text, folder, options):
    shutil.rmtree(folder, ignore_errors=True)
    command = [lowbit, "--quiet", "--device", "cpu", "quantize", model, "-o", folder, *options]
    calibration = ["--calib", text, "--samples", "32", "--seq-len", "256"]
    done = subprocess.run([*command, *calibration], capture_output=True, text=True)
    if done.returncode != 0:
        return f"not written: {done.stderr.strip()}"
    config = json.load(open(f"{folder}/config.json"))["quantization_config"]
    ids = AutoTokenizer.from_pretrained(model)(open(text).read()[-20000:], return_tensors="pt").input_ids[:, :64]
    bf16 = any(g["weights"]["num_bits"] == 4 and g["weights"]["type"] == "float" for g in config["config_groups"].values())
    dtype = torch.bfloat16 if bf16 else torch.float32
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {k: sorted(v) for k, v in info.items() if v}
    if wrong:
        return f"loaded with {wrong}"
    with torch.no_grad():
        logits = loaded.eval()(ids).logits[0].float()
    save_file({"ids": ids[0].clone(), "logits": logits.contiguous()}, f"{folder}/golden.safetensors", {"dtype": str(dtype)})
    verdict = "" if torch.isfinite(logits).all() else "not finite, "
    return f"{verdict}{config['format']}, {str(dtype)[6:]}"


if __name__ == "__main__":
    lowbit, model, text, out, *only = sys.argv[1:]
    torch.set_num_threads(1)
    for name, options in CASES.items():
        if not only or name in only:
            print(f"{name}: {judge(lowbit, model, text, os.path.join(out, name), options)}", flush=True)
