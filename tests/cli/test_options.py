"""Help texts: every default, unit and word is said, in sentences, at any width; a shell completes what can be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from anchorscope.bench.dense import NAMES
from anchorscope.calibration.choose import BY
from anchorscope.calibration.curves import STATISTICS
from anchorscope.cli import app
from anchorscope.cli import options as opt
from anchorscope.devices import BACKENDS
from anchorscope.evaluation.tasks import PERPLEXITY, TASKS
from anchorscope.methods import known_methods
from anchorscope.models.presets import PRESETS

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app.app).commands
EVERY = [(name, option) for name, command in COMMANDS.items() for option in command.params if option.name != "help"]
every_option = pytest.mark.parametrize(("name", "option"), EVERY, ids=[f"{n}-{o.name}" for n, o in EVERY])

ALLOWED = {  # every word that an option takes is in its help
    "backend": BACKENDS,
    "device": ("auto", "cpu", "cuda", "cuda:1"),
    "dtype": opt.DTYPES,
    "model_dtype": opt.DTYPES,
    "by": BY,
    "statistic": STATISTICS,
    "minimise": ("density", "time"),
    "dense": NAMES,
    "task": (*TASKS, PERPLEXITY),
    "layers": ("0,5,10-15",),
    "model": tuple(PRESETS),
}
UNITS = {  # what a number counts is in its help or its place holder
    **dict.fromkeys(("theta", "figure_theta"), "nats"),
    **dict.fromkeys(("tokens", "chunk", "block", "init", "lookback", "period", "lengths"), "tokens"),
    "step": "blocks",
    **dict.fromkeys(("target_recall", "budget_density", "dense_above", "holdout", "depths"), "share"),
    **dict.fromkeys(("samples", "repeats", "seed", "heads", "kv_heads"), ""),
}


def flag(option) -> bool:
    return option.param_type_name == "option" and option.is_flag


@every_option
def test_every_option_says_what_it_is_in_a_sentence(name, option):
    text = option.help or ""
    assert text, "no help"
    assert text.endswith((".", ")")), text
    assert text[0].isupper() or text.split()[0] in ("bench.json", "anchors.json", "tokenizer.json,"), text
    assert text.split()[0] not in ("Of", "Its", "Instead:", "auto,"), text
    assert "[" not in text, f"the help would drop {text!r} from its bracket on"


@every_option
def test_every_default_is_said(name, option):
    if flag(option) or option.required or option.param_type_name == "argument":
        return
    shown = option.default not in (None, "") and option.show_default
    if name == "compare" and option.name == "out":
        return  # needed, but not for --list
    assert shown or "(default: " in option.help, option.help
    assert not (shown and "(default: " in option.help), "the default is said twice"


@every_option
def test_words_units_and_place_holders(name, option):
    text = f"{option.help} {option.metavar or ''}"
    for word in ALLOWED.get(option.name, ()):
        assert word in text, f"{word} is not in {text!r}"
    assert UNITS.get(option.name, "") in text.lower(), text
    if option.param_type_name == "option" and not option.is_flag:
        assert option.metavar, "typer would show a type of Python"
        if option.metavar in ("N", "TOKENS", "TOKENS,...", "SHARE", "SHARES", "NATS", "BLOCKS"):
            assert option.name in {*UNITS, "head_dim"}, f"say in UNITS what {option.name} counts"


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_page_is_whole_at_any_width(capsys, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert app.main([*([name] if name else []), "--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= columns
    assert "…" not in page
    assert "..." not in page.replace("[ARGS]...", "").replace("}...", "").replace(",...", "").replace("[DIR]...", "")
    assert not re.search(r"<\w+>|BOOL|INTEGER|list\[", page)
    words = page.split()
    for option in COMMANDS[name].params if name else ():
        for text in (option.help or "").split():
            assert text in words or "-" in text or len(text) > 25, f"{text!r} of {option.name} is cut"


@pytest.mark.parametrize("option", ["device", "backend", "prompts", "init", "model", "model_dtype", "tokenizer"])
def test_an_option_has_one_text(option):
    found = [o.help for command in COMMANDS.values() for o in command.params if o.name == option]
    texts = [text.removesuffix(" (default: none, give DIR)") for text in found]
    assert len(texts) > 1
    assert len(set(texts)) == 1, texts


def test_capture_shows_the_defaults_that_depend_on_the_run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert app.main(["capture", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: the run's)" in shown
    assert "(default: whole prompts)" in shown


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["info"], "Missing argument 'DIR'; see anchorscope info --help"),
        (["heads", "--out", "o"], "heads needs a dump, or a model and its prompts"),
        (["heds"], "Did you mean 'heads'"),
        (["heads", "d", "--layer", "3", "--out", "o"], "--layers"),
        (["heads", "d", "--step", "x", "--out", "o"], "'--step'"),
        (["heads", "d", "--out"], "'--out' requires an argument"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_a_misused_command_line_is_one_sentence(capsys, given, words):
    assert app.main(given) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err


def test_no_command_shows_the_commands(capsys):
    assert app.main([]) == 2
    shown = "".join(capsys.readouterr())
    assert "calibrate" in shown
    assert "error:" not in shown


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    done = subprocess.run(
        [sys.executable, "-m", "anchorscope"],
        env={
            **os.environ,
            "_ANCHORSCOPE_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("anchorscope", *words)),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ca"], ["capture", "calibrate"]),
        (["analyze", "d", "--bl"], ["--block"]),
        (["compare", "d", "--methods", "anchor,st"], ["anchor,streaming"]),
        (["heads", "d", "--device", "c"], ["cpu", "cuda"]),
    ],
)
def test_a_shell_completes_commands_options_and_words(words, offered):
    assert completed(*words) == offered


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("capture", "model", PRESETS),
        ("capture", "dtype", opt.DTYPES),
        ("evaluate", "task", (*TASKS, PERPLEXITY)),
        ("compare", "methods", ("all", *known_methods())),
        ("bench", "dense", NAMES),
        ("bench", "backend", BACKENDS),
        ("calibrate", "by", BY),
        ("calibrate", "statistic", STATISTICS),
        ("calibrate", "minimise", ("density", "time")),
    ],
)
def test_what_is_offered_is_what_there_is(command, option, known):
    param = next(p for p in COMMANDS[command].params if p.name == option)
    context = typer.Context(COMMANDS[command])
    offered = [getattr(item, "value", item) for item in param.shell_complete(context, "")]
    assert sorted(offered) == sorted(known)


def test_the_script_for_a_shell_is_shown(monkeypatch):
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "anchorscope", "--show-completion", "bash"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "complete -o default -F _anchorscope_completion anchorscope" in done.stdout
