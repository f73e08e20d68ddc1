"""`calibrate`: dumps of a few prompts in, anchors.json out, with its promise checked on prompts it never saw.

Dumps are analyzed first, once per kind of group, into OUT/analysis/; these folders are ordinary analyses, resumable and
kept, so another target needs no new measurement. Everything after that is numpy on saved curves and takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorscope.analysis.engine import HeadShape
from anchorscope.analysis.run import Plan as AnalysisPlan
from anchorscope.analysis.run import analyze, plan_analysis
from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.calibration.choose import BY, By, Choice, Problem, reach, spend
from anchorscope.calibration.costs import Costs, by_density, costs_json
from anchorscope.calibration.curves import STATISTICS, HeadCurves, HeadIndex, PromptCurve, Statistic, common_grid
from anchorscope.calibration.outcome import Outcome, against_one_theta, gain, lengths, promise, relative_time
from anchorscope.calibration.sources import (
    Measured,
    Run,
    Sources,
    group_name,
    hold_out,
    labels,
    open_sources,
    read_curves,
)
from anchorscope.calibration.tables import COLUMNS, head_rows, layer_rows, table_row
from anchorscope.errors import InputError
from anchorscope.files import csv_text, write_atomic
from anchorscope.params import AnchorParams
from anchorscope.parse import describe_indices, parse_thetas
from anchorscope.runs.environment import versions
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.jobs import Progress, ProgressCallback, check_beside_plan
from anchorscope.runs.values import jsonable

ANCHORS = "anchors.json"
REPORT = "calibration.json"
TABLE = "calibration.csv"
ANALYSIS = "analysis"
FIGURES = "figures"
VERSION = 1
THETAS = "-inf,0:16:0.25,inf"  # where the row statistics are measured; the mean has its own, finer curve
TARGET = 0.95
DENSE_ABOVE = 0.9
PICTURE_BYTES = 400_000  # of all figures together, as measured
FEW = 8  # finite thetas below which p05 and last are chosen coarsely

FOLDER = RunFolder(
    what="a calibration",
    command="calibrate",
    format="anchorscope-calibration-run",
    version=VERSION,
    state="run.json",
    report=REPORT,
    tables=(ANCHORS, TABLE),
    # analyses stay: another target uses them again
    parts=((FIGURES, "*.png"),),
    kept=("measured heads", f"{ANALYSIS}/*/profile/*.safetensors"),
)


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first head is measured.

    Attributes:
        sources: what it reads, checked.
        held: per prompt, whether it is held out.
        analyses: the analyses to make, with their plans.
        settings: the request as JSON.
        costs: measured times, if given.
        memory, disk: bytes needed, about; disk without figures.
        pictures: bytes that the figures will need besides, about.
        seconds: time the analyses take, about, if none of their heads is measured yet; from timing one head.
        warnings: sentences for the user.
    """

    sources: Sources
    held: tuple[bool, ...]
    analyses: tuple[tuple[Run, AnalysisPlan], ...]
    settings: dict[str, Any]
    costs: Costs | None
    memory: int
    disk: int
    pictures: int
    seconds: float
    warnings: tuple[str, ...]

    @property
    def heads(self) -> int:
        """Heads to measure, over prompts and kinds of groups."""
        return sum(len(plan.jobs) for _, plan in self.analyses)


@dataclass(frozen=True)
class Calibration:
    """A finished calibration.

    Attributes:
        path: the output folder.
        config: what anchors.json holds.
        report: what calibration.json holds.
        figures: the pictures written.
    """

    path: Path
    config: AnchorConfig
    report: dict[str, Any] = field(repr=False)
    figures: tuple[Path, ...] = ()


