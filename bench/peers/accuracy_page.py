"""docs/accuracy.md out of the records of `accuracy`: goals in plain words, and a table for each model and scheme."""
import math
import os
import statistics

# Which uniform scheme has the bits of a budget.
BASE = {"bits-4.25": "w4-g64"}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}


def ratio(ours, theirs):
    """Ratio of two means over the same windows with a 95 % interval: the paired windows as clusters (delta method), Student's t."""
    n, value = len(ours), sum(ours) / sum(theirs)
    if n < 2:
        return {"value": value, "low": 0.0, "high": None}
    variance = n / (n - 1) * sum((a - value * b) ** 2 for a, b in zip(ours, theirs)) / sum(theirs) ** 2
    half = t_critical(n - 1) * math.sqrt(variance)
    return {"value": value, "low": max(0.0, value - half), "high": value + half}


def t_critical(freedom):
    """The 97.5th percentile of Student's t: by its density, integrated (Simpson) and bisected."""
    c = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = lambda x: c * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    def below(t, steps=2000):
        h = t / steps
        inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, steps))
        return 0.5 + h / 3 * (density(0) + inner + density(t))

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.975 else (low, middle)
    return (low + high) / 2


def times(r):
    if r is None:
        return "–"
    high = "∞" if r["high"] is None else f"{r['high']:.2f}"
    return f"{r['value']:.2f}× [{r['low']:.2f}, {high}]"


def name(row):
    iterations = f" ({row['iterations']} iterations)" if "iterations" in row else ""
    return f"{row['tool']} `{row['method']}`{iterations}"


def said(parts):
    return "; ".join(f"{text} on {TEXTS[t]}" for t, text in parts.items())


def verdict(held):
    """`held`: text → whether the goal is met there."""
    if all(held.values()):
        return "met"
    return "missed" if not any(held.values()) else "missed on " + ", ".join(TEXTS[t] for t, ok in held.items() if not ok)


