"""Which of several thetas figures, tables and the page show: the first that keeps enough on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.errors import InputError
from anchorscope.shown import exact_theta

ASKED, REACHES, FALLS_SHORT = "asked", "reaches", "falls short"  # why a theta is shown


@dataclass(frozen=True)
class FigureTheta:
    """The theta that figures show, and why.

    Attributes:
        theta: nats.
        index: its place among the thetas as they were asked for (the first, if it was asked for twice).
        why: "asked": the user named it, or only one was measured. "reaches": it is the smallest finite theta at which
            the mean recall over prompts and heads reaches the target. "falls short": none does, so it is the one of
            most mean recall.
        of: how many different thetas were measured.
        target_recall: the recall to reach.
    """

    theta: float
    index: int
    why: str
    of: int
    target_recall: float

    def sentence(self, over: str = "") -> str:
        """The theta and why it is shown: "theta 9.5, the first of 41 to reach mean recall 0.95".

        Args:
            over: what the mean is over, in words to append, for a figure that shows other means.
        """
        text = f"theta {exact_theta(self.theta)}"
        if self.why == REACHES:
            return f"{text}, the first of {self.of} to reach mean recall {self.target_recall:g}{over}"
        if self.why == FALLS_SHORT:
            return f"{text} of {self.of}: no finite one reaches mean recall {self.target_recall:g}{over}"
        return f"{text}, one of {self.of}" if self.of > 1 else text

    def as_json(self) -> dict[str, Any]:
        """The object `figure_theta` of report.json."""
        theta = self.theta if math.isfinite(self.theta) else exact_theta(self.theta)
        return {"theta": theta, "why": self.why}


def choose_figure_theta(
    thetas: Sequence[float], recalls: Sequence[float], target: float, asked: float | None = None
) -> FigureTheta:
    """The theta that figures show; the order of `thetas` does not matter.

    It is the smallest whose mean recall reaches the target. An infinite one is taken only where no finite one was
    measured: +inf is dense attention, whose pictures show nothing. Where none reaches the target, it is the one of
    most recall, the smallest such.

    Args:
        thetas: those measured, nats; at least one.
        recalls: the mean recall over prompts and heads at each.
        target: the recall to reach.
        asked: the theta that the user named, if any.

    Raises:
        InputError: `asked` is not among `thetas`.
    """
    of = len(set(thetas))
    if asked is not None:
        return FigureTheta(float(asked), find_theta(thetas, asked), ASKED, of, target)
    finite = [t for t in sorted(range(len(thetas)), key=lambda t: thetas[t]) if math.isfinite(thetas[t])]
    by_size = finite or sorted(range(len(thetas)), key=lambda t: thetas[t])
    reaching = [t for t in by_size if recalls[t] >= target]
    index = reaching[0] if reaching else max(by_size, key=lambda t: recalls[t])
    why = ASKED if of == 1 else REACHES if reaching else FALLS_SHORT
    return FigureTheta(float(thetas[index]), index, why, of, target)


def find_theta(thetas: Sequence[float], asked: float, name: str = "the theta of the figures") -> int:
    """The place of a theta among those measured.

    Raises:
        InputError: it is not there; the message names the nearest, or all where they are few.
    """
    known = sorted({float(t) for t in thetas})
    if asked in known:
        return [float(t) for t in thetas].index(asked)
    if len(known) <= 6:
        choice = "there is only " if len(known) == 1 else "there are "
        choice += ", ".join(map(exact_theta, known))
    else:
        nearest = sorted(known, key=lambda t: (abs(t - asked) if math.isfinite(t) else math.inf, -t))
        near = exact_theta(known[0] if asked == -math.inf else known[-1] if asked == math.inf else nearest[0])
        choice = f"the nearest of the {len(known)} from {exact_theta(known[0])} to {exact_theta(known[-1])} is {near}"
    said = "nan" if math.isnan(asked) else exact_theta(asked)
    raise InputError(f"{name} must be one of those measured, not {said}; {choice}")


def saved_figure_theta(report: dict[str, Any]) -> FigureTheta:
    """The theta that a report.json names; of an earlier version, which names none, the first that was asked for."""
    thetas = [float(t) for t in report["settings"]["theta"]]
    target = float(report["settings"]["target_recall"])
    saved = report.get("figure_theta")
    if not isinstance(saved, dict) or saved.get("why") not in (ASKED, REACHES, FALLS_SHORT):
        return FigureTheta(thetas[0], 0, ASKED, len(set(thetas)), target)
    theta = float(saved["theta"])
    return FigureTheta(theta, find_theta(thetas, theta), saved["why"], len(set(thetas)), target)
