"""What kind of head is this? Exact diagnostics of every head of a dump (docs/heads.md)."""

from __future__ import annotations

from anchorscope.heads.diagnostics import HeadDiagnostics, classify, diagnose_head
from anchorscope.heads.request import HeadsPlan, HeadsRequest
from anchorscope.heads.run import Diagnosis, diagnose, load_diagnosis, plan_heads
from anchorscope.heads.stripes import HeadStripes, head_stripes, overlap
from anchorscope.heads.tables import HeadRow
from anchorscope.moved import moved

__all__ = [
    "Diagnosis",
    "HeadDiagnostics",
    "HeadRow",
    "HeadStripes",
    "HeadsPlan",
    "HeadsRequest",
    "classify",
    "diagnose",
    "diagnose_head",
    "head_stripes",
    "load_diagnosis",
    "overlap",
    "plan_heads",
]

__getattr__ = moved(__name__, {"Stripes": "anchorscope.heads.stripes:HeadStripes"})
