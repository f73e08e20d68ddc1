"""Capture on real weights (SmolLM2-135M): exactness, and the memory it adds. Prints its figures with -s."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_allocated

from anchorscope.capture import capture_model
from anchorscope.dumps import open_dump, verify
from anchorscope.kernels import reference
from anchorscope.models import AttentionCall, PromptInput, intercept, prefill
from anchorscope.models.load import load_model

pytestmark = [pytest.mark.slow, pytest.mark.network]
N = 8192
CHECKED = (0, 7, 15, 29)
ROWS = 48  # query rows recomputed in float64, spread over the prompt


@pytest.fixture(scope="module")
def loaded() -> Any:
    pytest.importorskip("transformers")
    return load_model("smollm2", device="cpu", notify=print)


@pytest.fixture(scope="module")
def ids(loaded: Any) -> tuple[int, ...]:
    """8,192 tokens of real source code, a module that every Python carries."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    found = loaded.tokenizer(text)["input_ids"]
    assert len(found) >= N
    return tuple(found[:N])


def test_exactness_at_8192_tokens(loaded: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    model, p = loaded.model, PromptInput("p", token_ids=ids)
    plain = peak_allocated(lambda: prefill(model, ids))
    captured = peak_allocated(lambda: capture_model(model, [p], tmp_path / "d", notify=print))
    dump = open_dump(tmp_path / "d")
    layer = max(e.bytes for e in dump.entries)
    print(f"\nextra memory {(captured - plain) / 1e6:.1f} MB, one layer {layer / 1e6:.1f} MB")
    assert len(dump.entries) == 30
    assert captured - plain <= layer + 16e6

    outputs: dict[int, torch.Tensor] = {}

    def keep(call: AttentionCall) -> None:
        if call.layer in CHECKED:
            outputs[call.layer] = call.output[0].clone()

    with intercept(model, keep):
        prefill(model, ids)
    rows = torch.linspace(0, N - 1, ROWS).long()
    for layer_index in CHECKED:
        entry = dump.entry("p", layer_index)
        t = dump.load(entry)
        assert t.v is not None
        scores = reference.scores(t.q[None, :, rows], t.k[None], scale=entry.scale)
        visible = torch.arange(N) <= rows[:, None]
        expected = reference.masked_attention(scores, t.v[None], visible)[0][0]  # (H, ROWS, d)
        actual = outputs[layer_index][rows].transpose(0, 1).double()
        error = float((expected - actual).norm() / expected.norm())
        print(f"layer {layer_index}: relative difference to the model's own attention output {error:.2e}")
        assert error < 1e-5
    assert verify(dump).state == "verified"


def test_logits_are_bit_equal(loaded: Any, ids: tuple[int, ...]) -> None:
    with torch.inference_mode():
        x = torch.tensor([ids[:1024]])
        plain = loaded.model(x).logits
        with intercept(loaded.model, lambda call: None):
            hooked = loaded.model(x).logits
    assert torch.equal(plain, hooked)


def test_chunked_prefill_on_real_weights(loaded: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    p = PromptInput("p", token_ids=ids[:2048])
    whole = capture_model(loaded.model, [p], tmp_path / "whole", layers=[0, 15, 29], notify=print)
    parts = capture_model(loaded.model, [p], tmp_path / "parts", layers=[0, 15, 29], chunk=600, notify=print)
    for a, b in zip(whole.entries, parts.entries, strict=True):
        one, two = whole.load(a), parts.load(b)
        for x, y in ((one.q, two.q), (one.k, two.k), (one.v, two.v)):
            error = float((x - y).norm() / x.norm())
            print(f"layer {a.layer}: chunked against whole {error:.2e}")
            assert error < 1e-4


def test_real_weights_are_proven_and_broken_attention_is_not(loaded: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    p = PromptInput("p", token_ids=ids[:1024])
    found = capture_model(loaded.model, [p], tmp_path / "d", layers=[29], notify=print).prompts[0].proof
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids[:1024]])).logits[0, -257:-1].double()
    nats = -logits.log_softmax(-1).gather(1, torch.tensor(ids[768:1024])[:, None]).mean()
    assert found is not None
    assert found.nats == pytest.approx(float(nats), rel=1e-5)
    assert found.accuracy > 0.2
    assert not found.near_chance

    broken = copy.deepcopy(loaded.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in broken.model.layers:  # what a loader does to a projection that it does not find
            layer.self_attn.q_proj.weight.normal_(0, 0.02)
    said: list[str] = []
    found = capture_model(broken, [p], tmp_path / "e", layers=[29], notify=said.append).prompts[0].proof
    assert found is not None
    assert found.near_chance
    assert any("hardly better than chance" in line for line in said)
