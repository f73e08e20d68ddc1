"""Arms in lockstep: what changes nothing changes nothing, chunks equal the whole, answers equal `generate`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from byte_model import byte_model

from anchorscope.anchors import AnchorConfig
from anchorscope.evaluation.lanes import (
    DENSE,
    Arm,
    Lane,
    LaneOptions,
    PrefillWork,
    group_multiple,
    run_prompt,
    run_sample,
    spans,
)
from anchorscope.evaluation.tasks import Sample
from anchorscope.params import AnchorParams

PARAMS = AnchorParams(16, 2)


def arm(theta, name="sparse", layers=range(3), params=PARAMS):
    return Arm(name, AnchorConfig.uniform(theta, list(layers), 6, params))


def ids(count, seed=0):
    return torch.randint(1, 257, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("tokens", "chunk", "want"),
    [
        (10, None, [(0, 10)]),
        (10, 10, [(0, 10)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (9, 4, [(0, 4), (4, 9)]),  # a single token would count as decoding
        (1, 4, [(0, 1)]),
    ],
)
def test_spans(tokens, chunk, want):
    assert spans(tokens, chunk) == want


def test_chunks_hold_whole_groups_of_every_arm():
    arms = [arm(1.0), arm(1.0, params=AnchorParams(8, 3)), Arm(DENSE, None)]
    assert group_multiple(arms) == 96
    assert group_multiple([]) == 1


def test_everything_selected_is_dense_and_the_anchor_region_alone_is_not(model):
    arms = [arm(math.inf, "all"), arm(-math.inf, "none")]
    found = run_prompt(model, arms, ids(400), LaneOptions(64), measure=True)
    dense, everything, nothing = (found[name] for name in (DENSE, "all", "none"))
    assert everything[0].kl.max() < 1e-5
    assert everything[0].agree.mean() > 0.999
    np.testing.assert_allclose(everything[0].nll, dense[0].nll, atol=1e-4)
    assert everything[1].density == 1
    assert everything[1].recall == pytest.approx(1, abs=1e-5)
    assert nothing[0].kl.mean() > 100 * max(everything[0].kl.mean(), 1e-9)
    assert nothing[1].density < 0.5
    assert 0 < nothing[1].recall < 0.99
    assert dense[1].density == 1
    assert {work.tokens for _, work in found.values()} == {400}
    assert all(work.attention_seconds > 0 for _, work in found.values())


@pytest.mark.parametrize(("family", "layers"), [("llama", [0, 1, 2]), ("gemma3_text", [2])])  # there 0 and 1 slide
def test_chunks_equal_the_whole(family, layers):
    net = byte_model(family)
    arms = [arm(0.5, layers=layers)]
    whole, parts = (run_prompt(net, arms, ids(300), LaneOptions(c), measure=False) for c in (None, 64))
    for name in (DENSE, "sparse"):
        for metric in ("nll", "kl"):
            np.testing.assert_allclose(
                getattr(parts[name][0], metric), getattr(whole[name][0], metric), atol=2e-4, err_msg=f"{name} {metric}"
            )
    assert parts["sparse"][1].density == pytest.approx(whole["sparse"][1].density, abs=1e-3)
    assert len(whole[DENSE][0].nll) == 299


def test_dense_equals_the_model(model):
    tokens = ids(150)
    with torch.inference_mode():
        p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    want = -p[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for chunk in (None, 32):
        found = run_prompt(model, [], tokens, LaneOptions(chunk), measure=False)
        np.testing.assert_allclose(found[DENSE][0].nll, want, atol=1e-4)


def sample(tokens, answer=(5, 6, 7), budget=9):
    return Sample("needle", len(tokens) + budget, 0.5, 0, tuple(tokens), tuple(answer), ("never",), budget)


def decode(found):
    return " ".join(map(str, found))


@pytest.mark.parametrize("chunk", [None, 32])
def test_answers_equal_generate(model, chunk):
    tokens = ids(100)
    found = run_sample(
        model, Arm(DENSE, None), sample(tokens), LaneOptions(chunk), measure=False, dense=None, decode=decode
    )
    want = model.generate(torch.tensor([tokens]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 100:]
    assert found.text == decode(want.tolist())
    assert found.score == 0
    with torch.inference_mode():
        logits = model(torch.tensor([[*tokens, 5, 6]])).logits[0, -3:]
    want = -logits.double().log_softmax(-1).gather(1, torch.tensor([[5], [6], [7]]))[:, 0]
    np.testing.assert_allclose(found.scores.nll, want, atol=1e-4)
    assert found.work.tokens == 100
    assert not found.scores.kl.any()


def test_sparse_answers_are_compared_with_dense_ones(model):
    question = sample(ids(400))
    dense = run_sample(model, Arm(DENSE, None), question, LaneOptions(64), measure=False, dense=None, decode=decode)
    same, other = (
        run_sample(model, arm(theta), question, LaneOptions(64), measure=True, dense=dense, decode=decode)
        for theta in (math.inf, -math.inf)
    )
    assert same.text == dense.text
    assert same.scores.kl.max() < 1e-5
    assert other.scores.kl.mean() > 100 * max(same.scores.kl.mean(), 1e-9)
    # only the prefill is sparse: what is decoded is not counted
    assert other.work.layers[0].queries == 400
    assert other.work.recall < same.work.recall == pytest.approx(1, abs=1e-5)


def test_an_answer_ends_when_everything_is_found_or_the_model_ends_it(model):
    tokens = ids(60)
    first = int(model.generate(torch.tensor([tokens]), max_new_tokens=1, pad_token_id=0, do_sample=False)[0, -1])
    found = Sample("needle", 70, None, 0, tuple(tokens), (5,), (str(first),), 9)
    options = {"measure": False, "dense": None, "decode": decode}
    answer = run_sample(model, Arm(DENSE, None), found, LaneOptions(None), **options)
    assert (answer.text, answer.score, len(answer.scores.nll)) == (str(first), 1.0, 1)
    net = byte_model()
    net.generation_config.eos_token_id = [first]
    assert run_sample(net, Arm(DENSE, None), sample(tokens), LaneOptions(None), **options).text == str(first)


def test_models_without_chunks_decode_token_by_token():
    net = byte_model("jamba")
    tokens = ids(40)
    found = run_sample(
        net,
        Arm(DENSE, None),
        sample(tokens),
        LaneOptions(None, stepwise=True),
        measure=False,
        dense=None,
        decode=decode,
    )
    with torch.inference_mode():
        logits = net(torch.tensor([[*tokens, 5, 6]]), use_cache=False).logits[0, -3:]
    want = -logits.double().log_softmax(-1).gather(1, torch.tensor([[5], [6], [7]]))[:, 0]
    np.testing.assert_allclose(found.scores.nll, want, atol=1e-3)


def test_measuring_is_in_nobodys_time(model, monkeypatch):
    """The seconds of a measured arm are those of its attention and of what dense spent elsewhere."""
    found = run_prompt(model, [arm(0.0)], ids(300), LaneOptions(64), measure=True)
    dense, sparse = found[DENSE][1], found["sparse"][1]
    elsewhere = dense.seconds - dense.attention_seconds
    assert sparse.seconds == pytest.approx(elsewhere + sparse.attention_seconds)
    assert PrefillWork.from_json(sparse.to_json()) == sparse


def test_a_layer_left_dense_keeps_everything(model):
    found = run_prompt(model, [arm(-math.inf, layers=[1])], ids(300), LaneOptions(64), measure=True)
    layers = found["sparse"][1].layers
    assert [layers[i].kind for i in range(3)] == ["dense", "sparse", "dense"]
    assert layers[0].recall == layers[2].recall == 1
    assert layers[0].kept_pairs == layers[0].visible_pairs == 6 * 300 * 301 // 2
    assert layers[1].kept_pairs < layers[1].visible_pairs
    lane = Lane(model, arm(0.0), LaneOptions(None), measure=False)
    with torch.inference_mode():
        lane.step(torch.tensor(ids(200)), every=False, cached=False)
    assert lane.work.recall is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    """The same arms through the GPU kernels, logits compared there, times between synchronisations."""
    net = byte_model(head_dim=64).to("cuda", dtype)
    params = AnchorParams(64, 2)
    arms = [arm(math.inf, "all", params=params), arm(-math.inf, "none", params=params)]
    found = run_prompt(net, arms, ids(1500), LaneOptions(512, "triton"), measure=True)
    assert found["all"][0].kl.mean() < 1e-3 < found["none"][0].kl.mean()
    assert found["all"][1].density == 1 > found["none"][1].density
    assert found["all"][1].recall == pytest.approx(1, abs=1e-3)
    for _, work in found.values():
        assert work.attention_seconds > 0
    assert 0 < found[DENSE][1].attention_seconds < found[DENSE][1].seconds
    dense, sparse = (
        run_sample(
            net, each, sample(ids(900)), LaneOptions(512, "triton"), measure=False, dense=reference, decode=decode
        )
        for each, reference in ((Arm(DENSE, None), None), (arms[1], None))
    )
    assert len(dense.text.split()) == len(sparse.text.split()) == 9
