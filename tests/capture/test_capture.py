"""Capture on tiny random models: the dump is what attention consumed, and the model never notices."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope.capture import capture_model
from anchorscope.capture.request import CaptureRequest
from anchorscope.dumps import Entry, open_dump, verify
from anchorscope.errors import InputError, MissingBackendError, RunFailure
from anchorscope.models import AttentionCall, PromptInput, intercept, prefill

transformers = pytest.importorskip("transformers")

from families import N, collect, prompt, quiet, recompute, tiny  # noqa: E402

CORE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")  # plain, windows, norms, caps
WINDOWS = {"qwen2": [None, None, 24], "gemma2": [24, None, 24], "gemma3_text": [24, 24, None]}
# transformers' sdpa refuses soft-caps, so gemma2 runs eager only, as it does by default
CASES = [(f, a) for f in CORE for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_attention_from_the_dump_is_the_models_own(tmp_path: Path, family: str, attention: str) -> None:
    model = tiny(family, attn_implementation=attention)
    p = prompt()
    calls = collect(model, p.token_ids)
    dump = capture_model(model, [p], tmp_path / "d", notify=quiet)
    assert [e.layer for e in dump.entries] == [0, 1, 2]
    assert [e.window for e in dump.entries] == WINDOWS.get(family, [None] * 3)
    assert {e.softcap for e in dump.entries} == {4.0 if family == "gemma2" else None}
    for entry in dump.entries:
        call, t = calls[entry.layer], dump.load(entry)
        assert torch.equal(t.q, call.q[0])  # as consumed: after rotary and norms, K and V not repeated
        assert torch.equal(t.k, call.k[0])
        assert torch.equal(t.v, call.v[0])
        output = call.output[0].transpose(0, 1).double()
        assert float((recompute(dump, entry) - output).abs().max()) < 1e-5 * float(output.abs().max())
    # the comparison above can fail: a shifted window or another scale is seen
    wrong = Entry(**{**vars(dump.entries[0]), "scale": dump.entries[0].scale * 1.01})
    shift = (recompute(dump, wrong) - recompute(dump, dump.entries[0])).abs().max()
    assert float(shift) > 1e-4


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_logits_are_bit_equal_and_the_model_is_restored(family: str, attention: str) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    model = tiny(family, attn_implementation=attention)
    ids = torch.tensor([prompt().token_ids])
    before = (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    with torch.no_grad():
        plain = model(ids).logits
        with intercept(model, lambda call: None):
            assert model.config._attn_implementation != attention  # it is hooked
            hooked = model(ids).logits
    assert torch.equal(plain, hooked)

    def fail(call: AttentionCall) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), torch.no_grad(), intercept(model, fail):
        model(ids)
    assert model.config._attn_implementation == attention
    for was, now in zip(before, (AttentionInterface, AttentionMaskInterface), strict=True):
        added = now._global_mapping.keys() - was.keys()
        assert was.items() <= now._global_mapping.items()
        assert all(name.startswith("anchorscope_in_front_of_") for name in added)  # names that no model is set to
    with torch.no_grad():
        assert torch.equal(plain, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize(("tokens", "chunk"), [(N, 17), (N, 40), (N, 79), (30, 1)])
def test_chunked_prefill_gives_the_same_dump(tmp_path: Path, family: str, tokens: int, chunk: int) -> None:
    model, p = tiny(family), prompt(tokens)
    whole = capture_model(model, [p], tmp_path / "whole", notify=quiet)
    parts = capture_model(model, [p], tmp_path / "parts", notify=quiet, chunk=chunk)
    assert verify(parts).state == "verified"
    for a, b in zip(whole.entries, parts.entries, strict=True):
        assert (a.layer, a.scale, a.window, a.softcap) == (b.layer, b.scale, b.window, b.softcap)
        one, two = whole.load(a), parts.load(b)
        for x, y in ((one.q, two.q), (one.k, two.k), (one.v, two.v)):
            assert float((x - y).abs().max()) < 2e-5 * float(x.abs().max())


def test_logits_are_made_for_the_last_position_only() -> None:
    model, ids = tiny(), prompt().token_ids
    logits = prefill(model, ids)
    assert logits is not None
    with torch.no_grad():
        assert torch.allclose(logits[0, 0], model(torch.tensor([ids])).logits[0, -1], atol=1e-4)
    assert logits.shape == (1, 1, 97)


def test_selected_layers_heads_dtype_and_values(tmp_path: Path) -> None:
    model, p = tiny(), prompt()
    calls = collect(model, p.token_ids)
    dump = capture_model(
        model, [p], tmp_path / "d", layers=[2, 0], kv_heads=[1], dtype="bf16", values=False, notify=quiet
    )
    assert [(e.layer, e.query_heads, e.kv_heads, e.dtype) for e in dump.entries] == [
        (0, (3, 4, 5), (1,), "bf16"),
        (2, (3, 4, 5), (1,), "bf16"),
    ]
    t = dump.load(dump.entries[1])
    assert torch.equal(t.q, calls[2].q[0, 3:].bfloat16())
    assert torch.equal(t.k, calls[2].k[0, 1:].bfloat16())
    assert t.v is None
    assert t.kv_index(4) == 0


def test_early_stop_runs_no_later_layer(tmp_path: Path) -> None:
    model = tiny(max_position_embeddings=1024)
    ran: list[int] = []  # layers whose MLP saw the whole prompt; the proof's short run has other lengths
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, x, i=i: ran.append(i) if x[0].shape[1] in (800, 64) else None)
        for i, layer in enumerate(model.model.layers)
    ]

    def forget(line: str) -> None:
        if line.startswith("memory"):  # the trial runs are over
            assert set(ran) == {0, 1, 2}
            ran.clear()

    capture_model(model, [prompt(800)], tmp_path / "d", layers=[0], notify=forget)
    for hook in hooks:
        hook.remove()
    assert ran == []  # the real run ends inside layer 0's attention


def test_several_prompts_and_what_is_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    prompts = [prompt(60, "a"), prompt(60, "a", seed=1), prompt(9, "short")]
    dump = capture_model(tiny(), prompts, tmp_path / "d", tokens=50, notify=said.append)
    assert [(p.name, p.tokens) for p in dump.prompts] == [("a", 50), ("a-2", 50), ("short", 9)]
    assert dump.prompts[1].token_ids == list(prompts[1].token_ids or ())[:50]
    assert dump.prompts[0].sha256 != dump.prompts[1].sha256
    assert any("short has 9 tokens, fewer than the 50" in line for line in said)
    assert any("need" in line and "kB" in line for line in said)
    model = dump.model
    assert model is not None
    assert (model["type"], model["layers"], model["query_heads"], model["kv_heads"]) == ("llama", 3, 6, 2)
    assert dump.manifest["dtype"] == "fp32"
    assert str(tmp_path) not in (dump.path / "manifest.json").read_text()


def test_disk_need_is_exact_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    said: list[str] = []
    dump = capture_model(tiny(), [prompt()], tmp_path / "d", notify=said.append)
    actual = sum(e.bytes for e in dump.entries)
    stated = float(next(line for line in said if "need" in line).split("need ")[1].split(" kB")[0]) * 1000
    assert actual <= stated <= 1.2 * actual
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_200_000))
    with pytest.raises(RunFailure, match=r"needs .* free"):
        capture_model(tiny(), [prompt(256)], tmp_path / "e", notify=quiet, tokens=256, dtype="fp32", values=True)
    assert not (tmp_path / "e").exists()


def test_unknown_attention_is_caught_by_its_output(tmp_path: Path) -> None:
    """A model that does something no option tells: its output betrays it."""
    model = tiny()

    def odd(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
        return (transformers.AttentionInterface()["sdpa"](module, q * 1.2, k, v, mask, **options)[0], None)

    transformers.AttentionInterface.register("odd", odd)
    transformers.AttentionMaskInterface.register("odd", transformers.AttentionMaskInterface()["sdpa"])
    try:
        model.config._attn_implementation = "odd"
        with pytest.raises(InputError, match="output differs from softmax"):
            capture_model(model, [prompt()], tmp_path / "d", notify=quiet)
    finally:
        transformers.AttentionInterface._global_mapping.pop("odd")
        transformers.AttentionMaskInterface._global_mapping.pop("odd")
    assert not (tmp_path / "d").exists()


def test_damaged_weights_are_not_called_another_attention(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"of layer 1 .* heads 0 to 2 hold NaN or infinity: its weights are damaged"):
        capture_model(model, [prompt()], tmp_path / "d", notify=quiet)


def test_a_layer_without_a_number_of_its_own_is_refused(tmp_path: Path) -> None:
    """As zamba2's, which several layers share."""
    model = tiny()
    model.model.layers[1].self_attn.layer_idx = -1
    with pytest.raises(InputError, match="LlamaAttention has no layer_idx of its own"):
        capture_model(model, [prompt()], tmp_path / "d", notify=quiet)


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    model = tiny("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(InputError, match=r"mask|bidirectional"):
        capture_model(model, [prompt()], tmp_path / "d", notify=quiet)


def test_overflow_is_named_by_layer_and_head(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[8:].mul_(1e6)  # kv head 1
    with pytest.raises(InputError, match=r"layer 1 .*v of kv head 1 holds NaN or infinity"):
        capture_model(model, [prompt()], tmp_path / "d", dtype="fp16", notify=quiet)
    assert not (tmp_path / "d").exists()


def test_the_options_are_the_fields_of_the_request(tmp_path: Path) -> None:
    shown = inspect.signature(capture_model).parameters
    assert {f.name for f in fields(CaptureRequest)} | {"out", "overwrite", "resume", "progress", "notify"} == set(shown)
    assert shown["values"].default is True
    with pytest.raises(TypeError, match=r"capture_model\(\) got an unexpected keyword argument 'kvheads'"):
        capture_model(tiny(), [prompt()], tmp_path / "d", kvheads=[0])
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), 5])
def test_what_is_no_model_is_refused_by_its_type(tmp_path: Path, model: Any) -> None:
    with pytest.raises(InputError, match=f"needs a loaded transformers model, not {type(model).__name__}"):
        capture_model(model, [prompt()], tmp_path / "d", notify=quiet)
    assert not (tmp_path / "d").exists()


