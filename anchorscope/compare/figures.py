"""Figures of a comparison: functions take scored points and return a `Figure`; `draw_all` saves them."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from anchorscope.compare.looks import Look, looks
from anchorscope.compare.tables import Point, by_head, head_needs, per_head_need, shared_curve, winners
from anchorscope.plots.maps import LayerHead, color_bar, color_cells, paint, write_cells
from anchorscope.plots.names import file_names
from anchorscope.plots.save import save_all
from anchorscope.plots.style import (
    FAINT,
    INK,
    MUTED,
    PAPER,
    SKY,
    SMALL,
    label,
    legend_below,
    legend_name,
    new_figure,
    panel_title,
    plain_log,
    setting_text,
    share,
    tidy,
)
from anchorscope.plots.text import PARTS, name_text

TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
DENSITY = "density (kept pairs / visible pairs)"
PANELS = 36  # heads drawn in one figure


def draw_all(
    points: Sequence[Point], folder: Path, report: Mapping[str, Any], *, formats: Mapping[str, int] | None = None
) -> list[Path]:
    """Draw and save every figure of a comparison.

    For all prompts together: `pooled-recall-density`, `density-needed`, `winners`, `stripes-against-blocks`; and per
    prompt and layer `PROMPT-layer05-recall-density`.

    Args:
        points: what was scored.
        folder: where to.
        report: what compare.json holds.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.

    Returns:
        The files, in the order written.
    """
    return save_all(_figures(points, report), folder, formats=formats)


def _figures(points: Sequence[Point], report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """File names and figures, one at a time."""
    methods, target = report["settings"]["methods"], report["settings"]["target_recall"]
    tokens = {p["name"]: p["tokens"] for p in report.get("prompts", ())}
    model = report["dump"].get("model")
    own = [m["settings"] for m in methods if m["method"] == "anchor"]
    groups = [(int(s["block"]), int(s["step"])) for s in own if {"block", "step"} <= s.keys()]

    def setting(prompts: Iterable[str]) -> str:
        found = setting_text(model, [(name, tokens.get(name)) for name in prompts])
        return PARTS.join(filter(None, [found, f"anchors in {setting_text(groups=groups)}" if groups else ""]))

    style = looks(methods)
    names = file_names([p.prompt for p in points])
    everything: dict[str, Any] = {"target": target, "setting": setting(names)}
    yield "pooled-recall-density", pooled_curves(points, style, **everything)
    yield "density-needed", density_needed(points, style, **everything)
    yield "winners", winner_map(points, style, **everything)
    pairs = stripes_against_blocks(points, methods, **everything)
    if pairs is not None:
        yield "stripes-against-blocks", pairs
    for prompt, name in names.items():
        for layer in sorted({p.layer for p in points if p.prompt == prompt}):
            mine = [p for p in points if p.prompt == prompt and p.layer == layer]
            figure = head_curves(mine, style, target=target, setting=setting([prompt]))
            yield f"{name}-layer{layer:02d}-recall-density", figure


def pooled_curves(points: Sequence[Point], style: Mapping[str, Look], *, target: float, setting: str = "") -> Figure:
    """Recall against density, both means over all heads at each shared setting; one line per method."""
    figure = new_figure(
        10.6,
        6.2,
        "Recall against density: every method, one setting for all heads",
        setting,
        f"mean over {_count(points)}; marks are measured settings; further up and left is better",
    )
    axes = figure.subplots()
    for name, look in style.items():
        _line(axes, shared_curve(points, name), name, look)
    _curve_axes(axes, _densities(points, style), target)
    _legend(figure, style)
    return figure


def head_curves(points: Sequence[Point], style: Mapping[str, Look], *, target: float, setting: str = "") -> Figure:
    """Recall against density of every head of one layer and prompt, after a panel with the layer's mean.

    Args:
        points: the points of one prompt and one layer.
        style: a look per method.
        target: recall marked by a line.
        setting: of what, see `anchorscope.plots.style.setting_text`; the prompt's name by default.
    """
    layer = points[0].layer
    heads = sorted({p.head for p in points})
    shown = heads[: PANELS - 1]
    columns = min(4, len(shown) + 1)
    rows = math.ceil((len(shown) + 1) / columns)
    more = "" if len(shown) == len(heads) else f"; the first {len(shown)} of {len(heads)} heads are shown"
    width = max(3.0 * columns + 0.4, 8.2)
    figure = new_figure(
        width,
        2.75 * rows + 1.1,
        f"Recall against density, head by head, layer {layer}",
        setting or setting_text(prompts=[(points[0].prompt, None)]),
        f"each head, and the mean of the layer's heads; marks are measured settings{more}",
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    densities = _densities(points, style)
    for axes, head in zip(panels, [None, *shown], strict=False):
        mine = points if head is None else [p for p in points if p.head == head]
        for name, look in style.items():
            _line(axes, shared_curve(mine, name), name, look, small=True)
        _curve_axes(axes, densities, target, small=True)
        panel_title(axes, f"mean of {len(heads)} heads" if head is None else f"head {head}", loc="center")
        axes.label_outer()
    for axes in panels[len(shown) + 1 :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(shown) + 1 - columns) : len(shown) + 1]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        label(axes, DENSITY, axes.get_ylabel())
    _legend(figure, style)
    return figure


def density_needed(points: Sequence[Point], style: Mapping[str, Look], *, target: float, setting: str = "") -> Figure:
    """Mean density that reaches the target, every head at its own setting: method x layer. Empty: not reached."""
    layers = sorted({p.layer for p in points})
    by_layer = {layer: [p for p in points if p.layer == layer] for layer in layers}
    needed = {
        (name, layer): per_head_need(mine, name, target).density for layer, mine in by_layer.items() for name in style
    }
    overall = {name: per_head_need(points, name, target).density for name in style}
    names = sorted(style, key=lambda n: (style[n].oracle, math.inf if overall[n] is None else overall[n]))
    values = np.array([[_nan(overall[n])] + [_nan(needed[n, layer]) for layer in layers] for n in names])
    wide = len(layers) > 16
    figure = new_figure(
        max(0.28 * len(layers) + 3.4 if wide else 0.62 * len(layers) + 4.2, 7.4),
        0.3 * len(names) + 2.0,
        f"Density needed for recall {target:g}: method x layer",
        setting,
        f"mean over {_count(points)}, each head at its own, interpolated between settings; gray: not reached",
    )
    axes = figure.subplots()
    known = values[np.isfinite(values)]
    low = float(known.min()) if known.size else 0.01
    norm = LogNorm(max(min(low, 0.5), 1e-4), 1.0)
    colors = matplotlib.colormaps["viridis"]
    image = color_cells(values, colors, norm, missing=FAINT)
    paint(axes, image)
    texts: dict[tuple[int, int], str] = {}
    for (row, column), value in np.ndenumerate(values):
        if column == 0 or not wide:
            texts[row, column] = "-" if math.isnan(value) else share(float(value))
    write_cells(axes, image, texts, size=SMALL)
    axes.axvline(0.5, color="white", linewidth=3)
    oracles = sum(style[n].oracle for n in names)
    if 0 < oracles < len(names):
        axes.axhline(len(names) - oracles - 0.5, color="white", linewidth=3)
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_xticks([0, *range(1, len(layers) + 1, step)], ["all", *map(str, layers[::step])])
    axes.set_yticks(range(len(names)), [name_text(name, 28) for name in names])
    tidy(axes, grid=False)
    label(axes, "layer")
    plain_log(color_bar(axes, norm, colors, text="density needed", pad=0.02).ax.yaxis)
    return figure


def winner_map(points: Sequence[Point], style: Mapping[str, Look], *, target: float, setting: str = "") -> Figure:
    """Which method reaches the target with the least density: layer x head, one panel per prompt."""
    names = [n for n in style if not style[n].oracle]
    best = winners(points, names, target)
    prompts = list(dict.fromkeys(p.prompt for p in points))
    place = LayerHead((p.layer, p.head) for p in points)
    winning = [n for n in names if n in best.values()]
    across = min(3, len(prompts))
    down = math.ceil(len(prompts) / across)
    figure = new_figure(
        max(across * max(0.34 * len(place.heads) + 1.0, 2.6), 7.6),
        down * max(0.26 * len(place.layers) + 1.1, 2.0) + 1.2,
        f"Least density for recall {target:g}: which method, for which head",
        setting,
        "oracles excluded, identification not counted; in brackets, how many heads each method wins",
    )
    panels = figure.subplots(down, across, squeeze=False).ravel()
    letters = dict(zip(winning, itertools.cycle(string.ascii_uppercase + string.ascii_lowercase), strict=False))
    for axes, prompt in zip(panels, prompts, strict=False):
        won = {place.cell(layer, head): name for (p, layer, head), name in best.items() if p == prompt and name}
        image = np.full((*place.shape, 4), to_rgba(PAPER))
        for cell, name in won.items():
            image[cell] = to_rgba(style[name].color)
        paint(axes, image)
        if image.size <= 4 * 400:
            texts = {cell: letters[name] for cell, name in won.items()}
            write_cells(axes, image, texts, size=SMALL, weight="bold")
        panel_title(axes, name_text(prompt, 28), loc="center")
        place.numbers(axes, most=(16, 16))
        tidy(axes, grid=False)
        label(axes, "query head", "layer")
    for axes in panels[len(prompts) :]:
        axes.set_visible(False)
    total = {n: sum(x == n for x in best.values()) for n in winning}
    handles = [Patch(facecolor=style[n].color, label=f"{letters[n]}  {name_text(n, 28)} ({total[n]})") for n in winning]
    if None in best.values():
        missed = sum(x is None for x in best.values())
        handles.append(Patch(facecolor=PAPER, edgecolor=MUTED, label=f"none reaches it ({missed})"))
    legend_below(figure, columns=4, handles=handles, framealpha=0.8)
    return figure


def stripes_against_blocks(
    points: Sequence[Point], methods: Sequence[Mapping[str, Any]], *, target: float, setting: str = ""
) -> Figure | None:
    """Per head, the least density of any stripe method against that of any block method, at equal recall.

    Hollow marks are the oracles. None if the line-up lacks one of the two kinds.
    """
    kinds = {
        (grain, oracle): [m["label"] for m in methods if m["granularity"] == grain and m["oracle"] == oracle]
        for grain in ("stripe", "block")
        for oracle in (False, True)
    }
    series = [x for x in (False, True) if kinds["stripe", x] and kinds["block", x]]
    if not series:
        return None
    figure = new_figure(
        8.2,
        6.0,
        f"Stripes against blocks at recall {target:g}",
        setting,
        f"one mark per head, {_count(points)}; above the line, blocks cost more than stripes",
    )
    axes = figure.subplots()
    seen: list[float] = []
    for oracle in series:
        best: dict[str, dict[tuple[str, int, int], float]] = {}
        for grain in ("stripe", "block"):
            found: dict[tuple[str, int, int], float] = {}
            for name in kinds[grain, oracle]:
                for key, need in head_needs(points, name, target).items():
                    if need.density is not None:
                        found[key] = min(found.get(key, math.inf), need.density)
            best[grain] = found
        both = [k for k in best["stripe"] if k in best["block"]]
        x, y = [best["stripe"][k] for k in both], [best["block"][k] for k in both]
        seen += x + y
        wins = sum(a < b for a, b in zip(x, y, strict=True))
        color = SKY if not oracle else INK
        axes.plot(
            x,
            y,
            "o",
            color=color,
            markerfacecolor="none" if oracle else color,
            markersize=6 if oracle else 5,
            alpha=0.85,
            linestyle="none",
            label=f"{'oracles' if oracle else 'methods'}: stripes cost less in {wins} of {len(both)} heads",
        )
    low = max(min(seen, default=0.1) * 0.8, 1e-5)
    axes.plot([low, 1], [low, 1], color=MUTED, linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(low, 1.1), ylim=(low, 1.1))
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    tidy(axes)
    label(axes, "density needed by the best stripe method", "density needed by the best block method")
    legend_below(figure, columns=2, handles=axes.get_legend_handles_labels()[0])
    return figure


# ------------------------------------------------------------------------------------------------------------------
# parts


def _count(points: Sequence[Point]) -> str:
    heads = len(by_head(points, points[0].method))
    prompts = len({p.prompt for p in points})
    return f"{heads} heads" if prompts == 1 else f"{heads} heads of {prompts} prompts"


def _densities(points: Sequence[Point], style: Mapping[str, Look]) -> list[float]:
    """Densities that the axis must show: those of methods, or of oracles where there is nothing else."""
    everything = [p for p in points if p.density > 0]
    methods = [p.density for p in everything if not style[p.method].oracle]
    return methods or [p.density for p in everything]


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _line(
    axes: Axes, curve: Sequence[tuple[float, float, float]], name: str, look: Look, *, small: bool = False
) -> None:
    ordered = sorted((d, r) for d, r, _ in curve if d > 0)
    axes.plot(
        [d for d, _ in ordered],
        [r for _, r in ordered],
        color=look.color,
        linestyle=look.dash,
        linewidth=1.6 if look.oracle else 1.1,
        marker=look.marker or None,
        markersize=2.6 if small else 4.2,
        zorder=3 if look.oracle else 2,
        label=legend_name(name, 28),
    )


def _curve_axes(axes: Axes, densities: Sequence[float], target: float, *, small: bool = False) -> None:
    """Log density; recall stretched towards 1, where the differences are."""
    low = max(min(densities, default=0.01) * 0.35, 1e-4)  # room for the oracles, which start much further left
    axes.set_xscale("log")
    axes.set_xlim(low, 1.08)
    axes.set_yscale("function", functions=(_stretch, _unstretch))
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.axhline(target, color=MUTED, linewidth=0.9)
    crowded = small and low < 0.02
    plain_log(axes.xaxis, LogLocator(numticks=6) if crowded else None)
    tidy(axes)
    label(axes, DENSITY, "recall (attention mass kept)")


def _stretch(recall: np.ndarray) -> np.ndarray:
    return -np.log10(1.005 - np.clip(recall, 0.0, 1.0))


def _unstretch(height: np.ndarray) -> np.ndarray:
    return 1.005 - 10.0**-height


def _legend(figure: Figure, style: Mapping[str, Look]) -> None:
    handles = [
        Line2D([], [], color=look.color, linestyle=look.dash, marker=look.marker or None, markersize=4.5, label=shown)
        for shown, look in ((legend_name(name, 28), look) for name, look in style.items())
    ]
    legend_below(figure, columns=6, handles=handles, handlelength=2.8)
