"""torch's bf16 matmul on the suite's layer shapes, timed as the suite times ours; JSON rows on stdout."""

import json
import statistics
import time

import torch

SHAPES = [
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096),
    (8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600), (151936, 5120),
]
BATCHES = [1, 4, 8, 16, 64, 256]
COLD_BYTES = 512 << 20
SAMPLE_SECONDS = 0.01


def sample(weights, x, calls, first):
    """Seconds of `calls` products over weights in turn, and the wait for the last."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        y = x @ weights[(first + i) % len(weights)].t()
    y[0, 0].item()
    return time.perf_counter() - start


def main():
    rows = []
    for out, cols in SHAPES:
        copies = min(256, max(1, -(-COLD_BYTES // (2 * out * cols))))
        weights = [torch.randn(out, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for tokens in BATCHES:
            x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
            sample(weights, x, 1, 0)
            calls = 1
            for _ in range(2):
                calls = max(1, min(2000, round(SAMPLE_SECONDS / (sample(weights, x, calls, 0) / calls))))
            times = [sample(weights, x, calls, i * calls) / calls for i in range(7)]
            rows.append({
                "shape": f"{out}x{cols}", "tokens": tokens, "format": "bf16",
                "median_ns": statistics.median(times) * 1e9,
            })
        del weights
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
