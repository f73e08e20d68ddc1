"""`heads`: a dump in, one table of diagnostics and its figures out; resumable, one layer of one prompt at a time.

A layer is saved under parts/ once all its heads are measured; table, report and figures are made from those files
alone, so an interrupted run continues where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorscope.devices import resolve_device
from anchorscope.dumps import Dump, Entry, LayerTensors, open_dump
from anchorscope.errors import DumpError, InputError
from anchorscope.files import again_remark, csv_text, human_bytes, member, read_part, write_atomic, write_part
from anchorscope.heads import diagnostics
from anchorscope.heads.diagnostics import HeadDiagnostics, diagnose_head
from anchorscope.heads.stripes import HeadStripes, head_stripes, overlap
from anchorscope.heads.tables import (
    COLUMNS,
    ROW_SHAPE,
    HeadRow,
    TokenText,
    report_row,
    row_from_json,
    row_json,
    summarise,
    table_row,
)
from anchorscope.locks import folder_lock
from anchorscope.methods import Head
from anchorscope.methods.head import chunk_rows
from anchorscope.params import AnchorParams
from anchorscope.runs.environment import hardware_name, versions
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
from anchorscope.shapes import fits

STATE = "run.json"
REPORT = "heads.json"
TABLE = "diagnostics.csv"
PARTS = "parts"
FIGURES = "figures"
VERSION = 1
FOLDER = RunFolder(
    what="a diagnosis of heads",
    command="heads",
    format="anchorscope-heads-run",
    version=VERSION,
    state=STATE,
    report=REPORT,
    tables=(TABLE,),
    parts=((PARTS, "prompt*-layer*.json"), (FIGURES, "*.png")),
    kept=("finished layers", f"{PARTS}/prompt*-layer*.json"),
)
BLOCK, STEP, THETA = 128, 4, 12.0  # groups of 512: short prompts then have neighbouring groups to compare
STRIPE_TOKENS = 12
NUMBERED_HEADS = 12  # maps with more heads are drawn without numbers

# Everything a reader needs to know about the definitions, as heads.json states it.
DEFINITIONS: dict[str, Any] = {
    "streaming_window": {"sinks": diagnostics.STREAM_SINKS, "recent": diagnostics.STREAM_RECENT},
    "classes": {"streaming_from": diagnostics.STREAMING, "retrieval_below": diagnostics.RETRIEVAL},
    "hidden_sink": {
        "from_position": diagnostics.HIDDEN_FROM,
        "mass": diagnostics.HIDDEN_MASS,
        "queries": f"N/{diagnostics.HIDDEN_QUERIES}, at least {diagnostics.STREAM_RECENT}",
    },
    "influence": {"distances": list(diagnostics.HORIZON), "tokens": diagnostics.INFLUENTIAL},
    "heaviest": f"1/{diagnostics.TOP_SHARE} of columns, diagonals, blocks of {diagnostics.TILE}",
}


@dataclass(frozen=True)
class Layer:
    """One layer of one prompt, and what its diagnosis needs.

    Attributes:
        prompt_index: index of the prompt in the dump.
        entry: the layer.
        heads: heads to report.
        siblings: further query heads of the same kv heads, whose stripes are compared.
        previous: the captured layer before it, or None.
    """

    prompt_index: int
    entry: Entry
    heads: tuple[int, ...]
    siblings: tuple[int, ...]
    previous: Entry | None

    @property
    def name(self) -> str:
        """File name of its results."""
        return f"prompt{self.prompt_index:02d}-layer{self.entry.layer:03d}.json"


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first head is measured.

    Attributes:
        layers: layers to diagnose, in order.
        workers: heads measured at the same time.
        memory: bytes of working memory, besides the libraries themselves.
        disk: bytes that table, report and parts will need, about.
        pictures: bytes that the figures will need besides, about.
        warnings: sentences for the user.
    """

    dump: Dump
    settings: dict[str, Any]
    params: AnchorParams
    theta: float
    device: torch.device
    layers: tuple[Layer, ...]
    workers: int
    memory: int
    disk: int
    pictures: int
    warnings: tuple[str, ...]

    @property
    def heads(self) -> int:
        """Heads to report."""
        return sum(len(x.heads) for x in self.layers)


@dataclass(frozen=True)
class Diagnosis:
    """A finished run.

    Attributes:
        path: the output folder.
        report: what heads.json holds.
        rows: every head, in the order of diagnostics.csv.
        figures: the pictures written.
    """

    path: Path
    report: dict[str, Any]
    rows: tuple[HeadRow, ...] = field(repr=False)
    figures: tuple[Path, ...] = ()


