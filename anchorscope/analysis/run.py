"""`analyze`: a dump in, an output folder out; interruptible, resumable, one head at a time.

Every head is measured and saved as a profile; tables, figures and the report are made from the saved profiles alone. So
an interrupted run continues where it stopped and ends with the same bytes, and figures can be redrawn later without the
dump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anchorscope import views
from anchorscope.analysis.kinds import HEADS, diagnosis_of
from anchorscope.analysis.measuring import Measuring
from anchorscope.analysis.outcome import REPORT_VERSION, report_json
from anchorscope.analysis.request import AnalysisPlan, AnalyzeRequest, HeatMaps, asked_of, heat_map_count
from anchorscope.analysis.tables import (
    CURVES_COLUMNS,
    HEADS_COLUMNS,
    THETAS_COLUMNS,
    HeadLine,
    curves_rows,
    heads_rows,
    thetas_rows,
)
from anchorscope.analysis.words import FILE as TOKENS
from anchorscope.analysis.words import tokens_json
from anchorscope.errors import DumpError, InputError
from anchorscope.figure_theta import FigureTheta, choose_figure_theta, find_theta, saved_figure_theta
from anchorscope.files import MAX_JSON_BYTES, csv_text, human_bytes, member, read_json
from anchorscope.heads.run import Diagnosis, HeadsCommand, clear_diagnosis, diagnose_plan
from anchorscope.locks import folder_lock
from anchorscope.notebook import InNotebook
from anchorscope.pictures import DPI, Formats, picture_formats, picture_patterns, pictures_in
from anchorscope.profiles import HeadProfile, is_whole
from anchorscope.runs.executors import Context
from anchorscope.runs.folder import Run, RunFolder
from anchorscope.runs.life import BaseCommand, Parts, RunOptions, Summary, run
from anchorscope.runs.progress import Progress, ProgressCallback
from anchorscope.runs.recipe import GROUPS, Kinds
from anchorscope.runs.request import planned, split, takes
from anchorscope.runs.sources import InFlight, Source
from anchorscope.runs.units import HeadUnit
from anchorscope.shapes import check
from anchorscope.shown import counted

STATE = "analysis.json"
REPORT = "report.json"
PROFILES = "profile"
FIGURES = "figures"
AGAIN = (
    "the kinds of heads are told by the theta of the figures, which is known only now, so the prompts run once more"
    " where that is not done yet; --figure-theta or --no-diagnose saves that"
)
FOLDER = RunFolder(
    what="an analysis",
    command="analyze",
    format="anchorscope-analysis",
    version=REPORT_VERSION,
    state=STATE,
    report=REPORT,
    tables=("heads.csv", "curves.csv", "thetas.csv", TOKENS),
    parts=((PROFILES, "*.safetensors"), *picture_patterns(FIGURES)),
    kept=("head", f"{PROFILES}/*.safetensors"),
)
STATE_SHAPE = {"profiles": [str], "settings": {"target_recall": float, "prompts": [str], "layers": [int]}}
REPORT_SHAPE = {
    "dump": {"identity": str, "model": (dict, None)},
    "prompts": [{"name": str, "tokens": int}],
    "settings": {"target_recall": float, "theta": [(float, "inf", "-inf")]},
    "figure_theta": ({"theta": (float, "inf", "-inf"), "why": str}, ...),  # earlier versions wrote none
}


@dataclass(frozen=True, repr=False)
class Analysis(InNotebook):
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
    look = views.analysis

    def profiles(self, *, heat: bool = True) -> Iterator[HeadProfile]:
        """The saved profiles, one at a time."""
        return iter_profiles(self.path, heat=heat)


@takes(AnalyzeRequest, None)
def plan_analysis(dump: Source | Path | str, **request: Any) -> AnalysisPlan:
    """Check a request and say what it will take: `AnalyzeRequest(dump, ...).plan()`."""
    return AnalyzeRequest(dump, **request).plan()


@takes(AnalyzeRequest)
def analyze(
    dump: Source | Path | str, out: Path | str, *, plan: AnalysisPlan | None = None, **options: Any
) -> Analysis:
    """Measure every chosen head of a dump: recall against sparsity for every theta, and where the mass lies.

    Args:
        dump: a dump folder, an open dump, or a `anchorscope.ModelSource`, whose layers are measured as it runs.
        out: the output folder; new, empty, or holding an unfinished run of the same request, which then continues.
        plan: a plan made beforehand; what it decides must then not be given again.
        **options: the fields of `AnalyzeRequest` and of `RunOptions`.

    Returns:
        The finished analysis. `out` then holds heads.csv, curves.csv, thetas.csv, report.json, profile/, figures/ and
        heads/.

    Raises:
        InputError, DumpError, MissingBackendError: see `AnalyzeRequest.plan`; also an `out` that is in use.
        RunFailure: disk full, out of memory.
    """
    how, asked = split(options)
    if plan is None:
        wanted = {name: asked[name] for name in ("heatmaps", "diagnose", "figure_theta") if name in asked}
        FOLDER.refuse_early(Path(out), asked_of(how.asked, **wanted), **how.replacing)
    return analyze_plan(
        planned(AnalyzeRequest, plan, dump, asked, late=("heatmaps", "figure_theta", "diagnose")), out, how
    )


def analyze_plan(plan: AnalysisPlan, out: Path | str, options: RunOptions) -> Analysis:
    """Carry out a plan; see `analyze`."""
    done = run(AnalyzeCommand(plan, options), out)
    return Analysis(done.path, done.report, done.summary.value, done.figures, done.extension)


class AnalyzeCommand(BaseCommand[HeadUnit, HeadProfile]):
    """See `anchorscope.runs.life.BaseCommand`. A part is a profile, whose file has checksums of its own."""

    folder: ClassVar[RunFolder] = FOLDER
    suffix: ClassVar[str] = ".safetensors"
    known: ClassVar[Kinds | None] = GROUPS
    plan: AnalysisPlan
    _shown: FigureTheta | None = None  # known once the heads are summed up

    def __init__(self, plan: AnalysisPlan, options: RunOptions | None = None) -> None:
        super().__init__(plan, options)
        self._measuring = Measuring(plan)

    def make(self, root: Path, unit: HeadUnit, context: Context) -> None:
        self._measure(unit, context).save(self.files(root, unit)[0])

    def _measure(self, unit: HeadUnit, context: Context) -> HeadProfile:
        plan, entry = self.plan, unit.entry
        result = self._measuring.head(unit, context)
        assert context.tensors is not None
        return HeadProfile(
            prompt=entry.prompt,
            layer=entry.layer,
            head=unit.head,
            kv_head=context.tensors.kv_heads[context.tensors.kv_index(unit.head)],
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

    def load(self, root: Path, unit: HeadUnit) -> HeadProfile | None:
        try:
            saved = HeadProfile.load(self.files(root, unit)[0], heat=False)
        except DumpError:
            return None
        return saved if saved.dump_identity == self.plan.dump.identity else None

    def holds(self, root: Path, unit: HeadUnit) -> bool:
        return self.load(root, unit) is not None and is_whole(self.files(root, unit)[0], at_any_theta=self.plan.steps)

    def summarize(self, parts: Parts[HeadUnit, HeadProfile], run: Run) -> Summary:
        lines, head_rows, curve_rows = [], [], []
        for profile in parts:
            lines.append(HeadLine.of(profile, self.plan.target_recall))
            head_rows.extend(heads_rows(profile))
            curve_rows.extend(curves_rows(profile))
        shown = run.asked.get("figure_theta")
        report = report_json(self.plan, lines, run.state["started"], None if shown is None else float(shown))
        tables = {
            "heads.csv": csv_text(HEADS_COLUMNS, head_rows),
            "curves.csv": csv_text(CURVES_COLUMNS, curve_rows),
            "thetas.csv": csv_text(THETAS_COLUMNS, thetas_rows(report["overall"])),
        }
        if (texts := tokens_json(self.plan.dump, self.plan.settings["prompts"])) is not None:
            tables[TOKENS] = texts
        self._shown = saved_figure_theta(report)
        return Summary(report, tables, tuple(lines))

    def asked(self) -> dict[str, Any]:
        request = self.plan.request
        return asked_of(self.options.asked, request.heatmaps, request.diagnose, request.figure_theta)

    def draw(self, run: Run, summary: Summary) -> Sequence[Path]:
        assert self._shown is not None
        how: dict[str, Any] = {"theta": self._shown, "model": self.plan.dump.model, "formats": run.pictures}
        return _draw(run.path, run.state, run.asked["heatmaps"], self.options.report, **how)

    def nested(self, root: Path) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        kinds = self.plan.known_kinds()
        return [] if kinds is None else [(HeadsCommand(kinds, self.options), root / HEADS)]

    def extend(self, run: Run) -> Diagnosis | None:
        """Diagnose into a folder of the analysis; nothing of an earlier run stays there if that was not asked for."""
        if not run.asked["diagnose"]:
            clear_diagnosis(run.path / HEADS)
            return None
        shown = None if self._shown is None else self._shown.theta
        if isinstance(self.plan.source, InFlight) and not self.companions(run):
            self.options.tell(AGAIN)
        plan, folder, how = diagnosis_of(self.plan, run, self.options, shown)
        return diagnose_plan(plan, folder, how, self._measuring.rows(plan.theta))

    def companions(self, run: Run) -> Sequence[tuple[BaseCommand[Any, Any], Path]]:
        """The diagnosis, in the same pass of a running model; where its theta is not known yet, in a second one."""
        if not (run.asked["diagnose"] and isinstance(self.plan.source, InFlight)):
            return ()
        asked, thetas = run.asked.get("figure_theta"), self.plan.thetas
        if asked is None and len(set(thetas)) > 1:
            return ()
        theta = thetas[0] if asked is None else float(asked)
        plan, folder, how = diagnosis_of(self.plan, run, self.options, theta)
        return [(HeadsCommand(plan, how), folder)]

    def out_of_memory(self) -> str:
        longest = max(u.entry.tokens for u in self.plan.units)
        return (
            f"out of memory on {self.plan.device}: one head of {counted(longest, 'token')} needs about "
            f"{human_bytes(self.plan.memory / self.plan.workers)}; use --device cpu, fewer thetas or a shorter capture"
        )


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
    heatmaps: HeatMaps = None,
    theta: float | None = None,
    formats: Formats = ("png",),
    dpi: int = DPI,
    progress: ProgressCallback | None = None,
) -> list[Path]:
    """Draw the figures of an analysis again, from its saved profiles; the dump is not needed.

    Args:
        out: the folder of the analysis.
        heatmaps: (layer, head) pairs, "all", or None for the worst, the median and the best head.
        theta: what to draw, one of the thetas measured; None means the one that report.json names. Heat maps of other
            heads, and figures in other formats, that an earlier call drew at another theta are removed.
        formats, dpi: as of `RunOptions`.
        progress: called as work proceeds.

    Raises:
        DumpError: the folder holds no analysis, or a profile is damaged.
        InputError: an unknown format, a resolution out of range, a heat map of a head or a theta that was not measured,
            or the heat maps were saved for the first theta alone, by `calibrate` or an earlier version.
    """
    pictures = picture_formats(formats, dpi)
    path = Path(out)
    state = _state(path)
    report = load_report(path)
    shown = saved_figure_theta(report)
    if theta is not None:
        thetas = [float(t) for t in state["settings"]["theta"]]
        shown = choose_figure_theta(thetas, thetas, shown.target_recall, thetas[find_theta(thetas, theta, "--theta")])
    if heatmaps is None or len(heatmaps):
        for name in state["profiles"][:1]:  # refused before any picture is replaced
            HeadProfile.load(path / PROFILES / name).led_by(shown.theta)
    how: dict[str, Any] = {"theta": shown, "model": report["dump"].get("model"), "formats": pictures}
    with folder_lock(path):
        drawn = _draw(path, state, heatmaps, progress or (lambda _: None), **how)
        if theta is not None:
            stems = {picture.stem for picture in drawn}
            for other in set(pictures_in(path / FIGURES)) - set(drawn):
                if other.stem in stems or other.stem.endswith("-heatmap"):
                    other.unlink(missing_ok=True)
        return drawn


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


def _state(path: Path) -> dict[str, Any]:
    state = FOLDER.read(path)
    if state is None or not isinstance(state.get("profiles"), list):
        raise DumpError(f"{path} holds no analysis: run `anchorscope analyze DUMP --out {path}` first")
    if any(member(path / PROFILES, name, ".safetensors") is None for name in state["profiles"]):
        raise DumpError(f"{path / STATE} names a file outside its folder: it was edited; run analyze again")
    check(state, STATE_SHAPE, str(path / STATE), hint="it is damaged; run analyze again", error=DumpError)
    return state


def _draw(
    path: Path,
    state: Mapping[str, Any],
    heatmaps: Sequence[Sequence[int]] | str | None,
    report: Callable[[Progress], None],
    **how: Any,
) -> list[Path]:
    """Every figure, from the saved profiles; `how` as of `draw_all`."""
    from anchorscope.plots.draw import draw_all

    wanted: list[tuple[int, int]] | str | None = None
    if heatmaps not in (None, "default"):
        wanted = heatmaps if isinstance(heatmaps, str) else [(int(i), int(h)) for i, h in heatmaps or ()]
    target = state["settings"]["target_recall"]
    profiles = [path / PROFILES / name for name in state["profiles"]]
    prompts, layers = len(state["settings"]["prompts"]), len(state["settings"]["layers"])
    total = (prompts * (1 + 2 * layers) + heat_map_count(wanted, len(profiles), prompts)) * len(how["formats"])
    done = 0

    def drawn_one(file: Path) -> None:
        nonlocal done
        done += 1
        report(Progress("figures", min(done, total), total, file.stem))

    report(Progress("figures", 0, total))
    how["progress"] = drawn_one
    return draw_all(profiles, path / FIGURES, heatmaps=wanted, target_recall=target, **how)


__all__ = [
    "Analysis",
    "AnalysisPlan",
    "AnalyzeRequest",
    "Progress",
    "analyze",
    "is_whole",
    "iter_profiles",
    "load_report",
    "plan_analysis",
    "redraw",
]
