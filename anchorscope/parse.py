"""Small parsers for what users type: index lists, theta lists. Errors are sentences that name the option."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from anchorscope.errors import InputError

MAX_THETAS = 1000


def parse_thetas(text: str, option: str = "--theta") -> tuple[float, ...]:
    """Thetas in nats from a comma list of numbers and inclusive ranges `start:stop:step`; `inf` and `-inf` are legal.

    >>> parse_thetas("6,8,10"), parse_thetas("0:1:0.5"), parse_thetas("-inf,12")
    ((6.0, 8.0, 10.0), (0.0, 0.5, 1.0), (-inf, 12.0))

    Raises:
        InputError: not a number, NaN, empty, a range that runs backwards or holds infinities, over 1000 thetas.
    """
    thetas: list[float] = []
    for part in text.split(","):
        item = part.strip()
        if not item:
            raise InputError(f"{option} {text!r} has an empty element; write numbers separated by commas, like 6,8,10")
        if ":" not in item:
            thetas.append(_theta(item, option))
            continue
        bounds = [_theta(x, option) for x in item.split(":")]
        if len(bounds) != 3 or not all(map(math.isfinite, bounds)):
            raise InputError(f"{option} range {item!r} must be start:stop:step with finite numbers, like 0:20:0.5")
        start, stop, step = bounds
        if step == 0:
            raise InputError(f"{option} range {item!r} has step 0; write it as low:high:positive-step")
        if step < 0 or stop < start:
            raise InputError(f"{option} range {item!r} runs backwards; write it as low:high:positive-step")
        # Multiply, do not add up: 0:20:0.1 must end at 20 and hit 12 exactly.
        count = math.floor((stop - start) / step + 1e-9) + 1
        if count > MAX_THETAS:
            raise InputError(f"{option} range {item!r} holds {count} thetas; at most {MAX_THETAS} are allowed")
        thetas.extend(round(start + i * step, 12) for i in range(count))
    if len(thetas) > MAX_THETAS:
        raise InputError(f"{option} lists {len(thetas)} thetas; at most {MAX_THETAS} are allowed")
    return tuple(thetas)


def _theta(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise InputError(f"{option}: {text.strip()!r} is not a number of nats (use numbers like 12, or inf, -inf)")
    return value


def parse_indices(text: str, option: str, available: Sequence[int]) -> tuple[int, ...]:
    """Indices from `all` or a comma list of numbers and inclusive ranges (`0,5,10-15`), ascending, without repetition.

    Args:
        text: what the user wrote.
        option: the option's name, for errors.
        available: the indices that exist.

    Raises:
        InputError: malformed, a range that runs backwards, or an index that does not exist.
    """
    known = sorted(set(available))
    if text.strip() == "all":
        return tuple(known)
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if match is None:
            raise InputError(f"{option} {text!r} is malformed; write numbers and ranges like 0,5,10-15, or all")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"{option} range {part.strip()!r} runs backwards; write it as low-high")
        missing = [i for i in (first, last) if i not in known]
        if missing:
            raise InputError(f"{option}: {missing[0]} does not exist; there are {describe_indices(known)}")
        chosen.update(i for i in known if first <= i <= last)
    return tuple(sorted(chosen))


def describe_indices(indices: Sequence[int]) -> str:
    """Indices in the notation `parse_indices` reads: [0, 1, 2, 7] -> '0-2,7'."""
    runs: list[list[int]] = []
    for i in sorted(set(indices)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
