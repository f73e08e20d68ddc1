"""Former home of `dense_lse`, `column_mass`, `margins` and `sweep`, which have a file each now."""

from __future__ import annotations

import importlib
import warnings

_MOVED = {
    "dense_lse": "dense_lse",
    "column_mass": "column_mass",
    "margins": "margins",
    "sweep": "sweep",
    "bin_columns": "sweep",
    "Sweep": "sweep",
}


def __getattr__(name: str) -> object:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"{__package__}.{_MOVED[name]}"
    warnings.warn(f"{__name__}.{name} moved to {home}; the old place goes with the next release", DeprecationWarning, 2)
    return getattr(importlib.import_module(home), name)
