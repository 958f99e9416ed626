"""A model whose weights have no 4-bit history, out of one that came from a 4-bit GGUF: finetune.py MODEL OUT TEXT.jsonl...

    --steps 40 --batch 2 --length 512 --lr 5e-4 --seed 0 --dither 1

First every weight of the blocks' linears moves to a random place within its cell of the grid it lies on: by a uniform step of up to half
a cell, the cell being (max - min) / 15 over 32 columns, as Q4_1 has them (`--dither 0` leaves this out). No grid is left then, and the
model is a little worse. Training (AdamW, warm-up over five steps, then a cosine to zero; weights in f32, products in bf16) repairs that
and moves all parameters further. Windows are drawn from the texts in turn. Everything follows from the seed and the number of threads.

Printed as one JSON line: losses on windows of these texts that are not trained on (of the original, after the dither, after training), and
`off_grid`, the median distance of a weight to the grid of its 32 columns in cells (0 on the grid, 0.25 without one), before and after.
"""
import argparse
import json
import os
import resource
import shutil
import time

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors.torch import save_file

CELLS, COLUMNS = 15, 32
HELD_OUT = 4


def texts(tokenizer, files, length):
    """Per file its windows: the last four are kept from training. 2 MB of a file at most."""
    out = []
    for file in files:
        rows = [json.loads(line)["text"] for line in open(file, encoding="utf-8") if line.strip()]
        ids = tokenizer("\n\n".join(rows)[:2_000_000])["input_ids"]
        out.append(torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length))
    return out


def linears(model):
    """The matrices that are quantized later: those of the blocks."""
    for name, p in model.named_parameters():
        if ".layers." in name and p.ndim == 2 and p.shape[1] % COLUMNS == 0:
            yield p


def grid(weights):
    """Groups of 32 columns, the lowest of each and its cell."""
    groups = weights.reshape(-1, COLUMNS)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    return groups, low, ((high - low) / CELLS).clamp_min(1e-12)


@torch.no_grad()
def off_grid(model):
    """Of the first 32768 weights of every matrix. Extremes span the grid themselves and are left out."""
    away = []
    for p in linears(model):
        groups, low, cell = grid(p.detach().float().flatten()[: 1 << 15])
        place = (groups - low) / cell
        inner = place[(place > 0.5) & (place < CELLS - 0.5)]
        away.append((inner - inner.round()).abs())
    return torch.cat(away).median().item()


@torch.no_grad()
def dither(model, share, generator):
    for p in linears(model):
        groups, _, cell = grid(p.data)
        noise = torch.rand(groups.shape, generator=generator) - 0.5
        p.data = (groups + share * cell * noise).reshape(p.shape)


def loss_of(model, windows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=windows, labels=windows, use_cache=False).loss


@torch.no_grad()
def held_out(model, sets):
    return sum(loss_of(model, s[-HELD_OUT:]).item() for s in sets) / len(sets)


def train(model, sets, args, generator):
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = min(5, args.steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - warm))
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], [warm])
    model.train()
    for step in range(args.steps):
        windows = []
        for i in range(args.batch):
            s = sets[(step * args.batch + i) % len(sets)]
            windows.append(s[torch.randint(len(s) - HELD_OUT, (1,), generator=generator).item()])
        loss = loss_of(model, torch.stack(windows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}: loss {loss.item():.4f}", flush=True)
    model.eval()


def save(model, source, out):
    """Weights in bf16; configuration and tokenizer are those of the original, whose shapes these are."""
    os.makedirs(out, exist_ok=True)
    tied = model.config.tie_word_embeddings
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, os.path.join(out, "model.safetensors"), {"format": "pt"})
    for name in os.listdir(source):
        if name.endswith((".json", ".jinja")) and not name.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(out, name))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("text", nargs="+")
    for name, default in (("steps", 40), ("batch", 2), ("length", 512), ("seed", 0)):
        p.add_argument("--" + name, type=int, default=default)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--dither", type=float, default=1.0)
    args = p.parse_args()
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sets = texts(tokenizer, args.text, args.length)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    losses, grids = [held_out(model, sets)], [off_grid(model)]
    dither(model, args.dither, generator)
    losses.append(held_out(model, sets))
    train(model, sets, args, generator)
    losses.append(held_out(model, sets))
    model.to(torch.bfloat16)
    grids.append(off_grid(model))
    save(model, args.model, args.out)
    line = {"version": transformers.__version__, "seconds": time.perf_counter() - start, "steps": args.steps, "lr": args.lr}
    line.update(seed=args.seed, dither=args.dither, tokens=args.steps * args.batch * args.length, losses=losses, off_grid=grids)
    line["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(line))


main()
