"""What a JSON value must look like, written as a value of the same form; the first place that does not fit is named.

    check(report, {"format": "anchorscope-report", "dump": {"identity": str}, "heads": [{"layer": int}]}, "report.json")

A type stands for a value of it (`int`: a whole number from 0 to 2^53, `float`: any number, `object`: anything), a tuple
for one of several, `None` for null, a text or number for itself, a list of one for a list of those, a dict of one type
for an object with any keys (`{str: int}`), any other dict for an object with at least these keys, `...` among several
for a key that may be absent, `Row(int, float)` for a list of exactly these.
"""

from __future__ import annotations

from typing import Any

from anchorscope.errors import InputError


class Row:
    """A list of so many elements, each of its own shape."""

    def __init__(self, *shapes: Any) -> None:
        self.shapes = shapes


NUMBER = (float, None, "inf", "-inf")  # as `jsonable` writes floats
_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number of at least 0",
    float: "a number",
    bool: "true or false",
    None: "null",
}


def check(value: Any, shape: Any, where: str, *, hint: str = "", error: type[InputError] = InputError) -> None:
    """Refuse a JSON value that does not have a shape.

    Args:
        value: as parsed by `anchorscope.files.parse_json`.
        shape: see above.
        where: what was read, for the message.
        hint: what to do about it, for the message.
        error: class of the error.

    Raises:
        InputError: and the first place that differs.
    """
    at = _misfit(value, shape, "")
    if at is not None:
        place, wanted = at
        what = f"{where}: {place.lstrip('.')} must be {wanted}" if place else f"{where} must be {wanted}"
        raise error(what + (f": {hint}" if hint else ""))


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape."""
    return _misfit(value, shape, "") is None


def _misfit(value: Any, shape: Any, place: str) -> tuple[str, str] | None:
    if isinstance(shape, tuple):
        if any(_misfit(value, s, place) is None for s in shape):
            return None
        # Of several forms the last object or list says best what is wrong within it.
        inner = [s for s in shape if isinstance(s, (dict, list)) and type(s) is type(value)]
        return _misfit(value, inner[-1], place) if inner else (place, " or ".join(map(_wanted, shape)))
    if isinstance(shape, Row):
        if not isinstance(value, list) or len(value) != len(shape.shapes):
            return place, f"a list of {len(shape.shapes)}"
        pairs = enumerate(zip(value, shape.shapes, strict=True))
        return next((m for i, (x, s) in pairs if (m := _misfit(x, s, f"{place}[{i}]"))), None)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return place, "a list"
        return next((m for i, x in enumerate(value) if (m := _misfit(x, shape[0], f"{place}[{i}]"))), None)
    if isinstance(shape, dict):
        return _object_misfit(value, shape, place)
    return None if _is(value, shape) else (place, _wanted(shape))


def _object_misfit(value: Any, shape: dict[Any, Any], place: str) -> tuple[str, str] | None:
    if not isinstance(value, dict):
        return place, "an object"
    for key, inner in shape.items():
        pairs = value.items() if key is str else ((key, value[key]),) if key in value else None
        if pairs is None:
            if isinstance(inner, tuple) and ... in inner:  # may be absent
                continue
            return f"{place}.{key}", "given"
        for name, x in pairs:
            if (found := _misfit(x, inner, f"{place}.{name}")) is not None:
                return found
    return None


def _is(value: Any, kind: Any) -> bool:
    if kind is object:
        return True
    if kind is ...:
        return False
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and (kind is float or 0 <= value < 1 << 53)
    if isinstance(kind, type):
        return isinstance(value, kind)
    return bool(value == kind and type(value) is type(kind))


def _wanted(kind: Any) -> str:
    if kind is ...:
        return "left out"
    if isinstance(kind, (dict, list)) or kind in (dict, list):
        return "an object" if isinstance(kind, dict) or kind is dict else "a list"
    return _WORDS[kind] if isinstance(kind, type) or kind is None else repr(kind)


__all__ = ["NUMBER", "Row", "check", "fits"]
