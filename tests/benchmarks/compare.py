"""Seconds per head of every method's sweep, on whatever device there is: `python tests/benchmarks/compare.py 32768`."""

from __future__ import annotations

import sys
import time

import torch

from anchorscope.compare import score_lineup
from anchorscope.methods import Head, line_up
from anchorscope.methods.registry import Contender


def main(n: int, d: int = 128) -> None:
    """Time each method alone, then all together, on a head with a sink and stripes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, d, generator=g) for _ in range(3))
    u = torch.randn(d, generator=g)
    q += 0.3 * u
    k[:2] += 1.5 * u
    k[torch.randint(0, n, (n // 50,), generator=g)] += 1.2 * u
    q, k, v = (x.to(device) for x in (q, k, v))

    def run(lineup: tuple[Contender, ...]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        score_lineup(Head(q, k, scale=d**-0.5), v, lineup)
        return time.perf_counter() - start

    lineup = tuple(c.at_length(n) for c in line_up())
    run(lineup[:1])
    for contender in lineup:
        print(f"{contender.label:22s} {run((contender,)):7.2f} s", flush=True)
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
    print(f"all at {n} tokens, d {d}: {run(lineup):.2f} s{peak} on {device}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
