"""What needs no model and no measurement is refused before either: every option of every command, one table."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorscope import write_dump
from anchorscope.anchors import AnchorConfig
from anchorscope.cli.app import main
from anchorscope.params import AnchorParams, anchor_pairs, visible_pairs
from anchorscope.pictures import asked_pictures

TOKENS = 300

CAPTURE = "capture --model hub/model --text words --out OUT"
EVALUATE = "evaluate --model hub/model --theta 3 --task needle --out OUT"
MODELS = [
    *((f"{c} --model smollm", "did you mean smollm2?") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --model no.gguf", "model no.gguf does not exist") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --model ./no", "does not exist here") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --model TEXT", "neither a folder nor a .gguf file") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --model smollm2 --revision main", "--revision main is for a model of the") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --device tpu", "--device 'tpu' is unknown") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --device cuda", "--device cuda: this torch sees no CUDA GPU") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --device cuda:7", "--device cuda:7: this torch sees no CUDA GPU") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --model-dtype int8", "--model-dtype 'int8' is unknown") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --chunk 0", "--chunk 0 is out of range") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --chunk 4.5k", "--chunk '4.5k' is no number of tokens") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --out TEXT", "is a file") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --out TEXT/o", "is a file") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --out FULL", "FULL") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --out LOCKED/o", "LOCKED") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --prompt no.txt", "no.txt does not exist") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --prompt FULL", "is a folder, not a file") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --prompt BINARY", "is binary") for c in (CAPTURE, EVALUATE)),
    *((f"{c} --prompt EMPTY", "is empty") for c in (CAPTURE, EVALUATE)),
    (f"{CAPTURE} --tokens -5", "--tokens -5 is out of range; it takes 2 to"),
    (f"{CAPTURE} --tokens 0", "--tokens 0 is out of range"),
    (f"{CAPTURE} --tokens 1", "--tokens 1 is out of range"),
    (f"{CAPTURE} --tokens abc", "--tokens 'abc' is no number of tokens"),
    (f"{CAPTURE} --tokens 4kk", "--tokens '4kk' is no number of tokens"),
    (f"{CAPTURE} --layers 1..3", "--layers '1..3' is malformed"),
    (f"{CAPTURE} --layers 5-3", "backwards"),
    (f"{CAPTURE} --kv-heads x", "--kv-heads 'x' is malformed"),
    (f"{CAPTURE} --dtype fp8", "--dtype 'fp8' is unknown (did you mean fp"),
    (f"{CAPTURE} --overwrite --resume", "--overwrite and --resume contradict"),
    (f"{CAPTURE} --chat --no-special-tokens", "drop --no-special-tokens or --chat"),
    ("capture --model m/m --token-ids IDS --chat --out OUT", "leave out --chat"),
    ("capture --model m/m --token-ids TEXT --out OUT", "must hold whole numbers"),
    ("capture --model m/m --prompt - --token-ids - --out OUT", "once only"),
    ("capture --model m/m --out OUT", "give at least one prompt"),
    (f"{EVALUATE} --task needel", "--task 'needel' is unknown (did you mean needle?)"),
    (f"{EVALUATE} --task needle,needle", "named twice"),
    (f"{EVALUATE} --lengths 2k,2048", "twice"),
    (f"{EVALUATE} --lengths 1", "--lengths 1 is out of range"),
    (f"{EVALUATE} --lengths 1,,2", "--lengths"),
    (f"{EVALUATE} --lengths 99m", "--lengths 99m is out of range"),
    (f"{EVALUATE} --depths 1.5", "--depths: '1.5' is not a share"),
    (f"{EVALUATE} --depths -0.1", "--depths: '-0.1' is not a share"),
    (f"{EVALUATE} --samples 0", "samples must be a whole number of at least 1, not 0"),
    (f"{EVALUATE} --samples x", "'--samples'"),
    (f"{EVALUATE} --backend cuda", "--backend 'cuda' is unknown"),
    (f"{EVALUATE} --theta x", "--theta: 'x' is not a number"),
    (f"{EVALUATE} --block 0", "--block 0 is out of range"),
    (f"{EVALUATE} --step 0", "step must be"),
    (f"{EVALUATE} --config CONFIG", "not both"),
    (f"{EVALUATE} --as name", "--as names the arms of --config"),
    ("evaluate --model m/m --task needle --out OUT", "give either --config"),
    ("evaluate --model m/m --theta 3 --out OUT", "nothing to evaluate"),
    ("evaluate --model m/m --theta 3 --prompt TEXT --chat --out OUT", "there is no task"),
    ("evaluate --model m/m --task needle --config no.json --out OUT", "no.json cannot be read"),
    ("evaluate --model m/m --task needle --config TEXT --out OUT", "not JSON"),
    ("evaluate --model m/m --task needle --config JSON --out OUT", "not an anchors.json"),
    ("evaluate --model m/m --task needle --config CONFIG --block 64 --out OUT", "--block and --step are for --theta"),
    ("evaluate --model m/m --task needle --config CONFIG --config CONFIG --out OUT", "two arms are called"),
    ("evaluate --model m/m --task needle --config CONFIG --as dense --out OUT", "cannot be called dense"),
]
DUMP_COMMANDS = ("analyze DUMP --out OUT", "compare DUMP --out OUT", "heads DUMP --out OUT")
DUMPS = [
    *((f"{c} --device tpu", "--device 'tpu' is unknown") for c in (*DUMP_COMMANDS, "calibrate DUMP --out OUT")),
    *((f"{c} --device cuda", "sees no CUDA GPU") for c in (*DUMP_COMMANDS, "calibrate DUMP --out OUT", "bench DUMP")),
    *((f"{c} --out TEXT", "is a file") for c in (*DUMP_COMMANDS, "calibrate DUMP", "bench DUMP")),
    *((f"{c} --out FULL", "FULL") for c in (*DUMP_COMMANDS, "calibrate DUMP", "bench DUMP")),
    *((f"{c} --out LOCKED/o", "LOCKED") for c in (*DUMP_COMMANDS, "calibrate DUMP", "bench DUMP")),
    *((f"{c} --layers 9", "--layers: 9 does not exist") for c in (*DUMP_COMMANDS, "calibrate DUMP --out OUT")),
    *((f"{c} --layers 1..3", "--layers '1..3' is malformed") for c in (*DUMP_COMMANDS, "calibrate DUMP --out OUT")),
    *((f"{c} --heads 9", "--heads: 9 does not exist") for c in DUMP_COMMANDS),
    *((f"{c} --prompts q", "no prompt 'q'") for c in DUMP_COMMANDS),
    *((f"{c} --target-recall 0", "--target-recall 0.0 is out of range") for c in DUMP_COMMANDS[:2]),
    *((f"{c} --target-recall 1.5", "--target-recall 1.5 is out of range") for c in DUMP_COMMANDS[:2]),
    *((f"{c} --block 4kk", "--block '4kk' is no number of tokens") for c in (DUMP_COMMANDS[0], DUMP_COMMANDS[2])),
    *((f"{c} --step 0", "step must be") for c in (DUMP_COMMANDS[0], DUMP_COMMANDS[2])),
    *((f"{c} --theta x", "--theta: 'x' is not a number") for c in (DUMP_COMMANDS[0], DUMP_COMMANDS[2])),
    ("analyze DUMP --out OUT --init -1", "--init -1 is out of range"),
    ("analyze DUMP --out OUT --lookback x", "--lookback 'x' is no number"),
    ("analyze DUMP --out OUT --heatmap 1", "--heatmap '1' is malformed"),
    ("analyze DUMP --out OUT --heatmap 0:0 --no-figures", "contradict each other"),
    ("analyze DUMP --out OUT --overwrite --resume", "contradict each other"),
    ("analyze DUMP --out OUT --backend cuda", "--backend 'cuda' is unknown"),
    ("heads DUMP --out OUT --theta 1,2", "heads takes one"),
    ("heads DUMP --out OUT --tokenizer no.json", "no.json"),
    ("compare DUMP --out OUT --methods ancor", "did you mean anchor?"),
    ("compare DUMP --out OUT --set anchor.blok=3", "did you mean block?"),
    ("compare DUMP --out OUT --set anchor.block=64 --as a --as b", "1 --set and 2 --as"),
    ("compare --out OUT", "compare needs a dump"),
    ("calibrate DUMP --out OUT --budget-density 0", "--budget-density 0.0 is out of range"),
    ("calibrate DUMP --out OUT --budget-density 1.5", "--budget-density 1.5 is out of range"),
    ("calibrate DUMP --out OUT --budget-density nan", "--budget-density nan is out of range"),
    ("calibrate DUMP --out OUT --budget-density 0.01 --holdout 0", "is below what the anchor regions alone keep"),
    ("calibrate DUMP --out OUT --budget-density 0.5 --target-recall 0.9", "not both"),
    ("calibrate DUMP --out OUT --target-recall -1", "--target-recall -1.0 is out of range"),
    ("calibrate DUMP --out OUT --by heads", "--by 'heads' is unknown (did you mean head?)"),
    ("calibrate DUMP --out OUT --statistic p5", "--statistic 'p5' is unknown (did you mean p05?)"),
    ("calibrate DUMP --out OUT --minimise dense", "--minimise 'dense' is unknown"),
    ("calibrate DUMP --out OUT --minimise time", "give --costs"),
    ("calibrate DUMP --out OUT --costs no.json", "no.json"),
    ("calibrate DUMP --out OUT --dense-above 2", "--dense-above 2.0 is out of range"),
    ("calibrate DUMP --out OUT --holdout 1.5", "--holdout 1.5 must be a share"),
    ("calibrate DUMP --out OUT --holdout nobody", "no prompt 'nobody'"),
    ("calibrate DUMP --out OUT --groups 64", "--groups '64' is malformed"),
    ("calibrate DUMP --out OUT --groups 64x4,64x4", "twice"),
    ("calibrate DUMP --out OUT --theta 5:1:1", "backwards"),
    ("calibrate DUMP --out OUT --backend cuda", "--backend 'cuda' is unknown"),
    ("bench DUMP --lengths 999", "more than the 300 tokens of prompt story"),
    ("bench DUMP --layers 9", "--layers: 9 does not exist"),
    ("bench DUMP --heads 3", "heads belongs to planted input"),
    ("bench --layers 3", "planted input has no layers"),
    ("bench --lengths 4kk", "--lengths '4kk' is no number of tokens"),
    ("bench --lengths 2m", "--lengths 2m is out of range"),
    ("bench --dense flsh", "did you mean flash?"),
    ("bench --dtype fp64", "--dtype 'fp64' is unknown"),
    ("bench --repeats 0", "repeats must be at least 1"),
    ("bench --heads 3 --kv-heads 2", "cannot share"),
    ("bench --against no.json", "no.json cannot be read"),
    ("bench --overwrite", "give the folder with --out"),
    ("report FULL", "holds no result"),
    ("report nowhere", "nowhere does not exist"),
    ("figures FULL", "FULL"),
    ("info nowhere", "nowhere"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words of the table stand for."""
    base = tmp_path_factory.mktemp("early")
    entries = []
    for seed, name in enumerate(("story", "code")):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(h, TOKENS, 8, generator=g) for h in (2, 1, 1))
        entries.append({"prompt": name, "layer": 2, "q": q, "k": k, "v": v, "scale": 0.7})
    write_dump(base / "DUMP", entries)
    (base / "FULL").mkdir()
    (base / "FULL" / "x").write_text("x")
    (base / "LOCKED").mkdir()
    (base / "TEXT").write_text("some words")
    (base / "EMPTY").write_text("")
    (base / "BINARY").write_bytes(b"\0\1")
    (base / "IDS").write_text("1 2 3")
    (base / "JSON").write_text("{}")
    AnchorConfig.uniform(3.0, [0], 2).save(base / "CONFIG")
    words = ["DUMP", "FULL", "LOCKED", "TEXT", "EMPTY", "BINARY", "IDS", "JSON", "CONFIG", "OUT"]
    return {word: str(base / word) for word in words}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is loaded, fetched or measured; who tries is noted."""
    reached: list[str] = []

    def refuse(what: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            reached.append(what)
            raise RuntimeError(f"{what} was reached")

        return call

    for home, name in (
        ("anchorscope.models.load", "load_model"),
        ("anchorscope.models.locate", "preset_file"),
        ("anchorscope.models.hub", "reachable"),
        ("anchorscope.runs.executors", "Threads.run"),
        ("anchorscope.runs.executors", "InTurn.run"),
        ("anchorscope.calibration.request", "_seconds"),
        ("anchorscope.bench.run", "time_case"),
    ):
        monkeypatch.setattr(f"{home}.{name}", refuse(f"{home}.{name}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = __import__("os").access
    monkeypatch.setattr("os.access", lambda path, mode: "LOCKED" not in str(path) and real(path, mode))
    return reached


@pytest.mark.parametrize(("line", "words"), MODELS + DUMPS, ids=[line for line, _ in MODELS + DUMPS])
def test_a_bad_value_is_refused_before_anything_expensive(capsys, places, guarded, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    given = shlex.split(line)
    for word, place in places.items():
        given = [place + x[len(word) :] if x == word or x.startswith(f"{word}/") else x for x in given]
    code = main(given)
    out, err = capsys.readouterr()
    assert not guarded, err
    assert code == 2, err
    said = [x for x in err.splitlines() if x.startswith("error: ")]
    assert len(said) == 1
    assert words in said[0], said[0]
    assert "loading" not in err
    assert not out
    assert not Path(places["OUT"]).exists(), "a refused run leaves nothing behind"


def test_the_table_of_bad_values_reaches_what_it_guards(capsys, places, guarded):
    """The guards are at the doors: a good request comes to them."""
    assert main([x if x != "OUT" else places["OUT"] for x in CAPTURE.split()]) == 1
    assert main([x if x != "OUT" else places["OUT"] for x in EVALUATE.split()]) == 1
    assert guarded == ["anchorscope.models.load.load_model"] * 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "home"),
    [
        ("analyze DUMP", "analysis.run"),
        ("compare DUMP", "compare.run"),
        ("heads DUMP", "heads.run"),
        ("calibrate DUMP", "calibration.run"),
        ("bench", "bench.output"),
        ("evaluate --model m/m --theta 3 --task needle", "evaluation.run"),
    ],
)
def test_a_finished_folder_is_refused_first(capsys, places, guarded, tmp_path, line, home):
    own = importlib.import_module(f"anchorscope.{home}").FOLDER
    asked = {**asked_pictures(True), "heatmaps": "default", "diagnose": True, "tokens": None}
    (tmp_path / own.state).write_text(json.dumps({"format": own.format, "started": "", "asked": asked}))
    (tmp_path / own.report).write_text("{}")
    assert main([*(places.get(x, x) for x in line.split()), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path} holds a finished" in err, err
    assert "add --overwrite to replace it" in err
    assert "loading" not in err
    assert not guarded


def test_the_least_budget_is_what_the_anchor_regions_keep(places, guarded):
    from anchorscope.calibration.request import CalibrateRequest
    from anchorscope.errors import InputError

    groups = [AnchorParams(16, 2), AnchorParams(64, 2)]
    least = min(anchor_pairs(TOKENS, g) / visible_pairs(TOKENS) for g in groups)
    asked = {"groups": groups, "holdout": ["code"], "device": "cpu"}
    with pytest.raises(InputError, match=r"keep, 0\.\d+ with groups of 16x2: give at least 0\.\d+"):
        CalibrateRequest(places["DUMP"], budget_density=least * 0.999, **asked).plan()
    with pytest.raises(RuntimeError, match="_seconds was reached"):
        CalibrateRequest(places["DUMP"], budget_density=least, **asked).plan()


def test_python_functions_refuse_early_too(places, guarded, tmp_path):
    from anchorscope import analyze, calibrate, compare_methods, diagnose, evaluate
    from anchorscope.bench import BenchConfig, bench
    from anchorscope.capture import capture_model
    from anchorscope.errors import InputError

    full = places["FULL"]
    for call in (
        lambda: analyze(tmp_path / "no dump", full),
        lambda: compare_methods(tmp_path / "no dump", full),
        lambda: diagnose(tmp_path / "no dump", full),
        lambda: calibrate(tmp_path / "no dump", full),
        lambda: bench(BenchConfig(), full, tmp_path / "no dump"),
        lambda: evaluate("m/m", full, arms={"a": 1.0}, tasks=["needle"]),
        lambda: capture_model("m/m", [places["TEXT"]], full),
    ):
        with pytest.raises(InputError, match="FULL"):
            call()
    for options in ({"tokens": -5}, {"tokens": "4k"}, {"chunk": 0}, {"device": "tpu"}, {"dtype": "fp8"}):
        with pytest.raises(InputError, match=str(next(iter(options)))):
            capture_model("m/m", [places["TEXT"]], tmp_path / "o", **options)
    with pytest.raises(InputError, match="did you mean smollm2"):
        evaluate("smollm", tmp_path / "o", arms={"a": 1.0}, tasks=["needle"])
    assert not guarded
