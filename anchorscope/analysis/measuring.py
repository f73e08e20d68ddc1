"""What `analyze` measures of its heads: one at a time, or all of a layer together where that is quicker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anchorscope.analysis.accumulate import HeadShape
from anchorscope.analysis.request import AnalysisPlan
from anchorscope.heads.beside import Beside
from anchorscope.profiles import Measured
from anchorscope.runs.executors import Context
from anchorscope.runs.units import HeadUnit


class Measuring:
    """Measures the heads of a plan. Of a layer measured together, each head is handed out once.

    If a diagnosis is asked for, it is made beside, from the same sums.
    """

    def __init__(self, plan: AnalysisPlan) -> None:
        self._plan = plan
        self._found: dict[HeadUnit, Measured] = {}  # of the layer at work
        self._beside = None if plan.kinds is None else Beside.of(plan.kinds, plan.thetas)

    def head(self, unit: HeadUnit, context: Context) -> Measured:
        """What is measured of a head."""
        plan, entry = self._plan, unit.entry
        shape = HeadShape(
            entry.tokens,
            entry.head_dim,
            plan.params,
            plan.thetas,
            entry.scale,
            entry.window,
            entry.softcap,
            plan.steps,
            cancelled=context.stop.is_set,
        )
        measure_layer, found = plan.backend.layer_engine, self._found
        if measure_layer is None:
            return plan.backend.engine(*context.head(unit.head), shape)
        if unit not in found:
            layer = context.tensors
            assert layer is not None
            also = None if self._beside is None else self._beside.layer(entry, layer.query_heads)
            measured = measure_layer(layer.q, layer.k, layer.v, layer.kv_rows, shape, context.device, also)
            if self._beside is not None and also is not None:
                self._beside.finish(entry, also)
            units = [replace(unit, head=head) for head in layer.query_heads]
            self._found = found = dict(zip(units, measured, strict=True))
        return found.pop(unit)

    def rows(self, theta: float) -> dict[str, list[dict[str, Any]]]:
        """The rows of layers that are diagnosed already, by the name of their unit; theta in nats."""
        return {} if self._beside is None else self._beside.rows(theta)
