"""The Triton back end of `analyze`: the kernels measure, and `HeadAccumulator` adds up what they find."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anchorscope.analysis.accumulate import HeadAccumulator, HeadShape
from anchorscope.analysis.engine import profile_head
from anchorscope.kernels.anchor import anchor
from anchorscope.kernels.column_mass import column_mass
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.margins import margins
from anchorscope.kernels.sweep import bin_columns, sweep
from anchorscope.profiles import Measured
from anchorscope.ranges import working_dtype
from anchorscope.runs.progress import Cancelled


def profile_head_triton(q: Tensor, k: Tensor, v: Tensor | None, shape: HeadShape) -> Measured:
    """Measure one query head with the Triton kernels; arguments and result as `engine.profile_head`.

    Products accumulate in float32 from the stored dtype; heads that need float64 go through the torch engine, on the
    same device. Working memory on the device is about 40 bytes per (group, key).

    Raises:
        Cancelled: `shape.cancelled` said so.
        InputError: NaN or infinity in a tensor, or scores that overflow float32.
    """
    if (needed := working_dtype(q, k, v, shape.scale, shape.softcap)) == torch.float64:
        return profile_head(q, k, v, shape, dtype=needed)
    p = shape.params
    scores = {"scale": shape.scale, "window": shape.window, "softcap": shape.softcap}
    groups = {"block": p.block, "step": p.step, **scores}
    regions = {"init": p.init_tokens, "lookback": p.lookback_tokens, **groups}
    q, k, v = q[None, None], k[None, None], None if v is None else v[None, None]
    levels = len(shape.sorted_thetas)
    sums = HeadAccumulator(shape, v is not None, q.device)

    state = anchor(q, k, v, **regions, precise=True)
    out, lse = dense_lse(q, k, v, **scores)
    margin = margins(state, k, queries=shape.tokens, **regions)
    mass = column_mass(q, k, lse, **groups)
    columns, bins = bin_columns(margin, _float32_floor(shape.sorted_thetas))
    swept = sweep(q, k, v, state, out, columns, bins, thetas=levels, **groups)

    sums.add_rows(0, torch.exp(swept.lse[0, 0] - lse[0, 0]))
    if out is not None:
        sums.norm_sq += out.square().sum(dtype=torch.float64)
        sums.error_sq += swept.squares[0, 0]
        sums.close += torch.stack([swept.close_01[0, 0], swept.close_005[0, 0]])
    for group in range(shape.geometry.groups):
        if shape.cancelled():
            raise Cancelled
        start, stop = shape.geometry.candidates(group)
        seen = margin[0, 0, group, start:stop]
        last = shape.geometry.rows(group)[1]
        sums.add_group(group, mass[0, 0, group, :last], start, seen, sums.level_of(seen))
    return sums.result()


def _float32_floor(thetas: np.ndarray) -> Tensor:
    """Largest float32 not above each theta: a float32 margin compares with it exactly as with the theta itself."""
    floor = thetas.astype(np.float32)
    floor = np.where(floor > thetas, np.nextafter(floor, np.float32(-np.inf)), floor)
    return torch.from_numpy(floor)
