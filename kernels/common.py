"""What the Triton kernels share: checked problem sizes, launch configurations, device helpers.

Launch configurations come from `launch.json`, keyed by op, architecture, bytes per element and padded head dimension,
so that results are bit-identical from run to run; nothing is tuned at run time (`tests/benchmarks/timing.py --write`
updates the file).
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry, Placement, geometry

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def interpreting() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1 before the import)."""
    return bool(triton.knobs.runtime.interpret)


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise ValueError unless the given tensors are 4-d, on one usable device and of one supported dtype."""
    first: Tensor | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        first = t if first is None else first
        if t.ndim != 4 or 0 in t.shape:
            raise ValueError(f"{name} must be 4-d (batch, heads, tokens, head_dim) and not empty, not {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, not {t.dtype}")
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}, but the first tensor {first.dtype} on {first.device}")
    if first is not None and first.device.type != "cuda" and not interpreting():
        raise ValueError(
            f"the Triton kernels need tensors on a GPU, not on {first.device}; use the torch back end, or set "
            "TRITON_INTERPRET=1 before starting Python to run them in the slow interpreter"
        )


def checked(q: Tensor, k: Tensor, v: Tensor | None = None, **place: Unpack[Placement]) -> Geometry:
    """Check one call's tensors, q (B, H, n, d) and k, v (B, Hkv, N, d), and its parameters.

    Raises:
        ValueError: shapes, dtypes, devices or parameters that do not fit.
    """
    check_tensors(q=q, k=k, v=v)
    geo = _fitting(geometry(q.shape, k.shape, **place))
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v {tuple(v.shape)} must have the shape of k {tuple(k.shape)}")
    return geo


def checked_pooled(q_bar: Tensor, k: Tensor, queries: int, **place: Unpack[Placement]) -> Geometry:
    """`checked` for stages that have the pooled queries (B, H, blocks, d) in place of the n queries."""
    check_tensors(k=k)
    batch, heads, blocks, dim = q_bar.shape
    geo = _fitting(geometry((batch, heads, queries, dim), k.shape, **place))
    if blocks != geo.blocks:
        raise ValueError(f"q_bar has {blocks} blocks, but {queries} queries in blocks of {geo.block} make {geo.blocks}")
    return geo


def _fitting(geo: Geometry) -> Geometry:
    if geo.dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {geo.dim} is above the kernels' limit of {MAX_HEAD_DIM}; use the torch back end")
    return geo


@lru_cache(maxsize=1)
def launch_table() -> dict:
    """The committed launch configurations (`launch.json`)."""
    return json.loads(Path(__file__).with_name("launch.json").read_text())


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Key of the launch table for a device: `sm90`, `sm80`, `sm89`, `sm100`, `gfx942` or `interpret`."""
    if device.type != "cuda":
        return "interpret"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        # The smaller chips of this family have the shared memory of sm_89.
        return "sm100" if major == 10 else "sm89"
    return "sm90" if major == 9 else ("sm80" if (major, minor) == (8, 0) else "sm89")


def launch(op: str, device: torch.device, itemsize: int, dim_pad: int) -> dict[str, int]:
    """Launch configuration of an op: tile sizes, `num_warps`, `num_stages`."""
    return launch_for(op, architecture(device), itemsize, dim_pad)


def launch_for(op: str, arch: str, itemsize: int, dim_pad: int) -> dict[str, int]:
    """Entry of the launch table: the given head dimension or the next larger one listed."""
    sizes = launch_table()[op][arch]["4" if itemsize == 4 else "2"]
    return dict(sizes[str(min(int(s) for s in sizes if int(s) >= dim_pad))])


def theta_tensor(theta: float | Tensor, geo: Geometry, device: torch.device) -> Tensor:
    """Thetas in nats as (B, H) float32: a number for all heads, or a (B, H) tensor. Raises ValueError."""
    if isinstance(theta, Tensor):
        if theta.numel() != 1 and theta.shape != (geo.batch, geo.heads):
            raise ValueError(f"theta must be a number or a (batch, heads) tensor, not of shape {tuple(theta.shape)}")
        return theta.to(device, torch.float32).expand(geo.batch, geo.heads).contiguous()
    if math.isnan(theta):
        raise ValueError("theta must not be NaN")
    return torch.full((geo.batch, geo.heads), float(theta), device=device, dtype=torch.float32)


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the registered op: under torch.compile, with autograd, or with fake tensors.

    Otherwise the launcher is called directly; dispatching costs the host as much time as a short prompt takes the GPU.
    """
    return torch.compiler.is_compiling() or any(
        t is not None and (type(t) is not Tensor or (t.requires_grad and torch.is_grad_enabled())) for t in tensors
    )


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def capped(qk, scale, cap, SOFTCAP: tl.constexpr):
    """Score in nats from the dot product qk: scale * qk, then cap * tanh(. / cap) with a soft-cap."""
    s = qk * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); saturates to +-1 without overflow trouble.
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / cap))))
    return s


@triton.jit
def accumulate(acc, row_sum, row_max, qk, v, scale, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
               HAS_V: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One step of the online softmax: add a tile of raw scores to the accumulator, running sum and running maximum.

    acc: (M, D); row_sum, row_max: (M,), the maximum in log2 units; qk: (M, N), -inf where MASKED hides a key;
    v: (N, D). SPLIT gives the tensor cores each weight as the sum of two 16-bit numbers, which makes the PV GEMM
    accurate to about 2^-17 whatever the 16-bit dtype.
    """
    if SOFTCAP:
        s = capped(qk, scale, cap, SOFTCAP) * LOG2E
        if MASKED:
            s = tl.where(qk == float("-inf"), float("-inf"), s)
        new = tl.maximum(row_max, tl.max(s, 1))
    else:
        s = qk
        new = tl.maximum(row_max, tl.max(qk, 1) * (scale * LOG2E))
    if MASKED:
        shift = tl.where(new == float("-inf"), 0.0, new)
    else:
        shift = new
    if SOFTCAP:
        w = tl.exp2(s - shift[:, None])
    else:
        w = tl.exp2(s * (scale * LOG2E) - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(w, 1)
    if HAS_V:
        acc = acc * rescale[:, None]
        half = w.to(v.dtype)
        acc = tl.dot(half, v, acc, input_precision=PRECISION)
        if SPLIT:
            acc = tl.dot((w - half.to(tl.float32)).to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, new
