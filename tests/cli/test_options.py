"""Help texts: complete, sentences, and the same option in the same words wherever it is taken."""

from __future__ import annotations

import pytest
import typer

from anchorscope.cli import app

COMMANDS = typer.main.get_command(app.app).commands


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_says_what_it_is_in_a_sentence(name):
    for option in COMMANDS[name].params:
        text = option.help or ""
        assert text.endswith((".", ")")), (option.name, text)
        assert text.split()[0] not in ("Of", "Its", "Instead:", "auto,"), (option.name, text)
        assert "[" not in text, f"{option.name}: the help would drop {text!r} from its bracket on"


@pytest.mark.parametrize("option", ["device", "backend", "prompts", "init", "model", "model_dtype", "tokenizer"])
def test_an_option_has_one_text(option):
    texts = [o.help for command in COMMANDS.values() for o in command.params if o.name == option]
    assert len(texts) > 1
    assert len(set(texts)) == 1, texts


def test_capture_shows_the_defaults_that_depend_on_the_run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert app.main(["capture", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "(default: the run's)" in shown
    assert "(default: whole prompts)" in shown
