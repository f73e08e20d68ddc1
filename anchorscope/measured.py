"""What is measured on one head: its arrays, their dtypes and shapes, and what they must satisfy; numpy only."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from anchorscope.errors import InputError
from anchorscope.shown import counted

if TYPE_CHECKING:
    from anchorscope.profiles import HeadProfile

MAX_ROWS, MAX_COLUMNS = 128, 1024  # heat map cells: rows of query groups x bins of keys
MAX_TOP = 64
MAX_STEPS = 150_000  # what heat maps of several thetas hold; they get coarser instead of longer

# name -> (dtype as stored, shape in named sizes). Sizes: T thetas asked, M curve points, K oracle points,
# R x C heat map cells, S x D cells of its steps by theta, E steps, P bins of query positions, X top columns.
ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "thetas": ("float64", ("T",)),
    "recall": ("float64", ("T",)),
    "recall_p05": ("float64", ("T",)),
    "recall_min": ("float64", ("T",)),
    "recall_last": ("float64", ("T",)),
    "kept_pairs": ("int64", ("T",)),
    "stripe_pairs": ("int64", ("T",)),
    "output_error": ("float64", ("T",)),
    "output_close_01": ("float64", ("T",)),
    "output_close_005": ("float64", ("T",)),
    "curve_theta": ("float64", ("M",)),
    "curve_recall": ("float64", ("M",)),
    "curve_pairs": ("int64", ("M",)),
    "oracle_pairs": ("int64", ("K",)),
    "oracle_recall": ("float64", ("K",)),
    "heat_rows": ("int64", ("R+1",)),
    "heat_columns": ("int64", ("C+1",)),
    "heat_mass": ("float16", ("R", "C")),
    "heat_kept": ("float16", ("R", "C")),
    "heat_margin": ("float16", ("R", "C")),
    "heat_stripes": ("float16", ("R", "C")),
    "step_rows": ("int64", ("S+1",)),
    "step_columns": ("int64", ("D+1",)),
    "step_count": ("uint16", ("S", "D")),
    "step_theta": ("uint16", ("E",)),
    "step_mass": ("float16", ("E",)),
    "step_stripes": ("float16", ("E",)),
    "position_recall": ("float32", ("T", "P")),
    "position_edges": ("int64", ("P+1",)),
    "top_columns": ("int64", ("X",)),
    "top_mass": ("float32", ("X",)),
}
_MAY_BE_NAN = {"output_error", "output_close_01", "output_close_005"}
_MAY_BE_INFINITE = {"thetas", "curve_theta", "heat_margin"}
_SHARES = {name for name in ARRAYS if "recall" in name}
_ASCENDING = {
    *("curve_theta", "curve_pairs", "oracle_pairs", "heat_rows", "heat_columns", "position_edges"),
    *("step_rows", "step_columns"),
}
STEPS = tuple(name for name in ARRAYS if name.startswith("step_"))  # `calibrate` and earlier versions save none
HEAT = tuple(name for name in ARRAYS if name.startswith("heat_")) + STEPS
PER_THETA = tuple(name for name, (_, shape) in ARRAYS.items() if shape[0] == "T")
_CLOSE = 1e-3  # float32 sums of exponentials may exceed 1 a little


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What an engine measures on one query head, whatever its name, whoever measured it.

    T is the number of thetas asked, M of curve points, K of oracle points, R x C of heat map cells, P of position
    bins. Dtypes are those of a profile (`HeadProfile`), which converts to them.

    Attributes:
        visible_pairs, anchor_pairs, candidate_pairs: exact (query, key) counts; the last two partition the first.
        recall, recall_p05, recall_min, recall_last: (T,) float64, attention mass kept: mean over queries, 5th
            percentile and minimum of the queries, mean of the last `block` queries.
        kept_pairs, stripe_pairs: (T,) int64, exact pairs kept in all and among the candidates.
        output_error: (T,) float64, ||O_sparse - O_dense||_F / ||O_dense||_F; NaN without V.
        output_close_01, output_close_005: (T,) float64, share of output elements closer than 0.01 / 0.005; NaN without
            V.
        curve_theta: (M,) float64 ascending, -inf first and +inf last.
        curve_recall, curve_pairs: (M,) float64 and int64, mean recall and exact kept pairs at each of them.
        oracle_pairs, oracle_recall: (K,) int64 ascending and float64, breakpoints of the stripe oracle.
        heat_rows, heat_columns: (R+1,), (C+1,) int64, edges of the heat map's cells: query and key positions.
        heat_mass: (R, C) float16, attention mass of the cell's keys, mean over the row's queries, anchor region
            included.
        heat_kept: (R, C) float16, the part of it kept at thetas[0].
        heat_margin: (R, C) float16, nats, smallest margin of the cell's candidate columns; +inf where there is none.
        heat_stripes: (R, C) float16, share of the cell's candidate (group, column) pairs that are stripes at
            thetas[0].
        step_rows, step_columns: (S+1,), (D+1,) int64, edges of the cells whose contents are kept for every theta: those
            of the heat map, or coarser; one edge and no cells where only one theta was asked for, and in profiles that
            `calibrate` saves.
        step_count: (S, D) uint16, how many of the steps below are of each cell, row by row.
        step_theta: (E,) uint16, ascending in a cell: the rank, among the distinct thetas in ascending order, of the
            smallest theta that selects candidates of the cell; the number of distinct thetas for those none selects.
        step_mass: (E,) float16, attention mass of these candidates, mean over the row's queries.
        step_stripes: (E,) float16, their share of the cell's candidate (group, column) pairs.
        position_recall: (T, P) float32, mean recall of the queries in each bin of positions.
        position_edges: (P+1,) int64, edges of those bins.
        top_columns, top_mass: (X <= 64,) int64 and float32, keys with most attention mass and their share of the
            total.
    """

    visible_pairs: int
    anchor_pairs: int
    candidate_pairs: int
    recall: np.ndarray
    recall_p05: np.ndarray
    recall_min: np.ndarray
    recall_last: np.ndarray
    kept_pairs: np.ndarray
    stripe_pairs: np.ndarray
    output_error: np.ndarray
    output_close_01: np.ndarray
    output_close_005: np.ndarray
    curve_theta: np.ndarray
    curve_recall: np.ndarray
    curve_pairs: np.ndarray
    oracle_pairs: np.ndarray
    oracle_recall: np.ndarray
    heat_rows: np.ndarray
    heat_columns: np.ndarray
    heat_mass: np.ndarray
    heat_kept: np.ndarray
    heat_margin: np.ndarray
    heat_stripes: np.ndarray
    step_rows: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_rows"))
    step_columns: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_columns"))
    step_count: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_count"))
    step_theta: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_theta"))
    step_mass: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_mass"))
    step_stripes: np.ndarray = dataclasses.field(default_factory=lambda: nothing("step_stripes"))
    position_recall: np.ndarray
    position_edges: np.ndarray
    top_columns: np.ndarray
    top_mass: np.ndarray


