#!/usr/bin/env python3
"""Float codes, quantized inputs and mixes, loaded by transformers and compressed-tensors: logits beside lowbit's own.

    narrow_formats.py --lowbit BIN --logits BIN --model FOLDER --text TEXT --out DIR [--golden DIR] -o RECORD [CASE...]
    narrow_formats.py --render RECORD            the table
    narrow_formats.py --render RECORD --page docs/formats.md   put there

For each case: `lowbit quantize MODEL` (calibrated on TEXT) into DIR, the result loaded without a missing or an unexpected tensor, and its
logits on 64 tokens compared with those of the example `logits`. They stay in DIR/CASE/golden.safetensors, so that
`LOWBIT_JUDGED=DIR cargo test --release --test integration cli::golden::judged -- --nocapture` compares them again. --golden is a folder of
checkpoints of the same model that llm-compressor made; those with float codes or quantized inputs are judged, too.

transformers computes in f32, in bf16 where compressed-tensors' fp4 path knows nothing else. Where inputs are rounded, a last bit decides
on which side of a tie a value falls: `itself` is how far transformers' own logits move when the embedding does by its last bits (a
relative 1e-6, or half a step of bf16), and `alone` is the difference with the same weights and inputs left as they are, where their
scales are not stored. Needs torch, transformers, compressed-tensors; --render needs none of them.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

import page

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
GOLDEN = ["w8a8", "fp8-dynamic", "fp8-static", "fp8-block", "nvfp4a16", "mxfp4a16"]
# (bf16, inputs rounded) → distance allowed: rounding of the dtype, and what ties make of last bits. As in `tests/cli/golden.rs`.
LIMIT = {(False, False): 1e-4, (False, True): 2e-2, (True, False): 3e-2, (True, True): 1.5e-1}


def config_of(folder):
    return page.load(os.path.join(folder, "config.json"))


def groups(config):
    return list(config["quantization_config"]["config_groups"].values())


def by_transformers(folder, ids, nudge=0.0):
    """(logits, dtype, tensors missing or unexpected); `nudge` moves the embedding by a relative normal step of that size."""
    import torch
    from transformers import AutoModelForCausalLM

    bf16 = any(g["weights"]["num_bits"] == 4 and g["weights"]["type"] == "float" for g in groups(config_of(folder)))
    dtype = torch.bfloat16 if bf16 else torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    with torch.no_grad():
        if nudge:
            weight = model.get_input_embeddings().weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight.copy_(weight.float() * (1 + nudge * noise))
        logits = model.eval()(torch.tensor([ids])).logits[0].float()
    return logits, dtype, {k: sorted(v) for k, v in info.items() if v}


def by_lowbit(args, folder, ids):
    import torch

    out = os.path.join(args.out, "logits")
    subprocess.run([args.logits, folder, out, *map(str, ids)], check=True)
    with open(out, "rb") as f:
        return torch.frombuffer(bytearray(f.read()), dtype=torch.float32).reshape(len(ids), -1)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def inputs_alone(args, folder):
    """The same weights with inputs left as they are, where that leaves no tensor over; `None` elsewhere."""
    config = config_of(folder)
    rounded = [g for g in groups(config) if g.get("input_activations")]
    if not rounded or any(g["input_activations"]["dynamic"] is not True for g in rounded):
        return None
    for g in rounded:
        g["input_activations"] = None
    out = os.path.join(args.out, "alone")
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    for name in os.listdir(folder):
        if name != "config.json":
            os.symlink(os.path.abspath(os.path.join(folder, name)), os.path.join(out, name))
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f)
    return out


def compared(args, folder, ids, keep):
    """A row's measurements."""
    import torch
    from safetensors.torch import save_file

    theirs, dtype, wrong = by_transformers(folder, ids)
    if keep:
        save_file({"ids": torch.tensor(ids), "logits": theirs.contiguous()}, f"{folder}/golden.safetensors", {"dtype": str(dtype)})
    bf16 = dtype == torch.bfloat16
    inputs = any(g.get("input_activations") for g in groups(config_of(folder)))
    ours, limit = by_lowbit(args, folder, ids), LIMIT[bf16, inputs]
    row = {"format": config_of(folder)["quantization_config"]["format"], "dtype": str(dtype)[6:], "distance": distance(ours, theirs)}
    row["same_best"] = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    row["itself"] = distance(by_transformers(folder, ids, 2**-9 if bf16 else 1e-6)[0], theirs) if inputs else None
    alone = inputs_alone(args, folder)
    row["alone"] = distance(by_lowbit(args, alone, ids), by_transformers(alone, ids)[0]) if alone else None
    return {**row, "wrong": wrong, "limit": limit, "ok": not wrong and row["distance"] <= limit}


