"""Several devices: the bytes of one, whatever happens to some of them. Two processes on the CPU stand for GPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy_faults
from resumable import COMMANDS, Command, contents
from toy_faults import Fault, FaultyCommand

from anchorscope import RunOptions, analyze, open_dump
from anchorscope.errors import DumpError, Interrupted, RunFailure
from anchorscope.runs.life import Make, run
from anchorscope.runs.pool import Devices

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.skipif(os.name == "nt", reason="signals and process groups"),
]
CPU = torch.device("cpu")
ON_HEADS = [c for c in COMMANDS if c.name in ("analyze", "heads", "compare", "calibrate")]
on_heads = pytest.mark.parametrize("command", ON_HEADS, ids=lambda c: c.name)


@pytest.fixture(scope="module")
def pool() -> Iterator[Devices]:
    """Two processes that serve most tests, since they take seconds to start."""
    with Devices((CPU, CPU)) as devices:
        yield devices
        assert len(devices.workers) == 2


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends within some time; one that is dead and not waited for has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@on_heads
def test_the_bytes_are_those_of_one_device(command: Command, inputs, pool, tmp_path, monkeypatch):
    command.run(inputs, tmp_path / "one", figures=False)
    seen, here = [], []
    monkeypatch.setattr(Make, "__call__", lambda make, *_: here.append(make))
    if command.name == "calibrate":
        monkeypatch.undo()  # its units are analyses, which share their heads out
    command.run(inputs, tmp_path / "two", figures=False, executor=pool, progress=seen.append)
    assert not here, "a unit was measured in this process"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    steps = [e.work for e in seen if e.stage == "heads"]
    assert steps == sorted(steps)
    assert steps[-1] == seen[0].total


@on_heads
def test_what_one_device_began_several_finish(command: Command, inputs, pool, tmp_path):
    command.run(inputs, tmp_path / "o", figures=False)
    want = contents(tmp_path / "o")
    (tmp_path / "o" / command.report).unlink()
    parts = sorted((tmp_path / "o").glob(command.parts))
    parts[0].unlink()
    kept = parts[1].stat().st_mtime_ns
    command.run(inputs, tmp_path / "o", figures=False, executor=pool)
    assert contents(tmp_path / "o") == want
    assert parts[1].stat().st_mtime_ns == kept


def squares(units: list[Fault], out: Path, executor: Devices, said: list[str] | None = None) -> dict[str, bytes]:
    told = (lambda _: None) if said is None else said.append
    run(FaultyCommand(toy_faults.plan(units), RunOptions(figures=False, executor=executor, notify=told)), out)
    return contents(out)


@pytest.mark.parametrize(("units", "workers"), [(1, 1), (2, 5), (40, 1), (40, 3), (40, 8)])
def test_any_number_of_units_and_threads(units, workers, pool, tmp_path):
    """Nobody waits for more before it says what is done."""
    plan = toy_faults.plan([Fault(n) for n in range(1, units + 1)], workers)
    command = FaultyCommand(plan, RunOptions(figures=False, executor=pool))
    assert run(command, tmp_path).report == {"sum": sum(n * n for n in range(1, units + 1))}
    assert sorted(command.seen) == list(range(1, units + 1)), "what they found besides the parts"


def with_fault(place: int, kind: str, once: Path | None) -> list[Fault]:
    return [Fault(n, kind, once) if n == place else Fault(n) for n in range(1, 9)]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("memory", r"^cpu: ran out of memory; its work goes to cpu$"),
        ("device", r"^cpu: failed \(CUDA error: an illegal memory access was encountered\); its work goes to cpu$"),
        ("killed", r"^cpu: its process was killed by signal 9 \(SIGKILL\); its work goes to cpu$"),
    ],
)
def test_the_units_of_a_device_that_fails_go_to_the_others(kind, why, pool, tmp_path):
    want = squares([Fault(n) for n in range(1, 9)], tmp_path / "want", pool)
    said: list[str] = []
    with Devices((CPU, CPU)) as devices:
        got = squares(with_fault(3, kind, tmp_path / "struck"), tmp_path / "o", devices, said)
        assert (tmp_path / "struck").exists()
        assert len(devices.workers) == 1
    assert got == want
    assert len(said) == 1
    assert re.search(why, said[0]), said


def test_no_device_is_left(tmp_path):
    with Devices((CPU, CPU)) as devices, pytest.raises(RunFailure, match="out of memory on cpu: about 64 B") as caught:
        squares(with_fault(2, "memory", None), tmp_path / "memory", devices)
    assert caught.value.exit_code == 1
    said: list[str] = []
    with (
        Devices((CPU, CPU)) as devices,
        pytest.raises(RunFailure, match=r"^no device is left \(cpu: .*SIGKILL.*; cpu:"),
    ):
        squares(with_fault(2, "killed", None), tmp_path / "o", devices, said)
    assert len(said) == 1
    kept = contents(tmp_path / "o")
    assert "squares.json" not in kept
    assert any(name.startswith("parts/") for name in kept)
    assert not any(name.endswith(".tmp") for name in kept)


def test_an_error_that_is_no_fault_of_the_device_is_raised_as_it_is(inputs, tmp_path):
    with Devices((CPU, CPU)) as devices, pytest.raises(ZeroDivisionError, match="of this unit alone") as caught:
        squares(with_fault(2, "error", None), tmp_path / "o", devices)
    assert "in measure" in str(caught.value.__cause__), "the other process' traceback"
    assert not devices.workers
    dump = open_dump(inputs.dump)
    hurt = tmp_path / "hurt"
    hurt.mkdir()
    for file in inputs.dump.iterdir():
        if file.is_file():
            data = bytearray(file.read_bytes())
            if file.name == dump.entries[1].file:
                data[-1] ^= 1
            (hurt / file.name).write_bytes(data)
    with Devices((CPU, CPU)) as devices, pytest.raises(DumpError, match="does not match its checksum"):
        analyze(hurt, tmp_path / "a", device="cpu", executor=devices)


def test_ctrl_c_ends_all_and_the_same_command_continues(inputs, pool, tmp_path):
    command = next(c for c in ON_HEADS if c.name == "analyze")
    command.run(inputs, tmp_path / "want", figures=False)
    pids: list[int] = []

    def stop(event) -> None:
        if event.work and not pids:
            pids.extend(w.process.pid for w in devices.workers)
            os.kill(os.getpid(), signal.SIGINT)

    with (
        Devices((CPU, CPU)) as devices,
        pytest.raises(Interrupted, match=r"\d+ of \d+ heads (is|are) kept in .*: give the same"),
    ):
        command.run(inputs, tmp_path / "o", figures=False, executor=devices, progress=stop)
    assert len(pids) == 2
    assert all(gone(pid, 0.2) for pid in pids)
    assert not list((tmp_path / "o").rglob("*.tmp"))
    assert list((tmp_path / "o").glob(command.parts))
    command.run(inputs, tmp_path / "o", figures=False, executor=pool)
    assert contents(tmp_path / "o") == contents(tmp_path / "want")


KILLED = """
import json, os, sys, torch, pathlib
import toy_faults
from anchorscope import RunOptions
from anchorscope.runs.life import run
from anchorscope.runs.pool import Devices
out, *_ = map(pathlib.Path, sys.argv[1:])
units = [toy_faults.Fault(n) for n in range(1, 500)]
devices = Devices((torch.device("cpu"),) * 2)
def seen(event):
    if event.work:
        print(json.dumps([w.process.pid for w in devices.workers]), flush=True)
run(toy_faults.FaultyCommand(toy_faults.plan(units), RunOptions(figures=False, executor=devices, progress=seen)), out)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run(number, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    main = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "o")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    with main:
        assert main.stdout is not None
        pids = json.loads(main.stdout.readline())
        assert len(pids) == 2
        main.send_signal(number)
        main.wait(20)
    assert all(map(gone, pids))
    assert list((tmp_path / "o" / "parts").iterdir())
    assert not (tmp_path / "o" / "squares.json").exists()
