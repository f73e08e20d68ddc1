"""Figures of a calibration: functions take calibration.json's values and return a `Figure`; `draw_all` saves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from anchorscope.calibration.tables import aim
from anchorscope.plots.maps import (
    LayerHead,
    bare,
    cell_share,
    color_bar,
    color_cells,
    paint,
    some_ticks,
    theta_cells,
    write_cells,
)
from anchorscope.plots.notes import Notes
from anchorscope.plots.save import save_all
from anchorscope.plots.style import (
    ALONE,
    BLUE,
    DENSE,
    FAINT,
    GREEN,
    INK,
    KINDS,
    MISSED,
    MUTED,
    PAPER,
    RED,
    SMALL,
    TEXT,
    THETA,
    label,
    legend_below,
    new_figure,
    panel_title,
    setting_text,
    tidy,
)
from anchorscope.shown import theta_text

NUMBERS = (16, 32)  # most heads and layers with a number in each cell
RECALLS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
DENSITIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
GROUP_DASHES = ((0, (5, 1.5)), (0, (1, 1)), (0, (3, 1.5, 1, 1.5)), (0, (8, 2)), (0, (6, 1, 1, 1, 1, 1)))
GROUPS = (KINDS[2], KINDS[5], KINDS[7], KINDS[4], KINDS[8])
LEAST_MISSED = 1e-4  # recall is drawn up to 1 minus this

Report = Mapping[str, Any]


def draw_all(report: Report, folder: Path, *, formats: Mapping[str, int] | None = None) -> list[Path]:
    """Draw and save every figure: `thetas`, `fitted-held-out` (if prompts were held out), `recall-density`, and
    `lengths` (if prompts differ in length).

    Args:
        report: what calibration.json holds.
        folder: where to.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.

    Returns:
        The files, in the order written.
    """
    figures: list[tuple[str, Figure]] = [("thetas", theta_map(report))]
    if report["held_out"] is not None:
        figures.append(("fitted-held-out", fitted_held_out(report)))
    if report["against_one_theta"]["budgets"]:
        figures.append(("recall-density", recall_density(report)))
    if report["lengths"]:
        figures.append(("lengths", length_matrix(report)))
    return save_all(figures, folder, formats=formats)


def _setting(report: Report, held_out: bool | None = None) -> str:
    """Model, prompts and chosen groups, and what was aimed at; `held_out` says which prompts, None all."""
    prompts = [p for p in report["prompts"] if held_out is None or p["held_out"] == held_out]
    groups = [(row["block"], row["step"]) for row in report["layers"]]
    named = [(p["name"], p["tokens"]) for p in prompts]
    return setting_text(report.get("model"), named, groups, (), aim(report["settings"]))


def theta_map(report: Report) -> Figure:
    """Theta per layer and head, with each layer's kind of group on the right; dense heads gray."""
    rows = report["heads"]
    place = LayerHead((r["layer"], r["head"]) for r in rows)
    layers, heads = place.layers, place.heads
    grid = place.fill((r["layer"], r["head"], math.inf if r["theta"] == "dense" else float(r["theta"])) for r in rows)
    dense = place.fill((r["layer"], r["head"], r["theta"] == "dense") for r in rows) == 1
    known = grid[np.isfinite(grid)]
    cell = place.row_height(0.17, 5.6)
    span = f"{theta_text(known.min())} to {theta_text(known.max())} nats" if known.size else "none sparse"
    figure = new_figure(
        max(0.5 * min(len(heads), 24) + 3.4, 8.2),
        cell * len(layers) + 2.0,
        "Theta of every head",
        _setting(report),
        f"{span}  |  {int(dense.sum())} of {len(rows)} heads dense",
    )
    axes = figure.subplots()
    image, norm = theta_cells(grid)
    paint(axes, image)
    if len(heads) <= NUMBERS[0] and len(layers) <= NUMBERS[1]:
        texts = {at: "dense" if dense[at] else _nats(float(value)) for at, value in np.ndenumerate(grid)}
        write_cells(axes, image, texts)
    place.numbers(axes, most=(24, 24))
    groups = {row["layer"]: f"{row['block']}x{row['step']}" for row in report["layers"]}
    right = axes.secondary_yaxis("right")
    some_ticks(right, [groups[i] for i in layers], math.ceil(len(layers) / 24))
    right.set_ylabel("groups (block x step)", size=TEXT, color=INK)
    for side in (axes, right):
        bare(side)
    label(axes, "query head", "layer")
    if norm is not None:
        color_bar(axes, norm, THETA, text="theta (nats)", fraction=0.035, pad=0.02)
    handles = [Patch(facecolor=DENSE, label="runs dense")] if dense.any() else []
    if (np.isposinf(grid) & ~dense).any():
        handles.append(Patch(facecolor=DENSE, edgecolor=MUTED, label="inf: keeps all"))
    if np.isneginf(grid).any():
        handles.append(Patch(facecolor=ALONE, edgecolor=MUTED, label="-inf: the anchor region alone suffices"))
    if np.isnan(grid).any():
        handles.append(Patch(facecolor=PAPER, edgecolor=MUTED, label="not measured"))
    if handles:
        legend_below(figure, columns=3, handles=handles)
    return figure


