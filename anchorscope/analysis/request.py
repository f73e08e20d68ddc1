"""What `analyze` is asked for, and what that will take: checked before the first score is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anchorscope.analysis.accumulate import CURVE_THETAS, POSITION_BINS
from anchorscope.analysis.backends import Backend, resolve_backend
from anchorscope.devices import resolve_devices
from anchorscope.errors import InputError
from anchorscope.figure_theta import find_theta
from anchorscope.heads.request import HeadsPlan, HeadsRequest
from anchorscope.params import AnchorParams, anchor_pairs, cheapest_groups, recommend_groups, visible_pairs
from anchorscope.profiles import MAX_COLUMNS, MAX_ROWS, MAX_STEPS
from anchorscope.runs.executors import threads_for
from anchorscope.runs.life import Plan
from anchorscope.runs.request import check_target
from anchorscope.runs.sources import Source, layer_memory
from anchorscope.runs.units import DumpRequest, HeadUnit, chosen_settings
from anchorscope.runs.values import jsonable
from anchorscope.shown import counted, exact_theta, share_text

ANCHOR_BUDGET = 0.25  # share of the pairs above which the anchor region alone is called expensive

HeatMaps = Sequence[tuple[int, int]] | str | None  # (layer, head) pairs, "all", or the worst, median and best


@dataclass(frozen=True, kw_only=True)
class AnalyzeRequest(DumpRequest):
    """What to measure of a dump.

    Attributes:
        thetas: nats; any number, +-inf included.
        params: block, step, init and lookback.
        target_recall: recall to report the needed theta and density for.
        backend: "auto", "torch" or "triton".
        heatmaps: (layer, head) pairs, "all", or None for the worst, the median and the best head.
        figure_theta: the theta that figures, tables and the page show, one of `thetas`; None means the smallest finite
            one whose mean recall over prompts and heads reaches the target (`anchorscope.figure_theta`).
        diagnose: also find out what kind of head each one is, by the theta of the figures: see `anchorscope.diagnose`.
    """

    thetas: Sequence[float] = (12.0,)
    params: AnchorParams | None = None
    target_recall: float = 0.95
    backend: str = "auto"
    heatmaps: HeatMaps = None
    figure_theta: float | None = None
    diagnose: bool = False

    def plan(self, *, steps: bool = True) -> AnalysisPlan:
        """Check the request and say what it will take.

        Args:
            steps: whether profiles hold the heat map at every theta, which figures need; or at the first alone.

        Raises:
            InputError: thetas empty or NaN, an unknown layer, head or prompt, a target outside (0, 1].
            DumpError: the dump is missing or damaged.
            MissingBackendError: back end or device absent.
        """
        params = AnchorParams() if self.params is None else self.params
        thetas = tuple(float(t) for t in self.thetas)
        if not thetas or any(np.isnan(thetas)):
            raise InputError("thetas must hold at least one number and no NaN")
        check_target(self.target_recall)
        if self.figure_theta is not None:
            find_theta(thetas, self.figure_theta, "--figure-theta")
        devices = resolve_devices(self.device, self.devices)
        backend = resolve_backend(self.backend, str(devices[0]))
        source, units = self.choose()
        _check_heatmaps(self.heatmaps, units)
        settings: dict[str, Any] = {
            "theta": [jsonable(t) for t in thetas],
            "block": params.block,
            "step": params.step,
            "init": params.init_tokens,
            "lookback": params.lookback_tokens,
            "target_recall": self.target_recall,
            **chosen_settings(units),
            "backend": backend.name,
            "device": backend.device.type,
        }
        kinds = self._kinds(source, params, thetas, backend, settings) if self.diagnose else None
        each = _workspace(units, backend, params, thetas)
        on_cpu = backend.device.type == "cpu"
        workers = threads_for(units, each) if on_cpu and backend.name == "torch" else 1
        memory = workers * each + layer_memory(source, [u.entry for u in units], backend.device)
        return AnalysisPlan(
            request=self,
            units=units,
            identity={"dump": source.identity, "settings": settings, "profiles": [u.name for u in units]},
            source=source,
            device=backend.device,
            devices=devices if len(devices) > 1 else (),
            workers=workers,
            memory=max(memory, kinds.memory if kinds else 0),
            disk=_disk_bytes(units, params, len(thetas), steps) + (kinds.disk if kinds else 0),
            pictures=_picture_bytes(units, self.heatmaps) + (kinds.pictures if kinds else 0),
            warnings=tuple(anchor_warnings(units, params)),
            settings=settings,
            params=params,
            thetas=thetas,
            target_recall=self.target_recall,
            backend=backend,
            kinds=kinds,
            steps=steps,
        )

    def _kinds(
        self,
        source: Source,
        params: AnchorParams,
        thetas: Sequence[float],
        backend: Backend,
        settings: dict[str, Any],
    ) -> HeadsPlan:
        """The diagnosis of the heads that are measured; by which theta is known when they are."""
        chosen = {key: settings[key] for key in ("layers", "heads", "prompts")}
        return HeadsRequest(source, params=params, theta=thetas[0], device=str(backend.device), **chosen).plan()


@dataclass(frozen=True, kw_only=True)
class AnalysisPlan(Plan[HeadUnit]):
    """The plan of an analysis; memory on a GPU is its own, and the host then holds the
    tensors of three layers: the one that is measured and those read meanwhile.

    Attributes:
        params, thetas, target_recall: of the request.
        backend: which engine measures, and where.
        kinds: the plan of the diagnosis, if that is asked for.
        steps: whether profiles hold the heat map at every theta. It is no part of the identity, since tables and report
            do not depend on it: profiles without are measured again by a run that needs them.
    """

    params: AnchorParams
    thetas: tuple[float, ...]
    target_recall: float
    backend: Backend
    kinds: HeadsPlan | None = None
    steps: bool = True

    def known_kinds(self) -> HeadsPlan | None:
        """The diagnosis by a theta that is known before the heads are measured: the one named, or the first."""
        shown = self.request.figure_theta
        return self.kinds if self.kinds is None or shown is None else replace(self.kinds.request, theta=shown).plan()

    def refuse_shards(self) -> None:
        """Refuse to diagnose heads by a theta that depends on all of them, where others measure some.

        Raises:
            InputError: several thetas are measured, and none is named.
        """
        thetas = set(self.thetas)
        if self.kinds is not None and len(thetas) > 1 and self.request.figure_theta is None:
            raise InputError(
                f"which of {len(thetas)} thetas is shown and used to diagnose heads is known when all shards are there:"
                " name one with --figure-theta, or leave the diagnosis out with --no-diagnose"
            )


def asked_of(
    pictures: Mapping[str, Any], heatmaps: HeatMaps = None, diagnose: bool = False, figure_theta: float | None = None
) -> dict[str, Any]:
    """What is to be made of the measurements, as the folder's state holds it; `pictures` of `asked_pictures`."""
    wanted = "default" if heatmaps is None else heatmaps if isinstance(heatmaps, str) else list(map(list, heatmaps))
    return {
        **pictures,
        "heatmaps": wanted if pictures["figures"] else None,
        "diagnose": diagnose,
        "figure_theta": None if figure_theta is None else exact_theta(figure_theta),  # as text: 0 is a word, too
    }


