"""The oldest packages that pyproject.toml admits, as pip constraints: `python tests/helpers/oldest.py`.

Every `name>=minimum` of the dependencies and of the extras that users install becomes `name==minimum`. torch is left
out: which build it is depends on the machine, so `make` takes it from TORCH.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip carries one for Pythons without
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
EXTRAS = ("hf", "report", "ray")
MINIMUM = re.compile(r"([\w.-]+)>=([\w.]+)\s*(;.*)?")


def minima() -> dict[str, str]:
    """The declared minimum of every package that users install, torch included.

    Raises:
        ValueError: a requirement is not of the form name>=minimum.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found = {}
    for requirement in [*project["dependencies"], *(x for e in EXTRAS for x in project["optional-dependencies"][e])]:
        match = MINIMUM.fullmatch(requirement)
        if match is None:
            raise ValueError(f"{requirement}: every requirement declares a minimum, as name>=version")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in minima().items() if name != "torch"))
