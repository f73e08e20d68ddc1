"""What a calibration reads: dumps, and folders that `analyze` finished; one model, the same heads on every prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorscope.analysis.request import AnalysisPlan
from anchorscope.analysis.run import STATE as ANALYSIS_STATE
from anchorscope.analysis.run import iter_profiles, load_report
from anchorscope.anchors import different_in
from anchorscope.calibration.curves import HeadIndex, PromptCurve, Statistic
from anchorscope.calibration.prompts import Prompt
from anchorscope.dumps import MANIFEST, open_dump
from anchorscope.errors import DumpError, InputError
from anchorscope.params import AnchorParams
from anchorscope.parse import describe_indices, parse_indices
from anchorscope.runs.sources import InFlight, Source, name_of, refuse_layers
from anchorscope.shown import counted

DEFAULT_GROUPS = (AnchorParams(64, 8), AnchorParams(128, 4), AnchorParams(128, 16))


Measured = dict[tuple[Prompt, AnchorParams, HeadIndex], PromptCurve]


@dataclass(frozen=True)
class AnalysisUnit:
    """One analysis to make: a dump, or a running model, with one kind of group.

    Attributes:
        dump: the dump or the model.
        params: the groups.
        prompts: names of the prompts to measure.
        folder: name of the analysis' folder.
        plan: of the analysis, once that is made.
    """

    dump: Source
    params: AnchorParams
    prompts: tuple[str, ...]
    folder: str
    plan: AnalysisPlan | None = None

    @property
    def analysis(self) -> AnalysisPlan:
        """The plan, which must have been made."""
        assert self.plan is not None, "not planned yet"
        return self.plan

    @property
    def stem(self) -> str:
        return self.folder

    @property
    def work(self) -> int:
        """(query, key) pairs."""
        return sum(unit.work for unit in self.analysis.units)

    @property
    def label(self) -> str:
        return group_name(self.params)


@dataclass(frozen=True)
class Sources:
    """Everything a calibration is made from, checked.

    Attributes:
        identity: what names the sources, in the order given.
        model: the model they belong to, or None if no dump says.
        prompts: in the order given.
        heads: heads to calibrate, ascending; the same on every prompt.
        windowed: layers left out because they have a sliding window.
        groups: kinds of groups to choose from.
        measured: the curves of the finished analyses.
        runs: the analyses to make.
    """

    identity: tuple[str, ...]
    model: Mapping[str, Any] | None
    prompts: tuple[Prompt, ...]
    heads: tuple[HeadIndex, ...]
    windowed: tuple[int, ...]
    groups: tuple[AnchorParams, ...]
    measured: Measured = field(repr=False)
    runs: tuple[AnalysisUnit, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers to calibrate."""
        return tuple(sorted({layer for layer, _ in self.heads}))


def parse_groups(text: str) -> tuple[AnchorParams, ...]:
    """Kinds of groups from `block`x`step`, separated by commas; init and lookback are the block.

    >>> [(p.block, p.step) for p in parse_groups("64x8,128x16")]
    [(64, 8), (128, 16)]

    Raises:
        InputError: malformed, zero, or one of them twice.
    """
    groups = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})x(\d{1,7})\s*", item)
        if match is None:
            raise InputError(f"--groups {text!r} is malformed; write block x step without spaces, like 64x8,128x16")
        groups.append(AnchorParams(int(match[1]), int(match[2])))
    if len(set(groups)) < len(groups):
        raise InputError(f"--groups {text!r} names a kind of group twice")
    return tuple(groups)


def group_name(params: AnchorParams) -> str:
    """`64x8`, with init and lookback where they are not the block."""
    name = f"{params.block}x{params.step}"
    if (params.init_tokens, params.lookback_tokens) != (params.block, params.block):
        name += f"-init{params.init_tokens}-lookback{params.lookback_tokens}"
    return name


def listed(groups: Iterable[AnchorParams]) -> str:
    """`64x8, 128x16`."""
    return ", ".join(map(group_name, groups))


