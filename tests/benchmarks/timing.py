"""Times launch configurations of the kernels on planted input: `python tests/benchmarks/timing.py OP [OP ...]`.

Each op is timed alone, medians of CUDA events; the Hopper kernels are compared with the portable ones on the way.
`--write` puts the fastest configuration into kernels/launch.json. Without `--only` the whole pipeline and the profile
follow, against dense attention. `--warm I/N` only compiles every N-th configuration, to fill Triton's cache from
several processes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from anchorscope.kernels import (
    anchor,
    anchor_hopper,
    common,
    identify,
    identify_hopper,
    pipeline,
    sparse,
    sparse_hopper,
)
from anchorscope.kernels.column_mass import column_mass
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.margins import margins
from anchorscope.planted import planted

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "anchor_hopper": [
        {"BN": n, "STAGES": s, "QUEUE": 2, "CONSUMER_REGS": r, "MAXNREG": 168}
        for n, s, r in ((128, 2, 240), (128, 2, 232), (64, 4, 240))
    ],
    "anchor": [
        {"BM": m, "BN": n, "num_warps": w, "num_stages": s}
        for m, n, w, s in (
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2),
            (128, 32, 4, 3), (128, 32, 8, 3),
        )
    ],
    "sparse_hopper": [
        {"BN": n, "STAGES": s, "QUEUE": 2, "CONSUMER_REGS": 208, "PRODUCER_REGS": 88, "MAXNREG": 168, "PINGPONG": t}
        for n, s, t in ((128, 2, 0), (128, 2, 1), (64, 4, 0), (64, 4, 1))
    ],
    "sparse": [
        {"BM": m, "BN": n, "num_warps": w, "num_stages": s}
        for m, n, w, s in (
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
            (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 4, 2), (256, 64, 8, 2), (256, 32, 8, 3),
        )
    ],
    "identify_hopper": [
        {"KEEP": k, "STAGES": s, "CONSUMER_REGS": 160, "MAXNREG": 128} for k, s in ((2, 3), (2, 2), (1, 4))
    ],
    "identify": [
        {"BC": c, "ROWS": r, "num_warps": w, "num_stages": s}
        for c, r, w, s in ((128, 128, 4, 2), (128, 128, 4, 1), (64, 128, 4, 2), (128, 64, 4, 1))
    ],
    "margins": [
        {"BC": c, "ROWS": r, "num_warps": w, "num_stages": s}
        for c, r, w, s in ((128, 64, 8, 1), (128, 64, 4, 1), (64, 64, 4, 1), (128, 128, 8, 1), (64, 128, 4, 1))
    ],
    "column_mass": [
        {"BC": c, "BQ": q, "num_warps": w, "num_stages": s}
        for c, q, w, s in ((128, 64, 4, 3), (128, 64, 4, 2), (128, 32, 4, 4), (64, 64, 4, 3), (256, 32, 8, 3))
    ],
    "dense_lse": [
        {"BM": m, "BN": n, "num_warps": w, "num_stages": s}
        for m, n, w, s in ((256, 64, 8, 3), (256, 64, 8, 2), (128, 64, 4, 2), (128, 32, 4, 3), (64, 64, 4, 3))
    ],
}  # fmt: skip


def median(call: Callable[[], object], repeats: int = 9) -> float:
    """Median milliseconds of a call by CUDA events, after a warm-up."""
    call()
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host queues the call
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def dense_time(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Median of cuDNN's causal attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return median(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5
        )


def configured(op: str) -> Iterator[dict[str, Any]]:
    """Set each variant in the launch table in turn."""
    table = common.launch_table()[op]
    before = json.dumps(table)
    for config in VARIANTS[op]:
        for arch in table.values():
            for dim in arch.get("2", {}):
                arch["2"][dim] = config
        yield config
    common.launch_table()[op] = json.loads(before)


def plan(ops: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every variant of every op, set in the launch table while it is out."""
    for op in ops:
        for config in configured(op):
            yield op, config


