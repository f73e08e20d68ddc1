"""Memory is known beforehand: the estimate against what a capture allocates, and what is said when it runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.capture.recorder import Recorder
from anchorscope.errors import RunFailure
from anchorscope.models import memory, prefill
from anchorscope.models.memory import LiveBytes, prefill_curve, weight_bytes

pytest.importorskip("transformers")

from allocations import peak_allocated
from families import prompt, tiny


def stated_and_allocated(family: str, tokens: int, chunk: int | None, out: Path) -> tuple[int, int]:
    """Bytes stated for a prefill, and those that the allocator gave at once while it was captured."""
    model = tiny(family, max_position_embeddings=65536, hidden_size=192, intermediate_size=512, head_dim=32)
    p = prompt(tokens)
    stated = prefill_curve(model, p.token_ids or (), tokens, chunk).bytes(tokens)
    used = peak_allocated(lambda: capture_model(model, [p], out, chunk=chunk, layers=[0, 1, 2], notify=lambda _: None))
    print(f"\n{family}, {tokens} tokens, chunk {chunk}: stated {stated / 1e6:.1f} MB, used {used / 1e6:.1f} MB")
    return stated, used


@pytest.mark.parametrize(
    ("family", "tokens", "chunk"), [("llama", 3000, None), ("gemma3_text", 2000, None), ("llama", 2500, 400)]
)
def test_the_estimate_is_what_a_capture_allocates(tmp_path: Path, family: str, tokens: int, chunk: int | None) -> None:
    stated, used = stated_and_allocated(family, tokens, chunk, tmp_path / "d")
    assert stated == pytest.approx(used, rel=0.1)


@pytest.mark.slow
def test_memory_is_bounded_at_32768_tokens(tmp_path: Path) -> None:
    stated, used = stated_and_allocated("llama", 32768, 1024, tmp_path / "d")
    assert stated == pytest.approx(used, rel=0.1)
    assert used < 32768 * 32768  # less than one byte for each pair of positions of a single head


@pytest.mark.parametrize(("tokens", "chunk"), [(200, None), (700, None), (700, 300), (700, 100), (700, 699)])
def test_the_estimate_is_the_live_bytes_of_the_real_run(tokens: int, chunk: int | None) -> None:
    model, ids = tiny("gemma3_text", max_position_embeddings=1024), prompt(700).token_ids or ()
    stated = prefill_curve(model, ids, tokens, chunk).bytes(tokens)
    with LiveBytes() as live:
        prefill(model, ids[:tokens], chunk=chunk)
    assert stated == pytest.approx(max(live.events), rel=0.1)


def test_fitting_is_the_inverse_of_bytes() -> None:
    curve = prefill_curve(tiny(), prompt().token_ids or (), 5000, None)
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
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2_000_000)

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Recorder, "__call__", run_out)
    with pytest.raises(
        RunFailure, match=r"GPU memory: the prefill needs about .* about [\d,]+ tokens fit in one piece"
    ) as x:
        capture_model(model, [prompt(4000)], tmp_path / "d", notify=said.append)
    fits = int(str(x.value).split("; about ")[1].split()[0].replace(",", ""))
    assert 100 < fits < 4000
    assert any(line.startswith("warning: only 2.0 MB of memory are free") for line in said)
    assert not (tmp_path / "d").exists()
