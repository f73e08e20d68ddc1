"""Names that moved keep working for one release, with a DeprecationWarning that says where they are now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping


def moved(module: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a module whose names moved.

    Args:
        module: its `__name__`.
        homes: name -> the module that has it now, or `module:name` if the name changed too.
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new_name = homes[name].partition(":")
        place = f"{home}.{new_name}" if new_name else home
        text = f"{module}.{name} moved to {place}; the old place goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new_name or name)

    return find
