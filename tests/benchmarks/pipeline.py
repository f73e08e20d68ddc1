"""The pipeline by GPU time and by host time: `python tests/benchmarks/pipeline.py [--lengths N,N] [--out FILE]`.

GPU time: medians of CUDA events around whole calls that follow each other. Host time: how long `anchor_attention` takes
to return while the GPU is kept busy, so that no launch waits for it. To compare two states of the code on one card,
run the script once with each on PYTHONPATH, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
import triton

from anchorscope.kernels.pipeline import anchor_attention
from anchorscope.planted import planted

GROUPS = ((128, 16), (64, 8), (128, 4))


def events(call, repeats: int) -> float:
    """Median milliseconds of a call on the GPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def host(call, repeats: int) -> float:
    """Median microseconds until a call returns, with the GPU busy ahead of it."""
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        for _ in range(4):
            busy @ busy
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--theta", type=float, default=6.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for n in map(int, args.lengths.split(",")):
        q, k, v = planted(n, device="cuda")
        for block, step in GROUPS:

            def call(q=q, k=k, v=v, block=block, step=step) -> None:
                anchor_attention(q, k, v, theta=args.theta, block=block, step=step)

            for _ in range(3):
                call()
            torch.cuda.synchronize()
            rows.append(
                {
                    "n": n,
                    "groups": f"{block}x{step}",
                    "gpu_ms": events(call, 15),
                    "host_us": host(call, 25),
                }
            )
    found = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "input": f"planted, 32/8 heads, d 128, bf16, theta {args.theta:g}",
        "rows": rows,
    }
    text = json.dumps(found)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