def plan_calibration(
    sources: Sequence[Path | str] | Path | str,
    *,
    target_recall: float | None = None,
    budget_density: float | None = None,
    by: str = "head",
    statistic: str = "mean",
    minimise: str = "density",
    costs: Sequence[Path | str] | Path | str | None = None,
    dense_above: float = DENSE_ABOVE,
    groups: Sequence[AnchorParams] | None = None,
    layers: Sequence[int] | str | None = None,
    thetas: Sequence[float] | None = None,
    holdout: float | Sequence[str] = 0.3,
    seed: int = 0,
    backend: str = "auto",
    device: str = "auto",
) -> Plan:
    """Check a request and say what it will cost. Arguments as in `calibrate`.

    Raises:
        InputError, DumpError, MissingBackendError: as `calibrate`.
    """
    target = _checked_target(target_recall, budget_density)
    _check_word("by", by, BY)
    _check_word("statistic", statistic, STATISTICS)
    _check_word("minimise", minimise, ("density", "time"))
    if not 0 < dense_above <= 1:
        raise InputError(f"dense_above must lie above 0 and at most at 1, not {dense_above!r}")
    if minimise == "time" and costs is None:
        raise InputError(
            "minimising time needs measured times: give --costs with the bench.json of `anchorscope bench`"
        )
    if minimise == "time" and budget_density is not None:
        raise InputError("a budget of density is shared out by density: leave out --minimise time, or give a target")
    times = None if costs is None else Costs.load([costs] if isinstance(costs, (str, Path)) else costs)
    paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found = open_sources(paths, groups=groups, layers=layers, statistic=statistic)  # type: ignore[arg-type]
    held = hold_out(found.prompts, holdout, seed)
    tokens = float(np.mean([p.tokens for p in found.prompts]))
    if times is not None:
        times.price(found.groups, tokens)
    asked = tuple(parse_thetas(THETAS)) if thetas is None else tuple(thetas)
    analyses = tuple((run, _plan_run(run, found, asked, backend, device)) for run in found.runs)
    settings: dict[str, Any] = {
        "target": target,
        "budget_density": budget_density,
        "by": by,
        "statistic": statistic,
        "minimise": minimise,
        "dense_above": dense_above,
        "groups": [group_name(p) for p in found.groups],
        "layers": list(found.layers),
        "thetas": [jsonable(t) for t in asked] if analyses else None,
        "holdout": holdout if isinstance(holdout, (int, float)) else list(holdout),
        "seed": seed,
        "costs": times and costs_json(times, found.groups, tokens),
        "backend": analyses[0][1].backend.name if analyses else None,
        "device": analyses[0][1].backend.device.type if analyses else None,
    }
    curves = len(found.prompts) * len(found.groups) * len(found.heads) * 30_000
    return Plan(
        sources=found,
        held=tuple(held),
        analyses=analyses,
        settings=settings,
        costs=times,
        memory=max([curves, *(plan.memory for _, plan in analyses)]),
        disk=sum(plan.disk for _, plan in analyses) + 1_500 * len(found.heads) + 100_000,
        pictures=PICTURE_BYTES,
        seconds=_seconds([plan for _, plan in analyses]),
        warnings=tuple(_warnings(found, held, analyses)),
    )


def calibrate(
    sources: Sequence[Path | str] | Path | str,
    out: Path | str,
    *,
    target_recall: float | None = None,
    budget_density: float | None = None,
    by: str = "head",
    statistic: str = "mean",
    minimise: str = "density",
    costs: Sequence[Path | str] | Path | str | None = None,
    dense_above: float = DENSE_ABOVE,
    groups: Sequence[AnchorParams] | None = None,
    layers: Sequence[int] | str | None = None,
    thetas: Sequence[float] | None = None,
    holdout: float | Sequence[str] = 0.3,
    seed: int = 0,
    backend: str = "auto",
    device: str = "auto",
    figures: bool = True,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    plan: Plan | None = None,
) -> Calibration:
    """Choose the kind of group and the theta of every head, and check them on prompts that were held out.

    Args:
        sources: dump folders and finished analyses, of one model.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
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
        backend, device: of the analyses, as in `analyze`.
        figures: draw the figures.
        overwrite: replace an earlier calibration in `out`; its analyses are used again where they fit.
        progress: called as work proceeds.
        plan: a plan made beforehand; what it decides must then not be given again.

    Returns:
        The calibration. `out` then holds anchors.json, calibration.json, calibration.csv, figures/ and analysis/.

    Raises:
        InputError: a target or a budget that makes no sense, dumps of different models, missing heads, fewer than two
            prompts with a holdout, times that lack a kind of group, an `out` that is in use.
        DumpError: a source that is missing or damaged.
        MissingBackendError: back end or device absent.
        RunFailure: disk full, out of memory.
    """
    if plan is None:
        plan = plan_calibration(
            sources,
            target_recall=target_recall,
            budget_density=budget_density,
            by=by,
            statistic=statistic,
            minimise=minimise,
            costs=costs,
            dense_above=dense_above,
            groups=groups,
            layers=layers,
            thetas=thetas,
            holdout=holdout,
            seed=seed,
            backend=backend,
            device=device,
        )
    else:
        given = {
            "target_recall": target_recall,
            "budget_density": budget_density,
            "by": by,
            "statistic": statistic,
            "minimise": minimise,
            "costs": costs,
            "dense_above": dense_above,
            "groups": groups,
            "layers": layers,
            "thetas": thetas,
            "holdout": holdout,
            "seed": seed,
            "backend": backend,
            "device": device,
        }
        check_beside_plan(calibrate, given)
    report = progress or (lambda _: None)
    request = {"sources": list(plan.sources.identity), "settings": plan.settings}
    disk = plan.disk + (plan.pictures if figures else 0)
    with FOLDER.run(Path(out), request, asked={"figures": figures}, disk=disk, overwrite=overwrite) as run:
        path = run.path
        curves = _gather(plan.sources, _measure(path, plan, overwrite, report))
        report(Progress("choosing", 0, 1))
        config, result, rows = _calibrate(plan, curves, run.state["started"])
        report(Progress("choosing", 1, 1))
        config.save(path / ANCHORS)
        write_atomic(path / TABLE, csv_text(COLUMNS, map(table_row, rows)).encode())
        drawn: list[Path] = []
        if run.asked["figures"]:
            from anchorscope.calibration.figures import draw_all

            report(Progress("figures", 0, 1))
            drawn = draw_all(result, path / FIGURES)
            report(Progress("figures", 1, 1))
        run.finish(result)
        return Calibration(path, config, result, tuple(drawn))


