"""What `anchorscope bench` does not time, on a GPU: `python tests/benchmarks/limits.py PART [PART ...] --out FILE`.

Parts: `first` (first call with an empty and a filled compile cache), `identification` (alone, at 131,072 tokens),
`profile` (everything that the all-theta curves need against dense attention), `crossover` (from which length and
density sparse wins, on a busy GPU and called eagerly), `short` (what dense kernels reach where a query sees as few keys
as in an anchor region) and `million` (1,048,576 tokens in 20 heads: more than 2^31 elements, with sampled rows against
float64). Planted input (`anchorscope/planted.py`); dense is cuDNN. Writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from timing import dense_time, median, run_profile
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from anchorscope.bench.measures import count_pairs
from anchorscope.kernels import anchor, identify, pipeline
from anchorscope.params import AnchorParams
from anchorscope.planted import planted

FIRST = """
import time, torch
from anchorscope.kernels.pipeline import anchor_attention
from anchorscope.planted import planted
q, k, v = planted(16384, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
anchor_attention(q, k, v, theta=6.0)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first() -> dict[str, float]:
    """Seconds of the first call at 16,384 tokens in a fresh process: nothing compiled yet, then from the disk cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        runs = [
            subprocess.run([sys.executable, "-c", FIRST], env=env, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
    compiled, cached = (float(run.stdout) for run in runs)
    return {"seconds_compiling": compiled, "seconds_from_disk_cache": cached}


def identification() -> dict[str, float]:
    """Milliseconds of stage 2 alone at 131,072 tokens, theta 6, with its list."""
    q, k, v = planted(131072, device="cuda")
    state = anchor.anchor(q, k, v)
    return {"ms": median(lambda: identify.identify(state, k, theta=6.0, queries=131072, capacity=2**24))}


def profile() -> list[dict[str, float]]:
    """All-theta profile of 32 heads against dense attention."""
    rows = []
    for n in (65536, 131072):
        q, k, v = planted(n, device="cuda")
        dense = dense_time(q, k, v)
        ms = median(lambda q=q, k=k: run_profile(q, k), 3)
        rows.append({"n": n, "ms": ms, "dense_ms": dense, "times_dense": ms / dense})
    return rows


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """cuDNN's causal attention."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def wall(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call, host included, called back to back."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def crossover() -> list[dict[str, Any]]:
    """Time of the pipeline against dense attention by length and theta, each right behind the other."""
    params = AnchorParams()
    rows = []
    for n in (2048, 4096, 8192, 16384, 32768, 65536, 131072):
        q, k, v = planted(n, device="cuda")
        repeats = 5 if n > 40000 else 15
        for theta in (6.0, 9.0, 10.0, 11.0, 12.0, 14.0, float("inf")):

            def sparse(q=q, k=k, v=v, theta=theta) -> pipeline.Attention:
                return pipeline.anchor_attention(q, k, v, theta=theta)

            def dense(q=q, k=k, v=v) -> torch.Tensor:
                return dense_attention(q, k, v)

            density = count_pairs(n, params, sparse().stripes).density
            dense()
            times: list[tuple[float, float]] = []
            for _ in range(repeats):
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
                torch.cuda._sleep(2_000_000)  # the host queues both meanwhile
                marks[0].record()
                dense()
                marks[1].record()
                marks[2].record()
                sparse()
                marks[3].record()
                torch.cuda.synchronize()
                times.append((marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])))
            base, ours = (sorted(x)[repeats // 2] for x in zip(*times, strict=True))
            row = {
                "n": n,
                "theta": theta if theta < 1e9 else "inf",
                "density": density,
                "dense_ms": base,
                "pipeline_ms": ours,
                "speedup": base / ours,
            }
            if n <= 32768:
                row["speedup_eager"] = wall(dense, repeats) / wall(sparse, repeats)
            rows.append(row)
            print(row, flush=True)
    return rows


def short() -> list[dict[str, Any]]:
    """Dense causal attention, about 65,536 tokens in sequences of `n`: pairs a second relative to one sequence."""
    heat = planted(65536, device="cuda")
    rates: dict[str, float] = {}
    rows = []
    for n in (65536, 256, 512, 768, 1024, 2048, 2560):
        batch = 65536 // n
        shape = (batch, 32, n, 128), (batch, 8, n, 128), (batch, 8, n, 128)
        q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shape)
        pairs = batch * 32 * n * (n + 1) / 2
        row: dict[str, Any] = {"n": n, "mean_keys": (n + 1) / 2}
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            times = []
            for _ in range(9):
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                dense_attention(*heat)  # the chip as warm as in the bench
                with sdpa_kernel(backend):
                    marks[0].record()
                    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    marks[1].record()
                torch.cuda.synchronize()
                times.append(marks[0].elapsed_time(marks[1]))
            row[f"{name}_ms"] = sorted(times)[len(times) // 2]
            rate = pairs / row[f"{name}_ms"]
            row[f"{name}_rate"] = rate / (rates.setdefault(name, rate))
        rows.append(row)
        print(row, flush=True)
    return rows


def million() -> dict[str, Any]:
    """1,048,576 tokens, 20 query heads, 4 kv heads; rows and one group's stripes against float64."""
    n, heads, kv_heads, theta = 2**20, 20, 4, 6.0
    q, k, v = planted(n, heads=heads, kv_heads=kv_heads, device="cuda")
    assert q.numel() > 2**31
    result = pipeline.anchor_attention(q, k, v, theta=theta)
    offsets, group, block = result.stripes.offsets, 2048, 128
    groups = n // group
    worst_out = worst_lse = 0.0
    for head, row in ((0, 5), (0, 2048), (7, n // 2 + 77), (13, n - 2049), (19, n - 1), (19, 3 * 2048 + 1)):
        g = row // group
        at = head * groups + g
        kept = torch.zeros(n, dtype=torch.bool, device="cuda")
        kept[result.stripes.columns[int(offsets[at]) : int(offsets[at + 1])].long()] = True
        kept[:block] = True
        kept[max(g * group - block, 0) :] = True
        kept[row + 1 :] = False
        keys, values = (x[0, head // (heads // kv_heads)][kept].double() for x in (k, v))
        scores = keys @ q[0, head, row].double() * 128**-0.5
        exact, lse = scores.softmax(0) @ values, scores.logsumexp(0)
        worst_out = max(worst_out, float((result.out[0, head, row].double() - exact).abs().max()))
        worst_lse = max(worst_lse, abs(float(result.lse[0, head, row]) - float(lse)))
    head, g = heads - 1, groups - 1
    keys = k[0, -1].double()
    rows = q[0, head, g * group :].double()
    scores = rows @ torch.cat((keys[:block], keys[g * group - block :])).T * 128**-0.5
    scores.masked_fill_(~torch.ones_like(scores, dtype=torch.bool).tril(2 * block), float("-inf"))
    anchors = scores.amax(1).view(-1, block).mean(1)
    pooled = rows.view(-1, block, 128).mean(1)
    margin = (anchors[:, None] - pooled @ keys[: g * group - block].T * 128**-0.5).amin(0)
    wanted = margin <= theta
    wanted[:block] = False
    found = torch.zeros_like(wanted)
    at = head * groups + g
    found[result.stripes.columns[int(offsets[at]) : int(offsets[at + 1])].long()] = True
    wrong = (wanted != found) & (
        (margin - theta).abs() > 2.0**-7 * 128**-0.5 * pooled.norm(dim=1).max() * keys.norm(dim=1).max()
    )
    del scores, rows, keys, pooled
    torch.cuda.empty_cache()
    return {
        "n": n,
        "heads": heads,
        "kv_heads": kv_heads,
        "stripes": int(offsets[-1]),
        "largest_output_difference": worst_out,
        "largest_lse_difference": worst_lse,
        "stripes_of_last_group": int(found.sum()),
        "stripes_wrong_beyond_rounding": int(wrong.sum()),
        "stripes_flipped_within_rounding": int((wanted != found).sum()) - int(wrong.sum()),
        "ms": median(lambda: pipeline.anchor_attention(q, k, v, theta=theta), 3),
    }


def main() -> None:
    """Entry point."""
    parts = {f.__name__: f for f in (first, identification, profile, crossover, short, million)}
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=list(parts))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "command": f"python tests/benchmarks/limits.py {' '.join(args.parts)} --out {args.out.name}",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name in args.parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name]), flush=True)
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
