"""The Triton back end of `analyze`: the kernels measure whole layers, and `Accumulator` adds up what they find.

The heads of a layer are measured in batches (`anchorscope.runs.batches`), so that memory is bounded. What is found of
a head does not depend on the heads beside it: every kernel works through one query head by itself, sums between
programs are of integers or of one head, and margins are made with one query head per kv head at a time. So an
interrupted run, or several GPUs, end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anchorscope.analysis.accumulate import Accumulator, HeadShape, float32_floor
from anchorscope.analysis.engine import profile_head
from anchorscope.heads.layer import Sought
from anchorscope.kernels.anchor import anchor
from anchorscope.kernels.column_mass import column_mass
from anchorscope.kernels.dense_lse import dense_entropy, dense_lse
from anchorscope.kernels.margins import margins_apart
from anchorscope.kernels.sweep import bin_columns, sweep
from anchorscope.params import AnchorParams
from anchorscope.profiles import Measured
from anchorscope.ranges import working_dtypes
from anchorscope.runs.batches import batches, heads_at_once, on_device
from anchorscope.runs.progress import Cancelled

Also = Callable[[Sought], None]
_SLICE_BYTES = 1 << 30  # of `Accumulator`, besides


def layer_workspace(tokens: int, head_dim: int, thetas: int, params: AnchorParams, heads: int, inputs: int) -> int:
    """Bytes that measuring a layer takes on the device, about.

    Per (head, group, key) a batch holds margins and, at most, the columns of every group and what sorts them, later
    masses and what `Accumulator` adds up at a time; besides two float32 outputs, and inputs of this batch and the next.

    Args:
        tokens, head_dim, thetas, params: of the layer and the request.
        heads: of the layer, that are measured.
        inputs: bytes of Q, K and V of one head.
    """
    each = min(heads, heads_at_once(params.groups(tokens), tokens))
    keys = params.groups(tokens) * tokens
    maps = max(each * (44 * keys + 8 * tokens * head_dim), each * 8 * keys + _SLICE_BYTES)
    return maps + each * (2 * inputs + (12 * thetas + 60) * tokens)


def profile_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    kv_rows: Sequence[int],
    shape: HeadShape,
    device: torch.device | None = None,
    also: Also | None = None,
) -> list[Measured]:
    """Measure the query heads of a layer with the Triton kernels.

    Products accumulate in float32 from the stored dtype; heads that need float64 go through the torch engine, on the
    same device.

    Args:
        q: (H, N, d) queries as attention consumes them; on the device, or on the CPU from where they are fetched.
        k: (Hkv, N, d) keys.
        v: (Hkv, N, d) values, or None: output error and closeness are then NaN.
        kv_rows: (H,) which row of `k` and `v` each query head reads, ascending.
        shape: sizes, parameters and thetas.
        device: where to compute; by default where `q` is.
        also: is given the sums of every batch, for whatever else follows from them; not of heads that need float64.

    Returns:
        What was measured of each head, in the order of `q`; see `engine.profile_head`.

    Raises:
        Cancelled: `shape.cancelled` said so, between batches.
        InputError: NaN or infinity in a tensor, or scores that overflow float32.
    """
    where = q.device if device is None else device
    found: list[Measured] = []
    each = batches(kv_rows, heads_at_once(shape.geometry.groups, shape.tokens))
    for batch, queries, keys, values in on_device(each, q, k, v, where):
        if shape.cancelled():
            raise Cancelled
        found += _profile_batch(batch.rows, queries, keys, values, shape, also)
    return found


def profile_head_triton(q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape) -> Measured:
    """Measure one query head with the Triton kernels; arguments and result as `engine.profile_head`.

    Raises:
        Cancelled: `shape.cancelled` said so.
        InputError: NaN or infinity in a tensor, or scores that overflow float32.
    """
    return profile_layer(q[None], k[None], None if v is None else v[None], (0,), shape)[0]


def _profile_batch(
    rows: Sequence[int], q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape, also: Also | None
) -> list[Measured]:
    """Measure heads (H, N, d) of kv heads (Hkv, N, d), H / Hkv each, all at once."""
    repeats = len(q) // len(k)
    kv_rows = [place // repeats for place in range(len(q))]
    dtypes = working_dtypes(q, k, v, kv_rows, shape.scale, shape.softcap)
    if all(dtype == torch.float32 for dtype in dtypes):
        return _with_kernels(rows, q, k, v, shape, also)
    found = []
    for place, (kv, dtype) in enumerate(zip(kv_rows, dtypes, strict=True)):
        value = None if v is None else v[kv]
        if dtype == torch.float32:
            mine = None if value is None else value[None]
            found += _with_kernels(rows[place : place + 1], q[place][None], k[kv][None], mine, shape, also)
        else:
            found.append(profile_head(q[place], k[kv], value, shape, dtype=dtype))
    return found


def _with_kernels(
    rows: Sequence[int], q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape, also: Also | None
) -> list[Measured]:
    p = shape.params
    scores: dict[str, Any] = {"scale": shape.scale, "window": shape.window, "softcap": shape.softcap}
    groups = {"block": p.block, "step": p.step, **scores}
    regions = {"init": p.init_tokens, "lookback": p.lookback_tokens, **groups}
    q, k, v = q[None], k[None], None if v is None else v[None]
    levels = len(shape.sorted_thetas)
    sums = Accumulator(shape, v is not None, q.device, q.shape[1])

    state = anchor(q, k, v, **regions, precise=True)
    if also is None:
        out, lse = dense_lse(q, k, v, **scores)
        entropy = None
    else:
        out, lse, entropy = dense_entropy(q, k, v, **scores)
    margin = margins_apart(state, k, queries=shape.tokens, **regions)
    columns, bins = bin_columns(margin, float32_floor(shape.sorted_thetas))
    swept = sweep(q, k, v, state, out, columns, bins, thetas=levels, **groups)
    sums.add_rows(0, torch.exp(swept.lse[0] - lse[0][:, None]))
    if out is not None:
        # One head after the other: how torch adds up several would depend on their number.
        sums.norm_sq += torch.stack([x.square().sum(dtype=torch.float64) for x in out[0]])
        sums.error_sq += swept.squares[0]
        sums.close += torch.stack([swept.close_01[0], swept.close_005[0]], 1)
    del state, out, columns, bins, swept
    mass = column_mass(q, k, lse, **groups)
    sums.add_groups(0, mass[0], margin[0])
    if also is not None:
        assert entropy is not None
        also(Sought(rows, q, k, lse, entropy, mass, margin))
    return sums.results()
