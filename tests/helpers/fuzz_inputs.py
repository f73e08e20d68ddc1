"""Mutate every input other than dumps at random and read it: a result, or a refusal in one sentence.

`python tests/helpers/fuzz_inputs.py 3000 --seed 0`. Inputs are anchors.json, bench results, the folders of analyze,
compare, heads, calibrate and evaluate with all that is in them, tokenizers, prompts and token ids. One mutant in ten
also goes through the command line. An outcome is a failure if

- anything but an `AnchorScopeError` is raised, or its message is longer than a paragraph;
- the command line speaks of an internal error, shows a traceback, or writes what acts on a terminal;
- a mutant takes longer than `LIMIT` seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from fuzz_dumps import Hang, change_somewhere

import anchorscope
from anchorscope.anchors import AnchorConfig
from anchorscope.bench.compare import compare as compare_benches
from anchorscope.bench.compare import load_result
from anchorscope.calibration.costs import Costs
from anchorscope.compare.run import compare as compare_methods
from anchorscope.compare.run import load_comparison
from anchorscope.dumps import write_dump
from anchorscope.errors import AnchorScopeError
from anchorscope.evaluation.lanes import LayerWork, PrefillWork
from anchorscope.evaluation.metrics import TokenScores
from anchorscope.evaluation.parts import Part
from anchorscope.evaluation.run import VERSION as EVALUATION_VERSION
from anchorscope.files import SEAL, seal
from anchorscope.heads.run import load_diagnosis
from anchorscope.methods import line_up
from anchorscope.models.prompts import prompt_from_file, token_ids_from_file
from anchorscope.params import AnchorParams
from anchorscope.report.html import build_data, open_sources
from anchorscope.tokens import load_pieces, token_texts

LIMIT = 30.0
CLI_SHARE = 10
TOKENS = (160, 128)
GROUPS = AnchorParams(16, 2)
# What a careless or hostile program might write in place of a word of JSON, CSV or text.
HOSTILE = (
    *("NaN", "-Infinity", "1e999", "-1", "0", "1e308", "9" * 400, "9" * 6000, "null", "true", "[]", "{}", '""', "0.5"),
    *('"\\ud800"', '"\\u0000"', '"[/]"', '"\\u001b[31m"', '"../../etc/passwd"', '"/dev/zero"', '"=1+1"', "'", '"', ","),
    *("[" * 3000, '{"a":' * 3000, "\0", "\x1b[2J", "\u202e", "\n", "$x^$", "</script><img onerror>", "[red]", "inf"),
)


@dataclass(frozen=True)
class Target:
    """Inputs of one kind: where they lie, who reads them, and which command does."""

    name: str
    pattern: str
    read: Callable[[Path, Path], object]
    command: Callable[[Path, Path], list[str]] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# what is mutated


def originals(base: Path) -> None:
    """One small, whole input of every kind."""
    g = torch.Generator().manual_seed(0)

    def x(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(heads, tokens, 8, generator=g)

    entries = [
        {"prompt": p, "layer": i, "q": x(2, n), "k": x(1, n), "v": x(1, n), "scale": 0.4}
        for p, n in zip("ab", TOKENS, strict=True)
        for i in (0, 1)
    ]
    model = {"name": "m", "layers": 2, "query_heads": 2, "kv_heads": 1, "head_dim": 8}
    write_dump(base / "dump", entries, model=model)
    _analyze(base)
    _compare(base)
    _heads(base)
    _calibrate(base)
    shutil.copy(base / "calibration" / "anchors.json", base / "anchors.json")
    (base / "bench.json").write_text(json.dumps(_bench()))
    vocabulary = {"a": 0, "\u0120b": 1, "\u0120c": 2}
    (base / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<s>", "id": 3}]})
    )
    (base / "unigram.json").write_text(json.dumps({"model": {"vocab": [["a", -1.5], ["\u2581b", -2]]}}))
    (base / "prompt.txt").write_text("Some text of a prompt, with an \u00e9.\n" * 4)
    (base / "ids.txt").write_text("[1, 2, 3, 4]\n")
    _evaluation(base / "evaluation")


def _analyze(base: Path) -> None:
    anchorscope.analyze(base / "dump", base / "analysis", thetas=[1.0, 3.0], params=GROUPS, figures=False)


def _compare(base: Path) -> None:
    lineup = line_up("anchor,streaming", (), ())
    compare_methods(base / "dump", base / "comparison", lineup=lineup, figures=False)


def _heads(base: Path) -> None:
    anchorscope.diagnose(base / "dump", base / "heads", params=GROUPS, theta=2.0, figures=False)


def _calibrate(base: Path) -> None:
    anchorscope.calibrate(
        [base / "dump"], base / "calibration", groups=[GROUPS], thetas=[1.0, 2.0, 4.0], holdout=0, figures=False
    )


def _bench() -> dict[str, Any]:
    timing = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}
    sparse = {"theta": 4.0, "density": 0.5, "efficiency": 0.8, "stages": {"anchor": timing}, "whole": timing}
    sparse |= {"recall": 0.9, "output_error": 0.01, "speedup": 1.5}
    row = {
        "source": "planted",
        "n": 128,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "window": None,
        "softcap": None,
        "dense": [{"name": "sdpa", "kv_repeated": True, "timing": timing, "output_error": 1e-7}],
        "absent": [{"name": "flex", "reason": "not here"}],
        "baseline": "sdpa",
        "check": {"passed": True, "reason": None},
        "sparse": [sparse, {**sparse, "theta": "inf", "density": 1.0}],
    }
    settings = {"input": "planted", "dump_sha256": None, "dtype": "fp32", "block": 16, "step": 2, "init": 16}
    settings |= {"lookback": 16, "seed": 0, "period": 8, "backend": "torch"}
    versions = {"anchorscope": "0", "torch": "2", "triton": None}
    return {
        "format": "anchorscope-bench",
        "format_version": 1,
        "settings": settings,
        "versions": versions,
        "hardware": {"type": "cpu", "name": "CPU"},
        "rows": [row],
    }


def _evaluation(folder: Path) -> None:
    (folder / "parts").mkdir(parents=True)
    scores = TokenScores(*(np.linspace(0, 1, 9) for _ in range(4)))
    Part(scores, PrefillWork(9, 0.5, {0: LayerWork("sparse", 9, 45, 30, 0.9, 0.1)}), "an answer", 1.0).save(
        folder / "parts" / "00000-arm00.safetensors", "run"
    )
    report = {"format": "anchorscope-evaluation", "version": EVALUATION_VERSION, "model": {"name": "m", "layers": 2}}
    times = {side: {"prefill_seconds": 1.0, "attention_share": 0.5} for side in ("dense", "sparse")}
    both = {"arm": "x", "length": 64, "recall": 0.9, "density": 0.5, "times": times}
    metrics = dict.fromkeys(("perplexity_dense", "perplexity_sparse", "perplexity_ratio", "kl_mean", "kl_p99"), 1.5)
    ranges = {name: [0.5, 2.0] for name in ("perplexity_ratio", "kl_mean", "top1_agreement")}
    prompt = {**both, **metrics, "prompt": "p", "top1_agreement": 0.9, "intervals": ranges, "last_half": metrics}
    prompt["layers"] = [{"layer": 0, "kind": "sparse", "density": 0.5, "recall": 0.9}]
    scores_of = {f"{name}_{side}": 0.5 for name in ("score", "logprob") for side in ("dense", "sparse")}
    task = {**both, **scores_of, "task": "needle", "depth": None, "samples": 2, "logprob_difference": 0.0}
    task["intervals"] = {"score_dense": [0.0, 1.0], "score_sparse": [0.0, 1.0], "logprob_difference": None}
    arm = {"name": "x", "layers": 1, "heads": 2, "dense_heads": 0, "theta_low": 1.0, "theta_high": "inf"}
    lists = {"arms": [{**arm, "groups": ["16x2"]}], "prompts": [prompt], "tasks": [task]}
    lists |= {"depths": [{**task, "depth": 0.5}], "answers": [{"name": "x"}]}
    proof = {"warnings": [], "prompts": [{"prompt": "p", "length": 64, "near_chance": True}]}
    (folder / "evaluation.json").write_text(json.dumps({**report, "settings": {}, **lists, "proof": proof}))


# ---------------------------------------------------------------------------------------------------------------------
# who reads it


def _read_anchors(base: Path, file: Path) -> None:
    config = AnchorConfig.load(file)
    config.check_model({"name": "m", "layers": 2, "query_heads": 2, "kv_heads": 1, "head_dim": 8, "type": "llama"})
    config.save(base / "again.json")
    assert AnchorConfig.load(base / "again.json") == config


def _read_bench(base: Path, file: Path) -> None:
    _read_page(base, ".")
    with contextlib.suppress(AnchorScopeError):
        compare_benches(_bench(), load_result(file))
    Costs.load([file]).price([GROUPS], 128)(GROUPS, np.array([0.1, 0.6, 1.0]))


def _read_analysis(base: Path, file: Path) -> None:
    folder = base / "analysis"
    for read in (
        lambda: anchorscope.load_report(folder),
        lambda: list(anchorscope.iter_profiles(folder)),
        lambda: build_data(open_sources([folder])),
        lambda: anchorscope.calibrate([folder], base / "new", groups=[GROUPS], holdout=0, figures=False),
        lambda: _again(base, "analysis", "report.json", _analyze),
    ):
        with contextlib.suppress(AnchorScopeError):
            read()


def _read_table(base: Path, file: Path) -> None:
    build_data(open_sources([base / "analysis", file.parent]))


def _read_comparison(base: Path, file: Path) -> None:
    with contextlib.suppress(AnchorScopeError):
        load_comparison(base / "comparison")
    with contextlib.suppress(AnchorScopeError):
        _read_table(base, base / "comparison" / "methods.csv")
    _again(base, "comparison", "compare.json", _compare)


def _read_heads(base: Path, file: Path) -> None:
    with contextlib.suppress(AnchorScopeError):
        load_diagnosis(base / "heads")
    with contextlib.suppress(AnchorScopeError):
        _read_table(base, base / "heads" / "diagnostics.csv")
    _again(base, "heads", "heads.json", _heads)


def _read_page(base: Path, *folders: str) -> None:
    """A page of folders, as strict JSON."""
    with contextlib.suppress(AnchorScopeError):
        json.dumps(build_data(open_sources([base / folder for folder in folders])), allow_nan=False)


def _make_page(*folders: str) -> Callable[[Path, Path], list[str]]:
    """The command that makes a page of folders."""
    return lambda base, _: ["report", *(str(base / f) for f in folders), "--html", str(base / "page.html")]


def _read_calibration(base: Path, file: Path) -> None:
    _read_page(base, "calibration")
    with contextlib.suppress(AnchorScopeError):
        _read_anchors(base, base / "calibration" / "anchors.json")
    _again(base, "calibration", "calibration.json", _calibrate)


def _again(base: Path, folder: str, report: str, make: Callable[[Path], None]) -> None:
    """Continue a run that has not written its report; what it ends with must be what it was without the accident."""
    if (base / folder / report).is_dir():
        (base / folder / report).rmdir()
    (base / folder / report).unlink(missing_ok=True)
    make(base)
    tables = list((base / folder).glob("*.csv"))
    assert tables
    for path in tables:
        if _resealed:  # whoever can make a checksum right again can also choose the number
            break
        assert path.read_bytes() == _genuine[f"{folder}/{path.name}"], f"{path.name} differs after the run continued"


def _read_evaluation(base: Path, file: Path) -> None:
    _read_page(base, "evaluation")
    Part.load(base / "evaluation" / "parts" / "00000-arm00.safetensors", "run")
    anchorscope.load_evaluation(base / "evaluation")


_genuine: dict[str, bytes] = {}
_resealed: set[Path] = set()  # of the mutant at hand
TARGETS = (
    Target("anchors", "anchors.json", _read_anchors),
    Target("bench", "bench.json", _read_bench, _make_page(".")),
    Target(
        "analysis",
        "analysis/**/*",
        _read_analysis,
        _make_page("analysis"),
    ),
    Target(
        "comparison",
        "comparison/**/*",
        _read_comparison,
        _make_page("analysis", "comparison"),
    ),
    Target(
        "heads",
        "heads/**/*",
        _read_heads,
        _make_page("analysis", "heads"),
    ),
    Target("calibration", "calibration/*", _read_calibration, _make_page("calibration")),
    Target("evaluation", "evaluation/**/*", _read_evaluation, _make_page("evaluation")),
    Target("tokenizer", "tokenizer.json", lambda _, file: token_texts([0, 1, 9], load_pieces(file))),
    Target("unigram", "unigram.json", lambda _, file: token_texts([0, 1, 9], load_pieces(file))),
    Target("prompt", "prompt.txt", lambda _, file: prompt_from_file(file)),
    Target("token ids", "ids.txt", lambda _, file: token_ids_from_file(file)),
)


# ---------------------------------------------------------------------------------------------------------------------
# mutations


def flip_bits(path: Path, rng: random.Random) -> None:
    """Flip up to eight bits."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut_or_grow(path: Path, rng: random.Random) -> None:
    """Truncate, drop a piece, double a piece, append noise, or leave nothing."""
    raw = path.read_bytes()
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    path.write_bytes(rng.choice([raw[:a], raw[:a] + raw[b:], raw[:b] + raw[a:], raw + rng.randbytes(b - a + 1), b""]))


