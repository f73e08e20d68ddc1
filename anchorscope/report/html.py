"""One self-contained HTML page from finished runs: every head's curve, heat map and numbers, no network.

The page is a template (assets/), plotly.js and one JSON document. Everything numeric travels as deflated binary, so
that a model of 1,024 heads stays under 15 MB:

- curves of all heads of a prompt (`curves.py`): float32 on one theta grid, thinned where nothing happens, which holds
  every theta asked for with its exact values;
- heat maps (`heat.py`): attention mass and smallest margin, as coarse as `PAGE_BYTES` demands;
- what folders of other commands add (`kinds.py`): one file per kind of folder; those with a section of their own say it
  in `blocks.py`'s cards, tables and grids.

The page interpolates on the theta grid; it computes nothing else that the CSV files hold. Text that comes from prompts
reaches the page as JSON with "<" escaped and is shown as text, never as markup. numpy only, neither torch nor the dump.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from anchorscope._version import __version__
from anchorscope.errors import MissingBackendError
from anchorscope.figure_theta import choose_figure_theta, find_theta
from anchorscope.files import write_atomic
from anchorscope.names import THETA_COLUMNS
from anchorscope.palette import PAGE, RED, SKY
from anchorscope.profiles import HeadProfile
from anchorscope.report.curves import pack_curves, theta_grid
from anchorscope.report.glossary import GLOSSARY
from anchorscope.report.heat import MARGIN_STEPS, MASS_FLOOR, MASS_STEPS, heat_shape, pack_heat
from anchorscope.report.kinds import KINDS, SECTIONS, Sources, open_sources
from anchorscope.report.pack import json_number
from anchorscope.report.read import Run, Table
from anchorscope.report.summary import summarize
from anchorscope.report.words import pack_words, read_words

PAGE_BYTES = 14_500_000  # what heat maps are fitted to
PLOTLY_BYTES = 5_000_000
LEAST_HEAT = 1_500_000  # what they get however large the rest is
MAX_ASKED = 24  # thetas whose other columns of heads.csv are kept; recall and density are kept for all

# of assets/
SCRIPTS = (
    "core",
    "data",
    "words",
    "state",
    "grid",
    "overview",
    "charts",
    "head",
    "heat",
    "events",
    "blocks",
    "glossary",
    "start",
)
COLOR_MAPS = ("viridis", "cividis", "magma", "PuOr")  # any color vision can read them

Progress = Callable[[int, int], None]
Tokens = Mapping[tuple[str, str], Sequence[str | bytes]]


def write_report(
    folders: Sequence[Path | str] | Sources,
    out: Path | str,
    *,
    tokens: Tokens | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build the page and save it atomically; the same results give the same bytes.

    Args:
        folders: result folders, or what `open_sources` made of them.
        out: the HTML file.
        tokens: text (or UTF-8 bytes) of every token by (dump identity, prompt), in place of what the analyses hold.
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
    tokens: Tokens | None = None,
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


def build_data(sources: Sources, *, tokens: Tokens | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The JSON document of the page: `runs`, one `set` per run and prompt, `sections` of other folders, `words` (token
    texts), color maps.

    Raises:
        DumpError: a profile is missing or damaged.
    """
    tick = _ticks(sum(len(r.profiles) for r in sources.runs), progress)
    measured = [_read(run, tick) for run in sources.runs]
    margins = (min((m.low for m in measured), default=0.0), max((m.high for m in measured), default=1.0))
    words: dict[str, str] = {}
    sets: list[dict[str, Any]] = []
    files: list[list[Path]] = []
    for index, one in enumerate(measured):
        texts: Mapping[str, Sequence[str | bytes]] = read_words(one.run.path, one.run.identity)
        for prompt in dict.fromkeys(p.prompt for p in one.profiles):
            key = f"{one.run.identity}/{prompt}"
            pieces = (tokens or {}).get((one.run.identity, prompt), texts.get(prompt))
            if pieces is not None:
                words[key] = pack_words(pieces)
            sets.append({"run": index, **_pack_set(one, prompt, sources, key if key in words else None)})
            files.append([path for path, p in zip(one.run.profiles, one.profiles, strict=True) if p.prompt == prompt])
    runs = [_pack_run(one) for one in measured]
    sections = [x for section in SECTIONS for x in section.pack(sources.results.get(section.name, ()))]
    rest = len(json.dumps([runs, sets, words, sections]))
    paths_of_all = [p for mine in files for p in mine]
    shape = heat_shape(paths_of_all, margins, max(LEAST_HEAT, PAGE_BYTES - PLOTLY_BYTES - rest))
    for one_set, paths in zip(sets, files, strict=True):
        one_set["heat"] = []
        for path in paths:
            one_set["heat"].append(pack_heat(HeadProfile.load(path), shape, margins))
            next(tick)
    return {
        "format": "anchorscope-page",
        "anchorscope": __version__,
        "runs": runs,
        "model": _model(sources),
        "summary": summarize([(one.run, one.profiles, one.grid) for one in measured], sources.results),
        "glossary": GLOSSARY,
        "columns": THETA_COLUMNS,
        "colors": {"lines": PAGE, "short": RED, "cursor": SKY},
        "sets": sets,
        "sections": sections,
        "words": words,
        "mass": {"steps": MASS_STEPS, "floor": MASS_FLOOR},
        "margin": {"steps": MARGIN_STEPS, "low": margins[0], "high": margins[1]},
        "maps": {name: _colors(name) for name in COLOR_MAPS},
    }


