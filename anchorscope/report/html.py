"""One self-contained HTML page from finished analyses: every head's curve, heat map and numbers, no network.

The page is a template (assets/), plotly.js and one JSON document. Everything numeric travels as deflated binary, so
that a model of 1,024 heads stays under 15 MB:

- curves of all heads of a prompt: float32 on one theta grid, thinned where nothing happens, which holds every theta
  asked for with its exact values;
- heat maps: attention mass (63 steps over six decades) and smallest margin, as coarse as `PAGE_BYTES` demands;
- other methods (`compare`) and diagnostics (`heads`) where such folders are given.

The page interpolates on the theta grid; it computes nothing else that the CSV files hold. Text that comes from prompts
reaches the page as JSON with "<" escaped and is shown as text, never as markup. numpy only, neither torch nor the dump.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from anchorscope._version import __version__
from anchorscope.errors import DumpError, InputError, MissingBackendError
from anchorscope.files import MAX_JSON_BYTES, member, read_csv, read_json, write_atomic
from anchorscope.profiles import HeadProfile
from anchorscope.shapes import check

PAGE_BYTES = 14_500_000  # what heat maps are fitted to
PLOTLY_BYTES = 5_000_000
LEAST_HEAT = 1_500_000  # what they get however large the rest is
HEAT_SIZES = (
    *((128, 512), (96, 384), (64, 256), (56, 224), (48, 192), (40, 160), (40, 128), (32, 96), (24, 64), (16, 48)),
    *((12, 24), (8, 16)),
)
GRID_POINTS = 96  # thetas of the shared grid, those asked for not counted
ORACLE_POINTS = 48
POSITION_BINS = 32
MAX_POSITIONS = 6  # thetas whose recall by position is kept
MAX_ASKED = 24  # thetas whose other columns of heads.csv are kept; recall and density are kept for all
TOP = 16
MASS_STEPS, MASS_FLOOR = 63, 1e-6
MARGIN_STEPS = 62

_RUN = {
    "started": (str, None, ...),
    "dump": {"identity": str, "model": ({"name": (str, None, ...)}, None, ...)},
    "settings": {"target_recall": float},
    "versions": ({str: (str, None)}, None, ...),
    "hardware": (str, dict, None, ...),
    "warnings": ([str], None, ...),
}
_ABOUT = {"settings": ({"methods": ([{"label": str, "oracle": (bool, ...)}], ...)}, None, ...)}

# columns of heads.csv that only exist at the thetas asked for
EXTRAS = (
    "recall_p05",
    "recall_min",
    "recall_last",
    "stripe_density",
    "output_error",
    "output_close_01",
    "output_close_005",
)
# state files of folders beside the analyses: format, what it is, who writes it, the report that is written last
UNFINISHED = (
    ("anchorscope-compare-run", "comparison", "compare", "compare.json"),
    ("anchorscope-heads-run", "diagnosis of heads", "heads", "heads.json"),
)
SCALARS = ("theta_needed", "density_needed", "oracle_needed", "anchor_density")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """A finished analysis as found on disk.

    Attributes:
        path: its folder.
        label: how the page calls it.
        report: its report.json.
        profiles: its profile files, in the order of heads.csv.
        remarks: what of it is missing or unfinished.
    """

    path: Path
    label: str
    report: dict[str, Any] = field(repr=False)
    profiles: tuple[Path, ...] = field(repr=False)
    remarks: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Hash that names the dump it came from."""
        return str(self.report["dump"]["identity"])


@dataclass(frozen=True)
class Table:
    """A per-head CSV beside the analyses: methods.csv of `compare` or diagnostics.csv of `heads`.

    Attributes:
        path: the file.
        identity: dump it was measured on, or None where its folder does not say.
        about: the JSON report of its folder ({} if there is none).
        columns: header.
        rows: one list of fields per line.
    """

    path: Path
    identity: str | None
    about: dict[str, Any] = field(repr=False)
    columns: tuple[str, ...]
    rows: list[list[str]] = field(repr=False)


@dataclass(frozen=True)
class Sources:
    """What a page is made from; see `open_sources`."""

    runs: tuple[Run, ...]
    methods: tuple[Table, ...] = ()
    diagnostics: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()


