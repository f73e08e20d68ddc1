"""Names that moved keep working for one release, with a DeprecationWarning that says where they are now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping


def moved(module: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a module whose names moved.

    Args:
        module: its `__name__`.
        homes: name -> the module that has it now.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} moved to {homes[name]}; the old place goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(homes[name]), name)

    return find
