"""Synthetic Q, K, V with a known answer: the seeded workload on which the benchmarks are taken.

Orthonormal directions u_0 ... u_R are drawn. Every query carries u_0 and, for each period of `group` queries and each
query head, one of u_1 ... u_R. The first four keys carry u_0: a sink that every query looks at. For each r, about
`fraction * n` random keys of each kv head carry u_r with 0.6 to 1.0 of full strength: the stripes of all groups whose
queries carry u_r. Everything else is Gaussian noise. A full match scores about `strength` nats above the noise.

The known answer: with `group` equal to the block * step of the method and theta below `strength` minus the noise, the
stripes of a group are the planted columns of its direction, the strongest first (`planted_truth` returns them). The
same arguments give the same numbers on the same kind of device (CPU and CUDA draw differently).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anchorscope.errors import InputError
from anchorscope.shown import counted

SINK = 4


@dataclass(frozen=True)
class Plant:
    """What is planted, and how much of it.

    Attributes:
        n: tokens.
        heads, kv_heads, dim: query heads, kv heads and head dimension.
        seed: what the generator starts from.
        group: period, the number of consecutive queries that share one direction.
        directions: R, the number of stripe directions.
        fraction: share of the columns planted per direction and kv head.
        strength: score of a full match above the noise, in nats at the scale 1 / sqrt(dim).

    Raises:
        InputError: a size below 1, heads not a multiple of kv_heads, or dim not above `directions`.
    """

    n: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    seed: int = 0
    group: int = 2048
    directions: int = 16
    fraction: float = 0.01
    strength: float = 11.0

    def __post_init__(self) -> None:
        names = {"n": "length", "kv_heads": "kv heads", "dim": "head dimension", "group": "period"}
        for name in ("n", "heads", "kv_heads", "dim", "group", "directions"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"planted input needs {names.get(name, name)} of at least 1, not {value}")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{counted(self.heads, 'query head')} cannot share {counted(self.kv_heads, 'kv head')} evenly"
            )
        if self.dim <= self.directions:
            raise InputError(
                f"planted input needs a head dimension above its {self.directions} directions, not {self.dim}"
            )
        if not 0 <= self.fraction <= 1:
            raise InputError(f"the planted fraction of columns must lie between 0 and 1, not {self.fraction}")


class PlantedTruth(NamedTuple):
    """What was planted.

    Attributes:
        directions: (heads, ceil(n / group)) int64, the direction 1 ... R that the queries of a period carry.
        strength: (kv_heads, R + 1, n) float32, share of full strength with which a key carries each direction: 1 for
            direction 0 in the first four keys, 0.6 to 1.0 for stripes, 0 for noise.
    """

    directions: Tensor
    strength: Tensor

    def stripes(self, head: int, period: int) -> Tensor:
        """Columns, ascending (int64), that the queries of a period of a query head were built to look at."""
        kv_head = head // (len(self.directions) // len(self.strength))
        return self.strength[kv_head, int(self.directions[head, period])].nonzero()[:, 0]


def planted(
    *plant: Any, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, **parameters: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Random Q, K, V with planted stripes.

    Args:
        *plant, **parameters: a `Plant`, or the parameters of one.
        device, dtype: where and as what the result is; drawn in float32 on `device`, then rounded.

    Returns:
        q (1, heads, n, dim), k and v (1, kv_heads, n, dim).

    Raises:
        InputError: as `Plant`.
    """
    q, k, v, _ = _draw(_plant(*plant, **parameters), device)
    return q.to(dtype)[None], k.to(dtype)[None], v.to(dtype)[None]


def planted_truth(*plant: Any, device: torch.device | str = "cuda", **parameters: Any) -> PlantedTruth:
    """What `planted` plants for the same arguments (draws the whole input again: meant for tests).

    Raises:
        InputError: as `Plant`.
    """
    return _draw(_plant(*plant, **parameters), device)[3]


def _plant(*plant: Any, **parameters: Any) -> Plant:
    return plant[0] if plant and isinstance(plant[0], Plant) else Plant(*plant, **parameters)


def _draw(p: Plant, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, PlantedTruth]:
    # The order of the draws is part of the workload: another order is another input.
    g = torch.Generator(device=device).manual_seed(p.seed)
    n, dim, directions = p.n, p.dim, p.directions
    u = torch.linalg.qr(torch.randn(dim, directions + 1, device=device, generator=g))[0].T
    k = torch.randn(p.kv_heads, n, dim, device=device, generator=g) * 0.6
    q = torch.randn(p.heads, n, dim, device=device, generator=g) * 0.6
    amplitude = math.sqrt(p.strength * math.sqrt(dim))
    periods = math.ceil(n / p.group)
    chosen = torch.empty(p.heads, periods, dtype=torch.int64, device=device)
    for h in range(p.heads):
        q[h] += amplitude * u[0]
        chosen[h] = torch.randint(1, directions + 1, (periods,), device=device, generator=g)
        q[h] += amplitude * u[chosen[h]].repeat_interleave(p.group, 0)[:n]
    share = torch.zeros(p.kv_heads, directions + 1, n, device=device)
    for h in range(p.kv_heads):
        k[h, :SINK] += amplitude * u[0]
        share[h, 0, :SINK] = 1
        for r in range(1, directions + 1):
            at = torch.randint(0, n, (int(n * p.fraction),), device=device, generator=g)
            weight = 0.6 + 0.4 * torch.rand(len(at), 1, device=device, generator=g)
            # A column drawn twice takes its last weight; a plain indexed write would let threads race for it.
            draw = torch.full((n,), -1, dtype=torch.int64, device=device)
            draw.scatter_reduce_(0, at, torch.arange(len(at), device=device), "amax")
            at = (draw >= 0).nonzero()[:, 0]
            weight = weight[draw[at]]
            k[h, at] += amplitude * u[r] * weight
            share[h, r, at] = weight[:, 0]
    v = torch.randn(p.kv_heads, n, dim, device=device, generator=g)
    return q, k, v, PlantedTruth(chosen, share)
