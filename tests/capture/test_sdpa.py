"""Capturing from plain PyTorch code by its calls of scaled_dot_product_attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from anchorscope.capture.sdpa import capture_sdpa
from anchorscope.dumps import open_dump, verify
from anchorscope.errors import InputError

N, H, KV, D = 50, 4, 2, 8


def tensors(seed: int, n: int = N, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(1, heads, n, D, generator=generator)).to(dtype) for heads in (H, KV, KV)]


def attend(seed: int, **options: Any) -> torch.Tensor:
    return functional.scaled_dot_product_attention(*tensors(seed), **{"is_causal": True, "enable_gqa": True, **options})


def window_mask(window: int) -> torch.Tensor:
    i = torch.arange(N)
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < window)


def test_calls_become_layers(tmp_path: Path) -> None:
    before = functional.scaled_dot_product_attention
    plain = attend(0)
    with capture_sdpa(tmp_path / "d", prompt="mine", token_ids=range(N)) as calls:
        assert torch.equal(attend(0), plain)
        attend(1, is_causal=False, attn_mask=window_mask(12), scale=0.2)
        assert calls == [0, 1]
    assert functional.scaled_dot_product_attention is before
    dump = open_dump(tmp_path / "d")
    assert verify(dump).state == "verified"
    assert [(e.layer, e.window) for e in dump.entries] == [(0, None), (1, 12)]
    assert [e.scale for e in dump.entries] == [pytest.approx(D**-0.5), 0.2]
    assert dump.prompts[0].token_ids == list(range(N))
    for entry in dump.entries:
        t = dump.load(entry)
        for got, expected in zip((t.q, t.k, t.v), tensors(entry.layer), strict=True):
            assert got is not None
            assert torch.equal(got, expected[0])


def test_float64_is_stored_as_fp32_like_a_models(tmp_path: Path) -> None:
    q, k, v = tensors(0, dtype=torch.float64)
    with capture_sdpa(tmp_path / "d"):
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    dump = open_dump(tmp_path / "d")
    t = dump.load(dump.entries[0])
    assert torch.equal(t.q, q[0].float())
    assert torch.equal(t.k, k[0].float())


def test_chosen_calls_only(tmp_path: Path) -> None:
    with capture_sdpa(tmp_path / "d", layers=[1]) as calls:
        for seed in range(3):
            attend(seed)
    assert calls == [1]
    assert [e.layer for e in open_dump(tmp_path / "d").entries] == [1]
    with (
        pytest.raises(InputError, match="call 5 was not made: the code made 1 call"),
        capture_sdpa(tmp_path / "e", layers=[0, 5]),
    ):
        attend(0)
    assert not (tmp_path / "e").exists()


def two_forwards() -> None:
    attend(0)
    functional.scaled_dot_product_attention(*tensors(1, 7), is_causal=True, enable_gqa=True)


def batch() -> None:
    both = [x.repeat(2, 1, 1, 1) for x in tensors(0)]
    functional.scaled_dot_product_attention(*both, is_causal=True, enable_gqa=True)


FAULTS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda: None, "never called"),
    "bidirectional": (lambda: attend(0, is_causal=False), "bidirectional"),
    "dropout": (lambda: attend(0, dropout_p=0.5), "dropout"),
    "bias": (lambda: attend(0, is_causal=False, attn_mask=torch.randn(N, N)), "bias"),
    "second forward": (two_forwards, "7 queries and 7 keys where the prompt has 50"),
    "batch": (batch, "batch of 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_captured(tmp_path: Path, fault: str) -> None:
    run, message = FAULTS[fault]
    before = functional.scaled_dot_product_attention
    with pytest.raises(InputError, match=message), capture_sdpa(tmp_path / "d"):
        run()
    assert functional.scaled_dot_product_attention is before
    assert not (tmp_path / "d").exists()
