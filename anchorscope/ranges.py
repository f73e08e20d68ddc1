"""Which magnitudes of Q, K and V float32 can measure: refuse scores that overflow, compute extreme heads in float64.

Finite Q and K can have scores that float32 cannot hold; softmax of such scores is NaN or an arbitrary choice. All
commands and functions that make scores ask here, so all refuse with the same sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anchorscope.errors import InputError

# Margins are differences of two scores and kernels count in powers of two (a factor of 1.44): room for both.
SCORE_LIMIT = float(torch.finfo(torch.float32).max) / 4
# float32 holds scores up to here to a thousandth of a nat; beyond it differences of scores fade.
FLOAT32_SCORES = 2.0**12
# Sums and squares of numbers within this factor of one neither overflow nor vanish in float32.
FLOAT32_RANGE = 2.0**60
_CHUNK = 1 << 21
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def overflowing_head(q: Tensor, k: Tensor, kv_rows: Sequence[int], scale: float) -> tuple[int, float] | None:
    """The first query head with a score that float32 cannot hold, and its largest score (nats, absolute).

    The raw score counts, before a soft-cap. A bound on all of a head's scores settles ordinary heads; the scores
    themselves are computed, in float64, only where it is exceeded.

    Args:
        q: (H, N, d) queries.
        k: (Hkv, N, d) keys.
        kv_rows: for each row of `q`, the row of `k` it reads.
        scale: softmax scale.
    """
    peak_q, peak_k = _peaks(q), _peaks(k)
    for row, kv in enumerate(kv_rows):
        if abs(scale) * peak_q[row] * peak_k[kv] * q.shape[-1] <= SCORE_LIMIT:
            continue
        if _norm_bound(q[row], k[kv], scale) <= SCORE_LIMIT:
            continue
        largest = _largest_score(q[row], k[kv], scale)
        if not largest <= SCORE_LIMIT:
            return row, largest
    return None


def overflow_sentence(head: str, largest: float) -> str:
    """The one sentence for scores that float32 cannot hold."""
    return (
        f"the attention scores of {head} reach {largest:.1e} nats, which float32 cannot compare"
        f" (at most {SCORE_LIMIT:.1e}): check its scale, queries and keys, or leave it out"
    )


def working_dtype(q: Tensor, k: Tensor, v: Tensor | None, scale: float, softcap: float | None = None) -> torch.dtype:
    """The arithmetic one head needs: float32, or float64 where float32 would lose differences, overflow or vanish.

    Args:
        q, k, v: (N, d) queries, keys and values of the head; v may be None.
        scale: softmax scale.
        softcap: logit soft-cap in nats, or None.

    Raises:
        InputError: scores that overflow float32, NaN or infinity in a tensor, a scale or soft-cap that is not a
            positive finite number.
    """
    return working_dtypes(q[None], k[None], None if v is None else v[None], (0,), scale, softcap)[0]


def working_dtypes(
    q: Tensor, k: Tensor, v: Tensor | None, kv_rows: Sequence[int], scale: float, softcap: float | None = None
) -> list[torch.dtype]:
    """`working_dtype` of every head of q (H, N, d), which read the rows `kv_rows` of k and v (Hkv, N, d).

    Raises:
        InputError: as `working_dtype`.
    """
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive finite number, not {value!r}")
    peaks = {name: _peaks(x) for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    for name, found in peaks.items():
        if not all(map(math.isfinite, found)):
            raise InputError(f"{name} holds NaN or infinity")
    if overflowing := overflowing_head(q, k, kv_rows, scale):
        raise InputError(overflow_sentence("this head", overflowing[1]))
    needed = []
    for row, kv in enumerate(kv_rows):
        others = [values[kv] for name, values in peaks.items() if name != "q"]
        magnitudes = [x for x in (peaks["q"][row], *others, scale, softcap) if x]
        plain = all(1 / FLOAT32_RANGE <= x <= FLOAT32_RANGE for x in magnitudes) and (
            scale * peaks["q"][row] * peaks["k"][kv] * q.shape[-1] <= FLOAT32_SCORES
            or _norm_bound(q[row], k[kv], scale) <= FLOAT32_SCORES
        )
        needed.append(torch.float32 if plain else torch.float64)
    return needed


def check_float32_sums(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, dtype: torch.dtype, where: str
) -> None:
    """Refuse a layer that kernels in `dtype`, summing in float32, cannot compute.

    Args:
        q, k, v: (H, N, d), (Hkv, N, d), (Hkv, N, d).
        scale, softcap: of the layer; soft-cap in nats or None.
        dtype: what the kernels get.
        where: prompt and layer, for the message.

    Raises:
        InputError: a number outside what the kernels' arithmetic holds.
    """
    most = min(FLOAT32_RANGE, float(torch.finfo(dtype).max))
    for name, x in (("q", q), ("k", k), ("v", v)):
        peak = max(_peaks(x))
        if peak > most:
            raise InputError(
                f"{where}: {name} reaches {peak:.1e} and kernels in {_NAMES[dtype]} hold at most {most:.1e}:"
                " choose another --dtype, or leave the layer out with --layers"
            )
        if 0 < peak < 1 / FLOAT32_RANGE:
            raise InputError(
                f"{where}: {name} is at most {peak:.1e}, too small for kernels that sum in float32;"
                " leave the layer out with --layers"
            )
    for name, value in (("scale", scale), ("soft-cap", softcap)):
        if value is not None and not 1 / FLOAT32_RANGE <= value <= FLOAT32_RANGE:
            raise InputError(
                f"{where}: the {name} {value:g} is outside what kernels that sum in float32 hold;"
                " leave the layer out with --layers"
            )


def unit_scaled(v: Tensor) -> Tensor:
    """Values divided by a power of two where their sums or squares would leave float32: relative errors stay the same.

    Raises:
        InputError: v holds NaN or infinity.
    """
    peak = max(_peaks(v[None]), default=0.0)
    if not math.isfinite(peak):
        raise InputError("v holds NaN or infinity")
    if not peak or 1 / FLOAT32_RANGE <= peak <= FLOAT32_RANGE:
        return v
    return (v.double() / 2.0 ** math.frexp(peak)[1]).float()


def _peaks(x: Tensor) -> list[float]:
    """Largest absolute value of each row of x (H, N, d)."""
    low, high = torch.aminmax(x.flatten(1), dim=1)
    return torch.maximum(low.abs(), high.abs()).double().tolist()


def _norm_bound(q: Tensor, k: Tensor, scale: float) -> float:
    """No score of a head is larger in absolute value: |scale| * largest |q_i| * largest |k_j|."""
    norms = [float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max()) for x in (q, k)]
    return abs(scale) * norms[0] * norms[1]


def _largest_score(q: Tensor, k: Tensor, scale: float) -> float:
    """Largest |score| over the causal pairs of a head, in float64; stops at the first run of queries that overflows."""
    keys, largest = k.double().T, 0.0
    rows = max(1, _CHUNK // len(k))
    for first in range(0, len(q), rows):
        last = min(first + rows, len(q))
        scores = q[first:last].double() @ keys[:, :last]
        largest = max(largest, abs(scale) * float(scores.tril(first).abs().max()))
        if not largest <= SCORE_LIMIT:
            break
    return largest
