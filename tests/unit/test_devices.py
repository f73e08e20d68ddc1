"""Memory that ran out, products at full precision, and provenance: each said in one place."""

from __future__ import annotations

import threading

import pytest
import torch

import anchorscope
from anchorscope.devices import is_out_of_memory
from anchorscope.errors import InputError, RunFailure
from anchorscope.runs.environment import full_precision, hardware_name, versions
from anchorscope.shown import threads_text

CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(CPU_ALLOCATOR), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_recognized(error, memory):
    assert is_out_of_memory(error) is memory


def test_the_cpu_allocator_still_says_what_we_look_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_full_precision_outlives_other_threads():
    """One that leaves while others are inside changes nothing for them; the last restores the caller's setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with full_precision():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_float32_matmul_precision())

    try:
        worker = threading.Thread(target=other)
        with full_precision():
            worker.start()
            assert inside.wait(10)
        assert torch.get_float32_matmul_precision() == "highest", "the other thread still computes"
        leave.set()
        worker.join()
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        leave.set()
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 200, 16, generator=g) for h in (4, 2, 2))
    path = tmp_path_factory.mktemp("devices") / "dump"
    return anchorscope.write_dump(path, [{"prompt": "p", "layer": 1, "q": q, "k": k, "v": v, "scale": 0.25}])


def runs():
    from anchorscope.analysis import run as analysis
    from anchorscope.compare import run as comparison
    from anchorscope.heads import run as heads
    from anchorscope.methods import line_up

    return {
        "analyze": (analysis.analyze, analysis.plan_analysis, {}),
        "compare": (comparison.compare, comparison.plan_compare, {"lineup": line_up("streaming")}),
        "heads": (heads.diagnose, heads.plan_heads, {}),
    }


@pytest.mark.parametrize("name", ["analyze", "compare", "heads"])
def test_an_allocator_failure_is_one_sentence_in_every_run(dump, tmp_path, monkeypatch, name):
    run, _, options = runs()[name]
    loads = []

    def greedy(self, *_):
        loads.append(1)
        raise RuntimeError(CPU_ALLOCATOR)

    monkeypatch.setattr(type(dump), "load", greedy)
    with pytest.raises(RunFailure, match="out of memory"):
        run(dump, tmp_path / "o", figures=False, **options)
    assert loads


@pytest.mark.parametrize("name", ["analyze", "compare", "heads"])
def test_the_setting_of_precision_is_the_callers_again(dump, tmp_path, name):
    run, _, options = runs()[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run(dump, tmp_path / "o", figures=False, **options)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("analyze", {"thetas": (1.0,)}),
        ("analyze", {"target_recall": 0.5}),
        ("analyze", {"layers": [1]}),
        ("compare", {"target_recall": 0.5}),
        ("compare", {"heads": [0]}),
        ("heads", {"theta": 1.0}),
        ("heads", {"device": "cpu"}),
    ],
)
def test_what_a_plan_decides_is_not_given_again(dump, tmp_path, name, extra):
    run, plan, options = runs()[name]
    with pytest.raises(InputError, match=f"{next(iter(extra))} is decided by the plan"):
        run(dump, tmp_path / "o", plan=plan(dump, **options), **extra)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["analyze", "compare", "heads"])
def test_a_plan_of_another_dump_is_refused(dump, tmp_path, name):
    run, plan, options = runs()[name]
    made = plan(dump, **options)
    with pytest.raises(InputError, match="the plan was made of"):
        run(tmp_path / "elsewhere", tmp_path / "o", plan=made)


def test_calibrate_refuses_what_its_plan_decides(dump, tmp_path):
    from anchorscope.calibration import calibrate, plan_calibration

    plan = plan_calibration(dump.path, holdout=0)
    with pytest.raises(InputError, match="target_recall is decided by the plan"):
        calibrate(dump.path, tmp_path / "o", target_recall=0.8, plan=plan)


def test_provenance_is_said_in_one_way(dump, tmp_path):
    assert threads_text(1) == "1 thread"
    assert threads_text(4) == "4 threads"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert hardware_name(torch.device("cpu")) == "CPU, 1 thread"
        reports = {}
        for name, (run, _, options) in runs().items():
            reports[name] = run(dump, tmp_path / name, figures=False, **options).report
    finally:
        torch.set_num_threads(threads)
    for report in reports.values():
        assert report["versions"] == versions()
        assert report["hardware"] == "CPU, 1 thread"