def plan_heads(
    dump: Dump | Path | str,
    *,
    params: AnchorParams | None = None,
    theta: float = THETA,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
) -> Plan:
    """Check a request and say what it will cost. Arguments as in `diagnose`.

    Raises:
        InputError: an unknown layer, head or prompt, a theta that is NaN.
        DumpError: the dump is missing or damaged.
        MissingBackendError: the device is absent.
    """
    if math.isnan(theta):
        raise InputError("theta must be a number of nats (inf and -inf are legal), not NaN")
    params = params or AnchorParams(BLOCK, STEP)
    source = dump if isinstance(dump, Dump) else open_dump(dump)
    where = resolve_device(device)
    jobs = choose_jobs(source, prompts, layers, heads)
    chosen = _layers(source, jobs)
    settings: dict[str, Any] = {
        "block": params.block,
        "step": params.step,
        "init": params.init_tokens,
        "lookback": params.lookback_tokens,
        "theta": jsonable(float(theta)),
        "prompts": list(dict.fromkeys(x.entry.prompt for x in chosen)),
        "layers": sorted({x.entry.layer for x in chosen}),
        "heads": sorted({h for x in chosen for h in x.heads}),
        "device": where.type,
    }
    largest = max(jobs, key=lambda j: j.entry.tokens * j.entry.head_dim).entry
    each = _workspace_bytes(largest.tokens, largest.head_dim, params, chunk_rows(where, largest.tokens))
    selections = max(len(x.heads) + len(x.siblings) for x in chosen)
    kept = 2 * selections * params.groups(largest.tokens) * (largest.tokens // 8 + 16)
    workers = 1
    if where.type == "cpu":
        workers = max(1, min(torch.get_num_threads(), selections, int(8 * 2**30 // each)))
    return Plan(
        dump=source,
        settings=settings,
        params=params,
        theta=float(theta),
        device=where,
        layers=chosen,
        workers=workers,
        memory=workers * each + kept + 2 * max(x.entry.bytes for x in chosen),
        # heads.json, parts and rows of the table, as measured; stripe tokens where there can be stripes
        disk=sum(2_900 + 2_400 * (params.groups(j.entry.tokens) > 1) for j in jobs) + 3_000,
        pictures=_picture_bytes(chosen),
        warnings=tuple(_warnings(chosen, params)),
    )


def diagnose(
    dump: Dump | Path | str,
    out: Path | str,
    *,
    params: AnchorParams | None = None,
    theta: float = THETA,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    pieces: Sequence[str] | None = None,
    figures: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
    plan: Plan | None = None,
) -> Diagnosis:
    """Diagnose every chosen head of a dump.

    Args:
        dump: a dump folder, or an open dump.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        params: groups and anchor region of the stripes whose overlap is measured; 128 x 4 by default.
        theta: threshold of those stripes, nats.
        layers, heads: original indices; None means all in the dump.
        prompts: prompt names; None means all.
        device: "auto", "cpu", "cuda" or "cuda:i".
        pieces: text of every token id (see `anchorscope.report.tokens`), so that heads.json can show tokens as text.
        figures: draw the figures.
        overwrite: replace an earlier run in `out`.
        resume: accept a finished run of the same request in `out` too; nothing is measured again.
        progress: called as work proceeds.
        notify: told in a sentence when saved parts cannot be used again.
        plan: a plan made beforehand; what it decides must then not be given again.

    Returns:
        The finished run. `out` then holds diagnostics.csv, heads.json, parts/ and figures/.

    Raises:
        InputError, DumpError, MissingBackendError: see `plan_heads`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    if plan is None:
        plan = plan_heads(dump, params=params, theta=theta, layers=layers, heads=heads, prompts=prompts, device=device)
    else:
        check_plan_source(plan.dump, dump)
        given = {
            "params": params,
            "theta": theta,
            "layers": layers,
            "heads": heads,
            "prompts": prompts,
            "device": device,
        }
        check_beside_plan(diagnose, given)
    report = progress or (lambda _: None)
    request = {
        "dump": plan.dump.identity,
        "settings": plan.settings,
        "parts": [x.name for x in plan.layers],
    }
    asked = {"figures": figures, "tokens": None if pieces is None else _digest(pieces)}
    disk = plan.disk + (plan.pictures if figures else 0)
    with FOLDER.run(Path(out), request, asked=asked, disk=disk, overwrite=overwrite, resume=resume) as run:
        path = run.path
        _measure(path, plan, report, notify or (lambda _: None))
        rows = tuple(row for layer in plan.layers for row in _load(path, plan, layer) or ())
        write_atomic(path / TABLE, csv_text(COLUMNS, map(table_row, rows)).encode())
        result = _summary(plan, run.state, rows, pieces)
        drawn: list[Path] = []
        if run.asked["figures"]:
            from anchorscope.heads.figures import draw_all

            report(Progress("figures", 0, 1))
            drawn = draw_all(rows, path / FIGURES)
            report(Progress("figures", 1, 1))
        run.finish(result)
        return Diagnosis(path, result, rows, tuple(drawn))


# ----------------------------------------------------------------------------------------------------------------
# planning


def _layers(source: Dump, jobs: Sequence[Job]) -> tuple[Layer, ...]:
    """The chosen jobs by layer. What a head is compared with does not depend on what else was chosen."""
    layers = []
    for entry in dict.fromkeys(j.entry for j in jobs):
        mine = [j for j in jobs if j.entry == entry]
        heads = tuple(j.head for j in mine)
        owners = {_kv_head(entry, h) for h in heads}
        siblings = tuple(h for h in entry.query_heads if h not in heads and _kv_head(entry, h) in owners)
        before = [e for e in source.entries if e.prompt == entry.prompt and e.layer < entry.layer]
        previous = max(before, key=lambda e: e.layer, default=None)
        layers.append(Layer(mine[0].prompt_index, entry, heads, siblings, previous))
    return tuple(layers)


def _kv_head(entry: Entry, head: int) -> int:
    """Original index of the kv head that a query head reads."""
    return entry.kv_heads[entry.query_heads.index(head) // (len(entry.query_heads) // len(entry.kv_heads))]


def _workspace_bytes(tokens: int, head_dim: int, params: AnchorParams, run: int) -> int:
    """Working memory of one head, bytes: inputs, weights of a run of queries, block sums, margins."""
    tensors = 6 * tokens * head_dim * 4
    chunk = 5 * run * (tokens + 2 * run) * 4 + 20 * tokens * 8
    tiles = 3 * (tokens // diagnostics.TILE + 1) ** 2 * 4
    margins = params.groups(tokens) * tokens * 7
    return tensors + chunk + tiles + margins


def _picture_bytes(layers: Sequence[Layer]) -> int:
    """What four maps per prompt take, as measured: more where every cell holds a number."""
    total = 0
    for prompt in {x.prompt_index for x in layers}:
        mine = [x for x in layers if x.prompt_index == prompt]
        cells, widest = sum(len(x.heads) for x in mine), max(len(x.heads) for x in mine)
        total += 170_000 + (4_000 * cells if widest <= NUMBERED_HEADS else 180 * cells)
    return total


def _warnings(layers: Sequence[Layer], params: AnchorParams) -> list[str]:
    shortest = min(x.entry.tokens for x in layers)
    found = []
    least = diagnostics.STREAM_SINKS + diagnostics.STREAM_RECENT
    if shortest <= least:
        found.append(f"{shortest:,} tokens are too short to class heads; it takes more than {least}")
    # Group 0 has no candidates, so the first pair of neighbours with stripes is 1 and 2.
    if params.groups(shortest) < 3:
        found.append(
            f"{shortest:,} tokens make {params.groups(shortest)} groups of {params.group:,}, too few to compare"
            " neighbours; lower --block or --step"
        )
    return found


# ------------------------------------------------------------------------------------------------------------------
# folder


def _load(path: Path, plan: Plan, layer: Layer) -> list[HeadRow] | None:
    """The saved rows of a layer, or None if they are not there or not whole."""
    rows = _read_rows(path / PARTS / layer.name, plan.dump.identity)
    return rows if rows is not None and [r.head for r in rows] == list(layer.heads) else None


def _read_rows(file: Path, identity: str) -> list[HeadRow] | None:
    saved = read_part(file)
    if not fits(saved, {"format": "anchorscope-heads-part", "dump": identity, "heads": [ROW_SHAPE]}):
        return None
    assert saved is not None
    return [row_from_json(x) for x in saved["heads"]]


def _digest(pieces: Sequence[str]) -> str:
    """Names a vocabulary, so that a run with another one is not taken for the same."""
    return hashlib.sha256(json.dumps(list(pieces)).encode()).hexdigest()


def load_diagnosis(out: Path | str) -> Diagnosis:
    """A finished run, read again from its folder.

    Raises:
        DumpError: the folder holds none, or one that is damaged.
    """
    path = Path(out)
    shape = {
        "format": "anchorscope-heads",
        "dump": {"identity": str},
        "settings": dict,
        "versions": {"anchorscope": str},
    }
    report, state = FOLDER.load(path, shape, {"parts": [str]})
    rows: list[HeadRow] = []
    for name in state["parts"]:
        file = member(path / PARTS, name, ".json")
        found = None if file is None else _read_rows(file, report["dump"]["identity"])
        if found is None:
            raise DumpError(f"{path / PARTS / name} is missing or damaged: run `anchorscope heads` again")
        rows.extend(found)
    return Diagnosis(path, report, tuple(rows), tuple(sorted((path / FIGURES).glob("*.png"))))


def clear_diagnosis(out: Path | str) -> None:
    """Remove a run of `diagnose` from its folder, and nothing else; a folder without one is left alone."""
    path = Path(out)
    if FOLDER.read(path) is None:
        return
    with folder_lock(path):
        FOLDER.clear(path)
    for folder in (path / PARTS, path / FIGURES, path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------
# measuring


@dataclass(frozen=True)
class _Task:
    """Heads of one entry to go through: diagnosed and selected (`heads`), or only selected (`others`)."""

    prompt_index: int
    entry: Entry
    heads: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def jobs(self) -> list[Job]:
        return [Job(self.prompt_index, self.entry, h) for h in self.entry.query_heads if h in self.heads + self.others]

    @property
    def work(self) -> int:
        return sum(j.work for j in self.jobs)


def _schedule(plan: Plan, missing: Sequence[Layer]) -> list[tuple[_Task | None, _Task, Layer]]:
    """For each layer that is missing: stripes of the previous layer unless they are at hand, then the layer itself."""
    steps: list[tuple[_Task | None, _Task, Layer]] = []
    at_hand: tuple[Entry, set[int]] | None = None
    for layer in missing:
        before = None
        if layer.previous is not None:
            wanted = tuple(h for h in layer.heads if h in layer.previous.query_heads)
            if wanted and not (at_hand is not None and at_hand[0] == layer.previous and set(wanted) <= at_hand[1]):
                before = _Task(layer.prompt_index, layer.previous, (), wanted)
        steps.append((before, _Task(layer.prompt_index, layer.entry, layer.heads, layer.siblings), layer))
        at_hand = layer.entry, {*layer.heads, *layer.siblings}
    return steps


def _measure(path: Path, plan: Plan, report: ProgressCallback, notify: Callable[[str], None]) -> None:
    """Diagnose the layers whose rows are not there yet."""
    missing = [x for x in plan.layers if _load(path, plan, x) is None]
    if (remark := again_remark(path / PARTS / x.name for x in missing)) is not None:
        notify(remark)
    steps = _schedule(plan, missing)
    total = sum(j.work for before, task, _ in steps for j in (before.jobs if before else []) + task.jobs)
    done = 0
    report(Progress("heads", 0, total))
    selections: dict[int, HeadStripes] = {}
    at_hand: Entry | None = None
    for before, task, layer in steps:
        if before is not None:
            _, selections = _run(plan, before, report, done, total)
            at_hand = before.entry
            done += before.work
        previous = selections if at_hand == layer.previous else {}
        found, selections = _run(plan, task, report, done, total)
        at_hand = task.entry
        done += task.work
        rows = [_row(layer, h, found[h], selections, previous) for h in layer.heads]
        saved = {
            "format": "anchorscope-heads-part",
            "version": VERSION,
            "dump": plan.dump.identity,
            "heads": [row_json(r) for r in rows],
        }
        write_part(path / PARTS / layer.name, saved)


def _run(
    plan: Plan, task: _Task, report: ProgressCallback, done: int, total: int
) -> tuple[dict[int, HeadDiagnostics], dict[int, HeadStripes]]:
    """Diagnostics and stripes by head."""
    found: dict[int, HeadDiagnostics] = {}
    selections: dict[int, HeadStripes] = {}

    def measure(job: Job, tensors: LayerTensors, stop: threading.Event) -> None:
        if stop.is_set():
            raise Cancelled
        entry = job.entry
        q = tensors.q[tensors.query_heads.index(job.head)].to(plan.device)
        k = tensors.k[tensors.kv_index(job.head)].to(plan.device)
        head = Head(q, k, scale=entry.scale, window=entry.window, softcap=entry.softcap)
        if job.head in task.heads:
            found[job.head] = diagnose_head(head, cancelled=stop.is_set)
        selections[job.head] = head_stripes(head, plan.params, plan.theta)

    run_jobs(
        plan.dump,
        task.jobs,
        measure,
        workers=plan.workers,
        report=report,
        work_before=done,
        work_total=total,
        memory_advice=lambda: _memory_advice(plan),
    )
    return found, selections


def _row(
    layer: Layer,
    head: int,
    found: HeadDiagnostics,
    selections: dict[int, HeadStripes],
    previous: dict[int, HeadStripes],
) -> HeadRow:
    entry, mine = layer.entry, selections[head]
    owner = _kv_head(entry, head)
    others = [s for h, s in sorted(selections.items()) if h != head and _kv_head(entry, h) == owner]
    shared = [x for x in (overlap(mine, s) for s in others) if not math.isnan(x)]
    before = previous.get(head)
    return HeadRow(
        prompt=entry.prompt,
        layer=entry.layer,
        head=head,
        kv_head=owner,
        kind=found.kind,
        window_recall=found.window_recall,
        sink_1=found.sink_1,
        sink_4=found.sink_4,
        hidden_sinks=tuple(zip(found.hidden_sinks, found.hidden_sink_masses, strict=True)),
        hidden_sink_mass=found.hidden_sink_mass,
        local_128=found.local_128,
        local_1024=found.local_1024,
        distance=found.distance,
        distance_1024=found.distance_1024,
        effective_keys_mean=found.effective_keys_mean,
        effective_keys_median=found.effective_keys_median,
        influence=found.influence,
        influential=tuple(zip(found.influential, found.influences, strict=True)),
        vertical_mass=found.vertical_mass,
        slash_mass=found.slash_mass,
        block_mass=found.block_mass,
        stripe_density=mine.density,
        stripe_tokens=_stripe_tokens(mine, found.far_mass),
        overlap_groups=overlap(mine, mine, shift=1),
        overlap_heads=math.fsum(shared) / len(shared) if shared else math.nan,
        overlap_layer=math.nan if before is None else overlap(mine, before),
        previous_layer=None if before is None or layer.previous is None else layer.previous.layer,
    )


def _stripe_tokens(stripes: HeadStripes, far_mass: np.ndarray) -> tuple[tuple[int, float, int, int], ...]:
    """The stripes that later queries attend to most, see `HeadRow.stripe_tokens`."""
    selected, candidate = stripes.chosen()
    columns = np.flatnonzero((selected > 0) & (far_mass > 0))
    top = columns[np.argsort(-far_mass[columns], kind="stable")[:STRIPE_TOKENS]]
    return tuple((int(j), float(far_mass[j] / stripes.tokens), int(selected[j]), int(candidate[j])) for j in top)


def _memory_advice(plan: Plan) -> str:
    longest = max(x.entry.tokens for x in plan.layers)
    return (
        f"out of memory on {plan.device}: a head of {longest:,} tokens needs about"
        f" {human_bytes(plan.memory / plan.workers)}; use --device cpu, a larger --step or a shorter capture"
    )


# ---------------------------------------------------------------------------------------------------------------
# finishing


def _summary(
    plan: Plan, state: dict[str, Any], rows: Sequence[HeadRow], pieces: Sequence[str] | None
) -> dict[str, Any]:
    """What heads.json holds."""
    prompts = [p for p in plan.dump.prompts if p.name in plan.settings["prompts"]]
    texts = {p.name: TokenText(p.token_ids, pieces) for p in prompts}
    return {
        "format": "anchorscope-heads",
        "version": VERSION,
        "started": state["started"],
        "dump": {"identity": plan.dump.identity, "model": plan.dump.model},
        "prompts": [{"name": p.name, "tokens": p.tokens} for p in prompts],
        "settings": plan.settings,
        "definitions": DEFINITIONS,
        "versions": versions(),
        "hardware": hardware_name(plan.device),
        "warnings": list(plan.warnings),
        "summary": {
            "all": summarise(rows),
            "prompts": [{"prompt": p.name, **summarise([r for r in rows if r.prompt == p.name])} for p in prompts],
        },
        "heads": [report_row(r, texts[r.prompt]) for r in rows],
    }
