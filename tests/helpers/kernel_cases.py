"""Problems for the kernel tests, from the smallest lengths to a GPU's, and what the tests share."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from anchorscope.kernels import reference
from anchorscope.kernels.geometry import Geometry, geometry
from anchorscope.kernels.types import Stripes

GPU = torch.cuda.is_available()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MARK = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU and not INTERPRET else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INF = math.inf
EPS = {F16: 2.0**-10, BF16: 2.0**-7, F32: 2.0**-20}


@dataclass(frozen=True)
class Case:
    """One problem; `theta` in nats. The defaults are small enough for the interpreter."""

    n: int = 150
    keys: int = 0  # 0: n, a whole prompt
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    dim: int = 16
    dtype: torch.dtype = F32
    block: int = 16
    step: int = 2
    init: int | None = None
    lookback: int | None = None
    window: int | None = None
    softcap: float | None = None
    theta: float | None = None  # None: the 0.3 quantile of the margins
    size: float = 1.0
    transposed: bool = False
    scale: float | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Keyword arguments of `anchor` and its siblings."""
        names = ("block", "step", "init", "lookback", "window", "softcap", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def geo(self) -> Geometry:
        """The geometry of the case."""
        q_shape = (self.batch, self.heads, self.n, self.dim)
        return geometry(q_shape, (self.batch, self.kv_heads, self.keys or self.n, self.dim), **self.params)

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q, k, v of the case."""
        gen = torch.Generator().manual_seed(seed)
        keys = self.keys or self.n

        def draw(heads: int, tokens: int, size: float) -> torch.Tensor:
            shape = (self.batch, tokens, heads, self.dim) if self.transposed else (self.batch, heads, tokens, self.dim)
            x = torch.randn(shape, generator=gen).mul(size).to(self.dtype).to(DEVICE)
            return x.transpose(1, 2) if self.transposed else x

        return draw(self.heads, self.n, self.size), draw(self.kv_heads, keys, 2.0), draw(self.kv_heads, keys, 1.0)

    def __str__(self) -> str:
        base = Case()
        parts = [
            f"{f}={str(v).removeprefix('torch.')}"
            for f in self.__dataclass_fields__
            if (v := getattr(self, f)) != getattr(base, f)
        ]
        return ",".join(parts) or "default"


def lengths(group: int, block: int) -> list[int]:
    """The lengths where the geometry changes, and primes between."""
    return [1, block - 1, block, block + 1, group - 1, group, group + 1, 3 * group, 2 * group + block + 1, 97, 131]


SMALL = [
    *[Case(n=n) for n in lengths(32, 16)],
    *[Case(n=n, dtype=F16) for n in (1, 16, 33, 97, 128)],
    *[Case(theta=t) for t in (-INF, INF, 0.0)],
    *[Case(theta=t, dtype=F16, heads=3, kv_heads=1, n=110) for t in (-INF, INF, None)],
    Case(heads=4, kv_heads=2, batch=2, n=70),
    Case(heads=2, kv_heads=2, n=100),
    Case(heads=3, kv_heads=1, step=3, n=160),
    Case(n=70, keys=150),
    Case(n=64, keys=160, dtype=F16),
    Case(n=1, keys=131),
    *[Case(window=w, theta=t) for w in (1, 7, 40, 500) for t in (None, INF)],
    Case(window=60, n=70, keys=150, dtype=F16),
    *[Case(softcap=5.0, theta=t) for t in (None, INF)],
    Case(softcap=5.0, window=60, dtype=F16),
    *[Case(init=i, lookback=b) for i, b in ((0, 0), (1, 0), (0, 5), (37, 50), (500, 3), (3, 500))],
    Case(dim=24, dtype=F16),
    Case(dim=40, n=80),
    Case(transposed=True, dtype=F16, heads=4, kv_heads=2),
    Case(block=20, step=2),
    Case(block=16, step=1),
    Case(block=8, step=40, n=345, heads=1),
    Case(block=200, step=3, n=150),
    Case(size=300.0),
    Case(size=300.0, dtype=F16),
    Case(scale=0.7),
]


def large() -> Iterator[Case]:
    """The grid for a GPU: every dtype, head dimension, kind of grouping and length, sharing few specialisations."""
    for dtype, dim in itertools.product((BF16, F16), (64, 80, 96, 128, 192, 256)):
        for heads, kv_heads in ((4, 4), (4, 1), (3, 1)):
            for n in (1, 127, 128, 129, 2047, 2048, 2049, 3001, 4096):
                yield Case(n, 0, heads, kv_heads, 1, dim, dtype, 128, 16, size=2.0)
    for block, step in ((32, 1), (32, 32), (64, 8), (128, 4), (64, 4), (128, 1)):
        for n, theta in itertools.product((31, 257, 1000, 2048, 3001), (-INF, None, 9.0, INF)):
            yield Case(n, 0, 4, 2, 1, 128, BF16, block, step, theta=theta, size=2.0)
    for n, keys in ((1, 4096), (300, 2500), (512, 4096), (2048, 4096), (100, 4001)):
        for window, cap in ((None, None), (700, None), (None, 20.0), (700, 20.0)):
            for theta in (None, INF):
                yield Case(n, keys, 4, 2, 2, 128, BF16, 64, 4, window=window, softcap=cap, theta=theta, size=2.0)
    for init, lookback in ((0, 0), (1, 0), (4, 64), (700, 1), (128, 4000), (4000, 128)):
        for n, theta in itertools.product((1000, 3001), (None, INF)):
            yield Case(n, 0, 4, 2, 1, 128, BF16, 64, 4, init=init, lookback=lookback, theta=theta)
    for dim, n, theta in itertools.product((64, 128, 256), (97, 1000, 2049), (None, INF)):
        yield Case(n, 0, 4, 2, 1, dim, F32, 128, 4, theta=theta)
    for size in (50.0, 2000.0):
        for dtype in (BF16, F16):
            yield Case(3001, 0, 4, 2, 1, 128, dtype, 64, 4, size=size)
    for transposed_n in (100, 1999, 4096):
        yield Case(transposed_n, 0, 8, 2, 2, 128, BF16, 64, 4, transposed=True)


# A GPU run splits into processes: ANCHORSCOPE_SHARD=2/8 takes every eighth case from the third on.
SHARD, SHARDS = (int(x) for x in os.environ.get("ANCHORSCOPE_SHARD", "0/1").split("/"))
CASES = (SMALL if INTERPRET else [*SMALL, *large()])[SHARD::SHARDS]


PROFILE = CASES[::3] if INTERPRET else [c for c in CASES if c.n < 200 or c.n in (300, 512, 2048, 3001)]


def float32_slack(s: torch.Tensor) -> float:
    """How far float32 sums of products may lie from the exact scores `s`."""
    return 1e-4 + 1e-6 * s.abs().max().item()


def keep_of(stripes: Stripes, geo: Geometry, q: torch.Tensor) -> torch.Tensor:
    """Kept mask (B, H, n, N) of listed stripes plus the anchor region; checks the list's form on the way."""
    batch, heads = q.shape[:2]
    offsets, columns = stripes.offsets.tolist(), stripes.columns
    assert offsets == [0, *itertools.accumulate(stripes.counts.flatten().tolist())]
    chosen = torch.zeros(batch * heads * geo.groups, geo.keys, dtype=torch.bool, device=q.device)
    for r in range(len(offsets) - 1):
        row = columns[offsets[r] : offsets[r + 1]].long()
        assert bool((row[1:] > row[:-1]).all()), "columns must ascend"
        chosen[r, row] = True
    chosen = chosen.view(batch, heads, geo.groups, geo.keys)
    assert not bool((chosen & ~reference.candidate_mask(geo, q.device)).any()), "a stripe that is no candidate"
    rows = torch.arange(geo.queries, device=q.device) // geo.group
    return reference.visible_mask(geo, q.device) & (reference.anchor_mask(geo, q.device) | chosen[:, :, rows])


def close(actual: torch.Tensor, expected: torch.Tensor, tol: float, what: str) -> None:
    """No NaN, and every element within tol * (1 + |expected|)."""
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    worst = ((actual.double() - expected) / (1.0 + expected.abs())).abs().max().item()
    assert worst <= tol, f"{what}: error {worst:.3g} above {tol:.3g}"


def listed(stripes: Stripes) -> torch.Tensor:
    """The columns that a list holds."""
    return stripes.columns[: int(stripes.offsets[-1])]


def middle(margin: torch.Tensor) -> float:
    """A theta that selects about a third of the candidates."""
    finite = margin[torch.isfinite(margin)]
    return finite.sort().values[int(0.3 * len(finite))].item() if len(finite) else 1.0
