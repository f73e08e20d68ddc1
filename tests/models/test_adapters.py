"""PEFT adapters: those of weights run in capture, evaluate and sparse attention; all others are refused by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from families import collect, prompt, recompute, relative, tiny
from sparse_models import SMALL, brute_force

from anchorscope import attention_clock, sparse_attention
from anchorscope.anchors import AnchorConfig
from anchorscope.capture import capture_model
from anchorscope.errors import InputError
from anchorscope.models import PromptInput, model_facts
from anchorscope.models.adapters import unwrapped

QK = ["q_proj", "k_proj"]
OF_WEIGHTS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(target_modules=QK, init_lora_weights=False),
    "DORA": lambda: peft.LoraConfig(target_modules=QK, init_lora_weights=False, use_dora=True),
    "LORA and head": lambda: peft.LoraConfig(target_modules=QK, init_lora_weights=False, modules_to_save=["lm_head"]),
    "IA3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LOHA": lambda: peft.LoHaConfig(target_modules=QK, init_weights=False),
    "OFT": lambda: peft.OFTConfig(target_modules=QK, oft_block_size=4, r=0, init_weights=False),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"], init_weights=False),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16, num_attention_heads=6, num_layers=3
    ),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(kind: str, seed: int = 11) -> Any:
    model = tiny()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, (OF_WEIGHTS | REFUSED)[kind]()).eval()


def ids() -> torch.Tensor:
    return torch.tensor([prompt().token_ids])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def fingerprint(model: Any) -> str:
    return model_facts(model)["fingerprint"]


@pytest.mark.parametrize("kind", OF_WEIGHTS)
def test_capture(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    assert not torch.equal(logits(model), logits(tiny()))
    dump = capture_model(model, [prompt()], tmp_path / "dump", notify=lambda _: None)
    calls, base = collect(model, prompt().token_ids or ()), collect(tiny(), prompt().token_ids or ())
    for entry in dump.entries:
        assert torch.equal(dump.load(entry).q, calls[entry.layer].q[0])
        assert not torch.equal(dump.load(entry).q, base[entry.layer].q[0])
        assert relative(recompute(dump, entry), calls[entry.layer].output[0].transpose(0, 1).double()) < 2e-5
    assert dump.model["class"] == "LlamaForCausalLM"
    assert dump.model["fingerprint"] == fingerprint(model)


@pytest.mark.parametrize("kind", OF_WEIGHTS)
def test_sparse_attention(kind: str) -> None:
    model, config = adapted(kind), AnchorConfig.uniform(0.5, range(3), 6, SMALL)
    own = logits(model)
    with sparse_attention(model, AnchorConfig.uniform(math.inf, range(3), 6, SMALL)) as run:
        assert float((logits(model) - own).abs().max()) < 1e-5
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    with sparse_attention(model, config) as run:
        ours = logits(model)
    with brute_force(model.get_base_model(), config):
        assert float((logits(model) - ours).abs().max()) < 1e-5
    assert float((ours - own).abs().max()) > 1e-4
    with attention_clock(model) as clock:
        assert torch.equal(logits(model), own)
    assert [x.calls for x in clock.layers()] == [1] * 3


def test_generation_inside() -> None:
    model, options = adapted("LORA"), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    own = model.generate(input_ids=ids(), **options)
    with sparse_attention(model, AnchorConfig.uniform(math.inf, range(3), 6, SMALL)) as run:
        assert torch.equal(model.generate(input_ids=ids(), **options), own)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_part_of_the_layers_is_refused(kind: str, tmp_path: Path) -> None:
    from anchorscope.evaluation import evaluate

    model = adapted(kind)
    anchors = AnchorConfig.uniform(1.0, range(3), 6, SMALL)

    def enter(context: contextlib.AbstractContextManager[Any]) -> None:
        with context:
            pass

    for run in (
        lambda: capture_model(model, [prompt()], tmp_path / "dump", notify=lambda _: None),
        lambda: evaluate(model, tmp_path / "evaluation", arms={"a": anchors}, prompts=[prompt()]),
        lambda: enter(sparse_attention(model, anchors)),
        lambda: enter(attention_clock(model)),
        lambda: model_facts(model),
    ):
        with pytest.raises(InputError, match=rf"^the {kind} adapter .* not those of this model: merge it") as caught:
            run()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "dump").exists()
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("kind", sorted(REFUSED.keys() - {"ADAPTION_PROMPT"}))
def test_the_base_model_of_a_refused_adapter_runs(kind: str) -> None:
    model = adapted(kind)
    assert fingerprint(model.get_base_model()) == fingerprint(tiny())
    with model.disable_adapter():
        assert fingerprint(model) == fingerprint(tiny())


def test_an_adaption_prompt_is_found_without_its_wrapper() -> None:
    model = adapted("ADAPTION_PROMPT")
    with pytest.raises(InputError, match=r"^the ADAPTION_PROMPT adapter adds a second attention"):
        model_facts(model.get_base_model())
    with model.disable_adapter():
        assert fingerprint(model.get_base_model()) == fingerprint(tiny())


def test_wrappers_that_add_to_the_logits_are_refused() -> None:
    """Whatever an adapter is called: one that its base model does not contain is found by its logits."""
    model = adapted("LORA")
    forward = model.forward

    def more(*args: Any, **options: Any) -> Any:
        result = forward(*args, **options)
        result.logits = result.logits + 1
        return result

    model.forward = more
    with pytest.raises(InputError, match=r"the .*LORA adapter changes what comes out of it"):
        unwrapped(model)


def test_fingerprints() -> None:
    base = fingerprint(tiny())
    model = adapted("LORA")
    own = fingerprint(model)
    assert own == fingerprint(model.get_base_model()) == fingerprint(adapted("LORA"))
    assert len({base, own, fingerprint(adapted("LORA", seed=12)), fingerprint(adapted("IA3"))}) == 4
    with model.disable_adapter():
        assert fingerprint(model) == base
    assert fingerprint(model) == own

    torch.manual_seed(13)
    model.add_adapter("second", peft.LoraConfig(target_modules=QK, init_lora_weights=False))
    assert fingerprint(model) == own  # loaded, but not at work
    model.set_adapter("second")
    assert fingerprint(model) not in (base, own)
    model.set_adapter("default")
    assert fingerprint(model) == own
    for name, module in model.named_modules():
        if name.endswith("layers.1.self_attn.q_proj"):
            module.scaling["default"] *= 2
    assert fingerprint(model) != own


def test_merged_adapters_are_another_model() -> None:
    base = fingerprint(tiny())
    model = adapted("LORA")
    own = logits(model)
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(merged), own, atol=1e-5)
    assert fingerprint(merged) != base
    in_place = adapted("LORA")
    in_place.merge_adapter()
    assert fingerprint(in_place) != base
    in_place.unmerge_adapter()
    assert fingerprint(in_place) == fingerprint(adapted("LORA"))


def test_anchors_of_the_base_model_do_not_fit_silently() -> None:
    base, model = tiny(), adapted("LORA")
    config = AnchorConfig(AnchorConfig.uniform(1.0, range(3), 6, SMALL).layers, model_facts(base))
    with pytest.raises(InputError, match="their fingerprint differs"), sparse_attention(model, config):
        pass
    with sparse_attention(model, config, force=True) as run:
        logits(model)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3
    with model.disable_adapter(), sparse_attention(model, config):
        assert not torch.equal(logits(model), logits(base))


def test_adapters_added_by_transformers() -> None:
    from transformers.integrations.peft import MIN_PEFT_VERSION

    model = tiny()
    base = fingerprint(model)
    torch.manual_seed(11)
    try:
        from transformers.utils.peft_utils import check_peft_version
    except ImportError:
        pytest.skip("this transformers adds adapters in another way")
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(str(error))
    model.add_adapter(peft.LoraConfig(target_modules=QK, init_lora_weights=False))
    model.eval()
    assert fingerprint(model) == fingerprint(adapted("LORA"))
    model.disable_adapters()
    assert fingerprint(model) == base


@pytest.mark.parametrize("kind", ["mixed", "tuner alone"])
def test_other_wrappers_of_peft(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(11)
    config = peft.LoraConfig(target_modules=QK, init_lora_weights=False)
    model = peft.PeftMixedModel(tiny(), config) if kind == "mixed" else peft.LoraModel(tiny(), config, "default")
    model.eval()
    assert fingerprint(model) not in (fingerprint(tiny()), fingerprint(adapted("IA3")))
    dump = capture_model(model, [prompt()], tmp_path / "dump", notify=lambda _: None)
    assert dump.model["class"] == "LlamaForCausalLM"
    assert dump.model["fingerprint"] == fingerprint(model)
    with sparse_attention(model, AnchorConfig.uniform(math.inf, range(3), 6, SMALL)) as run:
        logits(model)
    assert [x.kind for x in run.layers()] == ["sparse"] * 3


def test_compiled_models_are_unwrapped(tmp_path: Path) -> None:
    compiled = torch.compile(adapted("LORA"), backend="eager")
    dump = capture_model(compiled, [PromptInput("p", token_ids=prompt().token_ids)], tmp_path, notify=lambda _: None)
    assert dump.model["fingerprint"] == fingerprint(adapted("LORA"))
