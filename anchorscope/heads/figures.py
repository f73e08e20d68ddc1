"""Layer x head maps of the diagnostics: functions take rows and return a `Figure`; `draw_all` saves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from anchorscope.errors import InputError
from anchorscope.heads.diagnostics import CLASSES
from anchorscope.heads.tables import HeadRow
from anchorscope.plots.maps import LayerHead, cell_share, color_bar, color_cells, paint, write_cells, write_numbers
from anchorscope.plots.names import file_names
from anchorscope.plots.save import save_all
from anchorscope.plots.style import MUTED, PAPER, SMALL, legend_below, new_figure, panel_title, setting_text, share

# Light to dark, and none of the colors that mean something in all figures.
CLASS_COLORS = dict(zip(CLASSES, ("#86C5A4", "#7C8BA1", "#7F2F5B"), strict=True))
NUMBERS = (10, 32)  # most heads and layers with a number or letter in each cell


class Panel(NamedTuple):
    """One map: the metric, its title, colors and scale."""

    metric: str
    title: str
    cmap: str
    scale: str  # "share": 0 to 1; "tokens": 0 to the largest; "log": smallest to largest


WHERE = (
    Panel("sink_4", "mass on the first 4 tokens", "cividis", "share"),
    Panel("hidden_sink_mass", "mass on hidden sinks", "cividis", "share"),
    Panel("local_128", "mass on the last 128 keys", "cividis", "share"),
    Panel("window_recall", "recall of 64 first + 256 last keys", "cividis", "share"),
    Panel("distance_1024", "mean distance, clipped at 1,024 (tokens)", "viridis", "tokens"),
    Panel("effective_keys_median", "effective number of keys, median", "viridis", "log"),
)
SHAPES = (
    Panel("vertical_mass", "mass on the heaviest 1/64 of columns", "cividis", "share"),
    Panel("slash_mass", "mass on the heaviest 1/64 of diagonals", "cividis", "share"),
    Panel("block_mass", "mass on the heaviest 1/64 of 64x64 blocks", "cividis", "share"),
)
PERSISTENCE = (
    Panel("overlap_groups", "with the neighboring group", "cividis", "share"),
    Panel("overlap_heads", "with query heads of the same kv head", "cividis", "share"),
    Panel("overlap_layer", "with the previous captured layer", "cividis", "share"),
)


def class_map(rows: Sequence[HeadRow], setting: str = "") -> Figure:
    """Which heads stream, which retrieve, which are mixed: one layer x head map.

    Args:
        rows: heads of one prompt; heads that are missing are left gray.
        setting: of what, see `anchorscope.plots.style.setting_text`; the prompt's name by default.

    Raises:
        InputError: no rows, or rows of several prompts.
    """
    grid = _grid_of(rows)
    count = {kind: sum(r.kind == kind for r in rows) for kind in CLASSES}
    height = max(grid.row_height(0.15, 5.2) * len(grid.layers), 1.2) + 2.2
    figure = new_figure(
        max(0.34 * len(grid.heads) + 1.4, 7.6),
        height,
        "What kind of head each one is",
        setting or setting_text(prompts=[(rows[0].prompt, None)]),
        "by the attention that the first 64 and the last 256 keys keep",
    )
    axes = figure.subplots()
    image = np.empty((len(grid.layers), len(grid.heads), 4))
    image[:] = to_rgba(PAPER)
    for r in rows:
        if r.kind:
            image[grid.cell(r.layer, r.head)] = to_rgba(CLASS_COLORS[r.kind])
    paint(axes, image)
    if len(grid.heads) <= 2 * NUMBERS[0] and len(grid.layers) <= NUMBERS[1]:
        letters = {grid.cell(r.layer, r.head): r.kind[0].upper() for r in rows if r.kind}
        write_cells(axes, image, letters, size=SMALL, weight="bold")
    grid.ticks(axes)
    grid.kv_lines(axes)
    means = {"streaming": "0.95 and more", "mixed": "between", "retrieval": "below 0.80"}
    handles = [Patch(facecolor=CLASS_COLORS[k], label=f"{k} ({count[k]}): {means[k]}") for k in CLASSES]
    if (image == to_rgba(PAPER)).all(-1).any():
        handles.append(Patch(facecolor=PAPER, edgecolor=MUTED, label="not measured"))
    legend_below(figure, columns=4, handles=handles, framealpha=0.8)
    return figure


def metric_maps(
    rows: Sequence[HeadRow], panels: Sequence[Panel], title: str, subtitle: str, setting: str = ""
) -> Figure:
    """Layer x head maps of several metrics.

    Args:
        rows: heads of one prompt; heads that are missing, or to which a metric does not apply, are left gray.
        panels: what to draw, three in a row.
        title, subtitle: above the maps.
        setting: of what, see `anchorscope.plots.style.setting_text`; the prompt's name by default.

    Raises:
        InputError: no rows or panels, or rows of several prompts.
    """
    grid = _grid_of(rows)
    if not panels:
        raise InputError("no metrics to draw")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    width = min(max(0.46 * len(grid.heads), 3.4), 4.8)
    each = max(grid.row_height(0.15, 5.2) * len(grid.layers), 1.1) + 1.15
    setting = setting or setting_text(prompts=[(rows[0].prompt, None)])
    figure = new_figure(across * width + 1.4, down * each + 1.25, title, setting, subtitle)
    gray = False
    for axes, panel in zip(figure.subplots(down, across, squeeze=False).ravel(), panels, strict=False):
        values = grid.fill((r.layer, r.head, getattr(r, panel.metric)) for r in rows)
        gray |= bool(np.isnan(values).any())
        _map(axes, values, panel)
        grid.ticks(axes)
        grid.kv_lines(axes)
    if gray:
        handles = [Patch(facecolor=PAPER, edgecolor=MUTED, label="not measured, or does not apply")]
        legend_below(figure, columns=4, handles=handles, framealpha=0.8)
    return figure


def draw_all(
    rows: Sequence[HeadRow],
    out: Path | str,
    report: Mapping[str, Any] | None = None,
    *,
    formats: Mapping[str, int] | None = None,
) -> list[Path]:
    """Draw and save every figure: four per prompt, `PROMPT-classes`, `-attention`, `-shapes` and `-persistence`.

    Args:
        rows: heads of any number of prompts.
        out: folder, made when missing.
        report: what heads.json holds, of which figures name model, lengths, groups and theta.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.

    Raises:
        RunFailure: a file cannot be written.
    """
    return save_all(_figures(rows, report or {}), out, formats=formats)


def _figures(rows: Sequence[HeadRow], report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """File names and figures, one at a time."""
    model = report.get("dump", {}).get("model")
    tokens = {p["name"]: p["tokens"] for p in report.get("prompts", ())}
    s = report.get("settings")
    for prompt, name in file_names([r.prompt for r in rows]).items():
        mine = [r for r in rows if r.prompt == prompt]
        density = [r.stripe_density for r in mine if not math.isnan(r.stripe_density)]
        stripes = f"stripes are {share(float(np.mean(density)))} of the candidates on average" if density else "none"
        prompts = [(prompt, tokens.get(prompt))]
        setting = setting_text(model, prompts)
        yield f"{name}-classes", class_map(mine, setting)
        about = "means over the queries of a head"
        yield f"{name}-attention", metric_maps(mine, WHERE, "Where attention goes", about, setting)
        about = "equal numbers of lines, exact masses"
        yield f"{name}-shapes", metric_maps(mine, SHAPES, "Columns, diagonals or blocks", about, setting)
        about = f"Jaccard overlap, 1 = the same stripes  |  {stripes}{_gaps(mine)}"
        selected = setting_text(model, prompts, [(s["block"], s["step"])], [s["theta"]]) if s else setting
        yield f"{name}-persistence", metric_maps(mine, PERSISTENCE, "Do stripes persist", about, selected)


def _gaps(rows: Sequence[HeadRow]) -> str:
    """Which layers are compared across a gap: the layer just before them is not in the dump."""
    pairs = sorted({(r.previous_layer, r.layer) for r in rows if r.previous_layer not in (None, r.layer - 1)})
    if not pairs:
        return ""
    shown = ", ".join(f"{layer} with {before}" for before, layer in pairs[:4])
    return f"  |  layers not consecutive: {shown}" + (", ..." if len(pairs) > 4 else "")


def _grid_of(rows: Sequence[HeadRow]) -> LayerHead:
    """The layers and heads of one prompt."""
    if len({r.prompt for r in rows}) != 1:
        raise InputError("a map shows the heads of one prompt")
    return LayerHead(((r.layer, r.head) for r in rows), {r.head: r.kv_head for r in rows})


def _map(axes: Axes, values: np.ndarray, panel: Panel) -> None:
    """One map under its title with its own color bar; numbers in the cells where they fit."""
    known = values[~np.isnan(values)]
    top = float(known.max()) if known.size else 1.0
    norm: Normalize = Normalize(0.0, 1.0)
    if panel.scale == "tokens":
        norm = Normalize(0.0, max(top, 1.0))
    elif panel.scale == "log":
        low = max(float(known.min()) if known.size else 1.0, 1e-9)
        norm = LogNorm(low, max(top, low * 1.01))
    colors = matplotlib.colormaps[panel.cmap]
    image = color_cells(values, colors, norm)
    paint(axes, image)
    panel_title(axes, panel.title, pad=6)
    if values.shape[1] <= NUMBERS[0] and values.shape[0] <= NUMBERS[1]:
        write_numbers(axes, image, values, lambda value: _digits(value, panel.scale))
    bar = color_bar(axes, norm, colors, orientation="horizontal", fraction=0.06, pad=0.03, aspect=34)
    if panel.scale == "log":
        # Powers of ten alone may all lie outside a narrow range.
        marks = np.geomspace(*_norm_range(norm), 4)
        bar.set_ticks(list(marks), labels=[_amount(m) for m in marks])
        bar.minorticks_off()


def _digits(value: float, scale: str) -> str:
    return cell_share(value) if scale == "share" else _amount(value)


def _amount(value: float) -> str:
    """Two digits where one would say little: 4.7, 10, 1,024."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def _norm_range(norm: Normalize) -> tuple[float, float]:
    """Low and high end of a scale."""
    return float(norm.vmin or 0.0), float(norm.vmax or 1.0)
