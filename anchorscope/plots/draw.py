"""Which figures an analysis gets, drawn from its saved profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from anchorscope.errors import InputError
from anchorscope.figure_theta import FigureTheta
from anchorscope.plots.analysis import layer_head_grid, recall_by_position, recall_density
from anchorscope.plots.heatmap import stripe_heatmap
from anchorscope.plots.names import file_names
from anchorscope.plots.save import save_all
from anchorscope.profiles import HeadProfile

Source = HeadProfile | Path | str


def draw_all(
    profiles: Iterable[Source],
    out: Path | str,
    *,
    heatmaps: Sequence[tuple[int, int]] | str | None = None,
    theta: FigureTheta | None = None,
    target_recall: float = 0.95,
    model: object = None,
    formats: Mapping[str, int] | None = None,
    progress: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Draw and save every figure of an analysis in the folder `out`.

    Per prompt: `PROMPT-grid`; per layer `PROMPT-layer05-recall-density` and `PROMPT-layer05-recall-by-position`; for
    the heads chosen `PROMPT-layer05-head03-heatmap`; each with the endings of its formats.

    Args:
        profiles: profiles or paths of saved ones, in any order. From paths, heat maps are read one at a time.
        out: folder, made when missing.
        heatmaps: (layer, head) pairs, "all", or None for the heads of worst, median and best recall of each prompt.
        theta: the theta to draw, one of those measured; None means the first.
        target_recall: see `layer_head_grid`.
        model: its name, or its record in a report.
        formats: dpi by format; see `anchorscope.plots.save.save_all`.
        progress: called with each file written.

    Returns:
        The files, in the order written.

    Raises:
        InputError: no profile, a heat map asked for a head that is not among them, or a theta that was not measured.
        DumpError: a saved profile is missing or damaged.
        RunFailure: a file cannot be written.
    """
    heads = [_Head(source, *_summary(source, theta)) for source in profiles]
    if not heads:
        raise InputError("no head profiles to draw")
    names = file_names([h.profile.prompt for h in heads])
    if not isinstance(heatmaps, (str, type(None))):
        there = {(h.profile.layer, h.profile.head) for h in heads}
        for layer, head in heatmaps:
            if (layer, head) not in there:
                raise InputError(f"no heat map for layer {layer}, head {head}: it was not analyzed")
    elif heatmaps not in (None, "all"):
        raise InputError(f"heatmaps must be 'all' or a list of (layer, head) pairs, not {heatmaps!r}")
    how = {"model": model, "note": theta.sentence(" over all prompts and heads") if theta and theta.of > 1 else ""}
    figures = _figures(heads, names, heatmaps, theta, target_recall, how)
    return save_all(figures, out, formats=formats, progress=progress)


class _Head(NamedTuple):
    """Where a profile comes from, and the profile without its heat map."""

    source: Source
    profile: HeadProfile

    def full(self, theta: FigureTheta | None) -> HeadProfile:
        whole = self.source if isinstance(self.source, HeadProfile) else HeadProfile.load(self.source)
        return whole if theta is None else whole.led_by(theta.theta)


def _summary(source: Source, theta: FigureTheta | None) -> tuple[HeadProfile]:
    """A profile without heat map, so that a thousand of them fit in memory."""
    slim = source.without_heat() if isinstance(source, HeadProfile) else HeadProfile.load(source, heat=False)
    return (slim if theta is None else slim.led_by(theta.theta),)


def _figures(
    heads: list[_Head],
    names: dict[str, str],
    heatmaps: Sequence[tuple[int, int]] | str | None,
    theta: FigureTheta | None,
    target_recall: float,
    how: dict[str, Any],
) -> Iterator[tuple[str, Figure]]:
    """File names and figures, one at a time; `how` has what all of them take: model and note."""
    for prompt, name in names.items():
        mine = [h for h in heads if h.profile.prompt == prompt]
        yield f"{name}-grid", layer_head_grid([h.profile for h in mine], target_recall=target_recall, **how)
        for layer in sorted({h.profile.layer for h in mine}):
            group = [h.profile for h in mine if h.profile.layer == layer]
            yield (
                f"{name}-layer{layer:02d}-recall-density",
                recall_density(group, target_recall=target_recall, **how),
            )
            yield f"{name}-layer{layer:02d}-recall-by-position", recall_by_position(group, **how)
        for h in _chosen(mine, heatmaps):
            file = f"{name}-layer{h.profile.layer:02d}-head{h.profile.head:02d}-heatmap"
            yield file, stripe_heatmap(h.full(theta), **how)


def _chosen(heads: list[_Head], heatmaps: Sequence[tuple[int, int]] | str | None) -> list[_Head]:
    """The heads whose heat map is drawn, by layer and head."""
    by_place = sorted(heads, key=lambda h: (h.profile.layer, h.profile.head))
    if heatmaps is None:
        ranked = sorted(by_place, key=lambda h: float(h.profile.recall[0]))
        wanted = {id(ranked[i]) for i in (0, len(ranked) // 2, -1)}
        return [h for h in by_place if id(h) in wanted]
    if heatmaps == "all":
        return by_place
    return [h for h in by_place if (h.profile.layer, h.profile.head) in set(heatmaps)]
