"""Where the time of the pipeline goes by kernel, on a GPU: `python tests/benchmarks/breakdown.py [BLOCKxSTEP ...]`.

Calls alternate with dense attention, so that the chip is about as warm as in `anchorscope bench`; each pair is waited
for. With `--out FILE` the figures are also written as JSON, with density and efficiency.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from anchorscope.bench.measures import count_pairs
from anchorscope.kernels import pipeline
from anchorscope.params import AnchorParams
from anchorscope.planted import planted

CUDA = torch.autograd.DeviceType.CUDA


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("grids", nargs="*", default=["64x8", "128x4", "128x16"])
    parser.add_argument("--n", type=int, default=65536)
    parser.add_argument("--theta", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    q, k, v = planted(args.n, device="cuda")
    for grid in args.grids:
        block, step = (int(x) for x in grid.split("x"))

        def call(block: int = block, step: int = step) -> pipeline.Attention:
            return pipeline.anchor_attention(q, k, v, theta=args.theta, block=block, step=step)

        times = trace(call, (q, k, v), args.repeats)
        params = AnchorParams(block=block, step=step)
        density = count_pairs(args.n, params, call().stripes).density
        speedup = times["dense"] / times["whole"]
        efficiency = speedup * density
        rows.append({"grid": grid, "density": density, "speedup": speedup, "efficiency": efficiency, "ms": times})
        print(
            f"n {args.n} {grid} theta {args.theta}: speed-up {speedup:.1f}, efficiency {efficiency:.3f}, "
            f"ms {shown(times)}",
            flush=True,
        )
    if args.out:
        about = {
            "command": f"python tests/benchmarks/breakdown.py {' '.join(args.grids)} --n {args.n} "
            f"--theta {args.theta:g} --repeats {args.repeats} --out {args.out.name}",
            "about": "medians of kernels, calls between dense ones; whole: first kernel's start to last one's end",
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def trace(call: Callable[[], object], qkv: tuple[torch.Tensor, ...], repeats: int) -> dict[str, float]:
    """Median milliseconds of every kernel of a call; `whole` is from its first kernel's start to its last one's end."""
    call()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(repeats):
            call()
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            torch.cuda.synchronize()
    events = sorted((e.time_range.start, e.time_range.end, e.name) for e in seen.events() if e.device_type == CUDA)
    times: dict[str, list[float]] = defaultdict(list)
    spans: list[tuple[float, float]] = []
    for start, end, name in events:
        dense = "cudnn" in name
        times["dense" if dense else name[:32]].append((end - start) / 1e3)
        if dense and spans:
            times["whole"].append((spans[-1][1] - spans[0][0]) / 1e3)
            spans = []
        elif not dense:
            spans.append((start, end))
    return {name: median(values) for name, values in times.items()}


def shown(times: dict[str, float]) -> str:
    """One line, longest first."""
    return ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(times.items(), key=lambda x: -x[1]))


if __name__ == "__main__":
    main()
