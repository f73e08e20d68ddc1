"""Collect what docs/benchmarks keeps from a GPU machine: `python tests/benchmarks/gpu_evidence.py OUT [--analyze-tokens
N]`.

1. the tests marked `gpu`, with their summary; 2. `analyze` on a planted dump of N tokens x 32 query heads through the
   Triton
kernels: time, peak device memory against the plan's estimate, and its numbers against the torch engine's on one head.
The timings of sparse against dense come from `anchorscope bench` itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[2]


def run_tests(folders: list[str], processes: int) -> dict[str, object]:
    """Run the tests marked `gpu` and keep pytest's own closing line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *folders]
    command += ["-n", str(processes)] if processes > 1 else []
    start = time.time()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(lines[-15:]))
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    return {
        "command": "pytest " + " ".join(command[3:]),
        "exit_code": result.returncode,
        "summary": lines[-1].strip("= "),
        "counts": counts,
        "failed": failed,
        "seconds": round(time.time() - start),
    }


def run_analyze(tokens: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> dict[str, object]:
    """Analyze a planted dump with the kernels and, for one head, with plain torch; compare."""
    from anchorscope import analyze, iter_profiles, plan_analysis, write_dump
    from anchorscope.planted import planted

    q, k, v = (x[0].cpu() for x in planted(tokens, heads, kv_heads, dim, device="cuda"))
    thetas = (6.0, 12.0)
    with tempfile.TemporaryDirectory() as folder:
        write_dump(f"{folder}/dump", [{"prompt": "planted", "layer": 0, "q": q, "k": k, "v": v, "scale": dim**-0.5}])
        settings = {"thetas": thetas, "figures": False}
        analyze(f"{folder}/dump", f"{folder}/warm", backend="triton", heads=[0], **settings)
        torch.cuda.reset_peak_memory_stats()
        plan = plan_analysis(f"{folder}/dump", thetas=thetas, backend="triton")
        start = time.time()
        analyze(f"{folder}/dump", f"{folder}/out", backend="triton", **settings)
        seconds = time.time() - start
        peak = torch.cuda.max_memory_allocated()
        start = time.time()
        analyze(f"{folder}/dump", f"{folder}/torch", backend="torch", heads=[0], **settings)
        torch_seconds = time.time() - start
        kernel = next(iter(iter_profiles(f"{folder}/out", heat=False)))
        plain = next(iter(iter_profiles(f"{folder}/torch", heat=False)))
        return {
            "tokens": tokens,
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "thetas": thetas,
            "seconds_all_heads_triton": round(seconds, 2),
            "seconds_one_head_torch_same_gpu": round(torch_seconds, 2),
            "peak_device_bytes": peak,
            "planned_bytes": plan.memory,
            "largest_recall_difference": float(abs(kernel.recall - plain.recall).max()),
            "largest_output_error_difference": float(abs(kernel.output_error - plain.output_error).max()),
            "kept_pairs_triton": kernel.kept_pairs.tolist(),
            "kept_pairs_torch": plain.kept_pairs.tolist(),
        }


def main() -> None:
    """Write gpu-tests.json into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--analyze-tokens", type=int, default=131072)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="folders of tests")
    args = parser.parse_args()
    evidence = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "tests": run_tests(args.tests, args.processes),
        "analyze": run_analyze(args.analyze_tokens),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu-tests.json").write_text(json.dumps(evidence, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(evidence, indent=2))


if __name__ == "__main__":
    main()