def made(args, name):
    """A case, quantized."""
    folder = os.path.join(args.out, name)
    shutil.rmtree(folder, ignore_errors=True)
    command = [args.lowbit, "--quiet", "--device", "cpu", "quantize", args.model, "-o", folder, *CASES[name]]
    subprocess.run([*command, "--calib", args.text, "--samples", "32", "--seq-len", "256"], check=True, stdout=subprocess.DEVNULL)
    return folder


def measure(args):
    import importlib.metadata

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    os.makedirs(args.out, exist_ok=True)
    with open(args.text, encoding="utf-8") as f:
        ids = AutoTokenizer.from_pretrained(args.model)(f.read()[-20000:])["input_ids"][:64]
    jobs = [("lowbit", name) for name in CASES] + [("llm-compressor", name) for name in GOLDEN if args.golden]
    rows = []
    for by, name in jobs:
        if args.case and name not in args.case:
            continue
        row = {"case": name, "made_by": by, "options": CASES[name] if by == "lowbit" else None}
        try:
            folder = made(args, name) if by == "lowbit" else os.path.join(args.golden, name)
            row |= compared(args, folder, ids, by == "lowbit")
        except (subprocess.CalledProcessError, OSError, RuntimeError, ValueError, LookupError) as e:
            row |= {"ok": False, "error": str(e)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    versions = {n: importlib.metadata.version(n) for n in ("transformers", "torch", "compressed-tensors")}
    return {**page.facts(args.lowbit), "versions": versions, "model": os.path.basename(os.path.normpath(args.model)), "tokens": len(ids), "rows": rows}


def render(record, file):
    versions = ", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items()))
    number = lambda v: "" if v is None else f"{v:.1e}"
    out = [f"{record['lowbit']}; {versions}; {record['model']}, {record['tokens']} tokens; {record['date']}. Record: `{os.path.relpath(file)}`.", ""]
    out += ["| checkpoint | made by | computed in | difference | limit | transformers against itself | inputs left alone | same best token |"]
    out += ["|---|---|---|---:|---:|---:|---:|---:|"]
    for r in record["rows"]:
        if "error" in r:
            lines = r["error"].splitlines() or ["no message"]
            out.append(f"| `{r['case']}` | {r['made_by']} | | fails: {lines[-1][:200]} | | | | |")
            continue
        over = " (over)" if r["distance"] > r["limit"] else " (tensors missing or left over)" if r["wrong"] else ""
        cells = [f"`{r['case']}`", r["made_by"], r["dtype"], number(r["distance"]) + over, f"{r['limit']:.0e}"]
        out.append("| " + " | ".join([*cells, number(r["itself"]), number(r["alone"]), f"{100 * r['same_best']:.0f} %"]) + " |")
    return "\n".join(out) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("case", nargs="*", metavar="CASE")
    for name in ("lowbit", "logits", "model", "text", "out", "golden"):
        p.add_argument("--" + name)
    p.add_argument("-o", "--output", metavar="RECORD")
    p.add_argument("--render", metavar="RECORD")
    p.add_argument("--page", help="with --render: put the table there")
    args = p.parse_args()
    if args.render:
        table = render(page.load(args.render), args.render)
        return page.place(args.page, "narrow-formats", table) if args.page else print(table, end="")
    missing = [n for n in ("lowbit", "logits", "model", "text", "out", "output") if not getattr(args, n)]
    if missing:
        p.error("needed: " + ", ".join("-o" if n == "output" else "--" + n for n in missing))
    record = measure(args)
    page.write(args.output, record)
    print(render(record, args.output), end="")
    return 0 if all(r["ok"] for r in record["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