def nothing(name: str) -> np.ndarray:
    """An array of the heat map, or of its steps, where there is none: one edge, no cell."""
    dtype, shape = ARRAYS[name]
    return np.zeros([int(size.endswith("+1")) for size in shape], dtype=dtype)


def check_arrays(profile: HeadProfile) -> None:
    sizes: dict[str, int] = {}
    for name, (_, shape) in ARRAYS.items():
        array = getattr(profile, name)
        if array.ndim != len(shape):
            raise InputError(f"{name} must have {counted(len(shape), 'dimension')}, not {array.ndim}")
        for size, label in zip(array.shape, shape, strict=True):
            want = size - 1 if label.endswith("+1") else size
            if sizes.setdefault(label.removesuffix("+1"), want) != want:
                raise InputError(f"{name} has shape {array.shape}, which contradicts the other arrays")
        if array.dtype.kind == "f":
            if name not in _MAY_BE_NAN and np.isnan(array).any():
                raise InputError(f"{name} holds NaN")
            if name not in _MAY_BE_INFINITE and np.isinf(array).any():
                raise InputError(f"{name} holds infinity")
        if name in _SHARES and array.size and not (array.min() >= 0 and array.max() <= 1 + _CLOSE):
            raise InputError(f"{name} must lie between 0 and 1")
        # +-inf minus itself is NaN, so compare neighbors instead of taking differences
        if name in _ASCENDING and (array[1:] < array[:-1]).any():
            raise InputError(f"{name} must be ascending")
    if sizes["T"] < 1 or sizes["M"] < 2 or sizes["K"] < 1:
        raise InputError("a profile needs a theta, two curve points and an oracle point")
    if sizes["R"] > MAX_ROWS or sizes["C"] > MAX_COLUMNS or sizes["X"] > MAX_TOP:
        raise InputError(f"at most {MAX_ROWS} x {MAX_COLUMNS} heat map cells and {MAX_TOP} top columns fit")
    if profile.curve_theta[0] != -math.inf or profile.curve_theta[-1] != math.inf:
        raise InputError("curve_theta must start at -inf and end at +inf")
    if (profile.curve_pairs[[0, -1]] != (profile.anchor_pairs, profile.visible_pairs)).any():
        raise InputError("the curve must run from the anchor pairs to the visible pairs")
    if (profile.kept_pairs - profile.stripe_pairs != profile.anchor_pairs).any():
        raise InputError("kept pairs must be the anchor pairs plus the stripe pairs")
    if sizes["R"] and (profile.heat_rows[-1] != profile.tokens or profile.heat_columns[-1] != profile.tokens):
        raise InputError("the heat map must cover the whole prompt")
    _check_steps(profile)


def _check_steps(profile: HeadProfile) -> None:
    """Refuse steps that do not belong to the cells of the heat map, or not to the thetas.

    Raises:
        InputError: with what contradicts what.
    """
    p = profile
    if int(p.step_count.sum(dtype=np.int64)) != p.step_theta.size:
        raise InputError("step_count must say how many steps each cell has")
    if p.step_theta.size > MAX_STEPS:
        raise InputError(f"at most {MAX_STEPS:,} steps of heat map cells fit, not {p.step_theta.size:,}")
    if p.step_theta.size and int(p.step_theta.max()) > len(np.unique(p.thetas)):
        raise InputError("step_theta must be ranks of the thetas")
    if not (np.isin(p.step_rows, p.heat_rows).all() and np.isin(p.step_columns, p.heat_columns).all()):
        raise InputError("the cells of the steps must be made of cells of the heat map")
    if p.step_count.size and (p.step_rows[-1], p.step_columns[-1]) != (p.tokens, p.tokens):
        raise InputError("the steps must cover the whole prompt")
