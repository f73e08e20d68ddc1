"""Sparse against dense attention, timed: `run_bench` measures, `bench` measures into a folder, `compare` compares."""

from __future__ import annotations

from anchorscope.bench.compare import Ratio, compare, load_result
from anchorscope.bench.output import check_out, save
from anchorscope.bench.request import BenchConfig, BenchPlan
from anchorscope.bench.rows import BenchResult
from anchorscope.bench.run import Bench, bench, run_bench

__all__ = [
    "Bench",
    "BenchConfig",
    "BenchPlan",
    "BenchResult",
    "Ratio",
    "bench",
    "check_out",
    "compare",
    "load_result",
    "run_bench",
    "save",
]
