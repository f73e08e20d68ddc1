"""A request as JSON and back, so that a run can be finished by another process on another day.

Nothing is constructed but what the caller lists by name: a file of anybody's makes no other object.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchorscope.dumps import Dump
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams

Kinds = Mapping[str, type]  # dataclasses by the name that JSON has for them
GROUPS: Kinds = {"groups": AnchorParams}


def to_json(value: Any, kinds: Kinds) -> Any:
    """JSON of a value: None, numbers, texts, paths (made absolute), dumps, lists, tables, and dataclasses of `kinds`.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, Dump):
        value = value.path
    if isinstance(value, Path):
        return {"path": str(value.absolute())}
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_json(item, kinds) for item in value]
    for name, kind in kinds.items():
        if type(value) is kind:
            made = {f.name: to_json(getattr(value, f.name), kinds) for f in dataclasses.fields(kind) if f.init}
            return {"kind": name, "fields": made}
    raise InputError(f"a run with {type(value).__name__} in its request cannot be done in shards: give names and paths")


def from_json(value: Any, kinds: Kinds) -> Any:
    """What `to_json` made JSON of; lists come back as tuples.

    Raises:
        InputError: it did not.
    """
    if isinstance(value, list):
        return tuple(from_json(item, kinds) for item in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"path"} and isinstance(value["path"], str):
        return Path(value["path"])
    if set(value) == {"number"} and value["number"] in ("inf", "-inf", "nan"):
        return float(value["number"])
    kind = kinds.get(value["kind"]) if isinstance(value.get("kind"), str) else None
    made = value.get("fields")
    if kind is None or not isinstance(made, dict):
        raise InputError("it names something unknown")
    try:
        return kind(**{name: from_json(item, kinds) for name, item in made.items()})
    except TypeError as error:
        raise InputError(f"its fields do not fit ({error})") from None
