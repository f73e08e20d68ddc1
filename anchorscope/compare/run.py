"""`compare`: a dump and a line-up of methods in, one table and its figures out; resumable, one head at a time.

Every head is scored with all methods and saved under scores/; tables and figures are made from those files alone. So
an interrupted run continues where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorscope.compare.score import LAST_ROWS, Score, score
from anchorscope.compare.tables import COLUMNS, RECALLS, Point, methods_rows, needed_table, winners
from anchorscope.devices import resolve_device
from anchorscope.dumps import Dump, LayerTensors, open_dump
from anchorscope.errors import DumpError, InputError
from anchorscope.files import again_remark, csv_text, human_bytes, member, read_part, write_atomic, write_part
from anchorscope.methods import Contender, Head, Selection, line_up
from anchorscope.methods.head import chunk_rows
from anchorscope.ranges import working_dtype
from anchorscope.runs.environment import full_precision, hardware_name, versions
from anchorscope.runs.folder import RunFolder
from anchorscope.runs.jobs import (
    Cancelled,
    Job,
    Progress,
    ProgressCallback,
    check_beside_plan,
    check_plan_source,
    choose_jobs,
    run_jobs,
)
from anchorscope.runs.values import jsonable
from anchorscope.shapes import NUMBER, fits

STATE = "run.json"
REPORT = "compare.json"
TABLE = "methods.csv"
SCORES = "scores"
FIGURES = "figures"
VERSION = 1
FOLDER = RunFolder(
    what="a comparison",
    command="compare",
    format="anchorscope-compare-run",
    version=VERSION,
    state=STATE,
    report=REPORT,
    tables=(TABLE,),
    parts=((SCORES, "*.json"), (FIGURES, "*.png")),
    kept=("finished heads", f"{SCORES}/*.json"),
)
BATCH_BYTES = 1 << 28  # selections held at a time; beyond it, a head's scores are computed once more

ScoreEngine = Callable[..., list[Score]]

_POINT = (str, int, int, str, str, *[NUMBER] * (len(COLUMNS) - 5))  # a row of a part
_REPORT_SHAPE = {"format": "anchorscope-compare", "dump": {"identity": str}}


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first score is computed.

    Attributes:
        lineup: the methods, as they appear in tables.
        jobs: heads to score, entry by entry.
        workers: heads scored at the same time.
        memory: bytes of working memory, besides the libraries themselves.
        disk: bytes that tables and scores will need, about.
        pictures: bytes that the figures will need besides, about.
        warnings: sentences for the user.
    """

    dump: Dump
    settings: dict[str, Any]
    lineup: tuple[Contender, ...]
    target_recall: float
    device: torch.device
    jobs: tuple[Job, ...]
    workers: int
    memory: int
    disk: int
    pictures: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        path: the output folder.
        report: what compare.json holds.
        points: every measured point, in the order of methods.csv.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any]
    points: tuple[Point, ...] = field(repr=False)
    figures: tuple[Path, ...] = ()


