"""Sparse against dense attention, timed: `run_bench` measures, `save` writes, `compare` compares."""

from __future__ import annotations

from anchorscope.bench.compare import Ratio, compare, load_result
from anchorscope.bench.output import check_out, save
from anchorscope.bench.run import BenchConfig, BenchResult, run_bench

__all__ = ["BenchConfig", "BenchResult", "Ratio", "check_out", "compare", "load_result", "run_bench", "save"]
