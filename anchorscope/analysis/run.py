"""`analyze`: a dump in, an output folder out; interruptible, resumable, one head at a time.

Stages: every head is measured and saved as a profile; then tables, figures and the report are made from the saved
profiles alone. So an interrupted run continues where it stopped and ends with the same bytes, and figures can be
redrawn later without the dump.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorscope.analysis.backends import Backend, resolve_backend
from anchorscope.analysis.diagnosis import Diagnosis, diagnose_analysis, plan_diagnosis
from anchorscope.analysis.engine import CURVE_THETAS, HEAT_COLUMNS, HEAT_ROWS, POSITION_BINS, HeadShape
from anchorscope.analysis.tables import (
    CURVES_COLUMNS,
    HEADS_COLUMNS,
    HeadLine,
    curves_rows,
    heads_rows,
    short_of_target,
    summarise,
)
from anchorscope.dumps import Dump, LayerTensors, open_dump
from anchorscope.errors import DumpError, InputError
from anchorscope.files import MAX_JSON_BYTES, csv_text, human_bytes, member, read_json, write_atomic
from anchorscope.locks import folder_lock
from anchorscope.params import AnchorParams, anchor_pairs, recommend_groups, visible_pairs
from anchorscope.profiles import HeadProfile
from anchorscope.runs.environment import versions
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.jobs import (
    Job,
    Progress,
    ProgressCallback,
    check_beside_plan,
    check_plan_source,
    choose_jobs,
    run_jobs,
)
from anchorscope.runs.values import jsonable
from anchorscope.shapes import check

STATE = "analysis.json"
REPORT = "report.json"
PROFILES = "profile"
FIGURES = "figures"
REPORT_VERSION = 1
FOLDER = RunFolder(
    what="an analysis",
    command="analyze",
    format="anchorscope-analysis",
    version=REPORT_VERSION,
    state=STATE,
    report=REPORT,
    tables=("heads.csv", "curves.csv"),
    parts=((PROFILES, "*.safetensors"), (FIGURES, "*.png")),
    kept=("measured heads", f"{PROFILES}/*.safetensors"),
)
ANCHOR_BUDGET = 0.25  # share of the pairs above which the anchor region alone is called expensive
STATE_SHAPE = {"profiles": [str], "settings": {"target_recall": float, "prompts": [str], "layers": [int]}}
REPORT_SHAPE = {
    "dump": {"identity": str, "model": (dict, None)},
    "prompts": [{"name": str, "tokens": int}],
    "settings": {"target_recall": float},
}


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first score is computed.

    Attributes:
        jobs: heads to measure, entry by entry.
        workers: heads measured at the same time.
        memory: bytes of working memory besides the libraries themselves; on a GPU its own memory, and the host then
            holds one layer's tensors.
        disk: bytes that tables and profiles will need, about.
        pictures: bytes that the figures will need besides, about.
        warnings: sentences for the user.
    """

    dump: Dump
    settings: dict[str, Any]
    params: AnchorParams
    thetas: tuple[float, ...]
    target_recall: float
    backend: Backend
    jobs: tuple[Job, ...]
    workers: int
    memory: int
    disk: int
    pictures: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """A finished analysis.

    Attributes:
        path: the output folder.
        report: what report.json holds.
        lines: one summary per head, in the order of heads.csv.
        figures: the pictures written, heat maps included.
        diagnosis: what kind of head each one is, if that was asked for.
    """

    path: Path
    report: dict[str, Any]
    lines: tuple[HeadLine, ...] = field(repr=False)
    figures: tuple[Path, ...] = ()
    diagnosis: Diagnosis | None = None

    def profiles(self, *, heat: bool = True) -> Iterator[HeadProfile]:
        """The saved profiles, one at a time."""
        return iter_profiles(self.path, heat=heat)