def _model(sources: Sources) -> str | None:
    """The name of the model that all is about, if any folder tells it."""
    models = [run.report["dump"].get("model") for run in sources.runs]
    models += [result.model for results in sources.results.values() for result in results]
    return next((str(m["name"]) for m in models if m and m.get("name")), None)


@dataclass(frozen=True)
class _Measured:
    """A run with its profiles (without heat maps), its theta grid, and the ends of the slider in nats."""

    run: Run
    profiles: list[HeadProfile] = field(repr=False)
    grid: np.ndarray = field(repr=False)
    low: float
    high: float

    @property
    def target(self) -> float:
        """The recall that heads should reach."""
        return float(self.run.report["settings"]["target_recall"])

    @property
    def kept(self) -> int:
        """Thetas asked for, of which the page keeps everything."""
        return min(MAX_ASKED, len(self.profiles[0].thetas))


def _ticks(total: int, progress: Progress | None) -> Iterator[None]:
    """Report progress at every step; each head is read twice."""
    seen = 0
    while True:
        seen += 1
        if progress is not None:
            progress(min(seen, 2 * total) // 2, total)
        yield


def _read(run: Run, tick: Iterator[None]) -> _Measured:
    profiles = []
    for path in run.profiles:
        profiles.append(HeadProfile.load(path, heat=False))
        next(tick)
    order = opening_order(run, profiles)
    profiles = [p.reordered(order) for p in profiles]
    return _Measured(run, profiles, *theta_grid(profiles))


def opening_order(run: Run, profiles: Sequence[HeadProfile]) -> list[int]:
    """The places of a run's thetas in the order of their use for the page: the page opens at the first.

    That is the theta of the run's figures; reports of earlier versions do not name one, so it is chosen here. The
    others follow so that any number of them from the front lies spread over the range asked for.
    """
    thetas = profiles[0].thetas.tolist()
    said = run.report.get("figure_theta")
    named = said.get("theta") if isinstance(said, dict) else None
    if isinstance(named, (int, float, str)) and float(named) in thetas:
        first = find_theta(thetas, float(named))
    else:
        recalls = np.mean([p.recall for p in profiles], axis=0).tolist()
        first = choose_figure_theta(thetas, recalls, float(run.report["settings"]["target_recall"])).index
    rank = np.argsort(np.argsort(thetas, kind="stable"))
    order, distance = [first], np.abs(rank - rank[first])
    while len(order) < len(thetas):
        order.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(rank - rank[order[-1]]))
        distance[order] = -1
    return order


def _pack_run(one: _Measured) -> dict[str, Any]:
    return {
        "label": one.run.label,
        **{k: one.run.report.get(k) for k in ("started", "dump", "settings", "versions", "hardware", "warnings")},
        "target": one.run.report["settings"]["target_recall"],
        "grid": [json_number(t) for t in one.grid],
        "asked": [json_number(t) for t in one.profiles[0].thetas],
        "kept": one.kept,
        "low": one.low,
        "high": one.high,
    }


def _pack_set(one: _Measured, prompt: str, sources: Sources, text: str | None) -> dict[str, Any]:
    """All of one prompt but its heat maps; `text` names its tokens among the words."""
    profiles = [p for p in one.profiles if p.prompt == prompt]
    return {
        "prompt": prompt,
        "tokens": profiles[0].tokens,
        "text": text,
        **pack_curves(profiles, one.grid, one.target, one.kept),
        **{kind.name: kind.pack(sources.tables_of(kind, one.run), prompt) for kind in KINDS},
    }


def _colors(name: str) -> list[str]:
    """33 even steps of a color map."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[name](x)) for x in np.linspace(0, 1, 33)]


def page_script() -> str:
    """The script of the page: its files share one scope, in the order of `SCRIPTS`."""
    assets = resources.files("anchorscope.report") / "assets"
    parts = [(assets / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n".join(['"use strict";', "(() => {", *parts, "})();"])


def _page(data: Mapping[str, Any], plotly: str) -> str:
    """The template with style, scripts and data put in."""
    assets = resources.files("anchorscope.report") / "assets"
    page, css = ((assets / name).read_text(encoding="utf-8") for name in ("report.html", "report.css"))
    # Inside <script>, "</script" and "<!--" would end or change the element: JSON can write "<" as an escape.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "{{style}}": css,
        "{{plotly}}": plotly.replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        "{{data}}": text,
        "{{script}}": page_script(),
    }
    out = []
    for mark, part in parts.items():
        before, _, page = page.partition(mark)
        out += [before, part]
    return "".join([*out, page])


__all__ = ["Run", "Sources", "Table", "build_data", "build_report", "open_sources", "write_report"]
