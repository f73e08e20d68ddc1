"""The best any method can do: the largest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Selection, Threshold

ORACLE_SWEEP = tuple(float(f"{10 ** (-e / 4):.3g}") for e in range(4, 25))  # 0.1 ... 1e-6, four per decade


@dataclass(frozen=True)
class OracleRow(Method):
    """Keep every pair whose exact attention weight reaches one threshold, the same for all queries of the head.

    No selection with as many pairs keeps more mass: a bound for every method at its measured points.
    """

    name: ClassVar = "oracle-row"
    parameter: ClassVar = "threshold"
    sweep: ClassVar = ORACLE_SWEEP
    sweep_end: ClassVar = 0.0
    granularity: ClassVar = "token"
    oracle: ClassVar = True
    source: ClassVar = "exact attention weights"

    threshold: float = setting(1e-3, "least attention weight kept", low=0.0, high=1.0)

    def select(self, head: Head) -> Selection:
        return Selection((Threshold(self.threshold),), identify=head.pairs)
