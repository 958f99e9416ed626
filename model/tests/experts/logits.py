#!/usr/bin/env python3
"""Logits of tiny random models with experts, made by transformers: `python logits.py > logits.json`.

Made with torch 2.14.0 and transformers 5.17.0 on a CPU in f32. The weights are `values` of each tensor's name, which `experts.rs`
computes alike, so that no weights are stored. Every config is a released model's, with smaller sizes.
"""

import json
import tempfile
import zlib

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

IDS = [3, 17, 41, 5, 5, 60, 2, 33, 9, 28, 51, 0, 63, 14, 7, 22]
CONFIGS = json.load(open("configs.json"))


def mixed(name: str, count: int) -> torch.Tensor:
    """Element i: a 32-bit mix of CRC-32 of the name and i."""
    x = (torch.arange(count, dtype=torch.int64) * 0x9E3779B1 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def values(name: str, count: int) -> torch.Tensor:
    """The upper 24 bits as a number from -1 to 1, times the tensor's scale."""
    unit = (mixed(name, count) >> 8).to(torch.float32) / 8388608.0 - 1.0
    if "norm" in name:
        return 1.0 + 0.25 * unit
    if name.endswith("bias"):
        return 0.125 * unit
    if "embed_tokens" in name or name.endswith(("gate.weight", "router.weight", "sinks")):
        return unit
    if name.endswith("gate_up_proj"):
        # A few activations beyond the clamp of gpt-oss; with codes, below, many.
        return 0.5 * unit
    return 0.25 * unit


def mxfp4(name: str, shape: torch.Size) -> torch.Tensor:
    """A tensor `[experts, in, out]` from random codes and scales of 2^-3 to 2^-1, as transformers reads them."""
    experts, inner, out = shape
    blocks = (mixed(f"{name}_blocks", shape.numel() // 2) >> 24).reshape(experts, out, inner // 32, 16)
    scales = (124 + (mixed(f"{name}_scales", shape.numel() // 32) >> 24) % 3).reshape(experts, out, inner // 32)
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def logits(config: dict, codes: bool = False) -> list:
    with tempfile.TemporaryDirectory() as folder:
        json.dump(config, open(f"{folder}/config.json", "w"))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        # As it would be on disk: one matrix an expert.
        model.save_pretrained(folder)
        names = load_file(f"{folder}/model.safetensors")
        made = {n: values(n, t.numel()).reshape(t.shape).contiguous() for n, t in names.items()}
        if codes:
            packed = [n for n in names if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
            made.update({n: mxfp4(n, names[n].shape).contiguous() for n in packed})
        save_file(made, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    with torch.no_grad():
        out = model(torch.tensor([IDS]), use_cache=False).logits[0]
    # Every position, every third column.
    return [[round(v, 7) for v in row[::3].tolist()] for row in out]


made = {name: logits(c) for name, c in CONFIGS.items()}
made["gpt_oss_mxfp4"] = logits(CONFIGS["gpt_oss"], codes=True)
print(json.dumps({"ids": IDS, "logits": made}))
