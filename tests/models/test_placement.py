"""Where weights lie changes nothing: accelerate's offloading to the CPU and to disk, and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import saved

from anchorscope import AnchorConfig, sparse_attention
from anchorscope.capture import capture_model
from anchorscope.evaluation import evaluate
from anchorscope.models import PromptInput, model_facts
from anchorscope.models.placement import model_device
from anchorscope.params import AnchorParams

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
MAPS: dict[str, dict[str, str]] = {
    "all weights on disk": {**dict.fromkeys(PARTS, "disk"), "model.rotary_emb": "cpu"},
    "embedding on disk": {**dict.fromkeys(PARTS, "cpu"), "model.embed_tokens": "disk"},
    "one layer and the norm on disk": {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk", "model.norm": "disk"},
}
PROMPT = PromptInput("p", token_ids=[(7 * i) % 90 + 3 for i in range(120)])
PARAMS = AnchorParams(16, 2)
SCORES = {"perplexity_dense", "perplexity_sparse", "density", "recall"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("placement") / "m")


def load(folder: Path, places: dict[str, str] | None, room: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(room)).eval()


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_offloaded_weights_give_the_same_fingerprint_dump_and_figures(
    folder: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    whole, spread = load(folder, None, tmp_path), load(folder, places, tmp_path / "offload")
    assert any(p.device.type == "meta" for p in spread.parameters())
    assert model_device(spread).type == "cpu"
    assert model_facts(spread)["fingerprint"] == model_facts(whole)["fingerprint"]

    dumps = [
        capture_model(model, [PROMPT], tmp_path / name, notify=[].append)
        for name, model in (("whole", whole), ("spread", spread))
    ]
    assert [e.sha256 for e in dumps[0].entries] == [e.sha256 for e in dumps[1].entries] != []

    runs = [
        evaluate(model, tmp_path / name, arms={"a": 2.0}, params=PARAMS, prompts=[PROMPT], figures=False)
        for name, model in (("e-whole", whole), ("e-spread", spread))
    ]
    scores = [[{k: v for k, v in row.items() if k in SCORES} for row in run.report["prompts"]] for run in runs]
    assert scores[0] == scores[1]
    assert set(scores[0][0]) == SCORES

    config = AnchorConfig.uniform(2.0, [0, 1], 4, PARAMS)
    logits = []
    for model in (whole, spread):
        with torch.no_grad(), sparse_attention(model, config, measure=True) as run:
            logits.append(model(torch.tensor([PROMPT.token_ids]), use_cache=False).logits)
        assert all(x.kind == "sparse" and x.density < 1 for x in run.layers())
    assert torch.equal(*logits)


def test_another_training_run_is_told_apart_on_disk(folder: Path, tmp_path: Path) -> None:
    first = load(folder, MAPS["all weights on disk"], tmp_path / "a")
    changed = load(folder, None, tmp_path)
    with torch.no_grad():
        changed.model.norm.weight[3] += 1
    changed.save_pretrained(tmp_path / "changed")
    second = load(tmp_path / "changed", MAPS["all weights on disk"], tmp_path / "b")
    assert model_facts(first)["fingerprint"] != model_facts(second)["fingerprint"]