def plan_compare(
    dump: Dump | Path | str,
    *,
    lineup: Sequence[Contender] | None = None,
    target_recall: float = 0.95,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
) -> Plan:
    """Check a request and say what it will cost. Arguments as in `compare`.

    Raises:
        InputError: an unknown layer, head or prompt, a target outside (0, 1], an empty or ambiguous line-up.
        DumpError: the dump is missing or damaged.
        MissingBackendError: the device is absent.
    """
    contenders = line_up() if lineup is None else tuple(lineup)
    if not contenders:
        raise InputError("name at least one method to compare")
    labels = [c.label for c in contenders]
    if len(set(labels)) < len(labels):
        raise InputError("two methods of the line-up have the same label; give each its own")
    if not 0 < target_recall <= 1:
        raise InputError(f"target recall must lie above 0 and at most at 1, not {target_recall!r}")
    source = dump if isinstance(dump, Dump) else open_dump(dump)
    where = resolve_device(device)
    jobs = choose_jobs(source, prompts, layers, heads)
    settings: dict[str, Any] = {
        "methods": [
            {
                "label": c.label,
                "method": c.method.name,
                "settings": {
                    k: jsonable(float(v)) if isinstance(v, float) else v
                    for k, v in c.method.settings.items()
                    if k != c.method.parameter
                },
                "parameter": c.method.parameter,
                "values": [jsonable(float(v)) for v in c.sweep],
                "granularity": c.method.granularity,
                "oracle": c.method.oracle,
                "source": c.method.source,
            }
            for c in contenders
        ],
        "target_recall": target_recall,
        "last_rows": LAST_ROWS,
        "prompts": list(dict.fromkeys(j.entry.prompt for j in jobs)),
        "layers": sorted({j.entry.layer for j in jobs}),
        "heads": sorted({j.head for j in jobs}),
        "device": where.type,
    }
    largest = max(jobs, key=lambda j: j.entry.tokens * j.entry.head_dim).entry
    selections = sum(len(c.sweep) for c in contenders)
    each = _workspace_bytes(largest.tokens, largest.head_dim, selections, chunk_rows(where, largest.tokens))
    workers = 1
    if where.type == "cpu":
        workers = max(1, min(torch.get_num_threads(), len(jobs), int(8 * 2**30 // each)))
    return Plan(
        dump=source,
        settings=settings,
        lineup=contenders,
        target_recall=target_recall,
        device=where,
        jobs=jobs,
        workers=workers,
        memory=workers * each + max(j.entry.bytes for j in jobs),
        disk=len(jobs) * (selections * 250 + 200) + 20_000,  # scores and rows of methods.csv, as measured
        pictures=_picture_bytes(jobs),
        warnings=tuple(_warnings(jobs)),
    )


def compare(
    dump: Dump | Path | str,
    out: Path | str,
    *,
    lineup: Sequence[Contender] | None = None,
    target_recall: float = 0.95,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    figures: bool = True,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
    plan: Plan | None = None,
) -> Comparison:
    """Score every method of a line-up on every chosen head of a dump.

    Args:
        dump: a dump folder, or an open dump.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        lineup: methods and sweeps, see `anchorscope.methods.line_up`; None means all.
        target_recall: recall that figures and `best` are about.
        layers, heads: original indices; None means all in the dump.
        prompts: prompt names; None means all.
        device: "auto", "cpu", "cuda" or "cuda:i".
        figures: draw the figures.
        overwrite: replace an earlier comparison in `out`.
        progress: called as work proceeds.
        notify: told in a sentence when saved parts cannot be used again.
        plan: a plan made beforehand; what it decides must then not be given again.

    Returns:
        The finished comparison. `out` then holds methods.csv, compare.json, scores/ and figures/.

    Raises:
        InputError, DumpError, MissingBackendError: see `plan_compare`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    if plan is None:
        plan = plan_compare(
            dump,
            lineup=lineup,
            target_recall=target_recall,
            layers=layers,
            heads=heads,
            prompts=prompts,
            device=device,
        )
    else:
        check_plan_source(plan.dump, dump)
        given = {
            "lineup": lineup,
            "target_recall": target_recall,
            "layers": layers,
            "heads": heads,
            "prompts": prompts,
            "device": device,
        }
        check_beside_plan(compare, given)
    report = progress or (lambda _: None)
    request = {
        "dump": plan.dump.identity,
        "settings": plan.settings,
        "scores": [_score_name(j) for j in plan.jobs],
    }
    disk = plan.disk + (plan.pictures if figures else 0)
    with FOLDER.run(Path(out), request, asked={"figures": figures}, disk=disk, overwrite=overwrite) as run:
        path = run.path
        _measure(path, plan, report, notify or (lambda _: None))
        points = tuple(p for job in plan.jobs for p in _load(path, plan, job) or ())
        write_atomic(path / TABLE, csv_text(COLUMNS, methods_rows(points)).encode())
        result = _summary(plan, run.state, points)
        drawn: list[Path] = []
        if run.asked["figures"]:
            from anchorscope.compare.figures import draw_all

            report(Progress("figures", 0, 1))
            drawn = draw_all(points, path / FIGURES, plan.settings["methods"], target_recall=plan.target_recall)
            report(Progress("figures", 1, 1))
        run.finish(result)
        return Comparison(path, result, points, tuple(drawn))


def load_comparison(out: Path | str) -> Comparison:
    """A finished comparison, read again from its folder.

    Raises:
        DumpError: the folder holds none, or one that is damaged.
    """
    path = Path(out)
    report, state = FOLDER.load(path, _REPORT_SHAPE, {"scores": [str]})
    points: list[Point] = []
    for name in state["scores"]:
        file = member(path / SCORES, name, ".json")
        found = None if file is None else _read_points(file, report["dump"]["identity"])
        if found is None:
            raise DumpError(f"{path / SCORES / name} is missing or damaged: run the comparison again")
        points.extend(found)
    return Comparison(path, report, tuple(points), tuple(sorted((path / FIGURES).glob("*.png"))))


# ----------------------------------------------------------------------------------------------------------------
# planning


def _workspace_bytes(tokens: int, head_dim: int, selections: int, run: int) -> int:
    """Working memory of one head, bytes: inputs, scores and masks of a run of queries, kept shares, selections."""
    tensors = 10 * tokens * head_dim * 4
    chunk = 6 * run * tokens * 4
    rows = 3 * selections * tokens * 4
    margins = 4 * math.ceil(tokens / 256) * tokens * 4
    # About what the sweeps of all methods hold, in two batches at most.
    held = min(2 * BATCH_BYTES, selections * tokens * (tokens // 400 + 2))
    return tensors + chunk + rows + margins + held


def _picture_bytes(jobs: Sequence[Job]) -> int:
    """What the figures take, as measured: four of all heads, and one per prompt and layer with a panel per head."""
    heads: dict[tuple[int, int], int] = {}
    for job in jobs:
        key = job.prompt_index, job.entry.layer
        heads[key] = heads.get(key, 0) + 1
    return 230_000 + sum(40_000 + 17_000 * min(n, 12) for n in heads.values())


def _warnings(jobs: Sequence[Job]) -> list[str]:
    short = sorted({j.entry.tokens for j in jobs if j.entry.tokens < 4096})
    if not short:
        return []
    return [
        f"{short[0]:,} tokens is short for these methods: many are dense there at their authors' settings, with least"
        " budgets of 1,024 tokens and more"
    ]


# ------------------------------------------------------------------------------------------------------------------
# folder


def _score_name(job: Job) -> str:
    return Path(job.name).with_suffix(".json").name


def _load(path: Path, plan: Plan, job: Job) -> list[Point] | None:
    """The saved points of a head, or None if they are not there or not whole."""
    points = _read_points(path / SCORES / _score_name(job), plan.dump.identity)
    if points is None or len(points) != sum(len(c.sweep) for c in plan.lineup):
        return None
    return points


def _read_points(file: Path, identity: str) -> list[Point] | None:
    saved = read_part(file)
    if not fits(saved, {"format": "anchorscope-scores", "dump": identity, "points": [list]}):
        return None
    assert saved is not None
    if not all(len(row) == len(_POINT) and all(map(fits, row, _POINT)) for row in saved["points"]):
        return None
    return [Point(*row[:5], *(math.nan if x is None else float(x) for x in row[5:])) for row in saved["points"]]


def _save(path: Path, plan: Plan, job: Job, points: Sequence[Point]) -> None:
    rows = [[jsonable(x) if isinstance(x, float) else x for x in vars(p).values()] for p in points]
    saved = {"format": "anchorscope-scores", "version": VERSION, "dump": plan.dump.identity, "points": rows}
    write_part(path / SCORES / _score_name(job), saved)


# ---------------------------------------------------------------------------------------------------------------
# measuring


def _measure(path: Path, plan: Plan, report: ProgressCallback, notify: Callable[[str], None]) -> None:
    """Score the heads whose points are not there yet."""
    missing = [job for job in plan.jobs if _load(path, plan, job) is None]
    if (remark := again_remark(path / SCORES / _score_name(job) for job in missing)) is not None:
        notify(remark)
    total = sum(j.work for j in plan.jobs)
    done = total - sum(j.work for j in missing)
    report(Progress("heads", done, total))

    def measure(job: Job, tensors: LayerTensors, stop: threading.Event) -> None:
        entry = job.entry
        row, kv = tensors.query_heads.index(job.head), tensors.kv_index(job.head)
        q, k = tensors.q[row].to(plan.device), tensors.k[kv].to(plan.device)
        v = None if tensors.v is None else tensors.v[kv].to(plan.device)
        dtype = working_dtype(q, k, v, entry.scale, entry.softcap)
        head = Head(q, k, scale=entry.scale, window=entry.window, softcap=entry.softcap, dtype=dtype)
        points = []
        for contender, value, result in score_lineup(head, v, plan.lineup, cancelled=stop.is_set):
            points.append(
                Point(
                    entry.prompt,
                    entry.layer,
                    job.head,
                    contender.label,
                    contender.method.parameter,
                    float(value),
                    result.recall,
                    result.recall_p05,
                    result.recall_last,
                    result.density,
                    result.output_error,
                    result.identify_cost,
                )
            )
        _save(path, plan, job, points)

    run_jobs(
        plan.dump,
        missing,
        measure,
        workers=plan.workers,
        report=report,
        work_before=done,
        work_total=total,
        memory_advice=lambda: _memory_advice(plan),
    )


def score_lineup(
    head: Head,
    v: Tensor | None,
    lineup: Sequence[Contender],
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[tuple[Contender, float, Score]]:
    """Score every setting of every contender on one head.

    Args:
        head: queries and keys.
        v: (N, d_v) values of its kv head, or None.
        lineup: methods and the values of their swept parameters.
        cancelled: asked often; once true, work stops.

    Returns:
        (contender, value, score), in the order of the line-up and its sweeps.

    Raises:
        Cancelled: `cancelled` returned true.
    """
    results: list[tuple[Contender, float, Score]] = []
    waiting: list[tuple[Contender, float, Selection]] = []

    def flush() -> None:
        scores = score(head, v, [x for *_, x in waiting], cancelled=cancelled)
        results.extend((c, value, s) for (c, value, _), s in zip(waiting, scores, strict=True))
        waiting.clear()

    with torch.inference_mode(), full_precision():
        for contender in lineup:
            for value in contender.sweep:
                if cancelled():
                    raise Cancelled
                waiting.append((contender, value, contender.method.at(value).select(head)))
                if sum(x.nbytes for *_, x in waiting) > BATCH_BYTES:
                    flush()
        flush()
    return results


def _memory_advice(plan: Plan) -> str:
    longest = max(j.entry.tokens for j in plan.jobs)
    return (
        f"out of memory on {plan.device}: one head of {longest:,} tokens needs about"
        f" {human_bytes(plan.memory / plan.workers)}; use --device cpu, fewer methods or a shorter capture"
    )


# ---------------------------------------------------------------------------------------------------------------
# finishing


def _summary(plan: Plan, state: dict[str, Any], points: Sequence[Point]) -> dict[str, Any]:
    """What compare.json holds."""
    labels = [c.label for c in plan.lineup]
    runnable = [c.label for c in plan.lineup if not c.method.oracle]
    recalls = sorted({*RECALLS, plan.target_recall})
    best = winners(points, runnable, plan.target_recall)
    return {
        "format": "anchorscope-compare",
        "version": VERSION,
        "started": state["started"],
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": [
            {"name": p.name, "tokens": p.tokens} for p in plan.dump.prompts if p.name in plan.settings["prompts"]
        ],
        "settings": plan.settings,
        "versions": versions(),
        "hardware": hardware_name(plan.device),
        "warnings": list(plan.warnings),
        "heads": len(plan.jobs),
        "needed": needed_table(points, labels, recalls),
        "best": [
            {"prompt": prompt, "layer": layer, "head": head, "method": method}
            for (prompt, layer, head), method in best.items()
        ],
    }