def read_sources(
    paths: Sequence[Source | Path | str],
    *,
    groups: Sequence[AnchorParams] | None = None,
    layers: Sequence[int] | str | None = None,
    statistic: Statistic = "mean",
) -> Sources:
    """Open and check everything; nothing is measured yet.

    Args:
        paths: dump folders, finished analyses and running models, in any mixture.
        groups: kinds to choose from; None means `DEFAULT_GROUPS`, or what the analyses have if a prompt has no dump.
        layers: layers to calibrate, also as the user types them; None means all.
        statistic: what will be chosen by.

    Raises:
        InputError: dumps of different models, a head that a prompt lacks, a kind of group that was not measured, a
            prompt given twice.
        DumpError: a folder that is neither, or damaged.
    """
    dumps, analyses = _open(paths)
    facts: list[tuple[Any, Any]] = [(path, dump.model) for path, dump in dumps]
    prompts = {(d.identity, p.name): _prompt(d, p.name) for _, d in dumps for p in d.prompts}
    if len(prompts) < sum(len(d.prompts) for _, d in dumps):
        raise InputError("a dump is given twice: name each one once")
    measured: Measured = {}
    windowed: set[int] = set()
    facts += [(path, _read_analysis(path, prompts, measured, windowed, statistic)) for path in analyses]
    model = _one_model(facts)

    for _, dump in dumps:
        _refuse(dump, layers)
    own = {(d.identity, e.prompt): d for _, d in dumps for e in d.entries}
    windowed |= {e.layer for _, d in dumps for e in d.entries if e.window is not None}
    covered: dict[Prompt, set[HeadIndex]] = {p: set() for p in prompts.values()}
    for prompt, _, head in measured:
        covered[prompt].add(head)
    for _, dump in dumps:
        for e in dump.entries:
            covered[prompts[dump.identity, e.prompt]] |= {(e.layer, h) for h in e.query_heads}
    chosen = _heads(covered, layers, windowed)
    kinds = _groups(groups, measured, [p for key, p in prompts.items() if key not in own])
    runs = _runs([d for _, d in dumps], prompts, kinds, measured, chosen)
    _check_measured(measured, [p for key, p in prompts.items() if key not in own], kinds, chosen)
    return Sources(
        identity=tuple(sorted({p.dump for p in prompts.values()})),
        model=model,
        prompts=tuple(prompts.values()),
        heads=chosen,
        windowed=tuple(sorted(windowed & {layer for heads in covered.values() for layer, _ in heads})),
        groups=kinds,
        measured={key: c for key, c in measured.items() if key[1] in kinds and key[2] in set(chosen)},
        runs=runs,
    )


def _open(paths: Sequence[Source | Path | str]) -> tuple[list[tuple[Any, Source]], list[Path]]:
    """Dumps, opened, and running models, both with what messages call them; and the folders of analyses."""
    if not paths:
        raise InputError("name at least one dump or finished analysis")
    dumps: list[tuple[Any, Source]] = []
    analyses: list[Path] = []
    for source in paths:
        if not isinstance(source, (str, Path)):
            dumps.append((name_of(source), source))
            continue
        path = Path(source)
        if (path / MANIFEST).exists():
            dumps.append((path, open_dump(path)))
        elif (path / ANALYSIS_STATE).exists():
            analyses.append(path)
        else:
            raise DumpError(
                f"{path} is neither a dump nor a finished analysis: give folders of `anchorscope capture` or"
                " `anchorscope analyze`"
            )
    return dumps, analyses


def read_curves(
    folder: Path, prompts: Mapping[tuple[str, str], Prompt], statistic: Statistic
) -> Iterator[tuple[tuple[Prompt, AnchorParams, HeadIndex], PromptCurve, int | None]]:
    """Every profile of an analysis: its key, its curve, its sliding window.

    Raises:
        DumpError: an unfinished analysis or a damaged profile.
    """
    grids: dict[bytes, Any] = {}
    for p in iter_profiles(folder, heat=False):
        prompt = prompts.get((p.dump_identity, p.prompt))
        if prompt is None or prompt.tokens != p.tokens:
            raise DumpError(f"{folder} holds a profile of another prompt ({p.prompt}): run analyze again")
        yield (prompt, p.params, (p.layer, p.head)), PromptCurve.of(p, statistic, grids), p.window


def _prompt(dump: Source, name: str) -> Prompt:
    p = next(p for p in dump.prompts if p.name == name)
    return Prompt(dump.identity, p.name, p.tokens, p.sha256, None if p.token_ids is None else tuple(p.token_ids))


def _read_analysis(
    path: Path,
    prompts: dict[tuple[str, str], Prompt],
    measured: Measured,
    windowed: set[int],
    statistic: Statistic,
) -> Any:
    """Add an analysis' prompts and curves; returns its model."""
    report = load_report(path)
    identity, model = report["dump"]["identity"], report["dump"]["model"]
    named = [Prompt(identity, p["name"], p["tokens"]) for p in report["prompts"]]
    for p in named:
        prompts.setdefault((identity, p.name), p)
    for key, curve, window in read_curves(path, prompts, statistic):
        if key in measured:
            layer, head = key[2]
            raise InputError(
                f"{path} measures layer {layer}, head {head} on prompt {key[0].name} with groups {group_name(key[1])},"
                " which another analysis given does too: name only one of them"
            )
        measured[key] = curve
        if window is not None:
            windowed.add(key[2][0])
    return model