# ----------------------------------------------------------------------------------------------------------------
# planning


def _checked_target(target: float | None, budget: float | None) -> float | None:
    if target is not None and budget is not None:
        raise InputError("give a target recall or a density budget, not both: one follows from the other")
    if budget is not None:
        if not 0 < budget <= 1:
            raise InputError(f"a density budget must lie above 0 and at most at 1, not {budget!r}")
        return None
    target = TARGET if target is None else target
    if not 0 < target <= 1:
        raise InputError(f"target recall must lie above 0 and at most at 1, not {target!r}")
    return target


def _check_word(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"--{name} {value!r} is unknown; use one of {', '.join(known)}")


def _plan_run(run: Run, sources: Sources, thetas: Sequence[float], backend: str, device: str) -> AnalysisPlan:
    return plan_analysis(
        run.dump,
        thetas=thetas,
        params=run.params,
        layers=sources.layers,
        prompts=run.prompts,
        backend=backend,
        device=device,
        heatmaps=[],
    )


def _seconds(plans: Sequence[AnalysisPlan]) -> float:
    """Time the analyses take, about: one head of random tensors is timed and scaled by pairs and head size."""
    if not plans:
        return 0.0
    plan = plans[0]
    entry = max((j.entry for j in plan.jobs), key=lambda e: e.tokens)
    n = min(entry.tokens, 4096 if plan.backend.device.type == "cpu" else 32768)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, entry.head_dim, generator=g).to(plan.backend.device) for _ in range(3))
    shape = HeadShape(n, entry.head_dim, plan.params, plan.thetas, entry.head_dim**-0.5)
    took = []
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        plan.backend.engine(q, k, v, shape)
        took.append(time.perf_counter() - begin)
    work = sum(j.work * j.entry.head_dim / p.workers for p in plans for j in p.jobs)
    return took[-1] * work / (n * (n + 1) / 2 * entry.head_dim)


def _warnings(sources: Sources, held: Sequence[bool], analyses: Sequence[tuple[Run, AnalysisPlan]]) -> list[str]:
    found = []
    if not any(held):
        found.append("no prompt is held out: whether the thetas hold on other prompts is not checked")
    if sources.windowed:
        found.append(
            f"layers {describe_indices(sources.windowed)} have a sliding window: they are left out and run dense"
        )
    model = sources.model or {}
    depth, model_heads = model.get("layers"), model.get("query_heads")
    if isinstance(depth, int) and len(sources.layers) < depth:
        found.append(
            f"{len(sources.layers)} of the model's {depth} layers are calibrated ({describe_indices(sources.layers)});"
            " the others will run dense"
        )
    for layer in sources.layers:
        have = sum(h[0] == layer for h in sources.heads)
        if isinstance(model_heads, int) and have < model_heads:
            found.append(f"layer {layer} holds {have} of {model_heads} query heads; the others will run dense")
    if analyses and all(plan.warnings for _, plan in analyses):  # one kind of group that suits is enough
        found += dict.fromkeys(sentence for _, plan in analyses for sentence in plan.warnings)
    return found


# ----------------------------------------------------------------------------------------------------------------
# measuring


def _measure(path: Path, plan: Plan, overwrite: bool, report: ProgressCallback) -> Measured:
    """Make the analyses that are missing and read all curves."""
    measured = dict(plan.sources.measured)
    prompts = {(p.dump, p.name): p for p in plan.sources.prompts}
    total = sum(j.work for _, p in plan.analyses for j in p.jobs)
    before = 0
    for run, planned in plan.analyses:
        folder = path / ANALYSIS / run.folder

        def forward(event: Progress, before: int = before, name: str = group_name(run.params)) -> None:
            if event.stage == "heads":
                report(Progress("heads", before + event.work, total, f"{name} {event.detail}".strip()))

        analyze(
            run.dump,
            folder,
            plan=planned,
            figures=False,
            heatmaps=[],
            overwrite=overwrite,
            resume=True,
            progress=forward,
        )
        before += sum(j.work for j in planned.jobs)
        measured.update((key, curve) for key, curve, _ in read_curves(folder, prompts, plan.settings["statistic"]))
    return measured


