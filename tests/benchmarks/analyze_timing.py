"""What `analyze`, `heads` and `calibrate` take on a GPU: `python tests/benchmarks/analyze_timing.py [PART ...]`.

Parts: `layer` (planted input, whole layers of 32/8 heads, with and without diagnostics), `calibrate` (many short heads,
three kinds of groups), `head` (one head, each of its steps by itself). The dump is written first and not timed. Every
figure is a wall-clock time after a warm-up; `--profile` adds the functions that took most. With `--keep DIR` the
results stay, and `--against DIR` compares them with those kept by another state of the code.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorscope import AnchorParams, analyze, iter_profiles, write_dump
from anchorscope.planted import planted
from anchorscope.runs import executors

THETAS = (6.0, 12.0)


def planted_dump(folder: Path, prompts: int, layers: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Path:
    """A dump whose layers are planted, each from a seed of its own."""

    def entries() -> Iterator[dict[str, Any]]:
        for prompt in range(prompts):
            for layer in range(layers):
                q, k, v = (
                    x[0].cpu() for x in planted(tokens, heads, kv_heads, dim, seed=1000 * prompt + layer, device="cuda")
                )
                yield {"prompt": f"p{prompt}", "layer": layer, "q": q, "k": k, "v": v, "scale": dim**-0.5}

    write_dump(folder, entries())
    return folder


class _Here:
    """A pool that works at once, in the caller's thread, where a profiler sees it."""

    def __init__(self, workers: int, initializer: Callable[[], None]) -> None:
        pass

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how: bool) -> None:
        """Nothing is left to do."""


@contextmanager
def timed(name: str, rows: list[dict[str, Any]], profiled: bool = False) -> Iterator[None]:
    """Add wall-clock seconds and the peak of device memory to `rows`; print them at once."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    profiler = cProfile.Profile()
    start = time.perf_counter()
    if profiled:
        profiler.enable()
    yield
    torch.cuda.synchronize()
    profiler.disable()
    seconds = time.perf_counter() - start
    rows.append({"what": name, "seconds": seconds, "peak_device_bytes": torch.cuda.max_memory_allocated()})
    print(f"{name}: {seconds:.3f} s, {rows[-1]['peak_device_bytes'] / 1e9:.2f} GB", flush=True)
    if profiled:
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(28)
        print("\n".join(line[:150] for line in text.getvalue().splitlines() if line.strip()), flush=True)


def layer(args: argparse.Namespace, root: Path, rows: list[dict[str, Any]]) -> None:
    """Whole layers: `analyze`, `heads`, and both in one command."""
    shape = args.tokens, args.heads, args.kv_heads, args.dim
    warm = planted_dump(root / "warm", 1, 1, 8192, *shape[1:])
    analyze(warm, root / "warm-out", thetas=THETAS, figures=False, diagnose=True)
    dump = planted_dump(root / "dump", 1, args.layers, *shape)
    name = f"{args.layers} layers of {args.tokens} x {args.heads}/{args.kv_heads} x {args.dim}"
    if not args.only_both:
        with timed(f"analyze, {name}", rows, args.profile):
            analyze(dump, root / "analyze", thetas=THETAS, figures=False)
    if not args.no_heads:
        with timed(f"analyze with diagnostics, {name}", rows, args.profile):
            analyze(dump, root / "both", thetas=THETAS, figures=False, diagnose=True)
    if args.figures:
        with timed(f"analyze with diagnostics and figures, {name}", rows, args.profile):
            analyze(dump, root / "all", thetas=THETAS, diagnose=True)


def calibrate(args: argparse.Namespace, root: Path, rows: list[dict[str, Any]]) -> None:
    """Heads of SmolLM2's shape on three prompts, three kinds of groups."""
    from anchorscope import calibrate as run

    dump = planted_dump(root / "small", 3, args.small_layers, 32768, 9, 3, 64)
    run(planted_dump(root / "small-warm", 2, 1, 4096, 9, 3, 64), root / "small-warm-out", figures=False)
    with timed(f"calibrate, {args.small_layers} layers x 9 heads x 3 prompts x 3 groups", rows, args.profile):
        run(dump, root / "calibrate", figures=False)


