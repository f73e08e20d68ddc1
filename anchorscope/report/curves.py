"""Recall, density and the rest of every head of a prompt on one theta grid: what the page interpolates between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from anchorscope.names import THETA_COLUMNS
from anchorscope.profiles import HeadProfile
from anchorscope.report.pack import pack_floats, shorten

GRID_POINTS = 96  # thetas of the shared grid, those asked for not counted
ORACLE_POINTS = 48
POSITION_BINS = 32
MAX_POSITIONS = 6  # thetas whose recall by position is kept
TOP = 16

# columns of heads.csv that only exist at the thetas asked for
EXTRAS = tuple(x for x in THETA_COLUMNS if x not in ("theta", "recall", "density", "sparsity"))
SCALARS = ("theta_needed", "density_needed", "oracle_needed", "anchor_density")


def curve_at(profile: HeadProfile, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(recall, density), float64, of a head at each theta of `grid`: exact where the profile holds that theta, else
    linear between its neighbors."""
    theta = profile.curve_theta
    density = profile.curve_pairs / profile.visible_pairs
    low = (np.searchsorted(theta, grid, side="right") - 1).clip(0)
    high = np.minimum(low + 1, theta.size - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (grid - theta[low]) / (theta[high] - theta[low])
    share = np.where(np.isfinite(share), share, 0.0)  # an exact hit of the last point, or an infinite neighbor
    recall = profile.curve_recall[low] + share * (profile.curve_recall[high] - profile.curve_recall[low])
    pairs = density[low] + share * (density[high] - density[low])
    for t, asked in enumerate(profile.thetas):
        at = grid == asked
        recall[at], pairs[at] = profile.recall[t], profile.density[t]
    return recall, pairs


def theta_grid(profiles: Sequence[HeadProfile]) -> tuple[np.ndarray, float, float]:
    """A theta grid for all heads of a run: (G,) float64 from -inf to inf, and the ends of the slider, nats.

    Points lie where the mean recall and density of the heads change; all thetas asked for are among them.
    """
    fine = np.unique(np.concatenate([p.curve_theta for p in profiles]))
    fine = fine[np.isfinite(fine)]
    asked = np.unique(np.concatenate([p.thetas for p in profiles]))
    finite = asked[np.isfinite(asked)]
    if fine.size == 0:
        fine = finite if finite.size else np.zeros(1)
    mean = np.zeros((2, fine.size))
    for p in profiles:
        mean += np.stack(curve_at(p, fine)) / len(profiles)
    change = np.append(0.0, np.cumsum(np.abs(np.diff(mean, axis=1)).sum(0)))
    if change[-1] > 0:
        change /= change[-1]
    inside = np.flatnonzero((change >= 0.001) & (change <= 0.999))
    core = fine[inside] if inside.size else fine[[0, -1]]
    low, high = math.floor(core[0]), math.ceil(core[-1])
    if finite.size:
        low, high = min(low, math.floor(finite[0])), max(high, math.ceil(finite[-1]))
    high = max(high, low + 1)
    # Half of the points by change, half even over the slider: steep parts are fine, flat ones still interpolate well.
    even = np.clip((fine - low) / (high - low), 0, 1)
    way = change + even
    picks = np.unique(np.searchsorted(way, np.linspace(way[0], way[-1], GRID_POINTS)).clip(max=fine.size - 1))
    grid = np.unique(np.concatenate([[-np.inf], fine[picks], fine[[0, -1]], asked, [np.inf]]))
    return grid, float(low), float(high)


def pack_curves(profiles: Sequence[HeadProfile], grid: np.ndarray, target: float, kept: int) -> dict[str, Any]:
    """Numbers of all heads of a prompt: one float32 record per head, and its layout as (name, rows, columns)."""
    positions = min(MAX_POSITIONS, len(profiles[0].thetas))
    bins = min(POSITION_BINS, max(p.position_recall.shape[1] for p in profiles))
    layout = [
        ("recall", 1, grid.size),
        ("density", 1, grid.size),
        ("oracle_density", 1, ORACLE_POINTS),
        ("oracle_recall", 1, ORACLE_POINTS),
        ("extras", len(EXTRAS), kept),
        ("position", positions, bins),
        ("top_columns", 1, TOP),
        ("top_mass", 1, TOP),
        ("scalars", 1, len(SCALARS)),
    ]
    exact = np.isin(grid, profiles[0].thetas)
    records = []
    for p in profiles:
        recall, density = (np.where(exact, x, shorten(x)) for x in curve_at(p, grid))
        parts = [recall, density, *(shorten(x) for x in _oracle(p))]
        parts += [getattr(p, name)[:kept] for name in EXTRAS]
        parts.append(shorten(_positions(p, bins)[:positions]))
        top = np.full((2, TOP), np.nan)
        count = min(TOP, p.top_columns.size)
        top[0, :count], top[1, :count] = p.top_columns[:count], p.top_mass[:count]
        needs = (p.theta_at_recall(target), p.density_at_recall(target), p.density_at_recall(target, "oracle"))
        parts += [
            top,
            np.array([math.nan if x is None else x for x in needs]),
            np.array([p.anchor_pairs / p.visible_pairs]),
        ]
        records.append(np.concatenate([np.ravel(x) for x in parts]).astype(np.float32))
    return {
        "heads": [[p.layer, p.head, p.kv_head] for p in profiles],
        "layout": layout,
        "extras": EXTRAS,
        "scalars": SCALARS,
        "position_edges": _edges(profiles[0].tokens, bins),
        "curves": pack_floats(np.stack(records)),
    }


def _oracle(profile: HeadProfile) -> np.ndarray:
    """(2, ORACLE_POINTS): density and recall of the stripe oracle, even in log density."""
    density, recall = profile.curve("oracle")
    at = np.geomspace(density[0], density[-1], ORACLE_POINTS) if density[0] > 0 else np.linspace(0, 1, ORACLE_POINTS)
    at[0], at[-1] = density[0], density[-1]
    return np.stack([at, np.interp(at, density, recall)])


def _edges(tokens: int, bins: int) -> list[int]:
    return [round(x) for x in np.linspace(0, tokens, bins + 1)]


def _positions(profile: HeadProfile, bins: int) -> np.ndarray:
    """(T, bins): recall by position in equal bins, queries weighted equally."""
    edges = np.array(_edges(profile.tokens, bins))
    cumulative = np.zeros((len(profile.thetas), profile.position_edges.size))
    cumulative[:, 1:] = np.cumsum(profile.position_recall * np.diff(profile.position_edges), axis=1)
    at = np.stack([np.interp(edges, profile.position_edges, row) for row in cumulative])
    return np.diff(at, axis=1) / np.diff(edges)