def open_sources(folders: Sequence[Path | str]) -> Sources:
    """Recognise result folders: `analyze` (at least one), `compare` and `heads`; one folder may hold several.

    Raises:
        DumpError: a folder that is missing, unfinished, damaged or holds no result.
        InputError: no analysis among them, or a comparison or diagnostics of a dump that none of the analyses used.
    """
    runs: list[Run] = []
    methods: list[Table] = []
    diagnostics: list[Table] = []
    own: list[Table] = []
    remarks: list[str] = []
    for folder in dict.fromkeys(Path(f) for f in folders):
        if not folder.is_dir():
            raise DumpError(f"no folder {folder}: name folders written by `anchorscope analyze`")
        known = False
        if (folder / "analysis.json").exists():
            runs.append(_open_run(folder))
            known = True
            if (folder / "heads" / "heads.json").exists():  # `analyze` diagnoses into its own folder
                own.append(_table(folder / "heads" / "diagnostics.csv", folder / "heads" / "heads.json", ()))
            remarks += runs[-1].remarks
        _refuse_unfinished(folder)
        if (folder / "methods.csv").exists():
            methods.append(_table(folder / "methods.csv", folder / "compare.json", ("method", "recall", "density")))
            known = True
        if (folder / "diagnostics.csv").exists():
            diagnostics.append(_table(folder / "diagnostics.csv", folder / "heads.json", ()))
            known = True
        if not known:
            raise DumpError(f"{folder} holds no result: name folders written by analyze, compare or heads")
    if not runs:
        raise InputError("the report needs an analysis: add a folder written by `anchorscope analyze`")
    for table in (*methods, *diagnostics, *own):
        if table.identity is not None and table.identity not in {r.identity for r in runs}:
            raise InputError(
                f"{table.path} was measured on a dump that none of the analyses used; name it with an analysis of"
                " the same dump"
            )
    return Sources(_labelled(runs), tuple(methods), (*diagnostics, *own), tuple(remarks))


