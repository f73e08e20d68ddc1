"""The common look: colors, sizes, titles and number formats. Nothing here touches matplotlib's global settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from anchorscope.palette import BLUE as BLUE
from anchorscope.palette import GREEN as GREEN
from anchorscope.palette import ORANGE as ORANGE
from anchorscope.palette import PINK as PINK
from anchorscope.palette import RED as RED
from anchorscope.palette import SKY as SKY
from anchorscope.pictures import DPI
from anchorscope.plots.text import PARTS, drawable, name_text, text_width, wrapped
from anchorscope.profiles import HeadProfile
from anchorscope.shown import exact_theta, share_text

T = TypeVar("T")

POSITIONS = 64  # bins of query positions drawn: more lines could not be told apart
TITLE, TEXT, SMALL = 12.5, 9.5, 8.5  # points; at 110 dpi even the small one is 13 pixels high
HEADER, LINE = 0.72, 0.22  # inches above a figure for its title and one line, and for each line more

# In all figures BLUE is what anchor attention keeps or does, SKY a single head, RED what is missed or falls short, and
# ORANGE the stripe oracle.
INK, MUTED, FAINT, PAPER = "#222222", "#666666", "#d8d8d8", "#eeeeee"
# Anything else that differs by kind (methods, arms, back ends): colors that mean none of the above.
KINDS = (
    GREEN,
    PINK,
    "#8C6D1F",
    "#1FA3A3",
    "#A3B018",
    "#7F2F5B",
    "#2E6F40",
    "#7C8BA1",
    "#6B4F3A",
    "#86C5A4",
    "#B0A08A",
    "#44546A",
)

# Missed mass: starts at a color that can be told from white, so that every cell above the scale's low end
# shows.
MISSED = LinearSegmentedColormap.from_list("missed", ["#fee3d3", "#fdae6b", RED, "#7f1d00"]).with_extremes(
    under="white"
)
# Theta, from few nats (pale) to many: violet, which means nothing else.
THETA = LinearSegmentedColormap.from_list("theta", ["#d6c4ec", "#a37fd0", "#6a35a8", "#2b0a4e"])
ALONE, DENSE = "#cfe8f7", "#4d4d4d"  # cells whose theta is -inf (the anchor region alone), and +inf or none (dense)
ALONE_LINE = "#7FB3D5"  # of a line or a mark whose theta is -inf


def theta_norm(values: Iterable[float]) -> Normalize:
    """The scale of thetas on `THETA`, from the least finite one to the largest."""
    finite = [float(x) for x in values if math.isfinite(x)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)


def theta_colors(thetas: Sequence[float] | np.ndarray) -> list[str]:
    """Colors of lines and marks on white, one for each theta: of finite ones from the stronger part of `THETA`."""
    norm = theta_norm(thetas)
    beyond = {-math.inf: ALONE_LINE, math.inf: DENSE}
    return [beyond.get(float(t)) or to_hex(THETA(0.3 + 0.7 * float(norm(float(t))))) for t in thetas]


def new_figure(
    width: float, height: float, title: str, setting: str, finding: str = "", *, constrained: bool = True
) -> Figure:
    """An empty figure under a bold title and muted lines, flush left; a text that is too long goes on in a line more.

    Args:
        width, height: inches, with a title of one line and one line below it; each further one makes the figure higher.
        title: what the figure shows.
        setting: of what: model, prompt, groups, theta (see `setting_text`).
        finding: numbers that sum it up.
        constrained: lay axes out below the header; without it, `figure.subplotpars.top` says where the header ends.
    """
    left = 0.16
    titles = wrapped(drawable(title), width - 2 * left, TITLE, bold=True)
    lines = [x for text in (setting, finding) if text for x in wrapped(drawable(text), width - 2 * left, TEXT)]
    header = HEADER + LINE * (len(titles) - 1 + max(len(lines), 1) - 1)
    height += header - HEADER
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    if constrained:
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header / height), w_pad=0.08, h_pad=0.06)
    else:
        figure.subplots_adjust(top=1 - header / height)

    def write(text: str, down: float, **look: Any) -> None:
        place = figure.transFigure + ScaledTranslation(left, -down, figure.dpi_scale_trans)
        figure.text(0, 1, text, transform=place, va="top", parse_math=False, **look)

    for i, line in enumerate(titles):
        write(line, 0.14 + LINE * i, size=TITLE, weight="bold", color=INK)
    for i, line in enumerate(lines, len(titles) - 1):
        write(line, 0.42 + LINE * i, size=TEXT, color=MUTED)
    return figure


def grow(figure: Figure, inches: float) -> None:
    """Make a figure of `new_figure` higher; what stands above its axes stays there."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine), "only laid out figures grow"
    width, height = figure.get_size_inches()
    rect: Any = engine.get()["rect"]
    header = (1 - rect[1] - rect[3]) * height
    figure.set_size_inches(width, height + inches)
    engine.set(rect=(0, 0, 1, 1 - header / (height + inches)))


def setting_text(
    model: object = None,
    prompts: Sequence[tuple[str, int | None]] = (),
    groups: Sequence[tuple[int, int]] = (),
    thetas: Sequence[float | str] = (),
    *others: str,
) -> str:
    """What a figure is of, in one line: model, prompt, groups, theta; what is not known or not meant is left out.

    Args:
        model: its record in a report, its name, or None.
        prompts: names and tokens.
        groups: (block, step) of each kind.
        thetas: nats.
        others: further parts.
    """
    parts = [model_text(model), _prompts_text(prompts), _groups_text(groups), _thetas_text(thetas), *others]
    return joined(*parts)


