"""What a head costs in time: measured efficiencies of `anchorscope bench`, read at any density.

A head of density D run at efficiency E takes D / E of the dense kernel's time. Between measured densities that time is
interpolated, not E: it is nearly linear in the density (a fixed part for the anchor region and identification, and a
part per kept pair). Below the least density measured, time is held; above the largest, efficiency is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorscope.errors import InputError
from anchorscope.files import read_json
from anchorscope.params import AnchorParams
from anchorscope.shapes import check

Price = Callable[[AnchorParams, np.ndarray], np.ndarray]
MAX_BYTES = 1 << 26
_SHAPE = {
    "settings": {"backend": str, "dtype": str, "block": int, "step": int},
    "hardware": {"name": str},
    "rows": [{"n": int, "sparse": [{"density": float, "efficiency": (float, None)}]}],
}


def by_density(params: AnchorParams, density: np.ndarray) -> np.ndarray:
    """The price without measured times: the density itself, whatever the group."""
    return density


@dataclass(frozen=True)
class Costs:
    """Relative times of one device, by kind of group.

    Attributes:
        points: per (block, step) and prompt length: densities ascending, and time / dense time at each.
        hardware: what they were measured on.
        files: names of the files.
    """

    points: dict[tuple[int, int], dict[int, tuple[np.ndarray, np.ndarray]]]
    hardware: str
    files: tuple[str, ...]

    @classmethod
    def load(cls, paths: Sequence[Path | str]) -> Costs:
        """Read saved bench results; each holds one kind of group.

        Raises:
            InputError: a file that is missing, not a bench result, without a timed sparse run, or of another device
                than the first.
        """
        found: dict[tuple[int, int], dict[int, list[tuple[float, float]]]] = {}
        devices: dict[str, str] = {}
        for path in map(Path, paths):
            group, rows, device = _read(path)
            devices.setdefault(device, str(path))
            for n, density, time in rows:
                found.setdefault(group, {}).setdefault(n, []).append((density, time))
        if len(devices) > 1:
            (one, first), (two, second) = list(devices.items())[:2]
            raise InputError(
                f"--costs {first} was timed on {one} and {second} on {two}: give results of one device,"
                " back end and dtype"
            )
        points = {group: {n: _curve(rows) for n, rows in lengths.items()} for group, lengths in found.items()}
        return cls(points, next(iter(devices)), tuple(Path(p).name for p in paths))

    def price(self, groups: Sequence[AnchorParams], tokens: float) -> Price:
        """Time relative to dense of a head of a given density, at the measured length nearest to `tokens`.

        Raises:
            InputError: a kind of group that was not timed.
        """
        for params in groups:
            if (params.block, params.step) not in self.points:
                known = ", ".join(f"{b}x{s}" for b, s in sorted(self.points))
                raise InputError(
                    f"--costs {', '.join(self.files)} holds no times of groups {params.block}x{params.step}, only of"
                    f" {known}: run `anchorscope bench --block {params.block} --step {params.step}` and give its"
                    " bench.json too, or leave the group out of --groups"
                )

        def price(params: AnchorParams, density: np.ndarray) -> np.ndarray:
            known, time = self.points[params.block, params.step][self.length(params, tokens)]
            beyond = np.maximum(density / known[-1], 1.0)  # above the largest: constant efficiency
            return np.interp(density, known, time) * beyond

        return price

    def length(self, params: AnchorParams, tokens: float) -> int:
        """The measured prompt length nearest to `tokens`, by ratio."""
        return min(self.points[params.block, params.step], key=lambda n: (abs(math.log(n / tokens)), n))


def _read(path: Path) -> tuple[tuple[int, int], list[tuple[int, float, float]], str]:
    """Kind of group, (length, density, relative time) rows, and the device in words."""
    hint = "give the bench.json of `anchorscope bench`"
    try:
        data = read_json(path, MAX_BYTES, "--costs")
    except InputError as error:
        raise InputError(f"{error}; {hint}") from None
    if not isinstance(data, dict) or data.get("format") != "anchorscope-bench" or data.get("format_version") != 1:
        raise InputError(f"--costs {path} is no bench result of version 1; {hint}")
    check(data, _SHAPE, f"--costs {path}", hint="it is damaged, run the bench again")
    settings = data["settings"]
    rows = [
        (row["n"], float(s["density"]), float(s["density"]) / float(s["efficiency"]))
        for row in data["rows"]
        for s in row["sparse"]
        if s["efficiency"]
    ]
    device = f"{data['hardware']['name']} ({settings['backend']}, {settings['dtype']})"
    group = settings["block"], settings["step"]
    if not rows:
        raise InputError(f"--costs {path} timed no sparse run against a dense one: run the bench with both")
    if not all(n > 0 and 0 < d <= 1 + 1e-9 and 0 < t < math.inf for n, d, t in rows):
        raise InputError(f"--costs {path} holds a density or an efficiency that makes no sense: run the bench again")
    return group, rows, device


def _curve(rows: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Densities ascending and the times at them; several times at one density are averaged."""
    density, which = np.unique([d for d, _ in rows], return_inverse=True)
    times = np.bincount(which, weights=[t for _, t in rows]) / np.bincount(which)
    return density, times


def costs_json(costs: Costs, groups: Sequence[AnchorParams], tokens: float) -> dict[str, Any]:
    """What a report says about the times used."""
    return {
        "files": list(costs.files),
        "hardware": costs.hardware,
        "tokens": {f"{p.block}x{p.step}": costs.length(p, tokens) for p in groups},
    }
