"""What `heads` is asked for, and what that will take: checked before the first head is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anchorscope.devices import resolve_backend_name, resolve_devices
from anchorscope.dumps import Entry
from anchorscope.errors import InputError
from anchorscope.heads import diagnostics
from anchorscope.heads.layer import layer_bytes
from anchorscope.methods.head import chunk_rows
from anchorscope.params import AnchorParams
from anchorscope.runs.executors import threads_for
from anchorscope.runs.life import Plan
from anchorscope.runs.sources import Source, layer_memory
from anchorscope.runs.units import DumpRequest, HeadUnit
from anchorscope.runs.values import jsonable
from anchorscope.shown import counted
from anchorscope.vocabulary import Vocabulary

BLOCK, STEP, THETA = 128, 4, 12.0  # groups of 512: short prompts then have neighboring groups to compare
NUMBERED_HEADS = 12  # maps with more heads are drawn without numbers


@dataclass(frozen=True, kw_only=True)
class HeadsRequest(DumpRequest):
    """What to diagnose of a dump.

    Attributes:
        params: groups and anchor region of the stripes whose overlap is measured; 128 x 4 by default.
        theta: threshold of those stripes, nats.
        pieces: text of token ids (see `anchorscope.tokens`) in place of those that the dump holds.
    """

    params: AnchorParams | None = None
    theta: float = THETA
    pieces: Vocabulary | Sequence[str] | None = None

    def plan(self) -> HeadsPlan:
        """Check the request and say what it will take.

        Raises:
            InputError: an unknown layer, head or prompt, a theta that is NaN.
            DumpError: the dump is missing or damaged.
            MissingBackendError: the device is absent.
        """
        if math.isnan(self.theta):
            raise InputError("theta must be a number of nats (inf and -inf are legal), not NaN")
        params = self.params or AnchorParams(BLOCK, STEP)
        devices = resolve_devices(self.device, self.devices)
        where = devices[0]
        source, heads = self.choose()
        units = _layers(source, heads)
        settings: dict[str, Any] = {
            "block": params.block,
            "step": params.step,
            "init": params.init_tokens,
            "lookback": params.lookback_tokens,
            "theta": jsonable(float(self.theta)),
            "prompts": list(dict.fromkeys(x.entry.prompt for x in units)),
            "layers": sorted({x.entry.layer for x in units}),
            "heads": sorted({h for x in units for h in x.heads}),
            "device": where.type,
        }
        largest = max(heads, key=lambda u: u.entry.tokens * u.entry.head_dim).entry
        each = _workspace_bytes(largest.tokens, largest.head_dim, params, chunk_rows(where, largest.tokens))
        at_once = max((x.jobs for x in units), key=len)
        kept = 2 * len(at_once) * params.groups(largest.tokens) * (largest.tokens // 8 + 16)
        workers = threads_for(at_once, each) if where.type == "cpu" else 1
        if where.type == "cuda" and resolve_backend_name("auto", where) == "triton":
            each = max(each, layer_bytes(largest.tokens, largest.head_dim, params, len(at_once)))
        return HeadsPlan(
            request=self,
            units=units,
            identity={"dump": source.identity, "settings": settings, "parts": [x.name for x in units]},
            source=source,
            device=where,
            devices=devices if len(devices) > 1 else (),
            workers=workers,
            memory=workers * each + kept + layer_memory(source, [x.entry for x in units], where, layers=2),
            # heads.json, parts and rows of the table, as measured; stripe tokens where there can be stripes
            disk=sum(2_900 + 2_400 * (params.groups(u.entry.tokens) > 1) for u in heads) + 3_000,
            pictures=_picture_bytes(units),
            warnings=tuple(_warnings(units, params)),
            settings=settings,
            params=params,
            theta=float(self.theta),
        )


@dataclass(frozen=True)
class LayerUnit:
    """One layer of one prompt, and what its diagnosis needs.

    Attributes:
        prompt_index: index of the prompt in the dump.
        entry: the layer.
        heads: heads to report.
        siblings: further query heads of the same kv heads, whose stripes are compared.
        previous: the captured layer before it, or None.
    """

    prompt_index: int
    entry: Entry
    heads: tuple[int, ...]
    siblings: tuple[int, ...]
    previous: Entry | None

    @property
    def stem(self) -> str:
        return f"prompt{self.prompt_index:02d}-layer{self.entry.layer:03d}"

    @property
    def name(self) -> str:
        """File name of its results."""
        return f"{self.stem}.json"

    @property
    def compared(self) -> tuple[int, ...]:
        """Heads whose stripes are compared with those of the layer before."""
        return () if self.previous is None else tuple(h for h in self.previous.query_heads if h in self.heads)

    @property
    def needs(self) -> tuple[tuple[Entry, tuple[int, ...]], ...]:
        """See `anchorscope.runs.units.HeadUnit.needs`: the layer before, then its own."""
        own = (self.entry, self.heads + self.siblings)
        return (own,) if self.previous is None or not self.compared else ((self.previous, self.compared), own)

    @property
    def jobs(self) -> tuple[HeadUnit, ...]:
        """The heads to go through, siblings included."""
        wanted = self.heads + self.siblings
        return tuple(HeadUnit(self.prompt_index, self.entry, h) for h in self.entry.query_heads if h in wanted)

    @property
    def work(self) -> int:
        """(query, key) pairs."""
        return sum(job.work for job in self.jobs)

    @property
    def label(self) -> str:
        return f"{self.entry.prompt}, layer {self.entry.layer}"


@dataclass(frozen=True, kw_only=True)
class HeadsPlan(Plan[LayerUnit]):
    """The plan of a diagnosis; `workers` are heads measured at the same time.

    Attributes:
        params, theta: of the stripes.
    """

    params: AnchorParams
    theta: float

    @property
    def layers(self) -> tuple[LayerUnit, ...]:
        """The units."""
        return self.units

    @property
    def heads(self) -> int:
        """Heads to report."""
        return sum(len(x.heads) for x in self.units)


def _layers(source: Source, jobs: Sequence[HeadUnit]) -> tuple[LayerUnit, ...]:
    """The chosen heads by layer. What a head is compared with does not depend on what else was chosen."""
    layers = []
    for entry in dict.fromkeys(j.entry for j in jobs):
        mine = [j for j in jobs if j.entry == entry]
        heads = tuple(j.head for j in mine)
        owners = {entry.kv_head(h) for h in heads}
        siblings = tuple(h for h in entry.query_heads if h not in heads and entry.kv_head(h) in owners)
        before = [e for e in source.entries if e.prompt == entry.prompt and e.layer < entry.layer]
        previous = max(before, key=lambda e: e.layer, default=None)
        layers.append(LayerUnit(mine[0].prompt_index, entry, heads, siblings, previous))
    return tuple(layers)


def _workspace_bytes(tokens: int, head_dim: int, params: AnchorParams, rows: int) -> int:
    """Working memory of one head, bytes: inputs, weights of a run of queries, block sums, margins."""
    tensors = 6 * tokens * head_dim * 4
    chunk = 5 * rows * (tokens + 2 * rows) * 4 + 20 * tokens * 8
    tiles = 3 * (tokens // diagnostics.TILE + 1) ** 2 * 4
    margins = params.groups(tokens) * tokens * 7
    return tensors + chunk + tiles + margins


def _picture_bytes(layers: Sequence[LayerUnit]) -> int:
    """What four maps per prompt take, as measured: more where every cell holds a number."""
    total = 0
    for prompt in {x.prompt_index for x in layers}:
        mine = [x for x in layers if x.prompt_index == prompt]
        cells, widest = sum(len(x.heads) for x in mine), max(len(x.heads) for x in mine)
        total += 170_000 + (4_000 * cells if widest <= NUMBERED_HEADS else 180 * cells)
    return total


def _warnings(layers: Sequence[LayerUnit], params: AnchorParams) -> list[str]:
    shortest = min(x.entry.tokens for x in layers)
    found = []
    least = diagnostics.STREAM_SINKS + diagnostics.STREAM_RECENT
    if shortest <= least:
        found.append(
            f"a prompt of {counted(shortest, 'token')} is too short to class heads; it takes more than {least}"
        )
    most = (shortest - 1) // 2  # tokens of the largest groups of which there are three
    # Group 0 has no candidates, so the first pair of neighbors with stripes is 1 and 2.
    if params.groups(shortest) < 3:
        found.append(
            f"{counted(shortest, 'token')} {'makes' if shortest == 1 else 'make'}"
            f" {counted(params.groups(shortest), 'group')} of {params.group:,}, too few to compare neighbors"
            + (f"; groups of at most {counted(most, 'token')} (--block x --step) do" if most else "")
        )
    return found