def joined(*parts: str) -> str:
    """Parts of a line above a figure, those that are empty left out."""
    return PARTS.join(part for part in parts if part)


def model_text(model: object) -> str:
    """The name of a model: an id as it is, of a path the last folder; empty where it is not known."""
    name = model.get("name") if isinstance(model, Mapping) else model
    if not isinstance(name, str) or not name:
        return ""
    path = name.replace("\\", "/").rstrip("/")
    local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path[1:3] == ":/"
    return name_text(path.rsplit("/", 1)[-1] if local else name)


def _prompts_text(prompts: Sequence[tuple[str, int | None]]) -> str:
    prompts = list(dict.fromkeys(prompts))
    lengths = sorted({tokens for _, tokens in prompts if tokens is not None})
    long = "" if not lengths else f", {lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "") + " tokens"
    names = list(dict.fromkeys(name for name, _ in prompts))
    if not names:
        return ""
    return (name_text(names[0]) if len(names) == 1 else f"{len(names)} prompts") + long


def _groups_text(groups: Sequence[tuple[int, int]]) -> str:
    kinds = [f"{block} x {step}" for block, step in sorted(set(groups))]
    if not kinds:
        return ""
    return f"groups of {_listed(kinds)}" if len(kinds) <= 4 else f"{len(kinds)} kinds of groups"


def _thetas_text(thetas: Sequence[float | str]) -> str:
    known = sorted({float(x) for x in thetas})
    if not known:
        return ""
    if len(known) == 1:
        return f"theta {exact_theta(known[0])}"
    if len(known) <= 6:
        return f"thetas {_listed([exact_theta(x) for x in known])}"
    return f"{len(known)} thetas from {exact_theta(known[0])} to {exact_theta(known[-1])}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def some_of(values: Sequence[T], most: int) -> list[T]:
    """At most so many of some values, spread over all of them, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def legend_name(name: str, most: int = 44) -> str:
    """A name as a legend shows it: matplotlib leaves out those that begin with an underscore."""
    return f" {name_text(name, most)}" if name.startswith("_") else name_text(name, most)


def tidy(axes: Axes, *, grid: bool = True) -> None:
    """Small ticks, no box above and on the right, a faint grid behind the data."""
    axes.tick_params(labelsize=SMALL, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    if grid:
        axes.grid(True, color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Axis labels at the common size."""
    axes.set_xlabel(x, size=TEXT, color=INK)
    axes.set_ylabel(y, size=TEXT, color=INK)


def panel_title(axes: Axes, text: str, **options: Any) -> None:
    """A title above one of several panels, flush left."""
    axes.set_title(text, **{"size": TEXT, "color": INK, "loc": "left", **options})


def legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend at the common size, on paper that keeps the lines behind it readable; none where nothing has a name."""
    if "handles" not in options and isinstance(owner, Axes) and not owner.get_legend_handles_labels()[0]:
        return
    owner.legend(**{"fontsize": SMALL, "frameon": True, "framealpha": 0.9, "edgecolor": FAINT, **options})


def legend_below(figure: Figure, *, columns: int, handles: Sequence[Any], **options: Any) -> None:
    """A legend at the lower left of a figure, under everything, in at most so many columns, as many as fit.

    The figure grows by the lines of the legend after the first, so that its axes keep their size.
    """
    texts = [str(handle.get_label()) for handle in handles]
    if not texts:
        return
    frame = SMALL / 72  # of a letter's height: what handle, gaps and frame take is counted in these
    each = max(text_width(text, SMALL) for text in texts) + 4.8 * frame
    columns = max(1, min(columns, len(texts), int((figure.get_size_inches()[0] - 2.0 * frame) / each)))
    lines = math.ceil(len(texts) / columns) + ("title" in options)
    grow(figure, 0.175 * (lines - 1))
    where = {"loc": "outside lower left", "ncols": columns, "borderaxespad": 0.4}
    legend(figure, **{**where, "handles": list(handles), **options})


def token_ticks(axes: Axes, *, x: bool = False, y: bool = False, count: int = 6) -> None:
    """Whole positions with thousands separators on the axes named."""
    for axis, wanted in ((axes.xaxis, x), (axes.yaxis, y)):
        if wanted:
            axis.set_major_locator(MaxNLocator(count, integer=True, steps=[1, 2, 4, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log(axis: Axis, locator: LogLocator | None = None) -> None:
    """Plain numbers on a logarithmic axis instead of powers of ten; every tenth where few of them are on it."""
    low, high = sorted(axis.get_view_interval())
    few = high < 5 * low
    axis.set_major_locator(locator or LogLocator(subs=range(1, 10) if few else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def share(value: float) -> str:
    """A share with the digits that matter: 0.943, 0.0312, 0.00637, 4.2e-05, 0.000."""
    if value < 1e-9:  # rounding of sums
        return f"{value:.3f}"
    if value >= 0.0995:
        return share_text(value)
    if value < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def profile_setting(p: HeadProfile, model: object, *, thetas: Iterable[float] = ()) -> str:
    """What a figure of profiles like this one is of; see `setting_text`."""
    return setting_text(model, [(p.prompt, p.tokens)], [(p.block, p.step)], list(thetas))


def shown_positions(edges: np.ndarray, recall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and mean recall (last axis) of few enough bins of positions to tell lines apart."""
    first = np.arange(0, edges.size - 1, math.ceil((edges.size - 1) / POSITIONS))
    shown = np.append(edges[first], edges[-1])
    return shown, np.add.reduceat(recall * np.diff(edges), first, axis=-1) / np.diff(shown)