INPUT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layers": [3]}, "layer 3 is out of range: the model has layers 0 to 2"),
    "kv head": ({"kv_heads": [2]}, "kv head 2 is out of range"),
    "no layers": ({"layers": []}, "at least one"),
    "tokens": ({"tokens": 1}, "at least 2"),
    "chunk": ({"chunk": 0}, "chunk must be"),
    "dtype": ({"dtype": "fp8"}, "fp32, fp16 or bf16"),
}


@pytest.mark.parametrize("fault", INPUT_FAULTS)
def test_input_faults(tmp_path: Path, fault: str) -> None:
    options, message = INPUT_FAULTS[fault]
    with pytest.raises(InputError, match=message):
        capture_model(tiny(), [prompt(300)], tmp_path / "d", notify=quiet, **{"tokens": 20, **options})
    assert not (tmp_path / "d").exists()


def test_prompt_faults(tmp_path: Path) -> None:
    files = {"empty": b" \n", "binary": b"ab\0c", "latin": b"caf\xe9"}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    for name, message in (
        ("empty", "is empty"),
        ("binary", "is binary"),
        ("latin", "not UTF-8"),
        ("none", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            capture_model(tiny(), [tmp_path / name], tmp_path / "d", notify=quiet)
    with pytest.raises(InputError, match="is a folder"):
        capture_model(tiny(), [tmp_path], tmp_path / "d", notify=quiet)
    with pytest.raises(InputError, match="at least one prompt"):
        capture_model(tiny(), [], tmp_path / "d", notify=quiet)
    with pytest.raises(InputError, match="at least 2"):
        capture_model(tiny(), [prompt(1)], tmp_path / "d", notify=quiet)
    with pytest.raises(InputError, match="outside the model's vocabulary of 97"):
        capture_model(tiny(), [PromptInput("x", token_ids=(3, 97))], tmp_path / "d", notify=quiet)
    (tmp_path / "text").write_text("fine")
    with pytest.raises(InputError, match="no tokenizer"):
        capture_model(tiny(), [tmp_path / "text"], tmp_path / "d", notify=quiet)


def test_unknown_models_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "empty"
    folder.mkdir()
    for source, message in (
        (str(folder), "holds no config.json"),
        (str(tmp_path / "x.gguf"), "does not exist"),
        ("no such/model at all", "no Hugging Face id"),
        ("./no-such-folder", "does not exist here"),
        ("nobody/nothing-of-that-name", "not in the local cache .*HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(InputError, match=message):
            capture_model(source, [prompt()], tmp_path / "d", notify=quiet)
    with pytest.raises(InputError, match="device 'tpu' is unknown"):
        capture_model("smollm2", [prompt()], tmp_path / "d", device="tpu", notify=quiet)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingBackendError, match="no CUDA GPU"):
        capture_model("smollm2", [prompt()], tmp_path / "d", device="cuda", notify=quiet)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(InputError, match="no whole GGUF file"):
        capture_model(str(tmp_path / "broken.gguf"), [prompt()], tmp_path / "d", device="cpu", notify=quiet)
    assert not (tmp_path / "d").exists()


def test_a_local_folder_is_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    dump = capture_model(str(tmp_path / "model"), [prompt()], tmp_path / "d", device="cpu", notify=quiet)
    direct = capture_model(model, [prompt()], tmp_path / "e", notify=quiet)
    assert [e.sha256 for e in dump.entries] == [e.sha256 for e in direct.entries]
    assert dump.model is not None
    assert dump.model["name"] == "model"
    half = capture_model(
        str(tmp_path / "model"), [prompt()], tmp_path / "f", device="cpu", model_dtype="bf16", notify=quiet
    )
    assert {e.dtype for e in half.entries} == {"bf16"}


def test_ctrl_c_then_resume_is_byte_identical(tmp_path: Path) -> None:
    prompts = [prompt(name="a"), prompt(name="b", seed=3)]
    seen: list[int] = []

    def press(event: Any) -> None:
        seen.append(event.done)
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_model(tiny(), prompts, tmp_path / "d", notify=quiet, progress=press)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert not manifest["complete"]
    assert len(manifest["entries"]) == 4
    assert len(list((tmp_path / "d").glob("*.safetensors"))) == 4
    with pytest.raises(InputError, match="--resume"):
        capture_model(tiny(), prompts, tmp_path / "d", notify=quiet)
    resumed = capture_model(tiny(), prompts, tmp_path / "d", notify=quiet, resume=True)
    straight = capture_model(tiny(), prompts, tmp_path / "e", notify=quiet)
    assert [(e.file, e.sha256) for e in resumed.entries] == [(e.file, e.sha256) for e in straight.entries]
    assert resumed.manifest["created"] == manifest["created"]


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    def press(event: Any) -> None:
        if event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_model(tiny(), [prompt()], tmp_path / "d", notify=quiet, progress=press)
    with pytest.raises(InputError, match=r"other settings \(capture\)"):
        capture_model(tiny(), [prompt()], tmp_path / "d", notify=quiet, resume=True, values=False)
    assert len(open_dump(tmp_path / "d", allow_incomplete=True).entries) == 1  # and nothing is lost


def test_tokenizer_text_is_cut_where_the_tokens_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["one", "two", "three", "four", "five"]
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i + 3 for i, w in enumerate(words)}}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    (tmp_path / "count.txt").write_text("one two three four five")
    dump = capture_model(
        tiny(),
        [tmp_path / "count.txt"],
        tmp_path / "d",
        tokenizer=tokenizer,
        tokens=3,
        layers=[1],
        notify=quiet,
    )
    assert (dump.prompts[0].name, dump.prompts[0].text) == ("count", "one two three")
    assert dump.prompts[0].token_ids == [3, 4, 5]
    assert open_dump(dump.path).manifest["tokenizer"] == {"class": type(tokenizer).__name__, "vocabulary": 6}


def byte_capture(folder: Path, **more: Any) -> Any:
    from byte_model import byte_model, byte_tokenizer

    texts = [PromptInput("a", text="na\u00efve \u6f22, the end"), PromptInput("b", text="another text")]
    return capture_model(byte_model(), texts, folder, tokenizer=byte_tokenizer(), notify=quiet, **more)


def test_the_dump_says_what_its_tokens_say(tmp_path: Path) -> None:
    dump = byte_capture(tmp_path / "d", layers=[0])
    used = {i for p in dump.prompts for i in p.token_ids}
    assert sorted(map(int, dump.manifest["token_texts"])) == sorted(used)
    for p in dump.prompts:
        assert dump.vocabulary.passage(p.token_ids) == f"<bos>{p.text}"
    assert any(isinstance(x, list) for x in dump.manifest["token_texts"].values()), "parts of characters are bytes"


def test_ids_without_a_tokenizer_stay_ids(tmp_path: Path) -> None:
    dump = capture_model(tiny(), [prompt()], tmp_path / "d", layers=[0], notify=quiet)
    assert dump.vocabulary is None
    assert "token_texts" not in dump.manifest


@pytest.mark.parametrize("begun_without", [False, True])
def test_resume_keeps_the_texts_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun_without: bool
) -> None:
    """Also a capture that an earlier version began, whose manifest has none."""
    from anchorscope.capture import request

    def press(event: Any) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if begun_without:
            patch.setattr(request, "texts_record", lambda *_: {})
        with pytest.raises(KeyboardInterrupt):
            byte_capture(tmp_path / "d", progress=press)
        straight = byte_capture(tmp_path / "e")
    resumed = byte_capture(tmp_path / "d", resume=True)
    assert (resumed.vocabulary is None) is begun_without
    mine, theirs = (
        {k: v for k, v in d.manifest.items() if k not in ("created", "sha256")} for d in (resumed, straight)
    )
    assert mine == theirs
