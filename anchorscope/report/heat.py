"""Heat maps small enough for a page: attention mass in 63 steps over six decades, and the smallest margin."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorscope.profiles import HeadProfile
from anchorscope.report.pack import pack_bytes

HEAT_SIZES = (
    *((128, 512), (96, 384), (64, 256), (56, 224), (48, 192), (40, 160), (40, 128), (32, 96), (24, 64), (16, 48)),
    *((12, 24), (8, 16)),
)
MASS_STEPS, MASS_FLOOR = 63, 1e-6
MARGIN_STEPS = 62


def shrink_heat(profile: HeadProfile, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The heat map in at most `shape` cells: edges of rows and columns, mass (R, C), smallest margin (R, C).

    Mass is summed over keys and averaged over queries, so rows still sum to 1.
    """
    rows, columns = (
        np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(int))
        for n, most in zip(profile.heat_mass.shape, shape, strict=True)
    )
    queries = np.diff(profile.heat_rows).astype(float)[:, None]
    mass = np.add.reduceat(profile.heat_mass.astype(float), columns[:-1], axis=1) * queries
    mass = np.add.reduceat(mass, rows[:-1], axis=0) / np.add.reduceat(queries, rows[:-1], axis=0)
    margin = np.minimum.reduceat(profile.heat_margin.astype(float), columns[:-1], axis=1)
    margin = np.minimum.reduceat(margin, rows[:-1], axis=0)
    return profile.heat_rows[rows], profile.heat_columns[columns], mass, margin


def pack_heat(profile: HeadProfile, shape: tuple[int, int], margins: tuple[float, float]) -> dict[str, Any] | None:
    """Mass and margin as bytes; mass 0: none, 1 ... 63: six decades; margin 0: no candidate, then even steps up."""
    if profile.heat_mass.size == 0:
        return None
    rows, columns, mass, margin = shrink_heat(profile, shape)
    decades = -math.log10(MASS_FLOOR)
    with np.errstate(divide="ignore"):
        level = 1 + np.rint((np.log10(mass) / decades + 1) * (MASS_STEPS - 1))
    level = np.where(mass > 0, level.clip(0, MASS_STEPS), 0)
    low, high = margins
    step = np.ceil((margin - low) / (high - low) * (MARGIN_STEPS - 1)).clip(0, MARGIN_STEPS) + 1
    step = np.where(np.isfinite(margin), step, 0)
    return {
        "rows": rows.tolist(),
        "columns": columns.tolist(),
        "cells": pack_bytes(np.stack([level, step]).astype(np.uint8).tobytes()),
    }


def heat_shape(paths: Sequence[Path], margins: tuple[float, float], budget: int) -> tuple[int, int]:
    """The finest size whose maps fit into `budget` bytes, judged on a sample of heads."""
    if not paths:
        return HEAT_SIZES[0]
    sample = [HeadProfile.load(paths[i]) for i in np.unique(np.linspace(0, len(paths) - 1, 24).astype(int))]
    for shape in HEAT_SIZES:
        each = np.mean([len(json.dumps(pack_heat(p, shape, margins))) for p in sample])
        if each * len(paths) <= 0.95 * budget:
            return shape
    return HEAT_SIZES[-1]
