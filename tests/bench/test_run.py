"""A bench that is interrupted, moved or of another version; `tests/runs/test_contract.py` has it meet accidents."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from allocations import peak_allocated

from anchorscope.bench import BenchConfig, bench, load_result, run_bench
from anchorscope.bench import request as request_module
from anchorscope.bench import run as run_module
from anchorscope.bench.measure import time_case
from anchorscope.bench.rows import Row, plain, restored
from anchorscope.errors import InputError, RunFailure
from anchorscope.params import AnchorParams

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "bench.schema.json").read_text(encoding="utf-8"))
TINY = BenchConfig(
    lengths=(40, 60, 80),
    thetas=(6.0, math.inf),
    params=AnchorParams(16, 2),
    heads=2,
    kv_heads=1,
    head_dim=32,
    device="cpu",
    repeats=1,
)


def out_of_memory_at(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is too small for inputs of `n` tokens and more."""
    real = run_module.time_case

    def time_case(case: Any, *rest: Any) -> Row:
        if case.n >= n:
            raise MemoryError
        return real(case, *rest)

    monkeypatch.setattr(run_module, "time_case", time_case)


def started_at(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_now", lambda: when)


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, int]:
    """A bench that timed one input of three; its parts with the times of their files."""
    with monkeypatch.context() as patch:
        out_of_memory_at(60, patch)
        started_at("2026-01-01T00:00:00+00:00", patch)
        with pytest.raises(RunFailure, match="out of memory on cpu at N = 60 with 2 heads of 32; N = 40 fitted"):
            bench(TINY, out)
    assert not (out / "bench.json").exists()
    with pytest.raises(InputError, match=r"unfinished one: give the same `anchorscope bench` command again"):
        load_result(out)
    return {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_a_continued_bench_says_which_rows_come_from_which_start(tmp_path, monkeypatch):
    kept = interrupted(tmp_path / "o", monkeypatch)
    assert [path.name for path in kept] == ["case-000.json"]
    started_at("2026-01-02T00:00:00+00:00", monkeypatch)
    done = bench(TINY, tmp_path / "o", figures=False, command="again")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "an input was timed again"
    first = json.loads((tmp_path / "o" / "parts" / "case-000.json").read_text())
    assert done.report["rows"][0] == first["row"]
    assert done.report["starts"] == [
        {"started": "2026-01-01T00:00:00+00:00", "rows": [0]},
        {"started": "2026-01-02T00:00:00+00:00", "rows": [1, 2]},
    ]
    assert (done.report["created"], done.report["command"]) == ("2026-01-02T00:00:00+00:00", "again")
    jsonschema.validate(done.report, SCHEMA)
    assert load_result(tmp_path / "o") == done.report
    assert "starts" not in bench(TINY, tmp_path / "straight", figures=False).report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("machine", lambda device: {"type": "cpu", "name": "another"}),
        ("versions", lambda: {"torch": "9.9"}),
    ],
)
def test_times_of_two_machines_or_versions_are_never_mixed(tmp_path, monkeypatch, name, value):
    kept = interrupted(tmp_path / "o", monkeypatch)
    monkeypatch.setattr(request_module, name, value)
    with pytest.raises(InputError, match="unfinished bench from another machine, thread count or version;"):
        bench(TINY, tmp_path / "o")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # Not even where somebody copies parts: each names the bench it belongs to.
    bench(TINY, tmp_path / "other", figures=False)
    (tmp_path / "other" / "bench.json").unlink()
    part = next(iter(kept))
    (tmp_path / "other" / "parts" / part.name).write_bytes(part.read_bytes())
    said: list[str] = []
    bench(TINY, tmp_path / "other", figures=False, notify=said.append)
    assert "1 part is measured again" in said[0]


def test_threads_are_part_of_the_machine(monkeypatch):
    before = TINY.plan()
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert TINY.plan().digest != before.digest
    assert TINY.plan().identity["hardware"]["threads"] == 77
    assert dataclasses.replace(TINY, dense=("math",)).plan().digest != TINY.plan().digest


def test_a_folder_of_the_version_before(tmp_path):
    """It holds bench.json and pictures, no state; whatever else is there stays."""
    out = tmp_path / "o"
    (out / "parts").mkdir(parents=True)
    old = {"format": "anchorscope-bench", "format_version": 1}
    for name, text in (("bench.json", json.dumps(old)), ("density.png", "old"), ("notes.txt", "mine")):
        (out / name).write_text(text)
    (out / "parts" / "case-007.json").write_text("mine too")
    with pytest.raises(InputError, match="holds a finished bench of an earlier version; add --overwrite"):
        bench(TINY, out)
    assert json.loads((out / "bench.json").read_text()) == old
    done = bench(dataclasses.replace(TINY, thetas=(6.0,)), out, overwrite=True)
    assert len(done.report["rows"]) == 3
    assert not (out / "density.png").exists(), "a picture of the result that was replaced"
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "parts" / "case-007.json").read_text() == "mine too"