class Goals:
    """Rows of (goal, measured, verdict) from the rows of one record."""

    def __init__(self, record):
        self.rows = {(r["model"], r["tool"], r["method"], r["scheme"]): r for r in record["rows"]}
        self.main, self.models, self.out = record["main"], record["models"], []

    def get(self, model, tool, method, scheme):
        return self.rows.get((model, tool, method, scheme))

    def peers(self, model, scheme):
        return [r for (m, tool, _, s), r in self.rows.items() if (m, s) == (model, scheme) and tool != "lowbit"]

    def below(self, what, ours, theirs, limit, strict=False, extra=""):
        """KL of one row at most `limit` times (strictly below, where so said) another's."""
        if ours is None or theirs is None:
            return self.out.append((what, "not measured", "–"))
        parts = {t: ratio(s["window_means"], theirs["scores"][t]["window_means"]) for t, s in ours["scores"].items() if t in theirs["scores"]}
        holds = lambda v: v < limit if strict else v <= limit
        self.out.append((what, said({t: times(r) for t, r in parts.items()}) + extra, verdict({t: holds(r["value"]) for t, r in parts.items()})))

    def kl(self):
        best = lambda scheme: self.get(self.main, "lowbit", "best", scheme)
        for scheme in ("w4-g64", "w3-g64"):
            peer = self.get(self.main, "llm-compressor", "gptq", scheme)
            self.below(f"{self.main} {scheme}: KL of `best` at most 0.30× that of llm-compressor's GPTQ", best(scheme), peer, 0.30)
        for tool, method in (("gptqmodel", "gptaq"), ("gptqmodel", "gptaq-act-order"), ("auto-round", "signround")):
            peer = self.get(self.main, tool, method, "w4-g64")
            what = f"{self.main} w4-g64: KL of `best` below that of {name(peer) if peer else f'{tool} `{method}`'}"
            self.below(what, best("w4-g64"), peer, 1.0, strict=True)

    def two_bits(self):
        what = f"{self.main} w2-g64: `best` finite and usable (here: perplexity at most ten times the float model's)"
        r = self.get(self.main, "lowbit", "best", "w2-g64")
        if r is None:
            return self.out.append((what, "not measured", "–"))
        usable = lambda s: math.isfinite(s["mean"]) and s["perplexity"] <= 10 * s["reference_perplexity"]
        parts = {t: f"perplexity {s['perplexity']:.1f} (float {s['reference_perplexity']:.1f})" for t, s in r["scores"].items()}
        self.out.append((what, said(parts), verdict({t: usable(s) for t, s in r["scores"].items()})))

    def order(self, model, text):
        """`best` and the peers by rising KL."""
        rows = [r for r in [self.get(model, "lowbit", "best", "w4-g64"), *self.peers(model, "w4-g64")] if r and text in r["scores"]]
        return [(r["tool"], r["method"]) for r in sorted(rows, key=lambda r: r["scores"][text]["mean"])]

    def other_models(self):
        for model in (m for m in self.models if m != self.main):
            what = f"{model} w4-g64: KL of `best` below that of every other tool"
            best, peers, held, parts = self.get(model, "lowbit", "best", "w4-g64"), self.peers(model, "w4-g64"), {}, {}
            for t, s in best["scores"].items() if best else ():
                nearest = min((p for p in peers if t in p["scores"]), key=lambda p: p["scores"][t]["mean"], default=None)
                if nearest:
                    r = ratio(s["window_means"], nearest["scores"][t]["window_means"])
                    held[t], parts[t] = r["value"] < 1, f"{times(r)} of {name(nearest)}"
            self.out.append((what, said(parts), verdict(held)) if held else (what, "not measured", "–"))
            what = f"{model} w4-g64: the same order of `best` and the other tools as on {self.main}"
            held, parts = {}, {}
            for t in TEXTS:
                here, there = self.order(model, t), self.order(self.main, t)
                both = [x for x in there if x in here]
                if len(both) > 1:
                    held[t] = [x for x in here if x in both] == both
                    parts[t] = " < ".join(f"{tool} {method}" for tool, method in here)
            self.out.append((what, said(parts), verdict(held)) if held else (what, "not measured", "–"))

    def time(self):
        what = f"{self.main} w4-g64: `best` takes at most 3× the time of `gptq`"
        a, b = (self.get(self.main, "lowbit", method, "w4-g64") for method in ("best", "gptq"))
        if not (a and b):
            return self.out.append((what, "not measured", "–"))
        value = a["seconds"] / b["seconds"]
        self.out.append((what, f"{value:.2f}× ({a['seconds']:.0f} s, {b['seconds']:.0f} s)", "met" if value <= 3 else "missed"))

    def budget(self):
        for method in ("gptq", "best"):
            a, b = (self.get(self.main, "lowbit", method, s) for s in ("bits-4.25", "w4-g64"))
            what = f"{self.main}, `{method}`: KL of `--bits 4.25` at most 0.85× that of w4-g64 in no more bytes"
            extra = f"; {a['bytes']:,} bytes, w4-g64 {b['bytes']:,}" if a and b else ""
            self.below(what, a, b, 0.85, extra=extra)
            if a and b and a["bytes"] > b["bytes"]:
                self.out[-1] = (*self.out[-1][:2], "missed: more bytes")


def table(record, model, scheme):
    rows = [r for r in record["rows"] if (r["model"], r["scheme"]) == (model, scheme)]
    head = "| method | bits a weight | MiB | proxy loss |" + "".join(f" KL, {t} [95 %] | to llm-compressor | top-1 | perplexity |" for t in TEXTS.values())
    out = [head + " time | memory |", "|---|---:|---:|---:|" + "---:|---:|---:|---:|" * len(TEXTS) + "---:|---:|"]
    for r in rows:
        proxy = f"{r['proxy_loss']:.5f}" if "proxy_loss" in r else "–"
        cells = [name(r), f"{r['bits_per_weight']:.3f}", f"{r['bytes'] / 2**20:,.1f}", proxy]
        for t in TEXTS:
            s = r["scores"].get(t)
            if s is None:
                cells += ["–"] * 4
                continue
            i = s["mean_interval"]
            cells += [f"{s['mean']:.4f} [{i['low']:.4f}, {i['high']:.4f}]", times(s.get("ratio"))]
            cells += [f"{100 * s['top1_agreement']['value']:.1f} %", f"{s['perplexity']:.2f}"]
        out.append("| " + " | ".join([*cells, f"{r['seconds']:,.0f} s", f"{r['peak'] / 2**20:,.0f} MiB"]) + " |")
    return out