def _gather(sources: Sources, measured: Measured) -> dict[AnchorParams, dict[HeadIndex, HeadCurves]]:
    """Curves per kind of group and head, on the thetas common to all."""
    wanted: dict[tuple[AnchorParams, HeadIndex], list[PromptCurve]] = {
        (params, head): [measured[p, params, head] for p in sources.prompts]
        for params in sources.groups
        for head in sources.heads
    }
    grid = common_grid(c for curves in wanted.values() for c in curves)
    return {
        params: {head: HeadCurves.of(*head, params, wanted[params, head], grid) for head in sources.heads}
        for params in sources.groups
    }


# ----------------------------------------------------------------------------------------------------------------
# choosing and judging


def _calibrate(
    plan: Plan, curves: dict[AnchorParams, dict[HeadIndex, HeadCurves]], started: str
) -> tuple[AnchorConfig, dict[str, Any], list[dict[str, Any]]]:
    """Choose, evaluate, and write it all down as JSON values."""
    s, sources = plan.settings, plan.sources
    statistic: Statistic = s["statistic"]
    by: By = s["by"]
    target: float | None = s["target"]
    names, tokens = labels(sources.prompts), [p.tokens for p in sources.prompts]
    fit = [i for i, held in enumerate(plan.held) if not held]
    held = [i for i, held in enumerate(plan.held) if held]
    timed = plan.costs.price(sources.groups, float(np.mean(tokens))) if plan.costs else None
    price = timed if timed and s["minimise"] == "time" else by_density
    problem = Problem(curves, fit, statistic, price, s["dense_above"])

    def decide(p: Problem) -> Choice:
        return spend(p, s["budget_density"], by) if target is None else reach(p, target, by)

    choice = decide(problem)
    fitted = Outcome.of(choice, curves, fit)
    held_out = Outcome.of(choice, curves, held) if held else None

    def summary(outcome: Outcome, rows: list[int]) -> dict[str, Any]:
        spent = timed and relative_time(choice, outcome, timed)
        return {**outcome.summary([names[i] for i in rows]), "time": spent}

    rows = head_rows(choice, fitted, held_out, statistic, target)
    comparison = against_one_theta(problem, choice, held, by, target)
    report = {
        "format": "anchorscope-calibration",
        "version": VERSION,
        "started": started,
        "versions": versions(),
        "settings": s,
        "model": None if sources.model is None else dict(sources.model),
        "prompts": [
            {"name": name, "tokens": p.tokens, "sha256": p.sha256, "dump": p.dump, "held_out": out}
            for name, p, out in zip(names, sources.prompts, plan.held, strict=True)
        ],
        "warnings": [*plan.warnings, *_grid_warnings(statistic, curves)],
        "fitted": summary(fitted, fit),
        "held_out": held_out and summary(held_out, held),
        "promise": promise(held_out, statistic, target, by) if held_out is not None and target is not None else None,
        "dense_heads": sum(setting.theta is None for setting in choice.values()),
        "layers": layer_rows(rows),
        "heads": rows,
        "lengths": lengths(problem, decide, tokens, plan.held, target),
        "against_one_theta": {
            **comparison,
            "gain": {part: gain(comparison, part) for part in ("fitted", "held_out")},
        },
    }
    return _config(sources, choice, report), report, rows


def _grid_warnings(statistic: Statistic, curves: dict[AnchorParams, dict[HeadIndex, HeadCurves]]) -> list[str]:
    finest = max(int(np.isfinite(c.theta).sum()) for heads in curves.values() for c in heads.values())
    if statistic == "mean" or finest >= FEW:
        return []
    return [
        f"{statistic} is known at {finest} finite thetas only, so thetas are coarse: analyze with --theta 0:16:0.25"
    ]


def _config(sources: Sources, choice: Choice, report: dict[str, Any]) -> AnchorConfig:
    """The runnable part; heads of the model that no source holds run dense."""
    width = (sources.model or {}).get("query_heads")
    layers = []
    for layer in sources.layers:
        mine = {head: setting for (i, head), setting in choice.items() if i == layer}
        count = max([*mine, -1]) + 1
        if isinstance(width, int):
            count = max(count, width)
        thetas = tuple(mine[h].theta if h in mine else None for h in range(count))
        layers.append(LayerAnchors(layer, next(iter(mine.values())).params, thetas))
    found = {key: report[key] for key in ("settings", "prompts", "fitted", "held_out", "versions")}
    judged = report["promise"] and {k: v for k, v in report["promise"].items() if k != "shortfalls"}
    return AnchorConfig(tuple(layers), sources.model, {"made_by": "calibrate", **found, "promise": judged})
