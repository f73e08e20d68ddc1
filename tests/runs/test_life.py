"""The life of a run, on a command of three methods; `test_contract.py` has it meet every accident."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_command
from toy_command import SquaresCommand, SquaresRequest, squares

from anchorscope import AnalyzeRequest, RunOptions, analyze, open_dump, plan_analysis, write_dump
from anchorscope.errors import InputError, RunFailure
from anchorscope.params import AnchorParams
from anchorscope.runs.executors import Context, InTurn, Work
from anchorscope.runs.life import Command, run


def test_a_command_takes_less_than_sixty_lines():
    assert len(Path(toy_command.__file__).read_text().splitlines()) < 60


def test_it_gets_progress_parts_and_a_report(tmp_path):
    seen = []
    assert squares((1, 2, 3), tmp_path, progress=seen.append) == {"sum": 14}
    assert [(e.work, e.total) for e in seen if e.stage == "heads"] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert {e.detail for e in seen} >= {"square-1", "square-2", "square-3"}
    assert json.loads((tmp_path / "squares.json").read_text()) == {"sum": 14}
    assert len(json.loads((tmp_path / "parts" / "square-2.json").read_text())["sha256"]) == 64
    with pytest.raises(InputError, match="holds a finished list of squares; add --overwrite"):
        squares((1, 2, 3), tmp_path)


def test_an_edited_part_is_measured_again_and_said(tmp_path):
    squares((1, 2), tmp_path)
    (tmp_path / "squares.json").unlink()
    part = tmp_path / "parts" / "square-2.json"
    part.write_text(part.read_text().replace("4", "5"))
    said = []
    assert squares((1, 2), tmp_path, notify=said.append) == {"sum": 5}
    assert len(said) == 1
    assert "square-2.json" in said[0]


def test_words_on_memory_and_disk(tmp_path, monkeypatch):
    plan = SquaresRequest((1, 2)).plan()
    assert plan.needs() == "needs about 64 B of memory and 1.5 MB of disk"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(RunFailure, match=r"10 B free and a list of squares like this may need 1.5 MB"):
        squares((1, 2), tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(SquaresCommand, "measure", full)
    with pytest.raises(RunFailure, match="out of memory on cpu: about 64 B"):
        squares((1, 2), tmp_path / "other")


def test_what_is_no_lack_of_memory_is_not_called_so(tmp_path, monkeypatch):
    def fails(error):
        def measure(*_):
            raise error

        monkeypatch.setattr(SquaresCommand, "measure", measure)

    fails(RuntimeError("you tried: can't allocate memory"))
    with pytest.raises(RunFailure, match="out of memory on cpu"):
        squares((1, 2), tmp_path)
    fails(RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match=r"^shapes$"):
        squares((1, 2), tmp_path)


def test_a_run_that_continues_began_when_the_first_one_did(tmp_path, monkeypatch):
    times = iter("abc")
    clock = SimpleNamespace(now=lambda _: SimpleNamespace(isoformat=lambda **_: next(times)))
    monkeypatch.setattr("anchorscope.runs.folder.datetime", clock)
    for again in (False, True):
        squares((1, 2), tmp_path, resume=again)
        assert json.loads((tmp_path / "run.json").read_text())["started"] == "a"


class Backwards:
    """An executor of one's own: the last unit first."""

    def run(self, work):
        InTurn(torch.device("cpu")).run(Work(work.units[::-1], work.measure, work.finished, work.source))


def test_whoever_works_the_result_is_the_same(tmp_path):
    for name, executor in (("threads", None), ("backwards", Backwards())):
        squares((1, 2, 3), tmp_path / name, executor=executor)
    for file in ("squares.json", "squares.csv"):
        assert (tmp_path / "threads" / file).read_bytes() == (tmp_path / "backwards" / file).read_bytes()


class Model:
    """A source that is no dump: its layers are made when they are asked for."""

    def __init__(self, dump):
        self.identity, self.model, self.prompts, self.entries = dump.identity, dump.model, dump.prompts, dump.entries
        self.vocabulary = dump.vocabulary
        self._dump, self.asked = dump, []

    def stream(self, wanted):
        for entry, heads in wanted:
            self.asked.append((entry.layer, tuple(heads)))
            yield self._dump.load(entry, heads)


@pytest.fixture
def dump(tmp_path):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 96, 8, generator=g) for h in (2, 1, 1))
    entries = [{"prompt": "p", "layer": i, "q": q, "k": k, "v": v, "scale": 0.5} for i in (0, 1)]
    write_dump(tmp_path / "dump", entries)
    return open_dump(tmp_path / "dump")


HOW = {"thetas": (4.0,), "params": AnchorParams(16, 2), "device": "cpu"}


def test_tensors_come_from_a_source_layer_by_layer(dump, tmp_path):
    from dataclasses import replace

    from anchorscope.analysis.run import AnalyzeCommand

    want = analyze(dump, tmp_path / "want", figures=False, **HOW)
    source = Model(dump)
    plan = replace(plan_analysis(dump, **HOW), source=source)
    run(AnalyzeCommand(plan, RunOptions(figures=False)), tmp_path / "got")
    assert source.asked == [(0, (0, 1)), (1, (0, 1))]
    assert (tmp_path / "got" / "heads.csv").read_bytes() == (want.path / "heads.csv").read_bytes()


def test_public_functions_take_the_fields_of_their_request(dump, tmp_path):
    shown = inspect.signature(analyze).parameters
    assert list(shown)[:3] == ["dump", "out", "plan"]
    assert {"thetas", "heatmaps", "figures", "executor"} <= set(shown)
    assert shown["thetas"].default == (12.0,)
    with pytest.raises(TypeError, match=r"analyze\(\) got an unexpected keyword argument 'theta'"):
        analyze(dump, tmp_path / "o", theta=3.0)
    with pytest.raises(TypeError, match="missing"):
        analyze(dump)


def test_a_plan_decides(dump, tmp_path):
    plan = AnalyzeRequest(dump, **HOW).plan()
    with pytest.raises(InputError, match="thetas is decided by the plan"):
        analyze(dump, tmp_path / "o", plan=plan, thetas=(3.0,))
    with pytest.raises(InputError, match=r"the plan was made of .*dump, not of .*other"):
        analyze(tmp_path / "other", tmp_path / "o", plan=plan)
    done = analyze(dump, tmp_path / "o", plan=plan, diagnose=True, figures=False)  # what is made of it may be said late
    assert done.diagnosis is not None


def test_a_context_without_a_source_has_no_heads():
    with pytest.raises(AssertionError, match="no source"):
        Context(torch.device("cpu")).head(0)


@pytest.mark.parametrize("method", ["measure", "read", "summarize"])
def test_a_command_without_one_of_its_methods_is_refused_before_it_runs(method):
    unfinished = type("Unfinished", (SquaresCommand,), {method: getattr(Command, method)})
    with pytest.raises(TypeError, match=method):
        unfinished(SquaresRequest((1,)).plan())
