"""Sparse attention methods as selection rules: one dataclass per file, one verb, one compact result (docs/methods.md).

A method says *which* pairs it keeps; `anchorscope.compare` scores all of them with one engine. Others plug in through
the entry point group `anchorscope.methods` (docs/adding-a-method.md).
"""

from __future__ import annotations

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.registry import METHODS, Contender, find_method, known_methods, line_up
from anchorscope.methods.selection import (
    BlockDiagonals,
    Blocks,
    Buckets,
    Columns,
    Diagonals,
    Selection,
    Sinks,
    Threshold,
    Window,
)

__all__ = [
    "METHODS",
    "BlockDiagonals",
    "Blocks",
    "Buckets",
    "Columns",
    "Contender",
    "Diagonals",
    "Head",
    "Method",
    "Selection",
    "Sinks",
    "Threshold",
    "Window",
    "find_method",
    "known_methods",
    "line_up",
    "setting",
]
