"""Units of work: what is measured in one go and saved as one part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Protocol

from anchorscope.devices import resolve_devices
from anchorscope.dumps import Entry
from anchorscope.errors import InputError
from anchorscope.params import visible_pairs
from anchorscope.parse import describe_indices
from anchorscope.profiles import profile_filename
from anchorscope.runs.sources import DEVICES, InFlight, Source, called, open_source, refuse_layers


class Unit(Protocol):
    """One unit of work.

    Attributes:
        stem: name of its part, without the suffix.
        work: how long it takes, in any measure that the units of a run share.
        label: what it is, in words.
    """

    @property
    def stem(self) -> str: ...
    @property
    def work(self) -> int: ...
    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class HeadUnit:
    """One query head of one layer and prompt."""

    prompt_index: int
    entry: Entry
    head: int

    @property
    def needs(self) -> tuple[tuple[Entry, tuple[int, ...]], ...]:
        """The layers whose tensors it needs, with their query heads; it is measured when it has seen the last one."""
        return ((self.entry, (self.head,)),)

    @property
    def name(self) -> str:
        """File name of its profile."""
        return profile_filename(self.prompt_index, self.entry.layer, self.head)

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".safetensors")

    @property
    def work(self) -> int:
        """(query, key) pairs."""
        return visible_pairs(self.entry.tokens, self.entry.window)

    @property
    def label(self) -> str:
        return f"{self.entry.prompt}, layer {self.entry.layer}"


@dataclass(frozen=True)
class DumpRequest:
    """A request about heads of a dump, or of a model that runs; every command that reads one asks for more.

    Attributes:
        dump: a dump folder, an open dump, or a `anchorscope.ModelSource`, whose layers are measured as it runs.
        layers, heads: original indices; None means all that there are.
        prompts: prompt names; None means all.
        device: "auto", "cpu", "cuda" or "cuda:i".
        devices: GPUs to share the work, instead of `device`: "all", or their names; see `devices.resolve_devices`.
    """

    dump: Source | Path | str
    _: KW_ONLY
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    device: str = "auto"
    devices: Sequence[str] | str | None = None

    def choose(self) -> tuple[Source, tuple[HeadUnit, ...]]:
        """The open source, and its heads that are asked for, by prompt, layer and head.

        Raises:
            InputError: an unknown prompt, layer or head, or nothing left.
            DumpError: the dump is missing or damaged.
        """
        source = open_source(self.dump)
        if isinstance(source, InFlight) and len(resolve_devices(self.device, self.devices)) > 1:
            raise InputError(DEVICES)
        return source, choose_heads(source, self.prompts, self.layers, self.heads)


def choose_heads(
    source: Source, prompts: Sequence[str] | None, layers: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[HeadUnit, ...]:
    """See `DumpRequest.choose`."""
    names = [p.name for p in source.prompts]
    refuse_layers(source, layers)
    for name in prompts or ():
        if name not in names:
            raise InputError(f"{called(source)} has no prompt {name!r}; it has {', '.join(names)}")
    chosen = set(names if prompts is None else prompts)
    all_layers = sorted({e.layer for e in source.entries})
    for layer in layers or ():
        if layer not in all_layers:
            raise InputError(f"{called(source)} has no layer {layer}; it has {describe_indices(all_layers)}")
    entries = [e for e in source.entries if e.prompt in chosen and (layers is None or e.layer in layers)]
    all_heads = sorted({h for e in entries for h in e.query_heads})
    for head in heads or ():
        if head not in all_heads:
            raise InputError(f"{called(source)} has no query head {head}; it has {describe_indices(all_heads)}")
    units = tuple(
        HeadUnit(names.index(e.prompt), e, h)
        for e in sorted(entries, key=lambda e: (names.index(e.prompt), e.layer))
        for h in e.query_heads
        if heads is None or h in heads
    )
    if not units:
        raise InputError("the chosen prompts, layers and heads leave nothing to analyze; widen one of them")
    return units


def chosen_settings(units: Sequence[HeadUnit]) -> dict[str, list[str] | list[int]]:
    """The prompts, layers and heads of units, as settings name them."""
    return {
        "prompts": list(dict.fromkeys(u.entry.prompt for u in units)),
        "layers": sorted({u.entry.layer for u in units}),
        "heads": sorted({u.head for u in units}),
    }


def prompt_facts(source: Source, names: Sequence[str]) -> list[dict[str, str | int]]:
    """Name and length of the prompts that are used, as reports list them."""
    return [{"name": p.name, "tokens": p.tokens} for p in source.prompts if p.name in names]
