"""Diagnoses the heads of an analysis beside it, from the sums that it makes anyway.

What comes out are the rows of whole layers, the same bytes as `heads` would find: it takes them as they are and
measures only the layers that are not among them. By which theta the heads are diagnosed is known when all of them are
measured, so rows are made for each that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from anchorscope.dumps import Entry
from anchorscope.heads.diagnostics import HeadDiagnostics
from anchorscope.heads.layer import Rule, Sought, diagnose_batch, stripes_of
from anchorscope.heads.request import HeadsPlan
from anchorscope.heads.rows import layer_rows
from anchorscope.heads.stripes import HeadStripes

MOST_THETAS = 4  # with more, measuring again by the right one is quicker than comparing stripes by all


class Beside:
    """Collects the diagnostics of one layer after another; rows are made in a thread, while the next is measured.

    Args:
        plan: what the diagnosis is asked for, whatever its theta.
        thetas: distinct, nats.
    """

    def __init__(self, plan: HeadsPlan, thetas: Sequence[float]) -> None:
        self.plan, self.thetas = plan, thetas
        self._rows: dict[tuple[float, str], Future[list[dict[str, Any]]]] = {}
        self._pool: ThreadPoolExecutor | None = None  # made when it is needed: a command may be sent to a process
        self._units = {unit.entry: unit for unit in plan.units}
        self._last: tuple[Entry | None, dict[float, dict[int, HeadStripes]]] = (None, {})

    @classmethod
    def of(cls, plan: HeadsPlan, thetas: Sequence[float]) -> Beside | None:
        """Such a diagnosis by each of some thetas, which may repeat; None where it would not pay."""
        distinct = sorted(set(thetas))
        return cls(plan, distinct) if len(distinct) <= MOST_THETAS else None

    def layer(self, entry: Entry, query_heads: Sequence[int]) -> LayerBeside:
        """Begin a layer; `query_heads` are the heads that its rows of Q belong to."""
        rule = Rule(entry.scale, entry.window, entry.softcap, self.plan.params, self.thetas[0])
        return LayerBeside(rule, self.thetas, query_heads)

    def finish(self, entry: Entry, layer: LayerBeside) -> None:
        """End a layer: make its rows, if nothing of it is missing."""
        before, previous = self._last
        self._last = entry, layer.selections
        unit = self._units.get(entry)
        if unit is None or unit.siblings or not set(unit.heads) <= set(layer.found):
            return
        if unit.previous is None:
            previous = {theta: {} for theta in self.thetas}
        elif unit.previous != before or not set(unit.heads) & set(before.query_heads) <= set(previous[self.thetas[0]]):
            return
        self._pool = self._pool or ThreadPoolExecutor(1)
        for theta in self.thetas:
            arguments = unit, layer.found, layer.selections[theta], previous[theta]
            self._rows[theta, unit.name] = self._pool.submit(layer_rows, *arguments)

    def rows(self, theta: float) -> dict[str, list[dict[str, Any]]]:
        """The rows by a theta of every layer that is whole, by the name of its unit."""
        return {name: rows.result() for (by, name), rows in self._rows.items() if by == theta}


class LayerBeside:
    """Collects what is found of the heads of one layer, batch after batch."""

    def __init__(self, rule: Rule, thetas: Sequence[float], query_heads: Sequence[int]) -> None:
        self.found: dict[int, HeadDiagnostics] = {}
        self.selections: dict[float, dict[int, HeadStripes]] = {theta: {} for theta in thetas}
        self._rule, self._heads = rule, query_heads

    def __call__(self, sums: Sought) -> None:
        """Add a batch."""
        heads = [self._heads[row] for row in sums.rows]
        for head, (_, diagnostics, _) in zip(heads, diagnose_batch(sums, self._rule), strict=True):
            assert diagnostics is not None
            self.found[head] = diagnostics
        for theta, selections in self.selections.items():
            selections.update(zip(heads, stripes_of(sums.margin, self._rule._replace(theta=theta)), strict=True))