def heat_map_count(heatmaps: HeatMaps, heads: int, prompts: int) -> int:
    """How many heat maps a request draws."""
    return heads if heatmaps == "all" else min(heads, prompts * (3 if heatmaps is None else len(heatmaps)))


def _workspace(units: Sequence[HeadUnit], backend: Backend, params: AnchorParams, thetas: Sequence[float]) -> int:
    largest = max(units, key=lambda u: u.entry.tokens * u.entry.head_dim).entry
    heads = sum(u.entry == largest for u in units)
    return backend.workspace(largest, len(set(thetas)), params, heads)


def _check_heatmaps(heatmaps: HeatMaps, units: Sequence[HeadUnit]) -> None:
    if heatmaps is None or heatmaps == "all":
        return
    if isinstance(heatmaps, str):
        raise InputError(f"heatmaps must be 'all' or (layer, head) pairs, not {heatmaps!r}")
    known = {(u.entry.layer, u.head) for u in units}
    for layer, head in heatmaps:
        if (layer, head) not in known:
            raise InputError(f"heat map {layer}:{head}: that layer and head are not analyzed here")


def _disk_bytes(units: Sequence[HeadUnit], params: AnchorParams, thetas: int, steps: bool) -> int:
    """What tables and profiles will take; profiles are mostly their heat maps, the rest is as measured."""
    total = 4_000
    for unit in units:
        n = unit.entry.tokens
        groups, positions = params.groups(n), -(-n // -(-n // POSITION_BINS))
        rows, columns = (-(-count // -(-count // limit)) for count, limit in ((groups, MAX_ROWS), (n, MAX_COLUMNS)))
        total += 8 * rows * columns + 8 * (rows + columns) + (4 * thetas + 8) * positions
        if steps and thetas > 1:  # of visible cells beyond the anchor region; few add keys at more than three thetas
            beyond = 1 - anchor_pairs(n, params, unit.entry.window) / visible_pairs(n, unit.entry.window)
            total += 2 * rows * columns + 6 * min(MAX_STEPS, int(beyond * rows * columns / 2) * min(thetas, 3))
        total += 24 * len(CURVE_THETAS) + 8_500 + 80 * thetas  # curves; the oracle, the header; numbers per theta
        total += 6_000 + 200 * thetas  # rows of curves.csv and heads.csv
    return total


def _picture_bytes(units: Sequence[HeadUnit], heatmaps: HeatMaps) -> int:
    """What the figures will take, as measured of their kinds."""
    layers = len({(u.prompt_index, u.entry.layer) for u in units})
    prompts = len({u.prompt_index for u in units})
    return 55_000 * prompts + 135_000 * layers + 150_000 * heat_map_count(heatmaps, len(units), prompts)


def anchor_warnings(
    units: Sequence[HeadUnit], params: AnchorParams, flags: str = "--block {block} --step {step}"
) -> Iterator[str]:
    """Say where the anchor region alone costs more than a quarter of the pairs, and which groups would not.

    `flags` is how groups are asked for on the command line.
    """
    for n, window in sorted({(u.entry.tokens, u.entry.window) for u in units}, key=lambda x: (x[0], x[1] or 0)):
        share = anchor_pairs(n, params, window) / visible_pairs(n, window)
        if share <= ANCHOR_BUDGET:
            continue
        better = recommend_groups(n, window, ANCHOR_BUDGET) or cheapest_groups(n, window)
        least = anchor_pairs(n, better, window) / visible_pairs(n, window)
        if least < share:
            asked = flags.format(block=better.block, step=better.step)
            hint = f"{asked} would keep {share_text(least, 2)} of them"
        elif share < 1:
            hint = "no customary groups keep fewer"
        else:
            hint = "it is too short for groups of 16 tokens and more to be sparse"
        layers = "" if window is None else f" (sliding window {window})"
        yield (
            f"at {counted(n, 'token')}{layers} the anchor region alone keeps {share_text(share, 2)} of the pairs with"
            f" groups of {params.block} x {params.step}; {hint}"
        )
