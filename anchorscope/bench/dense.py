"""The dense baselines: every causal attention back end that PyTorch brings here, behind one call.

`dense_backends` tries each one on the actual inputs and returns those that run, with K and V grouped (GQA native)
where the back end can, repeated beforehand where it cannot (then it says so; repeating is not timed).
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from anchorscope.devices import is_out_of_memory
from anchorscope.names import DENSE

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = DENSE
FLEX_TILE = 128  # side of a FlexAttention mask block


def default_names(device: torch.device, plain: bool = True) -> tuple[str, ...]:
    """Back ends tried when none are named; `plain` means neither sliding window nor soft-cap.

    `math` holds N x N scores and is never the fastest. On a CPU, `flash` is PyTorch's only tiled kernel, and compiling
    FlexAttention takes longer than the benchmark: it is tried only when nothing else can do it.
    """
    if device.type == "cuda":
        return "flash", "cudnn", "efficient", "flex"
    return ("flash",) if plain else ("flex",)


@dataclass(frozen=True)
class DenseBackend:
    """A dense back end that runs on the inputs.

    Attributes:
        name: one of `NAMES`.
        kv_repeated: K and V were repeated to the query heads, because it has no grouped form.
        first_ms: wall-clock time of its first call, compilation and repetition of K and V included.
        run: computes the output (B, H, N, d).
    """

    name: str
    kv_repeated: bool
    first_ms: float
    run: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Absent:
    """A back end that does not run on the inputs, and why."""

    name: str
    reason: str


def dense_backends(
    names: tuple[str, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[list[DenseBackend], list[Absent]]:
    """Try each named back end on the inputs.

    Args:
        names: out of `NAMES`.
        q: (B, H, N, d); `k`, `v`: (B, Hkv, N, d).
        scale: softmax scale.
        window: sliding window; only `flex` can.
        softcap: soft-cap of the scores in nats; only `flex` can.

    Returns:
        Back ends that ran once, in the order of `names`, and those that refused, with the reason.
    """
    present: list[DenseBackend] = []
    absent: list[Absent] = []
    for name in names:
        if name == "flex":
            attempts = [(False, lambda: _flex(q, k, v, scale, window, softcap))]
        elif window is not None or softcap is not None:
            absent.append(Absent(name, "has no sliding window" if softcap is None else "has no soft-cap"))
            continue
        else:
            attempts = [
                (repeated, functools.partial(_sdpa, name, q, k, v, scale, repeated))
                for repeated in ((False,) if q.shape[1] == k.shape[1] else (False, True))
            ]
        reason = ""
        for repeated, build in attempts:
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")  # sdpa explains a refusal in warnings, not in its error
                    start = time.perf_counter()
                    run = build()
                    run()
                    if q.is_cuda:
                        torch.cuda.synchronize(q.device)
                    first_ms = (time.perf_counter() - start) * 1e3
            except Exception as error:  # a back end refuses in many ways: RuntimeError, compiler errors, ...
                reason = "out of memory" if is_out_of_memory(error) else _reason(error, [str(w.message) for w in said])
            else:
                present.append(DenseBackend(name, repeated, first_ms, run))
                break
        else:
            absent.append(Absent(name, reason))
    return present, absent


def _reason(error: Exception, said: list[str]) -> str:
    """One short line: what sdpa warned about this back end, else what the error says."""
    told = [x.partition(" (Triggered internally")[0].strip() for x in said]
    told = [x for x in told if x and not x.endswith("because:") and "has been runtime disabled" not in x]
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    text = " ".join((told or lines or [type(error).__name__])[0].split())
    return text if len(text) <= 160 else text[:157] + "..."


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, repeated: bool) -> Callable[[], Tensor]:
    grouped = q.shape[1] != k.shape[1] and not repeated
    if repeated:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

    def run() -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)

    return run


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Every length compiles anew; past a handful, PyTorch would quietly run the uncompiled N x N version.
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Callable[[], Tensor]:
    mask = flex_mask(q.shape[2], window, q.device)

    attend = _compiled_flex()
    grouped = q.shape[1] != k.shape[1]
    score_mod = None if softcap is None else _cap(softcap)
    return lambda: attend(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=grouped)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def flex_mask(n: int, window: int | None, device: torch.device) -> Any:
    """FlexAttention's BlockMask for causal attention (with a window), built from tiles: no N x N tensor.

    PyTorch's `create_block_mask` evaluates the rule for every pair; here a tile is full, partial or absent by its
    corner positions.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tiles = -(-n // FLEX_TILE)
    first = torch.arange(tiles, device=device) * FLEX_TILE
    last = (first + FLEX_TILE - 1).clamp(max=n - 1)
    some = first[None, :] <= last[:, None]
    full = last[None, :] <= first[:, None]
    # A ragged last tile must stay partial: beyond N nothing may count as seen.
    full &= (first[None, :] + FLEX_TILE <= n) & (first[:, None] + FLEX_TILE <= n)
    if window is not None:
        some &= first[:, None] - last[None, :] < window
        full &= last[:, None] - first[None, :] < window

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        return seen if window is None else seen & (i - j < window)

    def lists(tile: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(tile.int(), dim=1, descending=True, stable=True).int()
        return tile.sum(1).int()[None, None], order[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *lists(some & ~full), *lists(full), BLOCK_SIZE=FLEX_TILE, mask_mod=rule, seq_lengths=(n, n)
    )
