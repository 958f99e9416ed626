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

IDS = [3, 17, 41, 5, 5, 60, 2, 33, 9, 28, 51, 0, 63, 14, 7, 22]
CONFIGS = json.load(open("configs.json"))


def values(name: str, count: int) -> torch.Tensor:
    """Element i: a 32-bit mix of CRC-32 of the name and i, its upper 24 bits as a number from -1 to 1, times the tensor's scale."""
    x = (torch.arange(count, dtype=torch.int64) * 0x9E3779B1 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    unit = (x >> 8).to(torch.float32) / 8388608.0 - 1.0
    if "norm" in name:
        return 1.0 + 0.25 * unit
    if name.endswith("bias"):
        return 0.125 * unit
    if "embed_tokens" in name or name.endswith("gate.weight"):
        return unit
    return 0.25 * unit


def logits(config: dict) -> list:
    with tempfile.TemporaryDirectory() as folder:
        json.dump(config, open(f"{folder}/config.json", "w"))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        # As it would be on disk: one matrix an expert.
        model.save_pretrained(folder)
        names = load_file(f"{folder}/model.safetensors")
        made = {n: values(n, t.numel()).reshape(t.shape).contiguous() for n, t in names.items()}
        save_file(made, f"{folder}/model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    with torch.no_grad():
        out = model(torch.tensor([IDS]), use_cache=False).logits[0]
    # Every position, every third column.
    return [[round(v, 7) for v in row[::3].tolist()] for row in out]


print(json.dumps({"ids": IDS, "logits": {name: logits(c) for name, c in CONFIGS.items()}}))
