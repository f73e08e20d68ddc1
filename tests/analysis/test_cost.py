"""What `analyze` may cost on two CPU cores: time per head, growth, memory. Slow: needs a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def measure(n, d, heads, thetas, block, step):
    """Seconds per head and peak resident bytes of a whole analysis, in a process of its own."""
    arguments = json.dumps([n, d, heads, thetas, block, step])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(result.stdout)
    print(f"N={n} d={d} heads={heads} thetas={thetas} groups={block}x{step}: {found}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("thetas", "limit"), [(3, 0.25), (41, 0.35)])
@pytest.mark.parametrize(("block", "step"), [(64, 4), (128, 16)])
def test_time_per_head(thetas, limit, block, step):
    assert measure(8192, 64, 6, thetas, block, step)["seconds_per_head"] <= limit


@pytest.mark.slow
def test_growth_is_at_most_quadratic():
    times = {n: measure(n, 64, 6, 3, 64, 4)["seconds_per_head"] for n in (2048, 4096, 8192, 16384)}
    assert times[16384] <= 4.4 * times[8192]
    assert times[8192] <= 4.4 * times[4096]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d", "thetas", "block", "step"), [(8192, 64, 3, 64, 4), (32768, 128, 41, 128, 16)])
def test_memory_is_stated_beforehand(n, d, thetas, block, step):
    """The plan's figure against the growth of the process, one head at a time."""
    from anchorscope.analysis.engine import workspace_bytes
    from anchorscope.params import AnchorParams

    idle = measure(1024, d, 1, thetas, block, step)["peak_bytes"]
    layer = 3 * n * d * 2
    stated = workspace_bytes(n, d, thetas, AnchorParams(block, step)) + layer
    small = workspace_bytes(1024, d, thetas, AnchorParams(block, step)) + 3 * 1024 * d * 2
    # The inputs exist twice here, once as made and once as read from the dump; they are written through one copy.
    used = measure(n, d, 1, thetas, block, step)["peak_bytes"] - idle + small - 3 * layer
    print(f"stated {stated / 1e6:.1f} MB, used {used / 1e6:.1f} MB")
    assert 0.7 * used <= stated <= 1.4 * used


@pytest.mark.slow
def test_memory_of_one_long_head():
    assert measure(32768, 64, 1, 3, 64, 4)["peak_bytes"] < 1.5 * 2**30
    assert measure(32768, 128, 1, 41, 128, 16)["peak_bytes"] < 1.5 * 2**30