def head(args: argparse.Namespace, root: Path, rows: list[dict[str, Any]]) -> None:
    """The steps of one head, by themselves."""
    from anchorscope.analysis.accumulate import Accumulator, HeadShape
    from anchorscope.analysis.backends import resolve_backend
    from anchorscope.kernels.anchor import anchor
    from anchorscope.kernels.column_mass import column_mass
    from anchorscope.kernels.dense_lse import dense_entropy, dense_lse
    from anchorscope.kernels.diagonals import diagonals
    from anchorscope.kernels.late_mass import late_mass
    from anchorscope.kernels.margins import margins
    from anchorscope.kernels.sweep import bin_columns, sweep

    q, k, v = planted(args.tokens, args.heads, args.kv_heads, args.dim, device="cuda")
    some = args.heads // args.kv_heads
    q, k, v = q[:, :some], k[:, :1], v[:, :1]
    params, scale = AnchorParams(), args.dim**-0.5
    place: Any = {"block": params.block, "step": params.step, "scale": scale}
    made: dict[str, Any] = {}

    def step(name: str, call: Callable[[], Any]) -> Any:
        for again in range(2):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            made[name] = call()
            stop.record()
            torch.cuda.synchronize()
            if again:
                rows.append({"what": f"{some} heads: {name}", "seconds": start.elapsed_time(stop) / 1e3})
                print(f"{some} heads: {name}: {start.elapsed_time(stop):.2f} ms", flush=True)
        return made[name]

    state = step("anchor", lambda: anchor(q, k, v, precise=True, **place))
    step("dense_lse without V", lambda: dense_lse(q, k, None, scale=scale))
    out, lse = step("dense_lse with V", lambda: dense_lse(q, k, v, scale=scale))
    step("dense_entropy without V", lambda: dense_entropy(q, k, None, scale=scale))
    step("dense_entropy with V", lambda: dense_entropy(q, k, v, scale=scale))
    margin = step("margins", lambda: margins(state, k, queries=args.tokens, **place))
    mass = step("column_mass", lambda: column_mass(q, k, lse, **place))
    step("late_mass", lambda: late_mass(q, k, lse, mass, 256, (128, 1023), **place))
    step("diagonals", lambda: diagonals(q, k, lse, scale=scale))
    sums = Accumulator(HeadShape(args.tokens, args.dim, params, THETAS, scale), False, q.device, some)
    step("group sums", lambda: sums.add_groups(0, mass[0], margin[0]))
    sums.add_rows(0, torch.rand(some, 2, args.tokens, device="cuda"))
    step("results", sums.results)
    columns, bins = step("bin_columns", lambda: bin_columns(margin, torch.tensor(THETAS)))
    step("sweep", lambda: sweep(q, k, v, state, out, columns, bins, thetas=2, **place))
    made.clear()
    shape = HeadShape(args.tokens, args.dim, params, THETAS, scale)
    backend = resolve_backend("triton", "cuda")
    one = q[0, 0], k[0, 0], v[0, 0]
    if hasattr(backend, "engine"):
        backend.engine(*one, shape)
        with timed("one head through the engine", rows, args.profile):
            backend.engine(*one, shape)
    with timed("one head from the host", rows):
        [x.cpu().cuda() for x in one]


def differences(mine: Path, others: Path) -> dict[str, float]:
    """The largest difference of every number of the profiles and tables in two folders."""
    worst: dict[str, float] = {}
    for a, b in zip(iter_profiles(mine), iter_profiles(others), strict=True):
        for name, value in vars(a).items():
            if isinstance(value, np.ndarray):
                other = getattr(b, name)
                if value.shape != other.shape:
                    worst[f"{name} (number of entries)"] = max(
                        worst.get(f"{name} (number of entries)", 0.0), float(abs(value.size - other.size))
                    )
                    continue
                x, y = value.astype(np.float64), other.astype(np.float64)
                same = (x == y) | (np.isnan(x) & np.isnan(y))
                gap = np.where(same, 0.0, np.abs(np.where(same, 0.0, x) - np.where(same, 0.0, y)))
                worst[name] = max(worst.get(name, 0.0), float(gap.max(initial=0.0)))
    return worst


def diagnosed(mine: Path, others: Path) -> dict[str, float]:
    """The largest difference of every number of two diagnoses."""
    worst: dict[str, float] = {}
    reports = [json.loads((folder / "heads.json").read_text())["heads"] for folder in (mine, others)]
    for a, b in zip(*reports, strict=True):
        for name, value in a.items():
            if isinstance(value, float) and isinstance(b[name], float):
                worst[name] = max(worst.get(name, 0.0), abs(value - b[name]))
            elif value != b[name] and not isinstance(value, (float, list)):
                worst[f"{name} differs"] = worst.get(f"{name} differs", 0.0) + 1
    return worst


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["head", "layer", "calibrate"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--small-layers", type=int, default=30)
    parser.add_argument("--only-both", action="store_true", help="only analyze with diagnostics")
    parser.add_argument("--no-heads", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import triton

    if args.profile:
        executors.ThreadPoolExecutor = _Here  # type: ignore[misc, assignment]
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {
        "command": f"python tests/benchmarks/analyze_timing.py {' '.join(sys.argv[1:])}",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    root = Path(tempfile.mkdtemp())
    try:
        for part in args.parts:
            {"layer": layer, "calibrate": calibrate, "head": head}[part](args, root, rows)
            if args.out:
                args.out.write_text(json.dumps(about, indent=1) + "\n")
        if args.against:
            about["differences"] = {
                name: differences(root / name, args.against / name)
                for name in ("analyze", "both")
                if (root / name).exists() and (args.against / name).exists()
            }
            kinds = [folder / "both" / "heads" for folder in (root, args.against)]
            if all(folder.exists() for folder in kinds):
                about["differences"]["heads"] = diagnosed(*kinds)
            print(json.dumps(about["differences"], indent=1), flush=True)
        if args.keep:
            for name in ("analyze", "both"):
                if (root / name).exists():
                    shutil.copytree(root / name, args.keep / name)
        if args.out:
            args.out.write_text(json.dumps(about, indent=1) + "\n")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
