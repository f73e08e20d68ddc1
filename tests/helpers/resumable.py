"""Every command that writes a folder and can be interrupted, each with a tiny request: one list for all accidents."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from byte_model import byte_model
from families import prompt, tiny
from toy_command import squares

from anchorscope import (
    ModelSource,
    analyze,
    calibrate,
    compare_methods,
    diagnose,
    evaluate,
    load_comparison,
    load_diagnosis,
    load_evaluation,
    load_report,
    open_dump,
    verify,
    write_dump,
)
from anchorscope.anchors import AnchorConfig
from anchorscope.bench import BenchConfig, bench, load_result
from anchorscope.capture import capture_model
from anchorscope.locks import LOCK
from anchorscope.methods import line_up
from anchorscope.models import PromptInput
from anchorscope.params import AnchorParams

PARAMS = AnchorParams(16, 2)


@dataclass(frozen=True)
class Inputs:
    """What the requests read: a dump of two prompts and two tiny models."""

    dump: Path
    model: Any
    reader: Any
    tokens: int

    @functools.cached_property
    def running(self) -> ModelSource:
        """The model on two prompts, in place of a dump."""
        prompts = [prompt(min(70, self.tokens), "a"), prompt(50, "b", seed=1)]
        return ModelSource(self.model, prompts, notify=lambda _: None)

    @classmethod
    def make(cls, folder: Path, tokens: int) -> Inputs:
        """Write the dump: two prompts, one layer, two query heads, one kv head."""
        entries, ids = [], {}
        for seed, name in enumerate(("story", "code")):
            g = torch.Generator().manual_seed(seed)
            q, k, v = (torch.randn(h, tokens, 8, generator=g) for h in (2, 1, 1))
            k[:, :2] += 1.5
            entries.append({"prompt": name, "layer": 2, "q": q, "k": k, "v": v, "scale": 0.7})
            ids[name] = {"token_ids": [seed + i for i in range(tokens)]}
        write_dump(folder / "dump", entries, prompts=ids)
        return cls(folder / "dump", tiny("gemma3_text"), byte_model(), tokens)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: the subcommand.
        run: carries out the request, or another one, into a folder; continues what is there.
        report: the file that is written last (of a dump: the manifest, which then says so).
        load: reads a finished folder, and refuses any other.
        parts: pattern of the files that are never made twice.
    """

    name: str
    run: Callable[..., Any]
    report: str
    load: Callable[[Path], Any]
    parts: str

    def finished(self, folder: Path) -> bool:
        """Whether the folder looks finished to every reader."""
        try:
            self.load(folder)
        except ValueError:
            return False
        return True


def _capture(x: Inputs, out: Path, *, other: bool = False, figures: bool = True, **how: Any) -> Any:
    prompts = [prompt(min(70, x.tokens), "a"), prompt(50, "b", seed=1)]
    how = {"resume": not how.get("overwrite", False), **how}
    return capture_model(x.model, prompts, out, layers=[0] if other else [0, 2], notify=lambda _: None, **how)


def _analyze(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    thetas = (5.0,) if other else (4.0, 8.0)
    return analyze(x.dump, out, thetas=thetas, params=PARAMS, device="cpu", heatmaps=[(2, 0)], diagnose=True, **how)


def _in_flight(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    what: dict[str, Any] = {"layers": [1, 2], "heads": [0], "heatmaps": [(2, 0)], "diagnose": True}
    return analyze(x.running, out, thetas=(5.0 if other else 4.0,), params=PARAMS, device="cpu", **what, **how)


def _compare(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    lineup = line_up("streaming" if other else "anchor,streaming", ["anchor.block=16,anchor.step=2"])
    return compare_methods(x.dump, out, lineup=lineup, device="cpu", **how)


def _heads(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    return diagnose(x.dump, out, params=PARAMS, theta=3.0 if other else 4.0, device="cpu", **how)


def _calibrate(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    how = {"target_recall": 0.8 if other else 0.9, "holdout": ["code"], **how}
    return calibrate(x.dump, out, groups=[PARAMS], thetas=(0.0, 2.0, 4.0, float("inf")), device="cpu", **how)


def _evaluate(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    prompts = [
        PromptInput(n, token_ids=tuple(1 + i * i % s for i in range(min(200, x.tokens))))
        for n, s in (("p", 250), ("q", 190))
    ]
    arms: dict[str, AnchorConfig | float] = {"two": 3.0 if other else 2.0}
    return evaluate(x.reader, out, arms=arms, params=PARAMS, prompts=prompts, device="cpu", **how)


def _bench(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    lengths = (40,) if other else (64, x.tokens)
    config = BenchConfig(lengths=lengths, thetas=(3.0, 6.0), params=PARAMS, device="cpu", repeats=2, backend="torch")
    return bench(config, out, x.dump, **how)


def _whole_dump(folder: Path) -> None:
    open_dump(folder)
    if verify(folder).state != "verified":
        raise ValueError("damaged")


def _calibration(folder: Path) -> None:
    if not (folder / "calibration.json").exists():
        raise ValueError("unfinished")
    AnchorConfig.load(folder / "anchors.json")


def _squares(x: Inputs, out: Path, *, other: bool = False, **how: Any) -> Any:
    return squares(range(4) if other else range(1, 7), out, **how)


def _sum(folder: Path) -> None:
    if not (folder / "squares.json").exists():
        raise ValueError("unfinished")


TOY = Command("squares", _squares, "squares.json", _sum, "parts/*.json")
COMMANDS = (
    Command("capture", _capture, "manifest.json", _whole_dump, "*.safetensors"),
    Command("analyze", _analyze, "report.json", load_report, "profile/*.safetensors"),
    Command("analyze-in-flight", _in_flight, "report.json", load_report, "profile/*.safetensors"),
    Command("compare", _compare, "compare.json", load_comparison, "scores/*.json"),
    Command("heads", _heads, "heads.json", load_diagnosis, "parts/*.json"),
    Command("calibrate", _calibrate, "calibration.json", _calibration, "analysis/*/profile/*.safetensors"),
    Command("bench", _bench, "bench.json", load_result, "parts/case-*.json"),
    Command("evaluate", _evaluate, "evaluation.json", load_evaluation, "parts/*.safetensors"),
)


@contextlib.contextmanager
def still_clock() -> Iterator[None]:
    """Every run starts at one time, every prefill takes none and every timed call takes a second and a kilobyte.

    So whole folders can be compared.
    """
    seconds = itertools.count()
    start = SimpleNamespace(now=lambda _: SimpleNamespace(isoformat=lambda **_: "2026-01-01T00:00:00+00:00"))
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    with (
        mock.patch("anchorscope.runs.folder.datetime", start),
        mock.patch("anchorscope.dumps.writer.datetime", start),
        mock.patch("anchorscope.bench.run.datetime", start),
        mock.patch("anchorscope.bench.timing.time", SimpleNamespace(perf_counter=lambda: next(seconds))),
        mock.patch("anchorscope.bench.dense.time", SimpleNamespace(perf_counter=lambda: next(seconds))),
        mock.patch("anchorscope.bench.timing.peak_memory", return_value=1000),
        mock.patch("anchorscope.evaluation.lanes.time", clock),
        mock.patch("anchorscope.runtime.usage.time", clock),
    ):
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks, which outlive a process that was killed, and what it was writing."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
