"""What `compare` is asked for, and what that will take: checked before the first score is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.compare.score import BATCH_BYTES, LAST_ROWS
from anchorscope.devices import resolve_devices
from anchorscope.errors import InputError
from anchorscope.methods import Contender, line_up
from anchorscope.methods.head import chunk_rows
from anchorscope.runs.executors import threads_for
from anchorscope.runs.life import Plan
from anchorscope.runs.request import check_target
from anchorscope.runs.sources import layer_memory
from anchorscope.runs.units import DumpRequest, HeadUnit, chosen_settings
from anchorscope.runs.values import jsonable
from anchorscope.shown import counted


@dataclass(frozen=True, kw_only=True)
class CompareRequest(DumpRequest):
    """Which methods to score on which heads of a dump.

    Attributes:
        lineup: methods and sweeps, see `anchorscope.methods.line_up`; None means all. Default sweeps go on until
            everything is kept of the longest prompt.
        target_recall: recall that figures and `best` are about.
    """

    lineup: Sequence[Contender] | None = None
    target_recall: float = 0.95

    def plan(self) -> ComparePlan:
        """Check the request and say what it will take.

        Raises:
            InputError: an unknown layer, head or prompt, a target outside (0, 1], an empty or ambiguous line-up.
            DumpError: the dump is missing or damaged.
            MissingBackendError: the device is absent.
        """
        lineup = line_up() if self.lineup is None else tuple(self.lineup)
        if not lineup:
            raise InputError("name at least one method to compare")
        labels = [c.label for c in lineup]
        if len(set(labels)) < len(labels):
            raise InputError("two methods of the line-up have the same label; give each its own")
        check_target(self.target_recall)
        devices = resolve_devices(self.device, self.devices)
        where = devices[0]
        source, units = self.choose()
        longest = max(u.entry.tokens for u in units)
        lineup = tuple(c.at_length(longest) for c in lineup)
        settings: dict[str, Any] = {
            "methods": [_described(c, longest) for c in lineup],
            "target_recall": self.target_recall,
            "last_rows": LAST_ROWS,
            **chosen_settings(units),
            "device": where.type,
        }
        largest = max(units, key=lambda u: u.entry.tokens * u.entry.head_dim).entry
        selections = sum(len(c.sweep) for c in lineup)
        each = _workspace_bytes(largest.tokens, largest.head_dim, selections, chunk_rows(where, largest.tokens))
        workers = threads_for(units, each) if where.type == "cpu" else 1
        return ComparePlan(
            request=self,
            units=units,
            identity={"dump": source.identity, "settings": settings, "scores": [f"{u.stem}.json" for u in units]},
            source=source,
            device=where,
            devices=devices if len(devices) > 1 else (),
            workers=workers,
            memory=workers * each + layer_memory(source, [u.entry for u in units], where),
            disk=len(units) * (selections * 250 + 200) + 20_000,  # scores and rows of methods.csv, as measured
            pictures=_picture_bytes(units),
            warnings=tuple(_warnings(units)),
            settings=settings,
            lineup=lineup,
            target_recall=self.target_recall,
        )


@dataclass(frozen=True, kw_only=True)
class ComparePlan(Plan[HeadUnit]):
    """The plan of a comparison.

    Attributes:
        lineup: the methods, as they appear in tables.
        target_recall: of the request.
    """

    lineup: tuple[Contender, ...]
    target_recall: float


def _described(contender: Contender, longest: int) -> dict[str, Any]:
    """A method and its sweep, as settings hold them; `longest` is the longest prompt, in tokens."""
    method = contender.method
    return {
        "label": contender.label,
        "method": method.name,
        "settings": {
            key: jsonable(float(value)) if isinstance(value, float) else value
            for key, value in method.settings.items()
            if key != method.parameter
        },
        "parameter": method.parameter,
        "values": [jsonable(float(value)) for value in contender.sweep],
        "end": contender.end(longest),
        "never_dense": method.never_dense or None,
        "granularity": method.granularity,
        "oracle": method.oracle,
        "source": method.source,
    }


def _workspace_bytes(tokens: int, head_dim: int, selections: int, rows: int) -> int:
    """Working memory of one head, bytes: inputs, scores and masks of a run of queries, kept shares, selections."""
    tensors = 10 * tokens * head_dim * 4
    chunk = 6 * rows * tokens * 4
    shares = 3 * selections * tokens * 4
    margins = 4 * math.ceil(tokens / 256) * tokens * 4
    # About what the sweeps of all methods hold, in two batches at most.
    held = min(2 * BATCH_BYTES, selections * tokens * (tokens // 400 + 2))
    return tensors + chunk + shares + margins + held


def _picture_bytes(units: Sequence[HeadUnit]) -> int:
    """What the figures take, as measured: four of all heads, and one per prompt and layer with a panel per head."""
    heads: dict[tuple[int, int], int] = {}
    for unit in units:
        key = unit.prompt_index, unit.entry.layer
        heads[key] = heads.get(key, 0) + 1
    return 230_000 + sum(40_000 + 17_000 * min(n, 12) for n in heads.values())


def _warnings(units: Sequence[HeadUnit]) -> list[str]:
    short = sorted({u.entry.tokens for u in units if u.entry.tokens < 4096})
    if not short:
        return []
    return [
        f"{counted(short[0], 'token')} is short for these methods: many are dense there at their authors'"
        f" settings, with least"
        " budgets of 1,024 tokens and more"
    ]
