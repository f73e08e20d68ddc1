"""The inputs that a bench times: planted ones, or the layers of a dump."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anchorscope.dumps import Dump, Entry
from anchorscope.errors import InputError
from anchorscope.planted import Plant, planted
from anchorscope.ranges import check_float32_sums
from anchorscope.shown import counted

if TYPE_CHECKING:
    from anchorscope.bench.request import BenchConfig

LENGTHS = {"cuda": (16384, 32768, 65536, 131072), "cpu": (2048, 4096, 8192)}
SHAPE = {"cuda": (32, 8, 128), "cpu": (4, 1, 64)}  # query heads, kv heads, head dimension
FACTS = ("source", "n", "heads", "kv_heads", "head_dim", "scale", "window", "softcap")

Tensors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One input to time, the unit of a bench: how to make its tensors, and what attention they need.

    Attributes:
        index: among the cases of the bench.
        source: "planted", or prompt and layer of a dump.
        n, heads, kv_heads, head_dim: tokens, query heads, kv heads, head dimension.
        scale, window, softcap: of its attention.
        make: draws or reads q (1, H, N, d), k and v (1, Hkv, N, d), on the device, in the dtype that is timed.
        making: bytes of memory that `make` takes at its peak, its result included.
    """

    index: int
    source: str
    n: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    make: Callable[[], Tensors] = field(repr=False)
    making: int = 0

    @property
    def attention(self) -> dict[str, Any]:
        """Scale, window and soft-cap, as keyword arguments."""
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it apart, as JSON values."""
        return {name: getattr(self, name) for name in FACTS}

    @property
    def stem(self) -> str:
        return f"case-{self.index:03d}"

    @property
    def work(self) -> int:
        """Pairs, about: most of the time goes into dense attention."""
        return self.n**2

    @property
    def label(self) -> str:
        return f"{self.n:,}"


def planted_cases(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> tuple[Case, ...]:
    """Planted input of every length.

    Raises:
        InputError: a shape that cannot be planted, or layers, which planted input does not have.
    """
    if config.layers is not None:
        raise InputError("layers can only be chosen from a dump; planted input has none")
    shape = zip((config.heads, config.kv_heads, config.head_dim), SHAPE[device.type], strict=True)
    heads, kv_heads, head_dim = (default if given is None else given for given, default in shape)
    if config.heads is not None and config.kv_heads is None:
        kv_heads = math.gcd(kv_heads, heads)
    for name, value in (("heads", heads), ("kv heads", kv_heads)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if heads % kv_heads:
        raise InputError(f"{counted(heads, 'query head')} cannot share {counted(kv_heads, 'kv head')} evenly")
    if head_dim < 17:
        raise InputError(f"planted input needs a head dimension of at least 17, not {head_dim}")
    period = config.params.group if config.period is None else config.period
    if period < 1:
        raise InputError(f"period must be at least 1, not {period}")

    def make(n: int) -> Callable[[], Tensors]:
        plant = Plant(n, heads, kv_heads, head_dim, config.seed or 0, period)
        return lambda: planted(plant, device=device, dtype=dtype)

    # Drawn in float32 (a product is made beside Q), with the strength of 17 directions at every key, then converted.
    converted = 0 if dtype == torch.float32 else (heads + 2 * kv_heads) * head_dim * dtype.itemsize
    drawn = 4 * ((heads + 2 * kv_heads) * head_dim + 17 * kv_heads) + converted
    making = max(4 * (2 * heads + kv_heads) * head_dim, drawn)
    scale = head_dim**-0.5
    return tuple(
        Case(i, "planted", n, heads, kv_heads, head_dim, scale, None, None, make(n), n * making)
        for i, n in enumerate(config.lengths or LENGTHS[device.type])
    )


def dump_cases(config: BenchConfig, dump: Dump, device: torch.device, dtype: torch.dtype) -> tuple[Case, ...]:
    """The chosen layers of a dump at every length.

    Raises:
        InputError: a layer that is missing or has no values, a prompt that is too short, shapes of planted input.
    """
    for name in ("heads", "kv_heads", "head_dim", "period", "seed"):
        if getattr(config, name) is not None:
            raise InputError(f"{name.replace('_', ' ')} belongs to planted input; a dump brings its own tensors")
    entries = [e for e in dump.entries if config.layers is None or e.layer in config.layers]
    known = sorted({e.layer for e in dump.entries})
    if missing := sorted(set(config.layers or ()) - set(known)):
        raise InputError(f"{dump.path} has no layer {missing[0]}; it has {', '.join(map(str, known))}")
    if not entries:
        raise InputError(f"{dump.path} holds no layers to time")
    if bare := [e for e in entries if not e.has_values]:
        raise InputError(
            f"{dump.path} holds no values for layer {bare[0].layer}, and attention needs V;"
            " capture it without --no-values"
        )
    wanted = [(entry, n) for entry in entries for n in config.lengths or (entry.tokens,)]
    for entry, n in wanted:
        if n > entry.tokens:
            raise InputError(
                f"length {n} is more than the {counted(entry.tokens, 'token')} of prompt {entry.prompt} in {dump.path}"
            )
    return tuple(_dump_case(i, dump, entry, n, device, dtype) for i, (entry, n) in enumerate(wanted))


def _dump_case(index: int, dump: Dump, entry: Entry, n: int, device: torch.device, dtype: torch.dtype) -> Case:
    def make() -> Tensors:
        layer = dump.load(entry)
        assert layer.v is not None  # checked before anything is timed
        check_float32_sums(
            layer.q, layer.k, layer.v, entry.scale, entry.softcap, dtype, f"{entry.prompt}, layer {entry.layer}"
        )
        q, k, v = (x[None, :, :n].to(device, dtype).contiguous() for x in (layer.q, layer.k, layer.v))
        return q, k, v

    elements = (len(entry.query_heads) + 2 * len(entry.kv_heads)) * n * entry.head_dim
    return Case(
        index,
        f"{entry.prompt}/layer {entry.layer}",
        n,
        len(entry.query_heads),
        len(entry.kv_heads),
        entry.head_dim,
        entry.scale,
        entry.window,
        entry.softcap,
        make,
        elements * dtype.itemsize + (entry.bytes if device.type == "cpu" else 0),
    )
