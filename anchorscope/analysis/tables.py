"""Tables and the summary of an analysis, computed from saved profiles alone. Column names are API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorscope.names import THETA_COLUMNS
from anchorscope.profiles import HeadProfile
from anchorscope.runs.values import jsonable, number

HEADS_COLUMNS = ("prompt", "layer", "head", "kv_head", *THETA_COLUMNS)
THETAS_COLUMNS = (
    "theta",
    "heads",
    "recall_mean",
    "recall_p05_mean",
    "recall_last_mean",
    "density_mean",
    "sparsity_mean",
    "stripe_density_mean",
    "output_error_mean",
    "worst_prompt",
    "worst_layer",
    "worst_head",
    "worst_recall",
    "worst_density",
)
CURVES_COLUMNS = ("prompt", "layer", "head", "kind", "theta", "density", "recall")

CURVE_STEP = 0.25  # nats between the anchor curve's rows in curves.csv; the profile holds it finer
ORACLE_ROWS = 128


def heads_rows(profile: HeadProfile) -> list[tuple[str, ...]]:
    """Rows of heads.csv: one per theta asked for."""
    p = profile
    columns = (
        p.thetas,
        p.recall,
        p.recall_p05,
        p.recall_min,
        p.recall_last,
        p.density,
        p.sparsity,
        p.stripe_density,
        p.output_error,
        p.output_close_01,
        p.output_close_005,
    )
    key = (p.prompt, str(p.layer), str(p.head), str(p.kv_head))
    return [key + tuple(number(c[t]) for c in columns) for t in range(len(p.thetas))]


def curves_rows(profile: HeadProfile) -> list[tuple[str, ...]]:
    """Rows of curves.csv: recall against density of the anchor rule at many thetas, then of the stripe oracle."""
    p = profile
    key = (p.prompt, str(p.layer), str(p.head))
    density, recall = p.curve("anchor")
    new = np.flatnonzero(np.diff(p.curve_pairs, prepend=-1) > 0)  # rows where the selection grew
    step = p.curve_theta[new] / CURVE_STEP
    keep = new[~np.isfinite(step) | (step == np.round(step)) | (new == new[-1])]
    rows: list[tuple[str, ...]] = [
        (*key, "anchor", number(p.curve_theta[i]), number(density[i]), number(recall[i])) for i in keep
    ]
    density, recall = p.curve("oracle")
    # Even in log density: the oracle's bend is where few columns carry much mass.
    picks = np.searchsorted(density, np.geomspace(density[0], density[-1], ORACLE_ROWS))
    picks = np.unique(np.concatenate([[0], picks.clip(max=len(density) - 1), [len(density) - 1]]))
    rows += [(*key, "oracle", "", number(density[i]), number(recall[i])) for i in picks]
    return rows


@dataclass(frozen=True)
class HeadLine:
    """The numbers of one head that summaries need; a profile without its arrays."""

    prompt: str
    layer: int
    head: int
    kv_head: int
    recall: np.ndarray
    recall_p05: np.ndarray
    recall_last: np.ndarray
    density: np.ndarray
    stripe_density: np.ndarray
    output_error: np.ndarray
    theta_needed: float | None
    density_needed: float | None
    oracle_density_needed: float | None

    @classmethod
    def of(cls, profile: HeadProfile, target: float) -> HeadLine:
        """Summarize a profile; `target` is the recall asked for."""
        p = profile
        return cls(
            p.prompt,
            p.layer,
            p.head,
            p.kv_head,
            p.recall,
            p.recall_p05,
            p.recall_last,
            p.density,
            p.stripe_density,
            p.output_error,
            p.theta_at_recall(target),
            p.density_at_recall(target),
            p.density_at_recall(target, "oracle"),
        )


def _means(lines: Sequence[HeadLine], name: str) -> list[float | None]:
    """Means over heads of a number that each has for every theta; None where no head has one."""
    table = np.stack([getattr(line, name) for line in lines], 1)  # (thetas, heads)
    known = ~np.isnan(table)
    return [float(row[seen].mean()) if seen.any() else None for row, seen in zip(table, known, strict=True)]


def summarize(lines: Sequence[HeadLine], thetas: Sequence[float]) -> list[dict[str, Any]]:
    """Means over heads and the worst head, one object per theta asked for."""
    out = []
    names = ("recall", "recall_p05", "recall_last", "density", "stripe_density", "output_error")
    means = {name: _means(lines, name) for name in names}
    for t, theta in enumerate(thetas):
        worst = min(lines, key=lambda x: (x.recall[t], x.prompt, x.layer, x.head))
        density = means["density"][t]
        out.append(
            {
                "theta": jsonable(theta),
                "heads": len(lines),
                "recall_mean": means["recall"][t],
                "recall_p05_mean": means["recall_p05"][t],
                "recall_last_mean": means["recall_last"][t],
                "density_mean": density,
                "sparsity_mean": None if density is None else 1 - density,
                "stripe_density_mean": means["stripe_density"][t],
                "output_error_mean": means["output_error"][t],
                "worst": {
                    "prompt": worst.prompt,
                    "layer": worst.layer,
                    "head": worst.head,
                    "recall": float(worst.recall[t]),
                    "density": float(worst.density[t]),
                },
            }
        )
    return out


def thetas_rows(overall: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of thetas.csv: what `summarize` says of all heads, one per theta, in the order asked for."""
    rows = []
    for item in overall:
        flat = {**item, **{f"worst_{key}": value for key, value in item["worst"].items()}}
        flat["theta"] = float(item["theta"])
        rows.append(tuple(_cell(flat[name]) for name in THETAS_COLUMNS))
    return rows


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, (int, str)) else number(value)


def short_of_target(lines: Sequence[HeadLine], at: int, target: float) -> list[dict[str, Any]]:
    """Heads whose recall misses the target at a theta, worst first, with what each would need.

    Args:
        lines: the heads.
        at: the place of the theta among those asked for.
        target: the recall to reach.
    """
    missed = sorted((x for x in lines if x.recall[at] < target), key=lambda x: float(x.recall[at]))
    return [
        {
            "prompt": x.prompt,
            "layer": x.layer,
            "head": x.head,
            "recall": float(x.recall[at]),
            "density": float(x.density[at]),
            "theta_needed": jsonable(x.theta_needed),
            "density_needed": jsonable(x.density_needed),
        }
        for x in missed
    ]
