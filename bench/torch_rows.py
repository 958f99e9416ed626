"""torch's bf16 matmul and its int4 weight-only matmul on the suite's layer shapes, timed as the suite times ours.

JSON rows on stdout; why there are no int4 rows, where there are none, on stderr.
"""

import json
import statistics
import sys
import time

import torch

SHAPES = [
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096),
    (8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600), (151936, 5120),
]
BATCHES = [1, 4, 8, 16, 64, 128, 256, 512, 4096]
HEAD_ROWS = 100_000  # a weight of more rows is a head: not for every token of a prompt
COLD_BYTES = 512 << 20
SAMPLE_SECONDS = 0.01
GROUP = 128
INNER_K_TILES = 8  # of the packed layout: columns must be a multiple of 16 times this


def bf16(out, cols):
    """One weight, and how x is multiplied with it."""
    weight = torch.randn(out, cols, device="cuda", dtype=torch.bfloat16)
    return lambda x: x @ weight.t()


def int4(out, cols):
    """The same for random 4-bit codes with a scale and a zero for each 128 columns of a row."""
    codes = torch.randint(0, 256, (out, cols // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, INNER_K_TILES)
    scales = torch.rand(cols // GROUP, out, 2, device="cuda").to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


FORMATS = {"bf16": (bf16, 2.0), "w4a16-g128": (int4, 0.5 + 4 / GROUP)}


def sample(products, x, calls, first):
    """Seconds of `calls` products with the weights in turn, and the wait for the last."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        y = products[(first + i) % len(products)](x)
    y[0, 0].item()
    return time.perf_counter() - start


def rows_of(name, out, cols):
    make, weight_bytes = FORMATS[name]
    copies = min(256, max(1, -(-COLD_BYTES // int(weight_bytes * out * cols))))
    products = [make(out, cols) for _ in range(copies)]
    for tokens in BATCHES:
        if out > HEAD_ROWS and tokens > 512:
            continue
        x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        sample(products, x, 1, 0)
        calls = 1
        for _ in range(2):
            calls = max(1, min(2000, round(SAMPLE_SECONDS / (sample(products, x, calls, 0) / calls))))
        times = [sample(products, x, calls, i * calls) / calls for i in range(7)]
        yield {
            "shape": f"{out}x{cols}", "tokens": tokens, "format": name,
            "median_ns": statistics.median(times) * 1e9,
        }


def main():
    rows, formats = [], list(FORMATS)
    for out, cols in SHAPES:
        for name in list(formats):
            try:
                rows.extend(rows_of(name, out, cols))
            except (AttributeError, RuntimeError) as e:
                if name == "bf16":
                    raise
                # Its operators are internal to torch: a version may lack them or want other arguments.
                print(f"no {name} rows from {out}x{cols} on: {e}", file=sys.stderr)
                formats.remove(name)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