def replace_words(path: Path, rng: random.Random) -> None:
    """Put hostile words in place of some."""
    text = path.read_bytes().decode("latin-1")
    for _ in range(rng.choice([1, 1, 2, 5])):
        words = list(re.finditer(r'"[^"]*"|[-+\w.]+', text))
        if not words:
            return
        at = rng.choice(words)
        text = text[: at.start()] + rng.choice(HOSTILE) + text[at.end() :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def edit_json(path: Path, rng: random.Random) -> None:
    """Change, remove, repeat or swap values anywhere; half the time a part's seal is made right again."""
    value = json.loads(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        change_somewhere(value, rng)
    if isinstance(value, dict) and SEAL in value and rng.random() < 0.5:
        with contextlib.suppress(ValueError, UnicodeEncodeError):
            value = seal({k: x for k, x in value.items() if k != SEAL})
            _resealed.add(path)
    path.write_bytes(json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))


def replace_file(path: Path, rng: random.Random) -> None:
    """A pipe, a device, a folder, a link, or nothing in the file's place."""
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("/dev/null")


def add_mark(path: Path, rng: random.Random) -> None:
    """A byte-order mark, another encoding."""
    text = path.read_bytes().decode("latin-1")
    path.write_bytes(text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-32"])))


MUTATIONS = (
    flip_bits,
    cut_or_grow,
    replace_words,
    replace_words,
    edit_json,
    edit_json,
    edit_json,
    replace_file,
    add_mark,
)


# ---------------------------------------------------------------------------------------------------------------------
# the campaign


def examine(target: Target, base: Path, file: Path, *, command: bool) -> str:
    """Read a mutant."""
    outcome = "accepted"
    if command and target.command is not None:
        _through_the_command_line(target.command(base, file))
    try:
        target.read(base, file)
    except AnchorScopeError as error:
        outcome, said = "refused", str(error)
        if not 0 < len(said) < 3000:
            raise ValueError(f"a message of {len(said)} characters") from error
    return outcome


def _through_the_command_line(arguments: list[str]) -> None:
    from anchorscope.cli import main as program

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program(arguments)
    for stream in (out, err):
        stream.seek(0)
        said = stream.read()
        assert "Traceback" not in said, said
        assert "internal error" not in said, said
        assert not any(ord(c) < 32 and c not in "\n\t" for c in said), repr(said)
    assert code in (0, 2), f"exit code {code}: {said}"


def campaign(count: int, seed: int, *, stop: bool = True) -> tuple[Counter[str], list[str]]:
    """Read `count` mutants; outcomes by kind of input, and failures with the number of the mutant."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        base, work = Path(name) / "original", Path(name) / "mutant"
        originals(base)
        _genuine.update({str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*.csv")})

        def late(*_: object) -> None:
            raise Hang

        signal.signal(signal.SIGALRM, late)
        for number in range(count):
            rng = random.Random(f"{seed}:{number}")
            shutil.copytree(base, work)
            _resealed.clear()
            target = rng.choice(TARGETS)
            file = rng.choice(
                [p for p in sorted(work.glob(target.pattern)) if p.is_file() and not p.name.startswith(".")]
            )
            mutate = rng.choice(MUTATIONS)
            try:
                mutate(file, rng)
            except ValueError:  # no JSON
                mutate = flip_bits
                mutate(file, rng)
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            try:
                outcome = examine(target, work, file, command=number % CLI_SHARE == 0)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = "FAILED"
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(
                    f"mutant {seed}:{number} ({file.relative_to(work)}, {mutate.__name__}): {type(error).__name__}:"
                    f" {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                shutil.rmtree(work)
            outcomes[f"{target.name}: {outcome}"] += 1
    return outcomes, failures


def main() -> None:
    """Run a campaign and print its outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    outcomes, failures = campaign(options.count, options.seed)
    for what, number in sorted(outcomes.items()):
        print(f"{number:6} {what}")
    for failure in failures:
        print(failure)
    print(f"{sum(outcomes.values())} mutants, {len(failures)} failures, {time.perf_counter() - begun:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
