"""Timing, dense baselines, counts and measures, each against something simpler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anchorscope.bench import measures, timing
from anchorscope.bench.backends import resolve_backend
from anchorscope.bench.dense import NAMES, dense_backends, flex_mask
from anchorscope.devices import resolve_device
from anchorscope.errors import InputError, MissingBackendError
from anchorscope.kernels import reference, torch_backend
from anchorscope.params import AnchorParams

CPU = torch.device("cpu")


def inputs(n: int = 150, heads: int = 4, kv_heads: int = 2, d: int = 16) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(1, heads, n, d, generator=g) * 2
    k, v = (torch.randn(1, kv_heads, n, d, generator=g) * s for s in (2, 1))
    return q, k, v


def test_repetitions_are_interleaved_and_summarized(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]
    took = iter((0.002, 0.008, 0.001, 0.004, 0.003, 0.006))  # a and b in turn

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(took)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    runs = {"a": lambda: work("a"), "b": lambda: work("b")}
    ticks: list[int] = []
    result = timing.interleaved(runs, {"a": 7.0, "b": 9.0}, 3, CPU, lambda: ticks.append(1))
    assert order == ["a", "b"] * 3
    assert len(ticks) == 3
    assert [result["a"].p20_ms, result["a"].median_ms, result["a"].p80_ms] == pytest.approx([1.4, 2, 2.6])
    assert [result["b"].p20_ms, result["b"].median_ms, result["b"].p80_ms] == pytest.approx([4.8, 6, 7.2])
    assert (result["b"].first_ms, result["b"].repeats) == (9.0, 3)


@pytest.mark.parametrize(
    ("round_ms", "wanted", "count"), [(1.0, None, 20), (100.0, None, 10), (5e4, None, 3), (1.0, 4, 4)]
)
def test_number_of_repetitions(round_ms: float, wanted: int | None, count: int) -> None:
    assert timing.repetitions(round_ms, wanted, most=20, budget_ms=1000.0) == count


def test_peak_memory_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """The growth of the peak resident set after it was reset; None where the system does not tell."""
    asked: list[str] = []

    def status(field: str) -> int:
        asked.append(field)
        return {"VmRSS": 1000, "VmHWM": 1700}[field]

    monkeypatch.setattr(timing.Path, "write_text", lambda path, text: asked.append(f"{path} {text}"))
    monkeypatch.setattr(timing, "_status_kib", status)
    peak = timing.peak_memory(lambda: asked.append("run"), CPU)
    if peak is not None:  # glibc is there
        assert peak == 700 * 1024
        assert asked == ["/proc/self/clear_refs 5", "VmRSS", "run", "VmHWM"]
    monkeypatch.setattr(timing, "_status_kib", lambda field: {}[field])
    assert timing.peak_memory(lambda: None, CPU) is None


@pytest.mark.parametrize("window", [None, 1, 20, 130, 400])
@pytest.mark.parametrize("n", [1, 128, 129, 300, 512])
def test_flex_mask_is_the_rule(n: int, window: int | None) -> None:
    """Expanding tiles (with the rule in partial ones) gives each visible pair once and nothing else."""
    mask = flex_mask(n, window, CPU)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    want = (j <= i) & (i - j < (window or n))
    got = torch.zeros(n, n, dtype=torch.int64)
    for count, index, partial in (
        (mask.kv_num_blocks, mask.kv_indices, True),
        (mask.full_kv_num_blocks, mask.full_kv_indices, False),
    ):
        for row, columns in enumerate(index[0, 0]):
            for column in columns[: count[0, 0, row]].tolist():
                a, b = (slice(x * 128, (x + 1) * 128) for x in (row, column))
                rule = mask.mask_mod(None, None, i, j)
                got[a, b] += rule[a, b] if partial else 1
    assert torch.equal(got, want.long())


def test_flex_mask_leaves_out_invisible_tiles() -> None:
    mask = flex_mask(1280, None, CPU)
    assert mask.kv_num_blocks.flatten().tolist() == [1] * 10
    assert mask.full_kv_num_blocks.flatten().tolist() == list(range(10))


def test_dense_back_ends_agree_and_refusals_are_named() -> None:
    q, k, v = inputs()
    exact, _ = measures.exact_dense(q, k, v, scale=0.25)
    present, absent = dense_backends(("flash", "math", "cudnn"), q, k, v, scale=0.25)
    assert [x.name for x in present] == ["flash", "math"]
    for dense in present:
        assert measures.output_error(dense.run(), exact)[1] < 1e-5
    assert [x.name for x in absent] == ["cudnn"]
    assert absent[0].reason
    present, absent = dense_backends(tuple(x for x in NAMES if x != "flex"), q, k, v, scale=0.25, window=8)
    assert not present
    assert {x.reason for x in absent} == {"has no sliding window"}


@pytest.mark.slow
def test_flex_with_window_and_cap() -> None:
    q, k, v = inputs(300)
    exact, _ = measures.exact_dense(q, k, v, scale=0.25, window=100, softcap=5.0)
    present, absent = dense_backends(("flex",), q, k, v, scale=0.25, window=100, softcap=5.0)
    assert not absent
    assert measures.output_error(present[0].run(), exact)[1] < 1e-5


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_exact_dense_and_recall(window: int | None, softcap: float | None) -> None:
    q, k, v = inputs()
    place = {"block": 8, "step": 2, "window": window}
    out, lse = measures.exact_dense(q, k, v, scale=0.25, window=window, softcap=softcap)
    geo = reference.geometry(q, k, **place)
    s = reference.scores(q, k, scale=0.25, softcap=softcap)
    want, want_lse = reference.masked_attention(s, v, reference.visible_mask(geo))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    _, kept_lse, mask = reference.anchor_attention(q, k, v, theta=3.0, scale=0.25, softcap=softcap, **place)
    per_head = reference.recall_rows(s, mask, geo).mean(-1)[0]
    got = measures.recall(kept_lse, lse)
    assert got == pytest.approx((per_head.mean().item(), per_head.min().item()), abs=1e-5)


def test_pairs_of_a_selection() -> None:
    q, k, v = (x.double() for x in inputs(147))
    params = AnchorParams(8, 2, 5, 3)
    for window in (None, 1, 30):
        place = {"block": 8, "step": 2, "init": 5, "lookback": 3, "window": window}
        state = torch_backend.anchor(q, k, v, **place)
        stripes = torch_backend.identify(state, k, theta=3.0, queries=147, **place)
        kept = measures.count_pairs(147, params, stripes, window)
        geo = reference.geometry(q, k, **place)
        mask = reference.anchor_attention(q, k, v, theta=3.0, **place)[2]
        visible, anchor = 4 * int(reference.visible_mask(geo).sum()), 4 * int(reference.anchor_mask(geo).sum())
        assert (kept.kept, kept.visible, kept.anchor) == (int(mask.sum()), visible, anchor)
        assert kept.candidates == visible - anchor
        assert kept.density == int(mask.sum()) / visible
        assert kept.stripe_density == (None if window == 1 else (int(mask.sum()) - anchor) / kept.candidates)


def test_output_error() -> None:
    exact = torch.ones(1, 2, 5, 4)
    out = exact.clone()
    out[0, 1] *= 1.5
    assert measures.output_error(out, exact) == pytest.approx((0.25, 0.5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_hardware_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_device("auto") == CPU
    assert resolve_backend("auto", CPU).name == "torch"
    with pytest.raises(MissingBackendError, match="no CUDA GPU"):
        resolve_device("cuda")
    with pytest.raises(MissingBackendError, match=r"needs a CUDA GPU|not installed"):
        resolve_backend("triton", CPU)
    for name in ("tpu", "meta", ""):
        with pytest.raises(InputError, match="--device"):
            resolve_device(name)
    with pytest.raises(InputError, match="--backend"):
        resolve_backend("cuda", CPU)


def test_every_dense_name_is_one_that_can_run() -> None:
    from anchorscope.bench.dense import NAMES, SDPA

    assert sorted(NAMES) == sorted([*SDPA, "flex"])
