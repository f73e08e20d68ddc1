"""Every capture proves its model: predictions of the last tokens, and weights that are there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.dumps import DumpWriter, open_dump
from anchorscope.errors import DumpError, InputError
from anchorscope.models import PromptInput, prefill
from anchorscope.models import proof as models_proof
from anchorscope.models.memory import LiveBytes, logits_bytes, prefill_curve
from anchorscope.models.proof import NextTokens, prove_model, prove_prompt
from anchorscope.proof import PromptProof

transformers = pytest.importorskip("transformers")

from families import prompt, quiet, tiny  # noqa: E402


def expected(model: Any, ids: tuple[int, ...], scored: int = 256) -> tuple[float, float]:
    """Mean nats and accuracy of the last tokens, from all logits of one forward, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(ids[1:])
    nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    right = (logits.argmax(-1) == targets).double()
    return float(nll[-scored:].mean()), float(right[-scored:].mean())


def counting(**changes: Any) -> Any:
    """A model that is right: its first choice after token t is t + 1, by its embedding and head alone."""
    model = tiny(max_position_embeddings=1024, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1)))
        head.copy_(embedding.roll(1, 0))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def ascending(count: int) -> PromptInput:
    return PromptInput("p", token_ids=tuple(3 + i % 90 for i in range(count)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])  # plain, capped, scaled logits
@pytest.mark.parametrize(("tokens", "chunk"), [(400, None), (400, 150), (400, 399), (80, None), (80, 7), (2, None)])
def test_the_proof_is_what_the_whole_model_predicts(
    tmp_path: Path, family: str, tokens: int, chunk: int | None
) -> None:
    model = tiny(family, max_position_embeddings=1024)
    p = prompt(tokens)
    dump = capture_model(model, [p], tmp_path / "d", chunk=chunk, notify=quiet)
    found = dump.prompts[0].proof
    assert found is not None
    assert (found.tokens, found.context, found.vocabulary) == (min(256, tokens - 1), tokens, 97)
    nats, accuracy = expected(model, p.token_ids or ())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
    stored = dump.manifest["prompts"][0]["proof"]
    assert stored["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_only_the_scored_rows_of_the_logits_are_made(tmp_path: Path) -> None:
    model, rows = tiny(max_position_embeddings=1024), []
    model.lm_head.register_forward_hook(lambda m, x, out: rows.append(out.shape[1]))
    dump = capture_model(model, [prompt(700)], tmp_path / "d", notify=quiet)
    assert dump.prompts[0].proof is not None
    assert dump.prompts[0].proof.tokens == 256
    assert max(rows) == 257
    assert sum(n for n in rows if n > 16) == 257  # the trial runs before make 16 rows at most


SHAPES = {  # hidden, layers, MLP, heads, kv heads, vocabulary: SmolLM2-135M, Llama-3.1-8B, Qwen2.5-7B
    "small": (576, 30, 1536, 9, 3, 49152),
    "llama": (4096, 32, 14336, 32, 8, 128256),
    "qwen": (3584, 28, 18944, 28, 4, 152064),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_proof_costs_under_two_percent_of_the_operations(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, layers, inner, heads, kv, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    scored: list[int] = []
    monkeypatch.setattr(models_proof, "score", lambda logits, targets: scored.append(len(logits)))
    # looks at values, which there are none of; None says that no sequences are packed
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None)
    ids, counts = [5] * 8192, []
    for rows in (False, True):
        with FlopCounterMode(display=False) as counter:
            if rows:
                with NextTokens(model, ids):
                    prefill(model, ids)
            else:
                prefill(model, ids)
        # attention left out, which is the same in both: its count ignores that half of the pairs are masked
        flops = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in flops.items() if "attention" not in str(op)))
    assert scored == [256]
    assert counts[1] - counts[0] == 2 * 256 * hidden * vocabulary
    assert counts[1] <= 1.02 * counts[0]


def test_logits_are_in_the_memory_estimate() -> None:
    model, ids = tiny("gemma2", vocab_size=20_000, max_position_embeddings=1024), prompt(400).token_ids or ()
    with LiveBytes() as live, NextTokens(model, ids):
        prefill(model, ids)
    curve = prefill_curve(model, ids, len(ids), None)
    assert max(live.events) > 1.2 * curve.bytes(len(ids))  # the logits are most of it here, the cap included
    whole = type(curve)(curve.lengths, curve.points, curve.unit, curve.tokens, logits_bytes(model, ids, 257))
    assert whole.bytes(len(ids)) == pytest.approx(max(live.events), rel=0.1)