def write(best: dict[str, dict[str, Any]], dim: int, like: torch.Tensor) -> None:
    """Put configurations into the launch table, one line each."""
    path = Path(common.__file__).with_name("launch.json")
    table = json.loads(path.read_text())
    for op, config in best.items():
        table[op][common.architecture(like.device)]["2"][str(dim)] = config
    text = json.dumps(table, indent=2)
    path.write_text(
        re.sub(r"\{\s*(\"(?:BM|BC|BN|KEEP)\"[^{}]*?)\s*\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*", default=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="put the fastest of each op into kernels/launch.json")
    parser.add_argument("--only", action="store_true", help="launch configurations only, no pipeline")
    parser.add_argument("--quick", action="store_true", help="the pipeline at one theta and shape only")
    parser.add_argument("--n", type=int, default=131072)
    parser.add_argument("--theta", type=float, default=6.0)
    parser.add_argument("--warm", default="")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--step", type=int, default=16)
    args = parser.parse_args()
    part, parts = (int(x) for x in args.warm.split("/")) if args.warm else (0, 1)
    n = min(args.n, 8192) if args.warm else args.n
    q, k, v = planted(n, heads=args.heads, kv_heads=args.kv_heads, dim=args.dim, device="cuda")
    grid: dict[str, Any] = {"block": args.block, "step": args.step}
    state = anchor.anchor(q, k, v, **grid)
    stripes = identify.identify(state, k, theta=args.theta, queries=n, **grid)
    lse = state.lse
    room = stripes.columns.numel()
    out, final = (x.clone() for x in (state.out, state.lse))
    limit = torch.full(q.shape[:2], args.theta, device="cuda")
    fine = anchor.anchor(q[:, :4], k[:, :1], None, precise=True, **grid)
    fit = common.checked(q, k, v, **grid)
    bits = identify._outputs(state.q_bar, fit)[0]
    calls: dict[str, Callable[[], object]] = {
        "anchor_hopper": lambda: anchor_hopper.anchor_hopper(q, k, v, fit),
        "anchor": lambda: anchor.portable(q, k, v, fit, False),
        "sparse_hopper": lambda: sparse_hopper.sparse_hopper(
            out, final, q, k, v, stripes.columns, stripes.offsets, fit
        ),
        "sparse": lambda: sparse.portable(out, final, q, k, v, stripes.columns, stripes.offsets, fit),
        "identify_hopper": lambda: identify_hopper.score_hopper(state.q_bar, state.a_bar, k, limit, bits, fit),
        "identify": lambda: identify.portable(state.q_bar, state.a_bar, k, limit, bits, fit),
        "margins": lambda: margins(fine, k[:, :1], queries=n, **grid),
        "column_mass": lambda: column_mass(q[:, :4], k[:, :1], lse[:, :4], **grid),
        "dense_lse": lambda: dense_lse(q[:, :4], k[:, :1], None),
    }
    fastest: dict[str, tuple[float, dict[str, Any]]] = {}
    for number, (op, config) in enumerate(plan(args.ops)):
        if args.warm and number % parts != part:
            continue
        try:
            if args.warm:
                calls[op]()
                continue
            ms = median(calls[op])
        except Exception as error:  # a configuration that does not fit the chip is a result too
            print(f"{op:12s} {config} failed: {str(error)[:90]}", flush=True)
            continue
        print(f"{op:12s} {n:7d} {ms:8.3f} ms  {config}", flush=True)
        if ms < fastest.get(op, (float("inf"), {}))[0]:
            fastest[op] = ms, config
        if op == "sparse_hopper":
            (a, b), (c, d) = ((state.out.clone(), state.lse.clone()) for _ in range(2))
            sparse_hopper.sparse_hopper(a, b, q, k, v, stripes.columns, stripes.offsets, fit)
            sparse.portable(c, d, q, k, v, stripes.columns, stripes.offsets, fit)
            print(
                f"    from the portable kernel: out {(a - c).abs().max():.2g}, lse {(b - d).abs().max():.2g}",
                flush=True,
            )
        if op == "anchor_hopper":
            with_names = zip(
                ("out", "lse", "q_bar", "a_bar"), calls[op](), anchor.portable(q, k, v, fit, False), strict=True
            )
            worst = {name: f"{(x.float() - y.float()).abs().max().item():.2g}" for name, x, y in with_names}
            print("    largest differences from the portable kernel:", worst, flush=True)
    if args.warm:
        return
    if args.write:
        write({op: config for op, (_, config) in fastest.items()}, args.dim, q)
    base = dense_time(q, k, v)
    print(f"stripes {room}, {torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN dense {base:.2f} ms")
    if args.ops and args.only:
        return
    for length in (16384, 32768, 65536, n):
        report(*(t[:, :, :length].contiguous() for t in (q, k, v)), theta=args.theta, grid=grid)
    if not args.quick:
        for length in (65536, n):
            x, y, z = (t[:, :, :length].contiguous() for t in (q, k, v))
            report_profile(x, y, dense_time(x, y, z))
        report(q, k, v, theta=12.0, grid=grid)
        for block, step in ((64, 8), (128, 4)):
            report(*(t[:, :, :65536].contiguous() for t in (q, k, v)), theta=6.0, grid={"block": block, "step": step})
        for heads, kv_heads, dim in ((16, 4, 64), (16, 8, 256)):
            other = planted(65536, heads=heads, kv_heads=kv_heads, dim=dim, device="cuda")
            report(*other, theta=6.0, grid=grid)


def report(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, theta: float, grid: dict[str, Any]) -> None:
    """One line: the pipeline and its stages against dense attention on the same tensors."""
    n = q.shape[2]

    def stages() -> pipeline.Attention:
        return pipeline.anchor_attention(q, k, v, theta=theta, **grid)

    result = stages()
    kept = int(result.stripes.offsets[-1])
    counts = result.stripes.counts.double()
    group = grid["block"] * grid["step"]
    sizes = torch.full((counts.shape[-1],), float(group), dtype=torch.float64, device="cuda")
    sizes[-1] = n - group * (len(sizes) - 1)
    block = grid["block"]
    rows = torch.arange(n, device="cuda", dtype=torch.float64)
    first = (rows // group * group - block).clamp(min=0)
    region = (rows + 1 - first + first.clamp(max=block)).sum()
    pairs = (counts * sizes).sum() / counts[..., 0].numel() + region
    density = (pairs / (n * (n + 1) / 2)).item()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stages()
    memory = (torch.cuda.max_memory_allocated() - before - q.numel() * 2) / 2**30
    total = median(stages)
    base = dense_time(q, k, v)
    begin = time.perf_counter()
    for _ in range(10):
        stages()
    host = (time.perf_counter() - begin) / 10 * 1e3
    torch.cuda.synchronize()
    state = anchor.anchor(q, k, v, **grid)
    times = {
        "anchor": median(lambda: anchor.anchor(q, k, v, **grid)),
        "identify": median(lambda: identify.identify(state, k, theta=theta, queries=n, capacity=kept, **grid)),
        "sparse": median(lambda: sparse.sparse(q, k, v, state, result.stripes, inplace=True, **grid)),
    }
    parts = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    print(
        f"n {n} heads {q.shape[1]}/{k.shape[1]} d {q.shape[3]} {grid['block']}x{grid['step']} theta {theta}: "
        f"{total:.3f} ms "
        f"({parts}; host {host:.2f}), dense {base:.3f}, {base / total:.2f}x, density {density:.4f}, "
        f"efficiency {base / total * density:.3f}, stripes {kept}, extra {memory:.2f} GiB",
        flush=True,
    )


def run_profile(q: torch.Tensor, k: torch.Tensor) -> None:
    """Everything that the all-theta curves need, one kv head at a time."""
    ratio, n = q.shape[1] // k.shape[1], q.shape[2]
    for h in range(k.shape[1]):
        mine, keys = q[:, h * ratio : (h + 1) * ratio], k[:, h : h + 1]
        lse = dense_lse(mine, keys, None)[1]
        state = anchor.anchor(mine, keys, None, precise=True)
        margins(state, keys, queries=n)
        column_mass(mine, keys, lse)


def report_profile(q: torch.Tensor, k: torch.Tensor, dense: float) -> None:
    """One line: the profile against dense attention."""
    n = q.shape[2]
    total = median(lambda: run_profile(q, k), 3)
    print(f"profile of {q.shape[1]} heads, n {n}: {total:.1f} ms, {total / dense:.2f}x dense ({dense:.1f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
