"""What `calibrate` is asked for, and what that will take: checked before the first head is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.request import AnalysisPlan, AnalyzeRequest, anchor_warnings
from anchorscope.calibration.choose import BY
from anchorscope.calibration.costs import Costs, costs_json
from anchorscope.calibration.curves import STATISTICS
from anchorscope.calibration.prompts import hold_out
from anchorscope.calibration.sources import AnalysisUnit, Sources, group_name, read_sources
from anchorscope.devices import resolve_backend_name, resolve_device
from anchorscope.elsewhere import elsewhere
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams, anchor_pairs, visible_pairs
from anchorscope.parse import check_word, describe_indices, parse_thetas
from anchorscope.runs.life import Plan
from anchorscope.runs.request import check_target
from anchorscope.runs.sources import Source
from anchorscope.runs.values import jsonable
from anchorscope.shown import counted

THETAS = "-inf,0:16:0.25,inf"  # where the row statistics are measured; the mean has its own, finer curve
TARGET = 0.95
DENSE_ABOVE = 0.9
TIMED_HEADS = 8  # of a layer, before the run
PICTURE_BYTES = 400_000  # of all figures together, as measured


@dataclass(frozen=True)
class CalibrateRequest:
    """What to choose, and from what.

    Attributes:
        sources: dump folders and finished analyses of one model, or a `anchorscope.ModelSource`.
        target_recall: what the statistic shall reach, at least cost; 0.95 by default.
        budget_density: instead, the mean density over all heads to get the best statistic for.
        by: who shares a theta and keeps the promise: "head", "layer" (mean over its heads), "model".
        statistic: "mean" recall, "p05" (5th percentile of queries) or "last" (mean of the last block's queries).
        minimise: "density", or "time" by measured efficiencies.
        costs: bench.json files of `anchorscope bench`, one per kind of group.
        dense_above: density from which on a head runs dense.
        groups: kinds of groups to choose from, per layer; 64 x 8, 128 x 4 and 128 x 16 by default.
        layers: layers to calibrate; None means all. Others run dense.
        thetas: nats at which row statistics of dumps are measured; every quarter from 0 to 16 by default.
        holdout: share of the prompts to hold out, or their names; 0 checks nothing.
        seed: changes which prompts a share holds out.
        backend, device, devices: of the analyses, as in `analyze`.
    """

    sources: Sequence[Source | Path | str] | Source | Path | str
    target_recall: float | None = None
    budget_density: float | None = None
    by: str = "head"
    statistic: str = "mean"
    minimise: str = "density"
    costs: Sequence[Path | str] | Path | str | None = None
    dense_above: float = DENSE_ABOVE
    groups: Sequence[AnchorParams] | None = None
    layers: Sequence[int] | str | None = None
    thetas: Sequence[float] | None = None
    holdout: float | Sequence[str] = 0.3
    seed: int = 0
    backend: str = "auto"
    device: str = "auto"
    devices: Sequence[str] | str | None = None

    def plan(self) -> CalibrationPlan:
        """Check the request and say what it will take.

        Raises:
            InputError: a target or a budget that makes no sense, dumps of different models, missing heads, fewer than
                two prompts with a holdout, times that lack a kind of group.
            DumpError: a source that is missing or damaged.
            MissingBackendError: back end or device absent.
        """
        target = self._check()
        costs = None if self.costs is None else Costs.load(_listed(self.costs))
        sources = read_sources(
            list(listed_sources(self.sources)),
            groups=self.groups,
            layers=self.layers,
            statistic=self.statistic,  # type: ignore[arg-type]  # checked
        )
        held = hold_out(sources.prompts, self.holdout, self.seed)
        if self.budget_density is not None:
            _check_budget(self.budget_density, sources, held)
        tokens = float(np.mean([p.tokens for p in sources.prompts]))
        if costs is not None:
            costs.price(sources.groups, tokens)
        thetas = tuple(parse_thetas(THETAS)) if self.thetas is None else tuple(self.thetas)
        units = tuple(replace(unit, plan=self._analysis(unit, sources, thetas)) for unit in sources.runs)
        analyses = [unit.analysis for unit in units]
        settings: dict[str, Any] = {
            "target": target,
            "budget_density": self.budget_density,
            "by": self.by,
            "statistic": self.statistic,
            "minimise": self.minimise,
            "dense_above": self.dense_above,
            "groups": [group_name(p) for p in sources.groups],
            "layers": list(sources.layers),
            "thetas": [jsonable(t) for t in thetas] if analyses else None,
            "holdout": self.holdout if isinstance(self.holdout, (int, float)) else list(self.holdout),
            "seed": self.seed,
            "costs": costs and costs_json(costs, sources.groups, tokens),
            "backend": analyses[0].backend.name if analyses else None,
            "device": analyses[0].backend.device.type if analyses else None,
        }
        curves = len(sources.prompts) * len(sources.groups) * len(sources.heads) * 30_000
        return CalibrationPlan(
            request=self,
            units=units,
            identity={"sources": list(sources.identity), "settings": settings},
            device=analyses[0].device if analyses else torch.device("cpu"),
            devices=analyses[0].devices if analyses else (),
            memory=max([curves, *(plan.memory for plan in analyses)]),
            disk=sum(plan.disk for plan in analyses) + 1_500 * len(sources.heads) + 100_000,
            pictures=PICTURE_BYTES,
            warnings=tuple(_warnings(sources, held, analyses)),
            sources=sources,
            held=tuple(held),
            settings=settings,
            costs=costs,
            seconds=_seconds(analyses),
        )

    def _check(self) -> float | None:
        """Refuse what makes no sense whatever the sources are; the target recall, or None where there is a budget."""
        target = _checked_target(self.target_recall, self.budget_density)
        check_word("--by", self.by, BY)
        check_word("--statistic", self.statistic, STATISTICS)
        check_word("--minimise", self.minimise, ("density", "time"))
        resolve_backend_name(self.backend, resolve_device(self.device))
        if isinstance(self.holdout, (int, float)) and not 0 <= self.holdout < 1:
            raise InputError(f"--holdout {self.holdout!r} must be a share from 0 to below 1, or names of prompts")
        if not 0 < self.dense_above <= 1:
            raise InputError(
                f"--dense-above {self.dense_above!r} is out of range: a density lies above 0 and at most at 1"
            )
        if self.minimise == "time" and self.costs is None:
            raise InputError(
                "minimising time needs measured times: give --costs with the bench.json of `anchorscope bench`"
            )
        if self.minimise == "time" and self.budget_density is not None:
            raise InputError(
                "a budget of density is shared out by density: leave out --minimise time, or give a target"
            )
        return target

    def _analysis(self, unit: AnalysisUnit, sources: Sources, thetas: Sequence[float]) -> AnalysisPlan:
        return AnalyzeRequest(
            unit.dump,
            thetas=thetas,
            params=unit.params,
            layers=sources.layers,
            prompts=unit.prompts,
            backend=self.backend,
            device=self.device,
            devices=self.devices,
            heatmaps=[],
        ).plan(steps=False)  # no heat map is drawn


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan(Plan[AnalysisUnit]):
    """The plan of a calibration; its units are the analyses to make.

    Attributes:
        sources: what it reads, checked.
        held: per prompt, whether it is held out.
        costs: measured times, if given.
        seconds: time the analyses take, about, if none of their heads is measured yet; from timing one head.
    """

    sources: Sources
    held: tuple[bool, ...]
    costs: Costs | None
    seconds: float

    @property
    def heads(self) -> int:
        """Heads to measure, over prompts and kinds of groups."""
        return sum(len(unit.analysis.units) for unit in self.units)


def listed_sources(sources: Sequence[Source | Path | str] | Source | Path | str) -> Sequence[Source | Path | str]:
    """Several sources, or the one that is given."""
    return sources if isinstance(sources, (list, tuple)) else [sources]  # type: ignore[list-item]


def _listed(paths: Sequence[Path | str] | Path | str) -> Sequence[Path | str]:
    return [paths] if isinstance(paths, (str, Path)) else paths


def _checked_target(target: float | None, budget: float | None) -> float | None:
    if target is not None and budget is not None:
        raise InputError("give a target recall or a density budget, not both: one follows from the other")
    if budget is not None:
        if not 0 < budget <= 1:
            raise InputError(f"--budget-density {budget!r} is out of range: a density lies above 0 and at most at 1")
        return None
    target = TARGET if target is None else target
    check_target(target)
    return target


def _check_budget(budget: float, sources: Sources, held: Sequence[bool]) -> None:
    """Refuse a budget of density that no choice can keep, before the heads are measured.

    Raises:
        InputError: the anchor regions alone cost more, whatever the groups.
    """
    tokens = [p.tokens for p, out in zip(sources.prompts, held, strict=True) if not out]
    shares = {g: float(np.mean([anchor_pairs(n, g) / visible_pairs(n) for n in tokens])) for g in sources.groups}
    cheapest = min(shares, key=shares.__getitem__)
    if budget < shares[cheapest] * (1 - 1e-9):
        raise InputError(
            f"--budget-density {budget:g} is below what the anchor regions alone keep, {shares[cheapest]:.4f} with"
            f" groups of {group_name(cheapest)}: give at least {math.ceil(1e4 * shares[cheapest]) / 1e4:g}, or add"
            " smaller groups to --groups"
        )


def _seconds(plans: Sequence[AnalysisPlan]) -> float:
    """Time the analyses take, about: a head of random tensors is timed and scaled by pairs and head size; where layers
    are measured together, some heads.
    """
    if not plans or elsewhere() is not None:
        return 0.0
    plan = plans[0]
    entry = max((j.entry for j in plan.units), key=lambda e: e.tokens)
    n = min(entry.tokens, 4096 if plan.backend.device.type == "cpu" else 32768)
    g = torch.Generator().manual_seed(0)
    together = plan.backend.layer_engine
    heads = 1 if together is None else min(len(entry.query_heads), TIMED_HEADS)
    dtype = torch.float32 if together is None else torch.bfloat16
    q, k, v = (
        torch.randn(count, n, entry.head_dim, generator=g).to(plan.backend.device, dtype) for count in (heads, 1, 1)
    )
    shape = HeadShape(n, entry.head_dim, plan.params, plan.thetas, entry.head_dim**-0.5, steps=plan.steps)
    took = []
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        if together is None:
            plan.backend.engine(q[0], k[0], v[0], shape)
        else:
            together(q, k, v, [0] * heads, shape, None, None)
        took.append((time.perf_counter() - begin) / heads)
    work = sum(j.work * j.entry.head_dim / p.workers for p in plans for j in p.units) / max(1, len(plan.devices))
    return took[-1] * work / (n * (n + 1) / 2 * entry.head_dim)


def _warnings(sources: Sources, held: Sequence[bool], analyses: Sequence[AnalysisPlan]) -> list[str]:
    found = []
    if not any(held):
        found.append("no prompt is held out: whether the thetas hold on other prompts is not checked")
    if sources.windowed:
        found.append(f"layers with a sliding window are left out and run dense: {describe_indices(sources.windowed)}")
    model = sources.model or {}
    depth, model_heads = model.get("layers"), model.get("query_heads")
    if isinstance(depth, int) and len(sources.layers) < depth:
        found.append(
            f"{len(sources.layers)} of the model's {counted(depth, 'layer')}"
            f" {'is' if len(sources.layers) == 1 else 'are'} calibrated ({describe_indices(sources.layers)});"
            " the others will run dense"
        )
    for layer in sources.layers:
        have = sum(h[0] == layer for h in sources.heads)
        if isinstance(model_heads, int) and have < model_heads:
            found.append(
                f"layer {layer} holds {have} of {counted(model_heads, 'query head')}; the others will run dense"
            )
    if analyses and all(plan.warnings for plan in analyses):  # one kind of group that suits is enough
        flags = "--groups {block}x{step}"
        found += dict.fromkeys(x for plan in analyses for x in anchor_warnings(plan.units, plan.params, flags))
    return found
