"""Memory is known beforehand: the estimate against what a capture really takes, and what is said when it runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model, prefill
from anchorscope.capture import run as capture_run
from anchorscope.capture.memory import LiveBytes, prefill_curve, weight_bytes
from anchorscope.errors import RunFailure

pytest.importorskip("transformers")

from families import prompt, tiny

# resident memory is a property of the whole process, so each case gets its own; glibc returns what is freed at once
PROBE = """
import json, sys, threading, psutil, torch
from pathlib import Path
torch.set_num_threads(1)
from families import prompt, tiny
from anchorscope.capture import capture_model
family, tokens, chunk, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, Path(sys.argv[4])
model = tiny(family, max_position_embeddings=65536, hidden_size=192, intermediate_size=512, head_dim=32)
capture_model(model, [prompt(300)], out / "warm", chunk=chunk and 100, notify=lambda _: None)
said, done, peak = [], threading.Event(), [0]
process = psutil.Process()
def sample():
    while not done.wait(0.002):
        peak[0] = max(peak[0], process.memory_info().rss)
def tell(line):
    said.append(line)
    if line.startswith("memory"):  # the real work begins here
        said.append(process.memory_info().rss)
        threading.Thread(target=sample).start()
try:
    capture_model(model, [prompt(tokens)], out / "d", chunk=chunk, layers=[0, 1, 2], notify=tell)
finally:
    done.set()
line, before = next((a, b) for a, b in zip(said, said[1:]) if str(a).startswith("memory"))
print(json.dumps({"line": line, "used": peak[0] - before}))
"""


def measure(family: str, tokens: int, chunk: int, out: Path) -> tuple[float, float]:
    """Estimated and used bytes of a prefill while it is captured."""
    helpers = str(Path(__file__).parents[1] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, family, str(tokens), str(chunk), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": helpers, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    number, unit = found["line"].split("about ")[1].split(" for")[0].split()
    stated = float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    used = float(found["used"])
    print(f"\n{family}, {tokens} tokens, chunk {chunk}: stated {stated / 1e6:.1f} MB, used {used / 1e6:.1f} MB")
    return stated, used


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux counts it")
@pytest.mark.parametrize(("family", "tokens", "chunk"), [("llama", 8192, 0), ("gemma3_text", 6144, 0)])
def test_the_estimate_is_within_a_fifth(tmp_path: Path, family: str, tokens: int, chunk: int) -> None:
    stated, used = measure(family, tokens, chunk, tmp_path)
    assert 0.8 * used <= stated <= 1.2 * used


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux counts it")
def test_memory_is_bounded_at_32768_tokens(tmp_path: Path) -> None:
    stated, used = measure("llama", 32768, 1024, tmp_path)
    assert 0.8 * used <= stated <= 1.2 * used
    assert used < 32768 * 32768  # less than one byte for each pair of positions of a single head


@pytest.mark.parametrize(("tokens", "chunk"), [(200, None), (700, None), (700, 300), (700, 100), (700, 699)])
def test_the_estimate_is_the_live_bytes_of_the_real_run(tokens: int, chunk: int | None) -> None:
    model, ids = tiny("gemma3_text", max_position_embeddings=1024), prompt(700).token_ids or ()
    stated = prefill_curve(model, ids, tokens, chunk, prefill).bytes(tokens)
    with LiveBytes() as live:
        prefill(model, ids[:tokens], chunk=chunk)
    assert stated == pytest.approx(max(live.events), rel=0.1)


def test_fitting_is_the_inverse_of_bytes() -> None:
    curve = prefill_curve(tiny(), prompt().token_ids or (), 5000, None, prefill)
    fits = curve.fitting(5e6)
    assert curve.bytes(fits) <= 5e6 < curve.bytes(fits + 1)
    assert curve.fitting(1e15) == 5000
    assert curve.fitting(0) == 0


def test_shared_weights_count_once() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    pair = torch.nn.ModuleList([model, torch.nn.Linear(8, 8, bias=False)])
    pair[1].weight = model.weight
    assert weight_bytes(pair) == 8 * 8 * 4  # type: ignore[arg-type]


def test_running_out_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(max_position_embeddings=4096)
    said: list[str] = []
    monkeypatch.setattr(capture_run, "free_bytes", lambda _: 2_000_000)

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(capture_run.Recorder, "__call__", run_out)
    with pytest.raises(
        RunFailure, match=r"GPU memory: the prefill needs about .* about \d+ tokens fit in one piece"
    ) as x:
        capture_model(model, [prompt(4000)], tmp_path / "d", notify=said.append)
    fits = int(str(x.value).split("; about ")[1].split()[0])
    assert 100 < fits < 4000
    assert any(line.startswith("warning: only 2.0 MB of memory are free") for line in said)
    assert not (tmp_path / "d").exists()
