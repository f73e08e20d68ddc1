"""Prompts in chunks and answers in steps: the same as one forward, or run whole, or refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from byte_model import byte_model

from anchorscope.errors import InputError
from anchorscope.evaluation import evaluate
from anchorscope.evaluation.lanes import DENSE, Arm, LaneOptions, run_sample
from anchorscope.evaluation.tasks import Sample
from anchorscope.models import PromptInput
from anchorscope.params import AnchorParams

ORIGINAL = 200
FACTORS = {"rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, "factor": 4.0}
LONGROPE = {**FACTORS, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PARAMS = AnchorParams(8, 4)


def changing(kind: str) -> Any:
    if kind == "longrope":
        return byte_model("phi3", rope_parameters=copy.deepcopy(LONGROPE), original_max_position_embeddings=ORIGINAL)
    model = byte_model("llama", rope_parameters=dict(DYNAMIC))
    # what the helper sets is the original length of dynamic scaling
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = ORIGINAL
    torch.manual_seed(7)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def ids(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 250, (count,), generator=torch.Generator().manual_seed(3)).tolist())


def nll(model: Any, tokens: tuple[int, ...]) -> np.ndarray:
    """Of each next token, from one forward of the model itself."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_prompts_across_the_switch_run_whole(tmp_path, kind):
    said: list[str] = []
    tokens = ids(320)
    prompts = [PromptInput("p", token_ids=tokens), PromptInput("shorter", token_ids=tokens[:260])]
    request = {"arms": {"a": math.inf}, "params": PARAMS, "prompts": prompts, "figures": False, "chunk": 96}
    found = evaluate(changing(kind), tmp_path / "o", notify=said.append, **request)
    assert any("cannot prefill in chunks: prompts run whole" in x and f"more than {ORIGINAL}" in x for x in said)
    assert found.report["settings"]["chunk"]["prompts"] is None
    for result, prompt in zip(found.prompts, prompts, strict=True):
        want = math.exp(nll(changing(kind), prompt.token_ids).mean())
        assert result["perplexity_dense"] == pytest.approx(want, rel=1e-4)
        assert result["perplexity_sparse"] == pytest.approx(want, rel=1e-4)  # an infinite theta keeps every key
    # up to the switch, chunks stay
    request["prompts"] = [PromptInput("p", token_ids=tokens[:ORIGINAL])]
    found = evaluate(changing(kind), tmp_path / "short", **request)
    assert found.report["settings"]["chunk"]["prompts"] == 96
    assert found.prompts[0]["perplexity_dense"] == pytest.approx(
        math.exp(nll(changing(kind), tokens[:ORIGINAL]).mean()), rel=1e-4
    )


def sample(count: int, budget: int = 12) -> Sample:
    return Sample("needle", count + budget, None, 0, ids(count), (5, 6, 7, 8, 9), ("never",), budget)


def answer(model: Any, question: Sample, *, arm: Arm | None = None, dense: Any = None, stepwise: bool = True) -> Any:
    options = LaneOptions(None, stepwise=stepwise)
    spell = lambda found: " ".join(map(str, found))  # noqa: E731
    return run_sample(model, arm or Arm(DENSE, None), question, options, measure=False, dense=dense, decode=spell)


def test_dynamic_answers_are_those_of_generate():
    """Every token of an answer changes the frequencies; scoring the right one first must not change the model's own."""
    question = sample(260)
    found = answer(changing("dynamic"), question)
    model = changing("dynamic")
    prompt = torch.tensor([question.token_ids])
    want = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 260:]
    assert found.text == " ".join(map(str, want.tolist()))


def test_every_arm_begins_anew():
    from anchorscope.anchors import AnchorConfig

    model, question = changing("dynamic"), sample(260)
    dense = answer(model, question)
    everything = Arm("a", AnchorConfig.uniform(math.inf, [0, 1, 2], 6, PARAMS))
    other = answer(model, question, arm=everything, dense=dense)
    assert other.scores.kl.max() < 1e-6
    assert other.text == dense.text


def test_bamba_answers_at_the_right_positions():
    """Its first layer is recurrent, and its cache counts no tokens."""
    model, question = byte_model("bamba"), sample(40)
    found = answer(model, question, stepwise=False)
    want = nll(model, (*question.token_ids, *question.answer_ids))[-5:]
    np.testing.assert_allclose(found.scores.nll, want, atol=1e-4)


def request(tokenizer: Any, length: int) -> dict[str, Any]:
    return {
        "arms": {"a": 1.0},
        "params": PARAMS,
        "tasks": ["needle"],
        "lengths": [length],
        "depths": [0.5],
        "samples": 1,
        "tokenizer": tokenizer,
        "figures": False,
    }


def test_answers_that_cross_the_switch_are_refused(tmp_path, tokenizer):
    def model() -> Any:
        factors = {**copy.deepcopy(LONGROPE), "original_max_position_embeddings": 500}
        return byte_model("phi3", rope_parameters=factors, original_max_position_embeddings=500)

    with pytest.raises(InputError, match=r"answers at length 505 cross the length of 500 tokens.*other --lengths"):
        evaluate(model(), tmp_path / "o", **request(tokenizer, 505))
    assert not (tmp_path / "o").exists()
    for length in (500, 560):
        assert evaluate(model(), tmp_path / str(length), **request(tokenizer, length)).tasks


def test_growing_frequencies_are_told(tmp_path, tokenizer):
    said: list[str] = []
    evaluate(changing("dynamic"), tmp_path / "o", notify=said.append, **request(tokenizer, 500))
    assert any("rotates answers by the length so far (rope type dynamic)" in x for x in said)


def test_models_that_cannot_decode_do_no_tasks(tmp_path, tokenizer):
    net = byte_model("recurrent_gemma")
    with pytest.raises(InputError, match=r"cannot decode answers.*leave out the tasks"):
        evaluate(net, tmp_path / "o", **request(tokenizer, 500))
    jamba = byte_model("jamba")
    said: list[str] = []
    evaluate(jamba, tmp_path / "p", notify=said.append, **request(tokenizer, 500))


def test_lengths_beyond_what_a_model_is_made_for(tmp_path, tokenizer):
    said: list[str] = []
    evaluate(byte_model(max_window_layers=1), tmp_path / "a", notify=said.append, **request(tokenizer, 2100))
    assert any("length 2,100 is beyond the 2,048 tokens that" in x for x in said)
    with pytest.raises(InputError, match=r"length 2,100 is beyond .*'s positions: at most 2,048 tokens"):
        evaluate(byte_model("gpt2", n_positions=2048), tmp_path / "b", **request(tokenizer, 2100))