def write_report(
    folders: Sequence[Path | str] | Sources,
    out: Path | str,
    *,
    tokens: Mapping[tuple[str, str], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build the page and save it atomically; the same results give the same bytes.

    Args:
        folders: result folders, or what `open_sources` made of them.
        out: the HTML file.
        tokens: text of every token by (dump identity, prompt), as `anchorscope.tokens` gives it.
        progress: called with (heads read, heads in all).

    Returns:
        The file written.

    Raises:
        DumpError, InputError: see `open_sources`; a damaged profile.
        MissingBackendError: plotly is not installed.
        RunFailure: the file cannot be written.
    """
    page = build_report(folders, tokens=tokens, progress=progress)
    write_atomic(out, page.encode())
    return Path(out)


def build_report(
    folders: Sequence[Path | str] | Sources,
    *,
    tokens: Mapping[tuple[str, str], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> str:
    """The page as text; arguments and errors as in `write_report`."""
    sources = folders if isinstance(folders, Sources) else open_sources(folders)
    return _page(build_data(sources, tokens=tokens, progress=progress), plotly_source())


def plotly_source() -> str:
    """plotly.js as shipped in the Python package `plotly`.

    Raises:
        MissingBackendError: the package is absent.
    """
    try:
        return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingBackendError(
            "the report needs plotly, which is not installed: pip install 'anchorscope[report]'"
        ) from None


def build_data(
    sources: Sources,
    *,
    tokens: Mapping[tuple[str, str], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The JSON document of the page: `runs`, one `set` per run and prompt, `tokens`, colour maps.

    Raises:
        DumpError: a profile is missing or damaged.
    """
    total = sum(len(r.profiles) for r in sources.runs)
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if progress is not None:
            progress(min(seen, 2 * total) // 2, total)

    brief: list[list[HeadProfile]] = []
    for run in sources.runs:
        brief.append([])
        for path in run.profiles:
            brief[-1].append(HeadProfile.load(path, heat=False))
            tick()
    thetas = [theta_grid(profiles) for profiles in brief]
    margins = (min(low for _, low, _ in thetas), max(high for _, _, high in thetas))

    runs: list[dict[str, Any]] = []
    sets: list[dict[str, Any]] = []
    files: list[list[Path]] = []
    words: dict[str, str] = {}
    for index, (run, profiles, (grid, low, high)) in enumerate(zip(sources.runs, brief, thetas, strict=True)):
        asked, kept = profiles[0].thetas, min(MAX_ASKED, len(profiles[0].thetas))
        runs.append(
            {
                "label": run.label,
                **{k: run.report.get(k) for k in ("started", "dump", "settings", "versions", "hardware", "warnings")},
                "target": run.report["settings"]["target_recall"],
                "grid": [_json(t) for t in grid],
                "asked": [_json(t) for t in asked],
                "kept": kept,
                "low": low,
                "high": high,
            }
        )
        for prompt in dict.fromkeys(p.prompt for p in profiles):
            mine = [(path, p) for path, p in zip(run.profiles, profiles, strict=True) if p.prompt == prompt]
            files.append([path for path, _ in mine])
            key = f"{run.identity}/{prompt}"
            if tokens is not None and (run.identity, prompt) in tokens:
                words[key] = _pack(json.dumps(list(tokens[run.identity, prompt])).encode())
            sets.append(
                {
                    "run": index,
                    "prompt": prompt,
                    "tokens": mine[0][1].tokens,
                    "text": key if key in words else None,
                    **_pack_curves([p for _, p in mine], grid, run.report["settings"]["target_recall"], kept),
                    "methods": _methods(sources.methods, run, prompt),
                    "diagnostics": _diagnostics(sources.diagnostics, run, prompt),
                }
            )
    rest = len(json.dumps([runs, sets, words]))
    shape = _heat_shape([p for mine in files for p in mine], margins, max(LEAST_HEAT, PAGE_BYTES - PLOTLY_BYTES - rest))
    for one, paths in zip(sets, files, strict=True):
        one["heat"] = []
        for path in paths:
            one["heat"].append(_pack_heat(HeadProfile.load(path), shape, margins))
            tick()
    return {
        "format": "anchorscope-page",
        "anchorscope": __version__,
        "runs": runs,
        "sets": sets,
        "words": words,
        "mass": {"steps": MASS_STEPS, "floor": MASS_FLOOR},
        "margin": {"steps": MARGIN_STEPS, "low": margins[0], "high": margins[1]},
        "maps": {name: _colours(name) for name in ("viridis", "cividis", "magma", "PuOr")},
    }


# ------------------------------------------------------------------------------------------------------------------
# reading


def _open_run(folder: Path) -> Run:
    state = _read_json(folder / "analysis.json")
    if not (folder / "report.json").exists():
        raise DumpError(f"{folder} holds an unfinished analysis: give the same analyze command again to finish it")
    report = _read_json(folder / "report.json")
    names = state.get("profiles")
    if report.get("format") != "anchorscope-report" or not isinstance(names, list) or not names:
        raise DumpError(f"{folder} holds no finished analysis: run `anchorscope analyze DUMP --out {folder}` first")
    if any(member(folder / "profile", n, ".safetensors") is None for n in names):
        raise DumpError(f"{folder / 'analysis.json'} names a file outside its folder: it was edited; run analyze again")
    check(report, _RUN, str(folder / "report.json"), hint="it is damaged; run analyze again", error=DumpError)
    remarks = _missing_diagnosis(folder, state)
    if remarks:
        report = {**report, "warnings": [*(report.get("warnings") or ()), *remarks]}
    return Run(folder, folder.resolve().name, report, tuple(folder / "profile" / n for n in names), remarks)


def _missing_diagnosis(folder: Path, state: Mapping[str, Any]) -> tuple[str, ...]:
    """What to say of head diagnostics that were begun or asked for and are not there: the page leaves them out."""
    heads = folder / "heads"
    asked = state.get("asked")
    if (heads / "heads.json").exists():
        return ()
    if (heads / "run.json").exists():
        return (f"the head diagnostics of {folder.name} are unfinished, left out here: give the same command again",)
    if isinstance(asked, dict) and asked.get("diagnose"):
        return (f"the head diagnostics of {folder.name} are gone: `anchorscope analyze --resume` makes them again",)
    return ()


def _refuse_unfinished(folder: Path) -> None:
    """Refuse a comparison or diagnosis whose report, which is written last, is not there."""
    if not (folder / "run.json").exists():
        return
    kind = _read_json(folder / "run.json").get("format")
    for name, what, command, report in UNFINISHED:
        if kind == name and not (folder / report).exists():
            raise DumpError(
                f"{folder} holds an unfinished {what}: give the same `anchorscope {command}` command again to finish it"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, MAX_JSON_BYTES, "result")
    except InputError as error:
        raise DumpError(f"{error}: run the command that wrote it again") from None
    if not isinstance(value, dict):
        raise DumpError(f"{path} is no result of anchorscope: run the command that wrote it again")
    return value


def _table(path: Path, report: Path, needed: Iterable[str]) -> Table:
    """A CSV with one or more lines per head, and the report of its folder."""
    about = _read_json(report) if report.exists() else {}
    check(about, _ABOUT, str(report), hint="it is damaged; run the command that wrote it again", error=DumpError)
    dump = about.get("dump")
    identity = dump.get("identity") if isinstance(dump, dict) else dump
    lines = read_csv(path, MAX_JSON_BYTES, "table", error=DumpError)
    columns = tuple(lines[0]) if lines else ()
    for name in ("prompt", "layer", "head", *needed):
        if name not in columns:
            raise DumpError(f"{path} has no column {name!r}: run the command that wrote it again")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise DumpError(f"{path}, line {number}: {len(line)} fields instead of {len(columns)}")
    return Table(path, identity if isinstance(identity, str) else None, about, columns, lines[1:])


def _labelled(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs with different labels: the folder's name, with the parent's in front where two are equal."""
    names = [r.label for r in runs]
    out: list[Run] = []
    for i, run in enumerate(runs):
        label = run.label
        if names.count(label) > 1:
            label = f"{run.path.resolve().parent.name}/{label}"
        if label in {r.label for r in out}:
            label = f"{label} ({i + 1})"
        out.append(replace(run, label=label))
    return tuple(out)


# ------------------------------------------------------------------------------------------------------------------
# curves


def curve_at(profile: HeadProfile, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(recall, density), float64, of a head at each theta of `grid`: exact where the profile holds that theta, else
    linear between its neighbours."""
    theta = profile.curve_theta
    density = profile.curve_pairs / profile.visible_pairs
    low = (np.searchsorted(theta, grid, side="right") - 1).clip(0)
    high = np.minimum(low + 1, theta.size - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (grid - theta[low]) / (theta[high] - theta[low])
    share = np.where(np.isfinite(share), share, 0.0)  # an exact hit of the last point, or an infinite neighbour
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


def _pack_curves(profiles: Sequence[HeadProfile], grid: np.ndarray, target: float, kept: int) -> dict[str, Any]:
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
        recall, density = (np.where(exact, x, _short(x)) for x in curve_at(p, grid))
        parts = [recall, density, *(_short(x) for x in _oracle(p))]
        parts += [getattr(p, name)[:kept] for name in EXTRAS]
        parts.append(_short(_positions(p, bins)[:positions]))
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
        "curves": _pack(np.stack(records).view(np.uint8).reshape(-1, 4).T.tobytes()),
    }


def _short(values: np.ndarray) -> np.ndarray:
    """Floats rounded to 16 significant bits (relative error below 1e-5), which deflate to half."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)


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


# ------------------------------------------------------------------------------------------------------------------
# heat maps


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


def _pack_heat(profile: HeadProfile, shape: tuple[int, int], margins: tuple[float, float]) -> dict[str, Any] | None:
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
        "cells": _pack(np.stack([level, step]).astype(np.uint8).tobytes()),
    }


def _heat_shape(paths: Sequence[Path], margins: tuple[float, float], budget: int) -> tuple[int, int]:
    """The finest size whose maps fit into `budget` bytes, judged on a sample of heads."""
    sample = [HeadProfile.load(paths[i]) for i in np.unique(np.linspace(0, len(paths) - 1, 24).astype(int))]
    for shape in HEAT_SIZES:
        each = np.mean([len(json.dumps(_pack_heat(p, shape, margins))) for p in sample])
        if each * len(paths) <= 0.95 * budget:
            return shape
    return HEAT_SIZES[-1]


# ------------------------------------------------------------------------------------------------------------------
# other commands' tables


def _methods(tables: Sequence[Table], run: Run, prompt: str) -> dict[str, Any] | None:
    """Measured points of other methods by head: density and recall, and the settings behind them."""
    labels: list[str] = []
    oracles: set[str] = set()
    heads: dict[str, dict[int, list[list[float]]]] = {}
    for table in tables:
        if table.identity not in (None, run.identity):
            continue
        listed = (table.about.get("settings") or {}).get("methods") or []
        oracles |= {m["label"] for m in listed if isinstance(m, dict) and m.get("oracle") and "label" in m}
        for row in _of_prompt(table, prompt):
            if row["method"] not in labels:
                labels.append(row["method"])
            point = [_number(table, row, name) for name in ("density", "recall")]
            own = heads.setdefault(_head_key(table, row), {})
            own.setdefault(labels.index(row["method"]), []).append(point)
    if not heads:
        return None
    points, index = [], {}
    for key, own in heads.items():
        index[key] = [[m, len(found)] for m, found in own.items()]
        points += [sorted(found) for found in own.values()]
    flat = _short(np.array([x for found in points for x in found]))
    return {
        "labels": labels,
        "oracles": [label in oracles for label in labels],
        "heads": index,
        "points": _pack(flat.view(np.uint8).reshape(-1, 4).T.tobytes()),
    }


def _diagnostics(tables: Sequence[Table], run: Run, prompt: str) -> dict[str, Any] | None:
    """What `heads` measured, whatever its columns: {"columns": [...], "heads": {"layer:head": [text, ...]}}."""
    for table in tables:
        if table.identity not in (None, run.identity):
            continue
        names = [c for c in table.columns if c not in ("prompt", "layer", "head", "kv_head")]
        heads = {_head_key(table, row): [row[n] for n in names] for row in _of_prompt(table, prompt)}
        if heads:
            return {"columns": names, "heads": heads}
    return None


def _of_prompt(table: Table, prompt: str) -> Iterable[dict[str, str]]:
    for row in table.rows:
        named = dict(zip(table.columns, row, strict=True))
        if named["prompt"] == prompt:
            yield named


def _head_key(table: Table, row: Mapping[str, str]) -> str:
    if not all(re.fullmatch(r"[0-9]{1,9}", row[name]) for name in ("layer", "head")):
        raise DumpError(f"{table.path}: layer {row['layer'][:40]!r}, head {row['head'][:40]!r} are not numbers")
    return f"{int(row['layer'])}:{int(row['head'])}"


def _number(table: Table, row: Mapping[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.inf
    if not 0 <= value <= 2:  # recall and density, which rounding may put a little above 1
        raise DumpError(f"{table.path}: {name} {row[name][:40]!r} is not a number from 0 to 1")
    return value


# ------------------------------------------------------------------------------------------------------------------
# the page


def _pack(data: bytes) -> str:
    """Raw deflate (what browsers call "deflate-raw"), base64."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(squeeze.compress(data) + squeeze.flush()).decode()


def _json(value: float) -> float | str:
    return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _colours(name: str) -> list[str]:
    """33 even steps of a colour map that any colour vision can read."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[name](x)) for x in np.linspace(0, 1, 33)]


def _page(data: Mapping[str, Any], plotly: str) -> str:
    """The template with style, scripts and data put in."""
    assets = resources.files("anchorscope.report") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "report.js")}
    # Inside <script>, "</script" and "<!--" would end or change the element: JSON can write "<" as an escape.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "{{style}}": read["report.css"],
        "{{plotly}}": plotly.replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        "{{data}}": text,
        "{{script}}": read["report.js"],
    }
    page = read["report.html"]
    out = []
    for mark, part in parts.items():
        before, _, page = page.partition(mark)
        out += [before, part]
    return "".join([*out, page])


__all__ = ["Run", "Sources", "Table", "build_data", "build_report", "open_sources", "write_report"]