def section(record, file):
    s = record["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(record["versions"].items()))
    out = [f"## {record['cpu']}, {record['cores']} cores, {record['date']}", "", f"{versions}; instructions {', '.join(record['instructions'])}. Record: `{os.path.relpath(file)}`.", ""]
    out += [f"Calibration: {s['samples']} windows of {s['seq_len']} tokens. Scored: {s['windows']} windows of {s['kl_window']} tokens of each text.", ""]
    made = {r["binary"] for r in record["rows"] if r["tool"] == "lowbit"} | {x["eval_binary"] for r in record["rows"] for x in r["scores"].values()}
    if len(made) > 1:
        out += [f"Not all rows are of one build of lowbit: {', '.join(sorted(made))} (SHA-256 of the program, first digits).", ""]
    goals = Goals(record)
    for part in (goals.kl, goals.two_bits, goals.other_models, goals.time, goals.budget):
        part()
    out += ["### Goals", "", "| goal | measured | |", "|---|---|---|"]
    out += [f"| {what} | {measured} | {held} |" for what, measured, held in goals.out] + [""]
    held = [g[2] for g in goals.out]
    out += [f"Met: {held.count('met')} of {len(held)}; not measured: {held.count('–')}. The verdict is that of the estimate, not of its interval.", ""]
    for model in record["models"]:
        rows = [r for r in record["rows"] if r["model"] == model]
        if not rows:
            continue
        out += [f"### {model}", ""]
        float_ = {t: statistics.median(r["scores"][t]["reference_perplexity"] for r in rows if t in r["scores"]) for t in TEXTS if any(t in r["scores"] for r in rows)}
        out += [f"The float model's perplexity: {said({t: f'{v:.2f}' for t, v in float_.items()})}.", ""]
        tuned = record["finetuned"].get(model)
        if tuned:
            losses, away = tuned["losses"], tuned["off_grid"]
            out += [f"Made by `finetune.py`: weights moved to a random place within their 4-bit cell, then {tuned['steps']} steps over {tuned['tokens']:,} tokens.", f"Median distance to the 4-bit grid {away[0]:.3f} cells before, {away[1]:.3f} after (0.25 without a grid); loss on texts kept", f"from training {losses[0]:.3f} of the original, {losses[1]:.3f} moved, {losses[2]:.3f} trained.", ""]
        for scheme in dict.fromkeys(r["scheme"] for r in rows):
            of = f", beside the ratios of {BASE[scheme]}" if scheme in BASE else ""
            out += [f"#### {model}, {scheme}{of}", "", *table(record, model, scheme), ""]
    if record["failures"]:
        out += ["### Failed", ""] + [f"- {f['row']}: `{f['error'].splitlines()[-1][:200]}`" for f in record["failures"]] + [""]
    return out + ["Commands:", "", "```", *record["commands"], "```", ""]


INTRODUCTION = """# Accuracy beside other tools

Made by `bench/peers/accuracy --render`; not edited by hand. All tools start from the same float weights and calibrate on the same
tokens; every result is scored by the same `lowbit eval` against the float model.

- KL(float ‖ quantized) is in nats a token over the whole vocabulary, with an interval over windows; top-1 is the share of positions with the
  same first choice; perplexity is that of the same positions.
- Ratios are of KL to that of llm-compressor's GPTQ at the same bits, paired by window.
- Texts: WikiText-2's test set, and documents of the calibration's own set (C4) that it does not see.
- Bits a weight are those of the blocks' linears with scales; MiB those of all tensors. Embedding and head are kept by all.
- Proxy loss is the mean of `relative_error` in `quantize.json`. `best` does not aim at it (`docs/methods.md`).
- Time is of lowbit the whole process, of the others the call that quantizes.

How to repeat it: `bench/peers/README.md`. `$MODEL` is the float model of a row, `$ROW` its folder.
"""


def render(records, files):
    out = [INTRODUCTION]
    for record, file in zip(records, files):
        out += section(record, file)
    return "\n".join(out)
