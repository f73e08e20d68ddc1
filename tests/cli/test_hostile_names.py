"""What a model's files call things reaches the terminal spelled out: no escape sequence, markup or direction mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anchorscope.cli import main

pytest.importorskip("transformers")

from byte_model import byte_model, byte_tokenizer

HOSTILE = "\x1b]0;title\x07\x1b[31m[/]:smile:\u202e"
SPELLED = r"\x1b]0;title\x07\x1b[31m[/]:smile:\u202e"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    byte_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def copy_of(model: Path, to: Path, file: str = "", **changes: Any) -> Path:
    """The model with some settings of one of its files changed."""
    to.mkdir(parents=True)
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if file:
        settings = json.loads((to / file).read_text())
        (to / file).write_text(json.dumps({**settings, **changes}))
    return to


def run(capsys: Any, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, neither of which may hold anything that acts on a terminal."""
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    return code, out, err


REFUSED = {
    "model type": ("config.json", {"model_type": HOSTILE}),
    "rope type": ("config.json", {"rope_parameters": {"rope_type": HOSTILE, "rope_theta": 1e4}}),
    "activation": ("config.json", {"hidden_act": HOSTILE}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_in_errors(capsys: Any, model: Path, tmp_path: Path, kind: str) -> None:
    file, changes = REFUSED[kind]
    folder = copy_of(model, tmp_path / "m", file, **changes)
    common = ("--model", folder, "--device", "cpu", "--out", tmp_path / "d")
    for command in (("capture", "--text", "abc"), ("evaluate", "--task", "needle", "--theta", "4")):
        code, _, err = run(capsys, *command, *common)
        assert code == 2
        assert SPELLED in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("template", "said"), [("{{ raise_exception('" + HOSTILE + "') }}", SPELLED), ("{% \x1b[31m %}", r"\x1b")]
)
def test_chat_templates_in_errors(capsys: Any, model: Path, tmp_path: Path, template: str, said: str) -> None:
    folder = copy_of(model, tmp_path / "m")
    (folder / "chat_template.jinja").write_text(template)
    common = ("--model", folder, "--device", "cpu", "--out", tmp_path / "d", "--chat")
    for command in (("capture", "--text", "abc"), ("evaluate", "--task", "needle", "--theta", "4")):
        code, _, err = run(capsys, *command, *common)
        assert code == 2
        assert said in err


def test_names_in_results(capsys: Any, model: Path, tmp_path: Path) -> None:
    """A folder's name, a class's and a tokenizer's, and a prompt's that looks like markup."""
    folder = copy_of(model, tmp_path / "\x1b[31m[bold]x", "tokenizer_config.json", tokenizer_class=HOSTILE)
    text = tmp_path / "x[bold]y.txt"
    text.write_text("it was a bright cold day in April")
    dump = tmp_path / "d"
    args = ("--model", folder, "--device", "cpu", "--prompt", text, "--out", dump)
    assert run(capsys, "capture", *args)[0] == 0
    path = dump / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["model"]["class"] = HOSTILE
    manifest["proof"]["loader"]["metadata"] = {"keys": {}, "set": {HOSTILE: 1}}
    manifest["prompts"][0]["proof"] = {"tokens": 0, "context": 9, "vocabulary": 0, "reason": f"{HOSTILE} has no head"}
    path.write_text(json.dumps(manifest))
    code, out, _ = run(capsys, "info", dump)
    assert code == 0
    assert rf"model    \x1b[31m[bold]x ({SPELLED}, fp32)" in out
    assert out.count("x[bold]y") == 2  # in both tables, whole
    assert f"after {SPELLED} were set" in out
    assert r"\x1b]0;title" in out.split("not scored:")[1]