def fitted_held_out(report: Report) -> Figure:
    """Each head's statistic on held-out prompts against the fitting ones; and what its density became."""
    s, target = report["settings"], report["settings"]["target"]
    key = {"mean": "recall", "p05": "p05", "last": "last"}[s["statistic"]]
    rows = [r for r in report["heads"] if r["theta"] != "dense"]
    broken = np.array([r["kept"] is False for r in rows], dtype=bool)
    found = report["promise"]
    said = "" if found is None else f"{found['heads_missed']} of {len(report['heads'])} heads below the target"
    figure = new_figure(11.4, 5.6, "Do the thetas hold on prompts they never saw?", _setting(report), said)
    panels = figure.subplots(1, 2)
    for axes, name, words in ((panels[0], key, f"{s['statistic']} recall"), (panels[1], "density", "density")):
        x, y = (np.array([r[f"{part}_{name}"] for r in rows], dtype=float) for part in ("fitted", "held_out"))
        ends = np.concatenate([x, y, [target] if name == key and target is not None else []])
        low, high = (float(ends.min()), float(ends.max())) if ends.size else (0.0, 1.0)
        pad = max(0.06 * (high - low), 0.004)
        axes.plot([low - pad, high + pad], [low - pad, high + pad], color=MUTED, linewidth=0.9, zorder=1)
        for mask, color, marker, text in (
            (~broken, BLUE, "o", "reaches the target" if target is not None else "head"),
            (broken, RED, "v", "below the target"),
        ):
            if mask.any():
                axes.scatter(
                    x[mask], y[mask], s=30, color=color, marker=marker, edgecolor="white", linewidth=0.5, label=text
                )
        if not rows:
            axes.text(0.04, 0.9, "every head runs dense", transform=axes.transAxes, color=INK, size=TEXT)
        if name == key and target is not None:
            axes.axhline(target, color=INK, linewidth=0.9, linestyle=":", zorder=1)
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(low - pad, high + pad)
        label(axes, f"{words}, fitting prompts (share)", f"{words}, held-out prompts (share)")
        tidy(axes)
    handles = [*panels[0].get_legend_handles_labels()[0]]
    handles.append(Line2D([], [], color=MUTED, linewidth=0.9, label="equal on both"))
    if target is not None:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=":", label=f"target {target:g}"))
    legend_below(figure, columns=4, handles=handles)
    _name_worst(panels[0], rows, key)
    return figure


def recall_density(report: Report) -> Figure:
    """Recall against total density: per-head thetas against one theta for all, mean and worst head."""
    part = "held_out" if report["held_out"] else "fitted"
    found = report["against_one_theta"]
    where = "held-out" if report["held_out"] else "fitting"
    figure = new_figure(
        12.2,
        6.0,
        "Per-head thetas against one theta for all heads",
        _setting(report, part == "held_out"),
        f"on the {where} prompts; further up and left is better",
    )
    panels = figure.subplots(1, 2)
    lines = _lines(found, part)
    for axes, key, title in (
        (panels[0], "value", "mean over heads"),
        (panels[1], "value_worst_head", "worst head"),
    ):
        densities, missed = [], []
        for name, rows, look in lines:
            x = np.array([r["density"] for r in rows])
            y = np.maximum(1 - np.array([r[key] for r in rows]), LEAST_MISSED)
            order = np.argsort(x, kind="stable")
            axes.plot(x[order], y[order], label=name, **look)
            densities.append(x)
            missed.append(y)
        own = found["at_choice"][0][part]
        axes.scatter(
            [own["density"]],
            [max(1 - own[key], LEAST_MISSED)],
            s=110,
            marker="*",
            color=INK,
            edgecolor="white",
            linewidth=0.6,
            zorder=9,
            label="anchors.json",
        )
        _recall_axis(axes, np.concatenate(missed))
        _density_axis(axes, np.concatenate(densities))
        label(
            axes, "density, mean over heads (log)", f"{report['settings']['statistic']} recall (log of what is missed)"
        )
        panel_title(axes, title)
        tidy(axes)
    legend_below(figure, columns=4, handles=panels[0].get_legend_handles_labels()[0])
    return figure