def test_a_capture_that_stops_early_is_proven_by_a_short_run(tmp_path: Path) -> None:
    model, p = tiny(max_position_embeddings=2048), prompt(1500)
    found = capture_model(model, [p], tmp_path / "d", layers=[0], notify=quiet).prompts[0].proof
    assert found is not None
    assert (found.tokens, found.context) == (256, 512)
    short, long = (expected(model, (p.token_ids or ())[-n:])[0] for n in (512, 1500))
    assert found.nats == pytest.approx(short, rel=1e-5)
    assert abs(short - long) > 1e-4  # the comparison can fail
    # where the rest of the model costs no more than the short run, the prompt itself is run to the end
    late = capture_model(model, [p], tmp_path / "e", layers=[2], notify=quiet).prompts[0].proof
    assert late is not None
    assert (late.tokens, late.context) == (256, 1500)
    assert late.nats == pytest.approx(long, rel=1e-5)


def test_a_short_run_rotates_like_a_prompt_of_its_own(tmp_path: Path) -> None:
    """Dynamic scaling remembers the longest prompt so far: the short run behind it must not."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny(max_position_embeddings=256, rope_parameters=rope)
    p = prompt(900)
    found = capture_model(model, [p], tmp_path / "d", layers=[0], notify=quiet).prompts[0].proof
    fresh = tiny(max_position_embeddings=256, rope_parameters=rope)
    assert found is not None
    assert found.context == 512
    assert found.nats == pytest.approx(expected(fresh, (p.token_ids or ())[-512:])[0], rel=1e-6)
    with torch.no_grad():
        fresh(torch.tensor([p.token_ids]))
    used = expected(fresh, (p.token_ids or ())[-512:])[0]
    assert abs(used - found.nats) > 1e-5  # the comparison can fail


def test_random_weights_are_called_near_chance_and_right_ones_are_not(tmp_path: Path) -> None:
    for model, near in ((counting(), False), (tiny(), True)):
        said: list[str] = []
        dump = capture_model(model, [ascending(90)], tmp_path / str(near), notify=said.append)
        found = dump.prompts[0].proof
        assert found is not None
        assert found.near_chance is near
        doubts = [line for line in said if "better than chance" in line]
        assert len(doubts) == near
        assert all("vocabulary 97" in line and "prompt p" in line for line in doubts)
        assert (found.accuracy == 1) is not near


def test_a_prompt_of_another_tokenizer_is_called_near_chance(tmp_path: Path) -> None:
    model = counting()
    noise = PromptInput("noise", token_ids=tuple(3 + 37 * i % 90 for i in range(90)))
    said: list[str] = []
    capture_model(model, [ascending(90), noise], tmp_path / "d", notify=said.append)
    assert [line.split("prompt ")[1].split()[0] for line in said if "than chance" in line] == ["noise"]


def test_logits_that_are_not_finite_are_said(tmp_path: Path) -> None:
    model, said = tiny(), []
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    dump = capture_model(model, [prompt()], tmp_path / "d", notify=said.append)
    assert dump.manifest["prompts"][0]["proof"]["reason"] == "its logits hold NaN or infinity"
    assert any("hold NaN or infinity" in line and line.startswith("warning") for line in said)


def test_models_without_a_head_or_the_option_say_so(tmp_path: Path) -> None:
    dump = capture_model(tiny().model, [prompt()], tmp_path / "base", notify=quiet)
    assert dump.prompts[0].proof == PromptProof(0, 80, reason="LlamaModel has no language-model head")

    class Plain(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = tiny(max_position_embeddings=1024)
    plain = Plain(model.config).eval()
    plain.load_state_dict(model.state_dict())
    p = prompt(700)
    found = capture_model(plain, [p], tmp_path / "plain", notify=quiet).prompts[0].proof
    assert found is not None
    assert found.context == 512
    assert found.nats == pytest.approx(expected(model, (p.token_ids or ())[-512:])[0], rel=1e-5)


@pytest.mark.parametrize("layers", [None, [0]])
def test_a_resumed_dump_has_the_same_proof(
    tmp_path: Path, layers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(max_position_embeddings=1024)
    request: dict[str, Any] = {"layers": layers, "notify": quiet}
    prompts = [prompt(800, "a"), prompt(60, "b", seed=2)]
    straight = capture_model(model, prompts, tmp_path / "straight", **request)
    assert [p.proof and p.proof.context for p in straight.prompts] == [800 if layers is None else 512, 60]

    def normal(folder: Path) -> str:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["created"], manifest["sha256"]
        return json.dumps(manifest)

    prove = DumpWriter.prove
    for stop in range(len(straight.entries) + 1):
        folder = tmp_path / f"stopped{stop}"

        def press(event: Any, stop: int = stop) -> None:
            if event.done == stop:
                raise KeyboardInterrupt

        def cut(*_: Any) -> None:
            raise KeyboardInterrupt

        # after each layer, and (the last time) between a prompt's last layer and its proof
        last = stop == len(straight.entries)
        monkeypatch.setattr(DumpWriter, "prove", cut if last else prove)
        with pytest.raises(KeyboardInterrupt):
            capture_model(model, prompts, folder, **request, progress=None if last else press)
        monkeypatch.setattr(DumpWriter, "prove", prove)
        capture_model(model, prompts, folder, **request, resume=True)
        assert normal(folder) == normal(tmp_path / "straight")


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        (7, "must be an object"),
        ({"tokens": "x"}, "whole numbers"),
        ({"tokens": 1, "context": 2, "vocabulary": 9, "nats": -1}, "nats"),
        ({"tokens": 1, "context": 2, "vocabulary": 9, "nats": 1, "accuracy": 2}, "accuracy"),
        ({"tokens": 1, "context": 2, "vocabulary": 9, "reason": 3}, "reason text"),
    ],
)
def test_a_damaged_proof_is_refused(tmp_path: Path, proof: Any, message: str) -> None:
    path = capture_model(tiny(), [prompt(20)], tmp_path / "d", notify=quiet).path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["prompts"][0]["proof"] = proof
    path.write_text(json.dumps(manifest))
    with pytest.raises(DumpError, match=message):
        open_dump(path.parent)
    manifest["prompts"][0].pop("proof")
    manifest.pop("proof")
    path.write_text(json.dumps(manifest))
    assert open_dump(path.parent).prompts[0].proof is None  # hand-written dumps need none


def test_a_proof_survives_its_json() -> None:
    for proof in (PromptProof(256, 512, 97, 1.25, 0.5), PromptProof(0, 9, reason="no head")):
        assert PromptProof.from_json(json.loads(json.dumps(proof.to_json()))) == proof
    assert PromptProof(256, 512, 97, 5000.0).to_json()["perplexity"] < math.inf


def checkpoint_without(folder: Path, name: str) -> Any:
    """A model whose checkpoint lacks one tensor, loaded as anybody would."""
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if name:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_no_checkpoint_held_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    assert prove_model(checkpoint_without(tmp_path / "whole", "")).warnings == ()
    assert prove_model(tiny()).warnings == ()  # made in memory: nothing is known
    model = checkpoint_without(tmp_path / "lacking", name).to(torch.bfloat16)
    (warning,) = prove_model(model).warnings
    assert warning.startswith(f"1 weights of LlamaForCausalLM were in no checkpoint ({name})")
    said: list[str] = []
    dump = capture_model(model, [prompt()], tmp_path / "d", notify=said.append)
    assert f"warning: {warning}" in said
    assert dump.manifest["proof"] == {"loader": None, "warnings": [warning]}


def test_adapters_come_from_files_of_their_own(tmp_path: Path) -> None:
    model = checkpoint_without(tmp_path / "m", "")

    class Adapted(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = layer
            self.lora_A = torch.nn.Linear(4, 4)

    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    assert prove_model(model).warnings == ()
    attention.extra = torch.nn.Linear(4, 4, bias=False)
    assert "self_attn.extra.weight" in prove_model(model).warnings[0]


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny().config).eval()
    with pytest.raises(InputError, match=r"weights without values, on the device meta \(model.embed_tokens.weight"):
        capture_model(model, [prompt()], tmp_path / "d", notify=quiet)
    assert not (tmp_path / "d").exists()


def test_offloaded_weights_have_values(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, direct = tiny(), tiny()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert any(x.device.type == "meta" for x in model.parameters())
    assert prove_model(model).warnings == ()
    ids = prompt().token_ids or ()
    assert prove_prompt(model, ids) == prove_prompt(direct, ids)


def test_weights_on_disk_are_of_their_checkpoint(tmp_path: Path) -> None:
    """The loader marks what it reads, but not what it leaves on disk."""
    pytest.importorskip("accelerate")
    tiny().save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "model.rotary_emb": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map={**places, "lm_head": "cpu"}, offload_folder=tmp_path / "disk"
    )
    assert {x.device.type for x in model.parameters()} == {"cpu", "meta"}
    assert prove_model(model.eval()).warnings == ()
