"""What a folder or file of AnchorScope is, for `anchorscope info`: its kind, how far it is, and a few lines of content.

Whatever is read may be damaged: what a line speaks of and is not there is said to be damaged, in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.errors import AnchorScopeError, DumpError, InputError
from anchorscope.files import MAX_JSON_BYTES, read_json, visible
from anchorscope.shown import counted, exact_theta, share_text

if TYPE_CHECKING:
    from anchorscope.runs.folder import RunFolder

Facts = dict[str, str]
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
KINDS = (
    "a dump, or what analyze, compare, heads, calibrate, evaluate or bench write, an anchors.json or a profile folder"
)


@dataclass(frozen=True)
class Found:
    """What was found at a path.

    Attributes:
        kind: "an analysis", "a comparison", ...
        path: where.
        command: who writes it; None of what several do.
        finished: whether it is whole.
        done: how much of an unfinished run is done, in words.
        facts: lines on what it holds.
        damage: what is wrong with it, or None.
        shard: which share of a run it is, like "1 of 4", or None.
    """

    kind: str
    path: Path
    command: str | None
    finished: bool = True
    done: str = ""
    facts: Facts = field(default_factory=dict)
    damage: str | None = None
    shard: str | None = None

    @property
    def lines(self) -> Facts:
        """All there is to say, by name."""
        state = "finished" if self.finished else "unfinished"
        if self.done:
            state += f": {self.done} done"
        lines = {"folder" if self.path.is_dir() else "file": str(self.path), "kind": self.kind, **self.facts}
        if self.shard is not None:
            lines["shard"] = f"{self.shard}; `anchorscope merge` puts all together"
        return lines if self.command is None else {**lines, "state": state}

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "path": str(self.path),
            "kind": self.kind.split(" ", 1)[1],
            "command": self.command,
            "finished": self.finished,
            "done": self.done or None,
            "damage": self.damage,
            "shard": self.shard,
            "content": dict(self.facts),
        }

    def check(self) -> None:
        """Refuse what nothing can be done with.

        Raises:
            DumpError: it is damaged or unfinished; says what to do.
        """
        if self.damage is not None:
            again = "" if self.command is None else f": run `anchorscope {self.command}` again"
            raise DumpError(f"{self.path} is damaged ({self.damage}){again}")
        if self.shard is not None:
            raise DumpError(
                f"{self.path} is shard {self.shard} of {self.kind}: give its command again if units are missing,"
                " and put all shards together with `anchorscope merge`"
            )
        if not self.finished:
            raise DumpError(
                f"{self.path} is {self.kind}, unfinished: give the same `anchorscope {self.command}` command, with"
                f" --out {self.path}, again to continue"
            )


def recognize(path: Path) -> Found:
    """What a folder or file is, if it is of AnchorScope and no dump.

    Raises:
        DumpError: there is nothing, or nothing of AnchorScope.
    """
    try:
        if not path.exists():
            raise DumpError(f"{path} does not exist: name a folder of AnchorScope ({KINDS})")
        if not path.is_dir():
            return _anchors(path)
        for folder, describe in _kinds():
            if (state := folder.find(path)) is not None or (path / folder.report).is_file():
                found = _run(path, folder, state, describe)
                if found is not None:
                    return found
        if (found := _profiles(path)) is not None:
            return found
    except OSError as error:
        raise DumpError(f"{path} cannot be looked at: {error.strerror or error}") from None
    if (path / "config.json").is_file():
        raise DumpError(
            f"{path} is not a folder of AnchorScope: its config.json says that it is a model, for `anchorscope analyze"
            f" --model {path}` or `anchorscope capture --model {path}`"
        )
    raise DumpError(f"{path} is not a folder of AnchorScope: name {KINDS}")


def _kinds() -> Iterator[tuple[RunFolder, Callable[[Mapping[str, Any]], Facts]]]:
    """The folders that runs write, and what to say of each."""
    from anchorscope.analysis.run import FOLDER as ANALYSIS
    from anchorscope.bench.output import FOLDER as BENCH
    from anchorscope.calibration.run import FOLDER as CALIBRATION
    from anchorscope.compare.run import FOLDER as COMPARISON
    from anchorscope.evaluation.run import FOLDER as EVALUATION
    from anchorscope.heads.run import FOLDER as HEADS

    yield ANALYSIS, _analysis
    yield CALIBRATION, _calibration
    yield EVALUATION, _evaluation
    yield COMPARISON, _comparison
    yield HEADS, _heads
    yield BENCH, _bench


def _run(path: Path, folder: RunFolder, state: object, describe: Callable[[Mapping[str, Any]], Facts]) -> Found | None:
    """The run in a folder; None if the report that is there is something else's."""
    whole = (path / folder.report).is_file()
    if not whole:
        done = folder.progress(path).rsplit(" ", 1)[0]
        from anchorscope.runs.shards import shard_of

        shard = shard_of(state) if isinstance(state, dict) else None
        named = None if shard is None else f"{shard.index} of {shard.of}"
        return Found(folder.what, path, folder.command, finished=False, done=done, shard=named)
    try:
        report = read_json(path / folder.report, MAX_JSON_BYTES, "report")
        if state is None and not str(report.get("format", "")).startswith("anchorscope-"):
            return None
        return Found(folder.what, path, folder.command, facts={k: visible(v, 300) for k, v in describe(report).items()})
    except InputError as error:
        return Found(folder.what, path, folder.command, damage=str(error))
    except DAMAGED as error:
        if state is None:
            return None
        what = f"{folder.report} is not what the command writes: {type(error).__name__} {error}"
        return Found(folder.what, path, folder.command, damage=visible(what, 200))