def _one_model(facts: Sequence[tuple[Any, Any]]) -> Mapping[str, Any] | None:
    """The model that all sources agree on."""
    first, model = facts[0]
    if any(m is not None and not isinstance(m, Mapping) for _, m in facts):
        raise DumpError("a source's model is not an object: it is damaged; capture it again")
    for path, other in facts[1:]:
        if (other is None) != (model is None):
            silent = path if other is None else first
            raise InputError(f"{silent} does not say which model it is of, the others do: calibrate them apart")
        if other is None or model is None:
            continue
        if (key := different_in(model, other)) is not None:
            values = " and ".join(str(m[key.replace(" ", "_")])[:24] for m in (model, other))
            raise InputError(
                f"{first} and {path} are of different models (their {key} differs: {values}): calibrate them apart"
            )
    return model


def _refuse(source: Source, layers: Sequence[int] | str | None) -> None:
    """Refuse layers of a running model that cannot be measured, with the reason."""
    if not isinstance(source, InFlight):
        return
    if isinstance(layers, str):
        known = {e.layer for e in source.entries} | source.refused.keys()
        layers = None if layers == "all" else parse_indices(layers, "--layers", sorted(known))
    refuse_layers(source, layers)


def _heads(
    covered: Mapping[Prompt, set[HeadIndex]], layers: Sequence[int] | str | None, windowed: Iterable[int]
) -> tuple[HeadIndex, ...]:
    """The heads to calibrate, which every prompt must have."""
    every = sorted(set().union(*covered.values()))
    known = sorted({layer for layer, _ in every})
    if isinstance(layers, str):
        layers = parse_indices(layers, "--layers", known)
    wanted = set(known if layers is None else layers)
    if missing := sorted(wanted - set(known)):
        raise InputError(f"no source has layer {missing[0]}; there are {describe_indices(known)}")
    wanted -= set(windowed)
    if not wanted:
        raise InputError("all the layers asked for have a sliding window and run dense: there is nothing to calibrate")
    chosen = tuple(h for h in every if h[0] in wanted)
    for prompt, heads in covered.items():
        for layer, head in chosen:
            if (layer, head) not in heads:
                raise InputError(
                    f"prompt {prompt.name} ({counted(prompt.tokens, 'token')}) lacks layer {layer}, head"
                    f" {head}, which another"
                    " prompt has: capture the same layers and heads of each, or choose --layers that all have"
                )
    return chosen


def _groups(
    asked: Sequence[AnchorParams] | None, measured: Measured, alone: Sequence[Prompt]
) -> tuple[AnchorParams, ...]:
    """The kinds of groups to choose from; prompts `alone` have no dump to measure more on."""
    if asked is not None:
        if not asked:
            raise InputError("groups must name at least one kind of group")
        return tuple(asked)
    if not alone:
        return DEFAULT_GROUPS
    of = {p: {params for prompt, params, _ in measured if prompt == p} for p in alone}
    common = set.intersection(*of.values())
    if not common:
        (a, mine), (b, others) = next(
            ((a, x), (b, y)) for a, x in of.items() for b, y in of.items() if a != b and not x & y
        )
        raise InputError(
            f"the analyses have no kind of group in common: {listed(mine)} for prompt {a.name}, {listed(others)} for"
            f" {b.name}; analyze them with the same --block, --step, --init and --lookback"
        )
    return tuple(p for p in dict.fromkeys(params for _, params, _ in measured) if p in common)


def _check_measured(
    measured: Measured, alone: Sequence[Prompt], groups: Sequence[AnchorParams], heads: Sequence[HeadIndex]
) -> None:
    for prompt in alone:
        for params in groups:
            for layer, head in heads:
                if (prompt, params, (layer, head)) not in measured:
                    raise InputError(
                        f"no analysis given measures prompt {prompt.name}, layer {layer}, head {head} with groups"
                        f" {group_name(params)}: give its dump, or run analyze with --block {params.block} --step"
                        f" {params.step}"
                    )


def _runs(
    dumps: Sequence[Source],
    prompts: Mapping[tuple[str, str], Prompt],
    groups: Sequence[AnchorParams],
    measured: Measured,
    heads: Sequence[HeadIndex],
) -> tuple[AnalysisUnit, ...]:
    runs = []
    taken: set[str] = set()
    for dump in dumps:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", name_of(dump))[:48].strip("-.") or "dump"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        names = dict.fromkeys(e.prompt for e in dump.entries)
        for params in groups:
            left = tuple(n for n in names if any((prompts[dump.identity, n], params, h) not in measured for h in heads))
            if left:
                runs.append(AnalysisUnit(dump, params, left, f"{name}-{group_name(params)}"))
    return tuple(runs)
