"""Memory that ran out, products at full precision, and provenance: each said in one place."""

from __future__ import annotations

import threading

import pytest
import torch

import anchorscope
from anchorscope.cli.app import main
from anchorscope.devices import is_device_failure, is_out_of_memory, resolve_device, resolve_devices
from anchorscope.errors import InputError, MissingBackendError, RunFailure
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


def with_gpus(monkeypatch, *names):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])


def test_devices_are_gpus_of_one_kind(monkeypatch):
    with_gpus(monkeypatch, "H200", "H200", "H200", "A100")
    assert resolve_devices("cpu", None) == (torch.device("cpu"),) == (resolve_device("cpu"),)
    two = (torch.device("cuda:2"), torch.device("cuda:0"))
    assert resolve_devices("auto", "cuda:2, cuda:0") == resolve_devices("auto", ["cuda:2", "cuda:0"]) == two
    with pytest.raises(InputError, match=r"cuda:0 \(H200\) and cuda:3 \(A100\) round differently; name GPUs of one"):
        resolve_devices("auto", "all")
    with_gpus(monkeypatch, "H200", "H200")
    assert resolve_devices("auto", "all") == (torch.device("cuda:0"), torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("device", "devices", "sentence"),
    [
        ("cuda:0", "all", "--device and --devices contradict each other: give one of them"),
        ("auto", "cuda:7", "there is no cuda:7; there are 2 CUDA GPUs, numbered from 0"),
        ("auto", ["cuda:0", "cuda:2"], "there is no cuda:2"),
        ("auto", "cuda:1,cuda:1", "'cuda:1,cuda:1' names a device twice"),
        ("auto", "cuda:1,cuda:01", "names a device twice"),
        ("auto", "cpu,cpu", "'cpu' is no CUDA GPU; write all, or cuda:0,cuda:1"),
        ("auto", "cuda,cuda:1", "'cuda' is no CUDA GPU"),
        ("auto", "cuda:0,", "'' is no CUDA GPU"),
        ("auto", "", "'' is no CUDA GPU"),
        ("auto", [], "'' is no CUDA GPU"),
        ("auto", "0,1", "'0' is no CUDA GPU"),
        ("auto", "all,cuda:0", "'all' is no CUDA GPU"),
        ("auto", "cuda:-1", "'cuda:-1' is no CUDA GPU"),
        ("auto", "cuda:\u0661", "is no CUDA GPU"),
    ],
)
def test_devices_that_make_no_sense_are_refused(monkeypatch, device, devices, sentence):
    with_gpus(monkeypatch, "H200", "H200")
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        resolve_devices(device, devices)


@pytest.mark.parametrize("command", ["analyze", "heads", "compare", "calibrate"])
def test_every_command_on_heads_takes_devices(command, tmp_path, capsys, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 32, 8, generator=g), torch.randn(1, 32, 8, generator=g)
    names = [{"prompt": p, "layer": 0, "q": q, "k": k, "v": k, "scale": 0.5} for p in ("a", "b")]
    anchorscope.write_dump(tmp_path / "d", names)
    words = [command, str(tmp_path / "d"), "--out", str(tmp_path / "o")]
    with_gpus(monkeypatch)
    assert main([*words, "--devices", "all"]) == 2
    assert capsys.readouterr().err == "error: --devices all: this torch sees no CUDA GPU; use --device cpu\n"
    assert main([*words, "--devices", "cuda:0", "--device", "cpu"]) == 2
    assert "--device and --devices contradict each other" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(MissingBackendError):
        anchorscope.AnalyzeRequest(tmp_path / "d", devices="all").plan()


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA error: of somebody else"), False),
    ],
)
def test_a_gpu_that_failed_is_recognized(error, failed):
    assert is_device_failure(error) is failed
