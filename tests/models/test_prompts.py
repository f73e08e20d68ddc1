"""Prompts: token ids, chat templates, special tokens, standard input, cuts; all from tiny tokenizers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from anchorscope.capture import capture_model
from anchorscope.cli import main
from anchorscope.dumps import open_dump
from anchorscope.errors import InputError
from anchorscope.models import PromptInput, token_ids_from_file
from anchorscope.models.prompts import TokenizedPrompt, parse_token_ids, tokenize

transformers = pytest.importorskip("transformers")

from families import prompt, tiny  # noqa: E402

WORDS = ["one", "two", "three", "four", "<user>", "<end>", "<answer>"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """Whitespace words to ids 3, 4, ...; begins sequences with id 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    table = {"[UNK]": 0, "[BOS]": 1, **{w: i + 3 for i, w in enumerate(WORDS)}}
    inner = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="[BOS]")
    made.chat_template = template
    return made


def ids(text: str = "one two three", said: list[str] | None = None, **options: Any) -> Any:
    settings = {
        "tokens": None,
        "positions": None,
        "vocabulary": None,
        "notify": (said if said is not None else []).append,
    }
    return tokenize(PromptInput("p", text), tokenizer(), **{**settings, **options})


def test_a_special_token_twice_is_said() -> None:
    for text, options, twice in (
        ("[BOS] one two", {}, True),
        ("  [BOS] one two", {}, True),
        ("one [BOS] two", {}, False),
        ("[BOS] one two", {"special_tokens": False}, False),
        ("one two", {}, False),
    ):
        said: list[str] = []
        found = ids(text, said, **options)
        assert (found.token_ids[:2] == (1, 1)) is twice
        assert any("begins with [BOS] twice" in x for x in said) is twice, text


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(InputError, match="surrogate"):
        ids("a \ud800 b")


def test_special_tokens_and_chat() -> None:
    assert ids().token_ids == (1, 3, 4, 5)
    assert ids(special_tokens=False).token_ids == (3, 4, 5)
    chat = ids(chat=True)
    assert chat.token_ids == (7, 3, 4, 5, 8, 9)  # the template's own, and no second beginning
    assert chat.text == "<user> one two three <end> <answer>"
    assert ids(chat=True, tokens=3).text == "<user> one two"


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), ("{{ raise_exception('only tools') }}", "failed: only tools")]
)
def test_chat_faults(template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenize(
            PromptInput("p", "one two"),
            tokenizer(template),
            tokens=None,
            positions=None,
            vocabulary=None,
            chat=True,
            notify=print,
        )


def test_cuts_are_said() -> None:
    said: list[str] = []
    assert ids(tokens=2, said=said).token_ids == (1, 3)
    assert said == ["warning: prompt p has 4 tokens and is cut to the first 2"]
    assert ids(tokens=4, said=said).token_ids == (1, 3, 4, 5)
    assert len(said) == 1


@pytest.mark.parametrize("raw", [b"[3, 4,5]", b"3 4 5\n", b"3\n4\n5", b"3,4,5", b"\xef\xbb\xbf 3 4 5"])
def test_token_ids_in_every_spelling(tmp_path: Path, raw: bytes) -> None:
    assert parse_token_ids(raw, "x") == (3, 4, 5)
    (tmp_path / "mine.json").write_bytes(raw)
    assert token_ids_from_file(tmp_path / "mine.json") == PromptInput("mine", token_ids=(3, 4, 5))


@pytest.mark.parametrize("raw", [b"3 x", b"[3, 4.5]", b"-1", b"[]", b'{"a": 1}', b"1e3", "٣".encode(), b"9" * 30])
def test_other_token_ids_are_refused(raw: bytes) -> None:
    with pytest.raises(InputError, match="must hold whole numbers"):
        parse_token_ids(raw, "x")
    with pytest.raises(InputError, match="is empty"):
        parse_token_ids(b" \n", "x")


def test_the_same_prompt_twice(tmp_path: Path) -> None:
    said: list[str] = []
    dump = capture_model(tiny(), [prompt(30), prompt(30), prompt(30, seed=1)], tmp_path / "d", notify=said.append)
    assert [p.name for p in dump.prompts] == ["p", "p-2", "p-3"]
    assert [line for line in said if "same tokens" in line] == ["warning: prompts p and p-2 are the same tokens"]
    one, two = (dump.load(dump.entry(name, 1)) for name in ("p", "p-2"))
    assert one.q.equal(two.q)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *options: str, stdin: bytes = b"") -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    return main(["capture", "--model", str(model), "--device", "cpu", "--out", str(out), *options])


def test_the_command_line(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([5, 6, 7]))
    some = ["--text", "one two", "--token-ids", str(tmp_path / "ids.json"), "--prompt", "-"]
    assert command(monkeypatch, model_folder, tmp_path / "a", *some, "--no-special-tokens", stdin=b"three four") == 0
    dump = open_dump(tmp_path / "a")
    assert {p.name: p.token_ids for p in dump.prompts} == {"stdin": [5, 6], "text": [3, 4], "ids": [5, 6, 7]}
    assert dump.manifest["capture"]["special_tokens"] is False
    assert command(monkeypatch, model_folder, tmp_path / "b", "--token-ids", "-", stdin=b"3 4 5") == 0
    assert open_dump(tmp_path / "b").prompts[0].token_ids == [3, 4, 5]
    assert command(monkeypatch, model_folder, tmp_path / "e", "--token-ids", "-", "--chat", stdin=b"3 4 5") == 2
    assert command(monkeypatch, model_folder, tmp_path / "c", "--text", "one", "--chat") == 0
    assert open_dump(tmp_path / "c").prompts[0].token_ids == [7, 3, 8, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give at least one prompt"),
        (["--prompt", "-", "--token-ids", "-"], "read once only"),
        (["--text", "one", "--chat", "--no-special-tokens"], "drop --no-special-tokens or --chat"),
        (["--text", "a\udcff"], "--text is not UTF-8"),
        (["--text", ""], "--text is empty"),
        (["--prompt", "-"], "standard input is empty"),
        (["--token-ids", "none.json"], "none.json does not exist"),
    ],
)
def test_command_line_faults(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert command(monkeypatch, model_folder, tmp_path / "d", *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert not (tmp_path / "d").exists()


def test_ids_with_a_text_of_their_own_are_cut_without_a_tokenizer() -> None:
    prompt = PromptInput("p", text="a b c", token_ids=(1, 2, 3))
    options: dict[str, Any] = {"positions": None, "vocabulary": None, "notify": lambda _: None}
    assert tokenize(prompt, None, tokens=None, **options) == TokenizedPrompt("p", (1, 2, 3), "a b c")
    assert tokenize(prompt, None, tokens=2, **options) == TokenizedPrompt("p", (1, 2), None)  # which part is not known