def length_matrix(report: Report) -> Figure:
    """Thetas fitted at one length, used at another: the statistic, the density, the share of heads that miss."""
    cells = report["lengths"]
    fits, at = sorted({c["fit_tokens"] for c in cells}), sorted({c["tokens"] for c in cells})
    statistic = report["settings"]["statistic"]
    maps: list[tuple[str, str, Colormap]] = [
        ("value", f"{statistic} recall, mean over heads", matplotlib.colormaps["cividis"]),
        ("density", "density", matplotlib.colormaps["viridis"]),
    ]
    if report["settings"]["target"] is not None:
        maps.append(("heads_missed_share", "share of heads below the target", MISSED))
    figure = new_figure(
        max((0.85 * len(at) + 1.6) * len(maps), 9.0),
        0.62 * len(fits) + 2.3,
        "Do thetas fitted at one length hold at another?",
        _setting(report),
        "on held-out prompts of that length, if any (* else on fitting ones)",
    )
    for axes, (key, title, colors) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        grid = np.full((len(fits), len(at)), math.nan)
        for c in cells:
            grid[fits.index(c["fit_tokens"]), at.index(c["tokens"])] = c[key]
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        norm = Normalize(low, max(high, low + 0.02))
        image = color_cells(grid, colors, norm, missing="white")
        paint(axes, image)
        texts: dict[tuple[int, int], str] = {}
        for c in cells:
            row, column = fits.index(c["fit_tokens"]), at.index(c["tokens"])
            texts[row, column] = cell_share(c[key]) + ("" if c["held_out"] else "*")
        write_cells(axes, image, texts, size=SMALL)
        some_ticks(axes.xaxis, [f"{n:,}" for n in at], 1)
        some_ticks(axes.yaxis, [f"{n:,}" for n in fits], 1)
        bare(axes)
        panel_title(axes, title)
        label(axes, "evaluated at (tokens)", "fitted at (tokens)")
    return figure


# ----------------------------------------------------------------------------------------------------------------


def _nats(value: float) -> str:
    return "" if math.isnan(value) else theta_text(value)


def _name_worst(axes: Axes, rows: Sequence[Report], key: str, most: int = 4) -> None:
    """Layer and head beside the points that fall furthest below the target, where there is room."""
    short = sorted((r for r in rows if r["shortfall"]), key=lambda r: -r["shortfall"])[:most]
    if not short:
        return
    notes = Notes(axes, [(r[f"fitted_{key}"], r[f"held_out_{key}"]) for r in rows])
    for r in short:
        notes.write((r[f"fitted_{key}"], r[f"held_out_{key}"]), f"{r['layer']}:{r['head']}", color=MUTED)


def _lines(found: Report, part: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Name, points and look of every line of `recall_density`."""

    def of(method: str, group: str | None = None) -> list[Any]:
        rows = [r for b in found["budgets"] for r in b["rows"] if r["method"] == method]
        return [r[part] for r in rows if group is None or r["group"] == group]

    lines: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("per head, equal slope", of("equal slope"), {"color": BLUE, "linewidth": 2.4, "zorder": 6}),
        (
            "per head, each at the same recall",
            [r[part] for r in found["targets"]],
            {"color": GREEN, "linewidth": 2.0, "zorder": 5},
        ),
        (
            "one theta, groups of equal slope",
            of("one theta, same groups"),
            {"color": KINDS[1], "linewidth": 2.0, "zorder": 4},
        ),
    ]
    groups = dict.fromkeys(r["group"] for b in found["budgets"] for r in b["rows"] if "group" in r)
    for i, group in enumerate(groups):
        look = {
            "color": GROUPS[i % len(GROUPS)],
            "linewidth": 1.4,
            "linestyle": GROUP_DASHES[i % len(GROUP_DASHES)],
            "zorder": 5,  # over the line of mixed groups, with which one of them may coincide
        }
        lines.append((f"one theta, all {group}", of("one theta, one group", group), look))
    return [line for line in lines if line[1]]


def _recall_axis(axes: Axes, missed: np.ndarray) -> None:
    """Recall upwards, even in the log of what is missed."""
    axes.set_yscale("log")
    axes.set_ylim(min(float(missed.max()) * 1.15, 1.0), max(float(missed.min()) * 0.8, LEAST_MISSED))
    axes.yaxis.set_major_locator(FixedLocator([1 - r for r in RECALLS]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(FixedLocator([]))


def _density_axis(axes: Axes, density: np.ndarray) -> None:
    axes.set_xscale("log")
    axes.set_xlim(float(density.min()) * 0.93, 1.0)
    axes.xaxis.set_major_locator(FixedLocator(list(DENSITIES)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.grid(True, color=FAINT, linewidth=0.6)
