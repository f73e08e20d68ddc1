"""What the page shows of a folder of `compare`: measured points of other methods, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anchorscope.report.pack import pack_floats, shorten
from anchorscope.report.read import Kind, Table


def pack_methods(tables: Sequence[Table], prompt: str) -> dict[str, Any] | None:
    """Measured points of other methods by head: density and recall, and the settings behind them."""
    labels: list[str] = []
    oracles: set[str] = set()
    heads: dict[str, dict[int, list[list[float]]]] = {}
    for table in tables:
        listed = (table.about.get("settings") or {}).get("methods") or []
        oracles |= {m["label"] for m in listed if isinstance(m, dict) and m.get("oracle") and "label" in m}
        for row in table.of_prompt(prompt):
            if row["method"] not in labels:
                labels.append(row["method"])
            point = [table.share(row, name) for name in ("density", "recall")]
            own = heads.setdefault(table.head_key(row), {})
            own.setdefault(labels.index(row["method"]), []).append(point)
    if not heads:
        return None
    points, index = [], {}
    for key, own in heads.items():
        index[key] = [[m, len(found)] for m, found in own.items()]
        points += [sorted(found) for found in own.values()]
    return {
        "labels": labels,
        "oracles": [label in oracles for label in labels],
        "heads": index,
        "points": pack_floats(shorten(np.array([x for found in points for x in found]))),
    }


KIND = Kind(
    name="methods",
    command="compare",
    what="comparison",
    table="methods.csv",
    report="compare.json",
    state="anchorscope-compare-run",
    needed=("method", "recall", "density"),
    about={"settings": ({"methods": ([{"label": str, "oracle": (bool, ...)}], ...)}, None, ...)},
    pack=pack_methods,
)
