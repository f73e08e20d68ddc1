"""What `analyze` takes: seconds per head and peak resident bytes of a whole run, each in a process of its own.

`python tests/benchmarks/analysis.py [N ...]` prints one line per length, number of thetas and kind of groups. Use a
quiet machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

MEASURE = """
import json, resource, sys, tempfile, time
import torch
from anchorscope import AnchorParams, analyze, write_dump
n, d, heads, thetas, block, step = json.loads(sys.argv[1])
g = torch.Generator().manual_seed(0)
u = torch.randn(d, generator=g)
q, k, v = (torch.randn(h, n, d, generator=g) for h in (heads, 1, 1))
q += 0.5 * u
k[:, :4] += 1.5 * u
k[:, torch.randint(0, n, (n // 30,), generator=g)] += 0.8 * u
full = {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}
settings = {"thetas": [20 * i / thetas for i in range(thetas)], "params": AnchorParams(block, step), "figures": False}
with tempfile.TemporaryDirectory() as folder:
    for name, tensors in (("warm", {key: x[:, :512] for key, x in full.items()}), ("dump", full)):
        write_dump(f"{folder}/{name}", [{"prompt": "p", "layer": 0, "scale": d**-0.5, **tensors}])
        start = time.perf_counter()
        analyze(f"{folder}/{name}", f"{folder}/{name}-out", **settings)
        seconds = (time.perf_counter() - start) / heads
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds_per_head": seconds, "peak_bytes": peak}))
"""


def measure(n: int, d: int, heads: int, thetas: int, block: int, step: int) -> dict[str, Any]:
    """Seconds per head and peak resident bytes of one analysis."""
    arguments = json.dumps([n, d, heads, thetas, block, step])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main(lengths: list[int]) -> None:
    """Measure every length with few and many thetas, narrow and wide groups."""
    for n in lengths:
        for thetas in (3, 41):
            for block, step in ((64, 4), (128, 16)):
                found = measure(n, 64, 6, thetas, block, step)
                print(
                    f"N={n} thetas={thetas} groups={block}x{step}: {found['seconds_per_head']:.3f} s per head,"
                    f" peak {found['peak_bytes'] / 1e6:.0f} MB"
                )


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or [2048, 8192, 16384])
