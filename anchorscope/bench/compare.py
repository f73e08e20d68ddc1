"""Comparing two saved benches: the ratio of every time that both hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorscope.bench.output import FOLDER, REPORT
from anchorscope.bench.rows import FORMAT, FORMAT_VERSION
from anchorscope.errors import InputError
from anchorscope.files import read_json
from anchorscope.shapes import NUMBER, check
from anchorscope.shown import counted

_SAME_ROW = ("source", "n", "heads", "kv_heads", "head_dim", "window", "softcap")
_SAME_SETTINGS = ("input", "dump_sha256", "dtype", "block", "step", "init", "lookback", "seed", "period")
_MACHINE = ("type", "name")
MAX_BYTES = 1 << 26
_SCALAR = (str, float, bool, None)
_TIMING = {"median_ms": float, "p20_ms": float, "p80_ms": float}
_SHAPE = {
    "settings": {**dict.fromkeys(_SAME_SETTINGS, _SCALAR), "backend": (str, None, ...)},
    "hardware": dict.fromkeys(_MACHINE, _SCALAR),
    "versions": ({str: _SCALAR}, ...),
    "rows": [
        {
            **dict.fromkeys(_SAME_ROW, _SCALAR),
            "source": str,
            "n": int,
            "dense": [{"name": str, "timing": _TIMING}],
            "sparse": [{"theta": NUMBER[:1] + NUMBER[2:], "stages": {str: _TIMING}, "whole": _TIMING}],
        }
    ],
}


@dataclass(frozen=True)
class Ratio:
    """One time in both results.

    Attributes:
        source, n: the input and its length.
        what: "dense cudnn", "anchor", "identification theta=6", "sparse theta=6", "whole theta=6".
        old_ms, new_ms: medians.
        ratio: new / old; below 1 the new one is faster.
        beyond_spread: the p20 to p80 ranges do not overlap.
    """

    source: str
    n: int
    what: str
    old_ms: float
    new_ms: float
    ratio: float
    beyond_spread: bool


def load_result(path: str | Path) -> dict[str, Any]:
    """Read a saved bench.json (or the folder that holds it).

    Raises:
        InputError: missing, unfinished, not JSON, not a bench, or of a newer format.
    """
    file = Path(path)
    if file.is_dir():
        if FOLDER.read(file) is not None:
            FOLDER.check_finished(file)
        file = file / REPORT
    try:
        data = read_json(file, MAX_BYTES, "bench result")
    except InputError as error:
        raise InputError(f"{error}; give the bench.json of an earlier bench") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{file} is not a bench result; give the bench.json of an earlier bench")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{file} has format version {repr(version)[:40]}; this AnchorScope reads {FORMAT_VERSION}")
    check(data, _SHAPE, f"bench result {file}", hint="it is damaged; run that bench again")
    return data


def comparison(new: Mapping[str, Any], name: str, old: Mapping[str, Any]) -> dict[str, Any]:
    """The key `against` of bench.json: an older result by name, and what `compare` says of both."""
    ratios, notes = compare(new, old)
    return {"file": name, "created": old.get("created"), "notes": notes, "ratios": [vars(ratio) for ratio in ratios]}


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[Ratio], list[str]]:
    """Ratios of the times that both results hold, and notes on what cannot be compared.

    Times are matched only on equal inputs: same source, length, heads, dtype, groups, seed and period.

    Args:
        new, old: contents of bench.json.
    """
    before = dict(_times(old))
    ratios, unmatched = [], 0
    for key, time in _times(new):
        if key not in before:
            unmatched += 1
            continue
        (row, what), earlier = key, before[key]
        a, b = float(earlier["median_ms"]), float(time["median_ms"])
        apart = time["p20_ms"] > earlier["p80_ms"] or time["p80_ms"] < earlier["p20_ms"]
        source, n = dict(row)["source"], dict(row)["n"]
        ratios.append(Ratio(source, n, what, a, b, b / a if a > 0 else float("inf"), bool(apart)))
    notes = []
    machine = [", ".join(str(x["hardware"].get(key)) for key in _MACHINE) for x in (old, new)]
    if machine[0] != machine[1]:
        notes.append(f"different hardware: {machine[0]} before, {machine[1]} now")
    facts = [{**x.get("versions", {}), "back end": x["settings"].get("backend")} for x in (old, new)]  # both optional
    notes += [
        f"different {name}: {facts[0].get(name)} before, {facts[1].get(name)} now"
        for name in ("anchorscope", "torch", "triton", "back end")
        if facts[0].get(name) != facts[1].get(name)
    ]
    if unmatched:
        notes.append(
            f"{unmatched} of {counted(unmatched + len(ratios), 'time')} {'has' if unmatched == 1 else 'have'}"
            f" no counterpart in the old result"
        )
    return ratios, notes


def _key(data: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    settings = data["settings"]
    return (*((x, row[x]) for x in _SAME_ROW), *((x, settings[x]) for x in _SAME_SETTINGS))


def _times(data: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, str], dict[str, Any]]]:
    for row in data["rows"]:
        key = _key(data, row)
        named = [(f"dense {dense['name']}", dense["timing"]) for dense in row["dense"]]
        for i, sparse in enumerate(row["sparse"]):
            theta = f"theta={sparse['theta']}" if isinstance(sparse["theta"], str) else f"theta={sparse['theta']:g}"
            named += [
                (name if name == "anchor" else f"{name} {theta}", time)
                for name, time in sparse["stages"].items()
                if name != "anchor" or i == 0
            ]
            named.append((f"whole {theta}", sparse["whole"]))
        for name, time in named:
            yield (key, name), time
