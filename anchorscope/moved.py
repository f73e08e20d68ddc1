"""Names that moved keep working for one release, with a DeprecationWarning that says where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


def moved(module: str, homes: Mapping[str, str] | Callable[[str], str | None]) -> Callable[[str], object]:
    """The `__getattr__` of a module whose names moved.

    Args:
        module: its `__name__`.
        homes: name -> the module that has it now, or `module:name` if the name changed too; or a
            function from a name to that, or to None.
    """

    look_up = homes if callable(homes) else homes.get

    def find(name: str) -> object:
        where = look_up(name)
        if where is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new_name = where.partition(":")
        place = f"{home}.{new_name}" if new_name else home
        text = f"{module}.{name} moved to {place}; the old place goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new_name or name)

    return find


def moved_modules(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Keep modules of a package importable after they moved or were split; each name that is used warns.

    Args:
        package: the package's `__name__`; it is being imported.
        homes: old module, without the package -> the modules that have its names now.
    """
    for short, places in homes.items():
        old = ModuleType(f"{package}.{short}", f"Moved to {', '.join(places)}.")
        old.__dict__["__getattr__"] = moved(old.__name__, _search(places))
        sys.modules[old.__name__] = old  # `import` looks here before it looks for a file
        setattr(sys.modules[package], short, old)


def _search(places: Sequence[str]) -> Callable[[str], str | None]:
    """A function from a name to the first of the modules that has it."""

    def home(name: str) -> str | None:
        if name.startswith("__"):
            return None  # `import` asks whether the module is a package
        return next((place for place in places if hasattr(importlib.import_module(place), name)), None)

    return home
