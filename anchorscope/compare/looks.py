"""How each method of a line-up is drawn in every figure of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from anchorscope.plots.style import BLUE, INK, KINDS, ORANGE

# The tool's own anchors are blue, stripe oracles yellow-orange, other oracles black; a list begins again at its end
# with another dash.
ANCHORS = (BLUE, "#00395A", "#7FA8D1")
MARKERS = "osDv^<>PX*hp"
DASHES = ("-", (0, (4, 1.5)))
ORACLES = ((0, (5, 1.5)), (0, (3, 1.5, 1, 1.5)), (0, (8, 1, 1, 1, 1, 1)), (0, (1, 1)))


class Look(NamedTuple):
    """How one method is drawn everywhere."""

    color: str
    marker: str
    dash: Any
    oracle: bool


def looks(methods: Sequence[Mapping[str, Any]]) -> dict[str, Look]:
    """A look per label; `methods` as in compare.json's settings. Oracles are dashed lines without markers."""
    out: dict[str, Look] = {}
    seen: Counter[str] = Counter()
    marks = 0
    for method in methods:
        kind = "anchor" if method["method"] == "anchor" else "plain"
        if method["oracle"]:
            kind = "stripe oracle" if method["granularity"] == "stripe" else "oracle"
        nth = seen[kind]
        seen[kind] += 1
        if method["oracle"]:
            color = ORANGE if kind == "stripe oracle" else INK
            out[method["label"]] = Look(color, "", ORACLES[nth % len(ORACLES)], True)
            continue
        colors = ANCHORS if kind == "anchor" else KINDS
        turn, place = divmod(nth, len(colors))
        out[method["label"]] = Look(colors[place], MARKERS[marks % len(MARKERS)], DASHES[turn % len(DASHES)], False)
        marks += 1
    return out