@pytest.mark.parametrize("state", [None, '{"format": "anchorscope-compare-run", "started": "then"}'])
def test_a_folder_of_something_else_is_never_replaced(tmp_path, state):
    report = {"format": "anchorscope-bench" if state else "mine"}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    if state:
        (tmp_path / "run.json").write_text(state)
    with pytest.raises(InputError, match="exists and is not a bench"):
        bench(TINY, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "bench.json").read_text()) == report


def test_a_comparison_is_part_of_the_report(tmp_path):
    old = run_bench(TINY).to_json()
    done = bench(TINY, tmp_path / "o", figures=False, against=("old.json", old))
    assert done.report["against"]["file"] == "old.json"
    assert len(done.report["against"]["ratios"]) == 3 * (2 + 2 * 3)
    jsonschema.validate(json.loads((tmp_path / "o" / "bench.json").read_text()), SCHEMA)


def test_rows_are_json_both_ways():
    row = run_bench(dataclasses.replace(TINY, lengths=(40,))).rows[0]
    broken = dataclasses.replace(row.check, output_error=math.nan, limit=math.inf)
    row = dataclasses.replace(row, check=broken)
    data = json.loads(json.dumps(plain(dataclasses.asdict(row)), allow_nan=False))
    back = restored(Row, data)
    assert math.isnan(back.check.output_error)
    assert repr(back) == repr(row)
    for change in ({"n": "40"}, {"n": True}, {"dense": None}, {"check": {}}, {"scale": "large"}):
        with pytest.raises(ValueError, match=r"is no|lacks"):
            restored(Row, {**data, **change})


def test_progress_is_a_share_of_the_whole():
    seen: list[tuple[float, str]] = []
    run_bench(TINY, progress=lambda share, text: seen.append((share, text)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert (shares[0], seen[-1]) == (0.0, (1.0, "done"))
    assert {"40: input", "60: check at inf", "80: timing 1/1"} <= {text for _, text in seen}


def test_memory_is_that_of_the_tensors():
    """Q, K and V, exact attention, the state, and at the peak another state and an output; `math` holds scores."""
    config = BenchConfig(lengths=(4096, 32768), heads=8, kv_heads=2, head_dim=128, device="cpu")
    output, key = 8 * 32768 * 128 * 4, 2 * 32768 * 128 * 4
    memory = config.plan().memory
    assert output * 5 + key * 2 < memory < 1.1 * (output * 5 + key * 2)
    assert dataclasses.replace(config, dtype="bf16").plan().memory < memory
    assert dataclasses.replace(config, dense=("math",)).plan().memory > 8 * 32768**2 * 4
    small = AnchorParams(16, 1)
    most = dataclasses.replace(config, params=small, thetas=(math.inf,)).plan().memory
    assert most > dataclasses.replace(config, params=small, thetas=(2.0,)).plan().memory


def test_memory_follows_what_is_allocated():
    plan = BenchConfig(lengths=(1024,), heads=16, kv_heads=16, head_dim=64, device="cpu", repeats=1).plan()
    got = peak_allocated(lambda: time_case(plan.units[0], plan.setup, lambda *_: None))
    assert 0.8 * got < plan.memory - 16_000_000 < 1.2 * got  # what is kept besides is no tensor


@pytest.mark.parametrize(
    ("lengths", "thetas", "dense"),
    [((64,), (6.0,), None), ((40, 60, 80), (6.0, math.inf), None), ((40, 60), (4.0, 5.0, 6.0), ("flash", "math"))],
)
def test_disk_within_a_fifth(tmp_path, lengths, thetas, dense):
    config = dataclasses.replace(TINY, lengths=lengths, thetas=thetas, dense=dense)
    plan = config.plan()
    done = bench(config, tmp_path / "o")
    sizes = {path: path.stat().st_size for path in done.path.rglob("*") if path.is_file()}
    drawn = sum(size for path, size in sizes.items() if path.suffix == ".png")
    written = sum(sizes.values()) - drawn
    assert 0.8 * written <= plan.disk <= 1.2 * written
    assert drawn / 2 <= plan.pictures <= 2 * drawn


def test_one_case_after_another(tmp_path, monkeypatch):
    """Nothing may run beside a timing."""
    from anchorscope.runs.executors import InTurn

    used: list[Any] = []
    monkeypatch.setattr(InTurn, "run", lambda self, work: used.append(len(work.units)))
    with pytest.raises(RunFailure, match="cannot be read back"):
        bench(TINY, tmp_path / "o")
    assert used == [3]
    assert TINY.plan().workers == 1


def test_a_row_of_another_case_is_not_taken(tmp_path):
    done = bench(TINY, tmp_path / "o", figures=False)
    command = run_module.BenchCommand(TINY.plan())
    saved = json.loads((done.path / "parts" / "case-001.json").read_text())
    assert command.read(command.plan.units[1], saved) is not None
    assert command.read(command.plan.units[0], saved) is None
    assert command.read(SimpleNamespace(facts={}), {}) is None  # type: ignore[arg-type]
