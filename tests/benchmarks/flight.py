"""Times an analysis in flight beside the plain prefill of the same model: `python tests/benchmarks/flight.py OUT.json`.

The model has the configuration of Llama-3.1-8B and random weights; planted Q, K and V stand in for the model's own in
every layer (see prefill.py), so that densities are those of real heads. All heads of all layers are analyzed while the
model runs: every theta, heat maps, kinds of heads, figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prefill import DENSE, LLAMA, Tensors, dense_backends, llama, prefill, replaced, tensors
from torch.nn.attention import sdpa_kernel

from anchorscope import AnchorParams, ModelSource, PromptInput, plan_analysis
from anchorscope.analysis.run import analyze_plan
from anchorscope.bench.environment import hardware
from anchorscope.capture import passes
from anchorscope.models.hook import intercept
from anchorscope.runs.environment import versions
from anchorscope.runs.life import RunOptions
from anchorscope.runs.progress import Progress


@contextlib.contextmanager
def planted_calls(given: Tensors) -> Iterator[None]:
    """What looks at calls of the model sees the planted tensors, which attention consumes beneath."""
    q, k, v = given

    def watch(model: Any, sink: Any) -> Any:
        return intercept(model, lambda call: sink(replace(call, q=q, k=k, v=v)))

    before, passes.intercept = passes.intercept, watch  # type: ignore[assignment]
    try:
        yield
    finally:
        passes.intercept = before


def measure(model: Any, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the prefill alone, and of the analysis with it."""
    given = tensors(n, args.fraction)
    ids = torch.randint(0, LLAMA["vocab_size"], (1, n), device="cuda")
    backends = dense_backends(given)
    fastest = min(backends, key=backends.__getitem__)
    with sdpa_kernel(DENSE[fastest]):
        with replaced(model, given):
            alone = [prefill(model, ids) / 1e3 for _ in range(2)]
        said: list[str] = []
        source = ModelSource(model, [PromptInput("planted", token_ids=tuple(ids[0].tolist()))], notify=said.append)
        begin = time.perf_counter()
        thetas = [float(t) for t in args.thetas.split(",")]
        plan = plan_analysis(
            source, thetas=thetas, params=AnchorParams(), figure_theta=thetas[0], diagnose=True, device="cuda"
        )
        planned = time.perf_counter() - begin
        stages: dict[str, float] = {}

        def progress(event: Progress) -> None:
            stages[event.stage] = time.perf_counter() - begin

        out = Path(tempfile.mkdtemp()) / "out"
        torch.cuda.reset_peak_memory_stats()
        with replaced(model, given), planted_calls(given):
            analyze_plan(plan, out, RunOptions(progress=progress))
        total = time.perf_counter() - begin
    written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    shutil.rmtree(out)
    return {
        "tokens": n,
        "layers": model.config.num_hidden_layers,
        "heads": len(plan.units),
        "thetas": thetas,
        "dense_backend": fastest,
        "prefill_seconds": min(alone),
        "plan_seconds": planned,
        "total_seconds": total,
        "stage_ends_at_seconds": stages,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "planned_bytes": plan.memory,
        "written_bytes": written,
        "planned_disk_bytes": plan.disk + plan.pictures,
        "said": said,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--lengths", default="131072")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of columns planted per kv head")
    parser.add_argument("--thetas", default="6,12")
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = llama(args.layers)
    rows = []
    for n in (int(x) for x in args.lengths.split(",")):
        rows.append(measure(model, n, args))
        print(json.dumps(rows[-1], indent=2), flush=True)
        record = {
            "command": " ".join(["python tests/benchmarks/flight.py", Path(args.out).name, *sys.argv[2:]]),
            "versions": versions(),
            "hardware": hardware(torch.device("cuda")),
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