def _analysis(report: Mapping[str, Any]) -> Facts:
    settings, target = report["settings"], report["target"]
    thetas = settings["theta"]
    return {
        **_source(report),
        "measured": f"{counted(target['heads'], 'head')} in layers {_list(settings['layers'])}",
        "groups": f"{settings['block']} x {settings['step']}",
        "thetas": _list([exact_theta(t) for t in thetas]),
        "recall": f"{target['reached']} of {counted(target['heads'], 'head')} reach {target['recall']:g}",
    }


def _comparison(report: Mapping[str, Any]) -> Facts:
    settings = report["settings"]
    return {
        **_source(report),
        "measured": f"{counted(report['heads'], 'head')} in layers {_list(settings['layers'])}",
        "methods": _list([m["label"] for m in settings["methods"]]),
        "target": f"recall {settings['target_recall']:g}",
    }


def _heads(report: Mapping[str, Any]) -> Facts:
    classes = report["summary"]["all"]["classes"]
    return {
        **_source(report),
        "measured": f"{counted(len(report['heads']), 'head')} in layers {_list(report['settings']['layers'])}",
        "kinds": ", ".join(f"{int(n)} {name}" for name, n in classes.items()),
    }


def _calibration(report: Mapping[str, Any]) -> Facts:
    settings, fitted, held = report["settings"], report["fitted"], report["held_out"]
    aim = f"recall {settings['target']:g}" if settings["target"] is not None else "best recall"
    budget = settings["budget_density"]
    lines = {
        **_source(report),
        "asked for": aim + (f" at density {budget:g}" if budget is not None else f" ({settings['statistic']})"),
        "chosen": f"{counted(len(report['heads']), 'head')}, groups {_list(settings['groups'])}",
        "fitted": f"recall {share_text(fitted['recall'])} at density {share_text(fitted['density'])}",
    }
    if held is not None:
        lines["held out"] = f"recall {share_text(held['recall'])} at density {share_text(held['density'])}"
    return lines


def _evaluation(report: Mapping[str, Any]) -> Facts:
    return {
        "model": _model(report["model"]),
        "measured": f"{report['started']}",
        "arms": _list([arm["name"] for arm in report["arms"]]),
        "prompts": _list(list(dict.fromkeys(p["prompt"] for p in report["prompts"]))) or "none",
        "tasks": _list(report["settings"]["tasks"]) or "none",
        "lengths": _list(report["settings"]["lengths"]),
    }


def _bench(report: Mapping[str, Any]) -> Facts:
    settings, rows = report["settings"], report["rows"]
    of = (
        "planted input"
        if settings["input"] == "planted"
        else f"a dump of {settings.get('model') or 'an unknown model'}"
    )
    return {
        "input": of,
        "measured": str(report["created"]),
        "machine": str(report["hardware"]["name"]),
        "lengths": _list([f"{n:,}" for n in dict.fromkeys(int(row["n"]) for row in rows)]),
        "thetas": _list([exact_theta(t) for t in settings["thetas"]]),
        "checks": f"{sum(bool(r['check']['passed']) for r in rows)} of {len(rows)} equal dense attention at theta inf",
    }


def _anchors(path: Path) -> Found:
    """An anchors.json.

    Raises:
        DumpError: it is something else, or damaged.
    """
    from anchorscope.anchors import FORMAT, MAX_BYTES, AnchorConfig

    try:
        value = read_json(path, MAX_BYTES, "file")
    except InputError as error:
        raise DumpError(f"{path} is a file and no anchors.json ({error}): name a folder, or an anchors.json") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DumpError(f"{path} is a file and no anchors.json: name the folder it is in, {path.absolute().parent}")
    try:
        config = AnchorConfig.from_json(value)
    except AnchorScopeError as error:
        return Found("an anchors.json", path, "calibrate", damage=str(error))
    thetas = [t for layer in config.layers for t in layer.thetas]
    finite = sorted(t for t in thetas if t is not None)
    between = f"{exact_theta(finite[0])} to {exact_theta(finite[-1])}" if finite else "none"
    groups = dict.fromkeys(f"{x.params.block} x {x.params.step}" for x in config.layers)
    return Found(
        "an anchors.json",
        path,
        None,
        facts={
            "model": visible(_model(config.model), 300),
            "layers": _list([x.layer for x in config.layers]) or "none",
            "heads": f"{counted(len(thetas), 'head')}, {sum(t is None for t in thetas)} of them dense",
            "groups": _list(list(groups)) or "none",
            "thetas": between,
        },
    )


def _profiles(path: Path) -> Found | None:
    """A folder of head profiles; None if it holds none that can be read."""
    from anchorscope.profiles import HeadProfile

    files = sorted(path.glob("p*-layer*-head*.safetensors"))
    for file in files:
        try:
            first = HeadProfile.load(file, heat=False)
        except AnchorScopeError:
            continue
        facts = {
            "profiles": counted(len(files), "head"),
            "first": visible(f"{first.prompt}, layer {first.layer}, head {first.head}, {first.tokens:,} tokens", 200),
        }
        return Found("a folder of profiles, part of an analysis", path, None, facts=facts)
    return None


def _source(report: Mapping[str, Any]) -> Facts:
    """The model and the prompts that a report speaks of, and when it was begun."""
    dump = report.get("dump")
    model = dump["model"] if isinstance(dump, Mapping) else report.get("model")
    prompts = [f"{p['name']} ({counted(int(p['tokens']), 'token')})" for p in report["prompts"]]
    return {"model": _model(model), "begun": str(report["started"]), "prompts": _list(prompts)}


def _model(model: Mapping[str, Any] | None) -> str:
    return "unknown" if model is None else str(model.get("name") or model.get("class") or "unknown")


def _list(items: list[Any]) -> str:
    """At most eight of some things, and how many more there are."""
    shown = ", ".join(str(x) for x in items[:8])
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")