def plan_analysis(
    dump: Dump | Path | str,
    *,
    thetas: Sequence[float] = (12.0,),
    params: AnchorParams | None = None,
    target_recall: float = 0.95,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    backend: str = "auto",
    device: str = "auto",
    heatmaps: Sequence[tuple[int, int]] | str | None = None,
) -> Plan:
    """Check a request and say what it will cost. Arguments as in `analyze`.

    Raises:
        InputError: thetas empty or NaN, an unknown layer, head or prompt, a target outside (0, 1].
        DumpError: the dump is missing or damaged.
        MissingBackendError: back end or device absent.
    """
    params = AnchorParams() if params is None else params
    thetas = tuple(float(t) for t in thetas)
    if not thetas or any(np.isnan(thetas)):
        raise InputError("thetas must hold at least one number and no NaN")
    if not 0 < target_recall <= 1:
        raise InputError(f"target recall must lie above 0 and at most at 1, not {target_recall!r}")
    source = dump if isinstance(dump, Dump) else open_dump(dump)
    engine = resolve_backend(backend, device)

    jobs = choose_jobs(source, prompts, layers, heads)

    settings: dict[str, Any] = {
        "theta": [jsonable(t) for t in thetas],
        "block": params.block,
        "step": params.step,
        "init": params.init_tokens,
        "lookback": params.lookback_tokens,
        "target_recall": target_recall,
        "prompts": list(dict.fromkeys(j.entry.prompt for j in jobs)),
        "layers": sorted({j.entry.layer for j in jobs}),
        "heads": sorted({j.head for j in jobs}),
        "backend": engine.name,
        "device": engine.device.type,
    }
    largest = max(jobs, key=lambda j: j.entry.tokens * j.entry.head_dim).entry
    each = engine.workspace(largest.tokens, largest.head_dim, len(set(thetas)), params)
    workers = 1
    if engine.device.type == "cpu" and engine.name == "torch":
        # One head per core beats one head on all cores; heads of over 64k tokens would need the memory twice.
        workers = max(1, min(torch.get_num_threads(), len(jobs), int(8 * 2**30 // each)))
    layer_bytes = max(j.entry.bytes for j in jobs)
    return Plan(
        dump=source,
        settings=settings,
        params=params,
        thetas=thetas,
        target_recall=target_recall,
        backend=engine,
        jobs=jobs,
        workers=workers,
        memory=workers * each + (layer_bytes if engine.device.type == "cpu" else 0),
        disk=_disk_bytes(jobs, params, len(thetas)),
        pictures=_picture_bytes(jobs, heatmaps),
        warnings=tuple(_anchor_warnings(source, jobs, params)),
    )


def analyze(
    dump: Dump | Path | str,
    out: Path | str,
    *,
    thetas: Sequence[float] = (12.0,),
    params: AnchorParams | None = None,
    target_recall: float = 0.95,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    backend: str = "auto",
    device: str = "auto",
    heatmaps: Sequence[tuple[int, int]] | str | None = None,
    figures: bool = True,
    diagnose: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
    plan: Plan | None = None,
) -> Analysis:
    """Measure every chosen head of a dump: recall against sparsity for every theta, and where the mass lies.

    Args:
        dump: a dump folder, or an open dump.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        thetas: nats; any number, +-inf included. Figures use the first.
        params: block, step, init and lookback.
        target_recall: recall to report the needed theta and density for.
        layers, heads: original indices; None means all in the dump.
        prompts: prompt names; None means all.
        backend: "auto", "torch" or "triton".
        device: "auto", "cpu", "cuda" or "cuda:i".
        heatmaps: (layer, head) pairs, "all", or None for the worst, the median and the best head.
        figures: draw the figures.
        diagnose: also find out what kind of head each one is, by the first theta: see `anchorscope.diagnose`.
        overwrite: replace an earlier analysis in `out`.
        resume: accept a finished analysis of the same request in `out` too, and leave it as it is.
        progress: called as work proceeds.
        notify: told in a sentence when saved diagnostics cannot be used again.
        plan: a plan made beforehand; what it decides must then not be given again.

    Returns:
        The finished analysis. `out` then holds heads.csv, curves.csv, report.json, profile/, figures/ and heads/.

    Raises:
        InputError, DumpError, MissingBackendError: see `plan_analysis`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    if plan is None:
        plan = plan_analysis(
            dump,
            thetas=thetas,
            params=params,
            target_recall=target_recall,
            layers=layers,
            heads=heads,
            prompts=prompts,
            backend=backend,
            device=device,
            heatmaps=heatmaps,
        )
    else:
        check_plan_source(plan.dump, dump)
        given = {
            "thetas": thetas,
            "params": params,
            "target_recall": target_recall,
            "layers": layers,
            "heads": heads,
            "prompts": prompts,
            "backend": backend,
            "device": device,
        }
        check_beside_plan(analyze, given)
    _check_heatmaps(heatmaps, plan)
    report = progress or (lambda _: None)
    kinds = plan_diagnosis(plan) if diagnose else None
    request = {
        "dump": plan.dump.identity,
        "settings": plan.settings,
        "profiles": [j.name for j in plan.jobs],
    }
    asked = {"figures": figures, "heatmaps": _heatmaps_asked(heatmaps) if figures else None, "diagnose": diagnose}
    disk = plan.disk + (kinds.disk if kinds else 0)
    if figures:
        disk += plan.pictures + (kinds.pictures if kinds else 0)
    with FOLDER.run(Path(out), request, asked=asked, disk=disk, overwrite=overwrite, resume=resume) as run:
        _measure(run.path, plan, report)
        result = _finish(run.path, plan, run.state)
        drawn = _draw(run.path, run.state, run.asked["heatmaps"], report) if run.asked["figures"] else []
        found = diagnose_analysis(run.path, plan, run.asked, report, notify)
        run.finish(result.report)
        return replace(result, figures=tuple(drawn), diagnosis=found)


def iter_profiles(out: Path | str, *, heat: bool = True) -> Iterator[HeadProfile]:
    """The profiles saved in an output folder, in the order of heads.csv.

    Raises:
        DumpError: the folder holds no analysis, or a profile is damaged.
    """
    for name in _state(Path(out))["profiles"]:
        yield HeadProfile.load(Path(out) / PROFILES / name, heat=heat)


def redraw(
    out: Path | str,
    *,
    heatmaps: Sequence[tuple[int, int]] | str | None = None,
    progress: ProgressCallback | None = None,
) -> list[Path]:
    """Draw the figures of an analysis again, from its saved profiles; the dump is not needed.

    Raises:
        DumpError: the folder holds no analysis, or a profile is damaged.
    """
    path = Path(out)
    state = _state(path)
    FOLDER.check_finished(path)
    with folder_lock(path):
        return _draw(path, state, heatmaps, progress or (lambda _: None))


def load_report(out: Path | str) -> dict[str, Any]:
    """The report.json of a finished analysis.

    Raises:
        DumpError: there is none.
    """
    FOLDER.check_finished(Path(out))
    path = Path(out) / REPORT
    try:
        report = read_json(path, MAX_JSON_BYTES, "report")
    except InputError as error:
        raise DumpError(f"{out} holds no finished analysis ({error}): run `anchorscope analyze` first") from None
    if not isinstance(report, dict) or report.get("format") != "anchorscope-report":
        raise DumpError(f"{path} is not a report written by analyze")
    check(report, REPORT_SHAPE, str(path), hint="it is damaged; run analyze again", error=DumpError)
    return dict(report)


# ----------------------------------------------------------------------------------------------------------------
# planning


def _disk_bytes(jobs: Sequence[Job], params: AnchorParams, thetas: int) -> int:
    """What tables and profiles will take; profiles are mostly their heat maps, the rest is as measured."""
    total = 4_000
    for job in jobs:
        n = job.entry.tokens
        groups, positions = params.groups(n), -(-n // -(-n // POSITION_BINS))
        rows, columns = (-(-count // -(-count // limit)) for count, limit in ((groups, HEAT_ROWS), (n, HEAT_COLUMNS)))
        total += 8 * rows * columns + 8 * (rows + columns) + (4 * thetas + 8) * positions
        total += 24 * len(CURVE_THETAS) + 8_500 + 80 * thetas  # curves; the oracle, the header; numbers per theta
        total += 6_000 + 200 * thetas  # rows of curves.csv and heads.csv
    return total


def _picture_bytes(jobs: Sequence[Job], heatmaps: Sequence[tuple[int, int]] | str | None) -> int:
    """What the figures will take, as measured of their kinds."""
    layers = len({(j.prompt_index, j.entry.layer) for j in jobs})
    prompts = len({j.prompt_index for j in jobs})
    return 55_000 * prompts + 135_000 * layers + 150_000 * _heat_maps(heatmaps, len(jobs), prompts)


def _heat_maps(heatmaps: Sequence[tuple[int, int]] | str | None, heads: int, prompts: int) -> int:
    """How many heat maps a request draws."""
    return heads if heatmaps == "all" else min(heads, prompts * (3 if heatmaps is None else len(heatmaps)))


def _anchor_warnings(dump: Dump, jobs: Sequence[Job], params: AnchorParams) -> Iterator[str]:
    """Say where the anchor region alone costs more than a quarter of the pairs, and which groups would not."""
    for n, window in sorted({(j.entry.tokens, j.entry.window) for j in jobs}, key=lambda x: (x[0], x[1] or 0)):
        share = anchor_pairs(n, params, window) / visible_pairs(n, window)
        if share <= ANCHOR_BUDGET:
            continue
        better = recommend_groups(n, window, ANCHOR_BUDGET)
        hint = (
            f"--block {better.block} --step {better.step} would cost "
            f"{anchor_pairs(n, better, window) / visible_pairs(n, window):.0%}"
            if better
            else "the prompt is too short for any groups to be sparse"
        )
        layers = "" if window is None else f" (sliding window {window})"
        yield (
            f"at {n:,} tokens{layers} the anchor region alone keeps {share:.0%} of the pairs with groups of "
            f"{params.block} x {params.step}; {hint}"
        )


def _check_heatmaps(heatmaps: Sequence[tuple[int, int]] | str | None, plan: Plan) -> None:
    if heatmaps is None or heatmaps == "all":
        return
    if isinstance(heatmaps, str):
        raise InputError(f"heatmaps must be 'all' or (layer, head) pairs, not {heatmaps!r}")
    known = {(j.entry.layer, j.head) for j in plan.jobs}
    for layer, head in heatmaps:
        if (layer, head) not in known:
            raise InputError(f"heat map {layer}:{head}: that layer and head are not analyzed here")


def _heatmaps_asked(heatmaps: Sequence[tuple[int, int]] | str | None) -> list[list[int]] | str:
    """Heat maps as the state holds them; what `_draw` takes."""
    return "default" if heatmaps is None else heatmaps if isinstance(heatmaps, str) else [list(x) for x in heatmaps]


# ------------------------------------------------------------------------------------------------------------------
# folder


def _state(path: Path) -> dict[str, Any]:
    state = FOLDER.read(path)
    if state is None or not isinstance(state.get("profiles"), list):
        raise DumpError(f"{path} holds no analysis: run `anchorscope analyze DUMP --out {path}` first")
    if any(member(path / PROFILES, name, ".safetensors") is None for name in state["profiles"]):
        raise DumpError(f"{path / STATE} names a file outside its folder: it was edited; run analyze again")
    check(state, STATE_SHAPE, str(path / STATE), hint="it is damaged; run analyze again", error=DumpError)
    return state


# ---------------------------------------------------------------------------------------------------------------
# measuring


def _measure(path: Path, plan: Plan, report: ProgressCallback) -> None:
    """Measure the heads whose profiles are not there yet."""
    total = sum(j.work for j in plan.jobs)
    missing: list[Job] = []
    for job in plan.jobs:
        try:
            saved = HeadProfile.load(path / PROFILES / job.name, heat=False)
            if saved.dump_identity != plan.dump.identity:
                missing.append(job)
        except DumpError:
            missing.append(job)
    done = total - sum(j.work for j in missing)
    report(Progress("heads", done, total))

    run_jobs(
        plan.dump,
        missing,
        lambda job, tensors, stop: _measure_head(path, plan, job, tensors, stop),
        workers=plan.workers,
        report=report,
        work_before=done,
        work_total=total,
        memory_advice=lambda: _memory_advice(plan),
    )


def _memory_advice(plan: Plan) -> str:
    longest = max(j.entry.tokens for j in plan.jobs)
    return (
        f"out of memory on {plan.backend.device}: one head of {longest:,} tokens needs about "
        f"{human_bytes(plan.memory / plan.workers)}; use --device cpu, fewer thetas or a shorter capture"
    )


def _measure_head(path: Path, plan: Plan, job: Job, tensors: LayerTensors, stop: threading.Event) -> None:
    entry, device = job.entry, plan.backend.device
    row, kv = tensors.query_heads.index(job.head), tensors.kv_index(job.head)
    shape = HeadShape(
        entry.tokens,
        entry.head_dim,
        plan.params,
        plan.thetas,
        entry.scale,
        entry.window,
        entry.softcap,
        cancelled=stop.is_set,
    )
    q, k = tensors.q[row].to(device), tensors.k[kv].to(device)
    v = None if tensors.v is None else tensors.v[kv].to(device)
    result = plan.backend.engine(q, k, v, shape)
    profile = HeadProfile(
        prompt=entry.prompt,
        layer=entry.layer,
        head=job.head,
        kv_head=tensors.kv_heads[kv],
        tokens=entry.tokens,
        head_dim=entry.head_dim,
        block=plan.params.block,
        step=plan.params.step,
        init=plan.params.init_tokens,
        lookback=plan.params.lookback_tokens,
        window=entry.window,
        softcap=entry.softcap,
        scale=entry.scale,
        backend=plan.backend.name,
        dump_identity=plan.dump.identity,
        thetas=np.asarray(plan.thetas),
        **vars(result),
    )
    profile.save(path / PROFILES / job.name)


# ---------------------------------------------------------------------------------------------------------------
# finishing


def _finish(path: Path, plan: Plan, state: dict[str, Any]) -> Analysis:
    """Tables and the report, from the saved profiles."""
    lines, head_rows, curve_rows = [], [], []
    for profile in iter_profiles(path, heat=False):
        lines.append(HeadLine.of(profile, plan.target_recall))
        head_rows.extend(heads_rows(profile))
        curve_rows.extend(curves_rows(profile))
    write_atomic(path / "heads.csv", csv_text(HEADS_COLUMNS, head_rows).encode())
    write_atomic(path / "curves.csv", csv_text(CURVES_COLUMNS, curve_rows).encode())

    def only(**fixed: object) -> list[dict[str, Any]]:
        chosen = [x for x in lines if all(getattr(x, k) == v for k, v in fixed.items())]
        return summarise(chosen, plan.thetas)

    report = {
        "format": "anchorscope-report",
        "version": REPORT_VERSION,
        "started": state["started"],
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": [
            {"name": p.name, "tokens": p.tokens} for p in plan.dump.prompts if p.name in plan.settings["prompts"]
        ],
        "settings": plan.settings,
        "versions": versions(),
        "hardware": plan.backend.hardware,
        "warnings": list(plan.warnings),
        "overall": summarise(lines, plan.thetas),
        "by_prompt": [{"prompt": p, "thetas": only(prompt=p)} for p in plan.settings["prompts"]],
        "by_layer": [{"layer": i, "thetas": only(layer=i)} for i in plan.settings["layers"]],
        "target": {
            "recall": plan.target_recall,
            "heads": len(lines),
            "reached": sum(bool(x.recall[0] >= plan.target_recall) for x in lines),
            "density_needed_mean": _mean_or_none([x.density_needed for x in lines]),
            "oracle_density_needed_mean": _mean_or_none([x.oracle_density_needed for x in lines]),
            "short": short_of_target(lines, plan.thetas, plan.target_recall),
        },
    }
    return Analysis(path, report, tuple(lines))


def _draw(
    path: Path,
    state: dict[str, Any],
    heatmaps: Sequence[Sequence[int]] | str | None,
    report: ProgressCallback,
) -> list[Path]:
    """Every figure, from the saved profiles."""
    from anchorscope.plots.draw import draw_all

    wanted: list[tuple[int, int]] | str | None = None
    if heatmaps not in (None, "default"):
        wanted = heatmaps if isinstance(heatmaps, str) else [(int(i), int(h)) for i, h in heatmaps or ()]
    target = state["settings"]["target_recall"]
    profiles = [path / PROFILES / name for name in state["profiles"]]
    prompts, layers = len(state["settings"]["prompts"]), len(state["settings"]["layers"])
    total = prompts * (1 + 2 * layers) + _heat_maps(wanted, len(profiles), prompts)
    done = 0

    def drawn_one(file: Path) -> None:
        nonlocal done
        done += 1
        report(Progress("figures", min(done, total), total, file.stem))

    report(Progress("figures", 0, total))
    return draw_all(profiles, path / FIGURES, heatmaps=wanted, target_recall=target, progress=drawn_one)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    return float(np.mean([v for v in values if v is not None])) if values and None not in values else None


__all__ = [
    "Analysis",
    "Plan",
    "Progress",
    "analyze",
    "iter_profiles",
    "load_report",
    "plan_analysis",
    "redraw",
]
