"""`run_bench` and the command: what is reported is what was timed; nothing is claimed on a failed check."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from matplotlib.figure import Figure

from anchorscope.bench import BenchConfig, cases, check_out, compare, load_result, measure, request, run_bench, save
from anchorscope.bench.backends import SparseBackend, resolve_backend
from anchorscope.bench.figures import figure_density, figure_time
from anchorscope.cli.app import main
from anchorscope.dumps import write_dump
from anchorscope.errors import InputError
from anchorscope.kernels import reference
from anchorscope.params import AnchorParams
from anchorscope.planted import Plant, planted

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "bench.schema.json").read_text(encoding="utf-8"))
SMALL = BenchConfig(
    lengths=(300, 600),
    thetas=(6.0, math.inf),
    params=AnchorParams(16, 4),
    heads=4,
    kv_heads=2,
    head_dim=32,
    device="cpu",
    repeats=2,
)
FLAGS = [*("--heads", "4", "--kv-heads", "2", "--head-dim", "32"), *("--block", "16", "--step", "4")]
FLAGS += ["--device", "cpu", "--repeats", "2"]


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return run_bench(SMALL).to_json()


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dumps") / "d"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 200, 16, generator=g) * 2 for h in (4, 2, 2))
    write_dump(
        folder,
        [
            {"prompt": "p", "layer": 3, "q": q, "k": k, "v": v, "scale": 0.3},
            {"prompt": "p", "layer": 5, "q": q, "k": k, "v": v, "scale": 0.25},
        ],
    )
    return folder


def test_result_follows_the_schema(small: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(small, SCHEMA)
    json.dumps(small, allow_nan=False)
    assert [row["n"] for row in small["rows"]] == [300, 600]
    assert [s["theta"] for s in small["rows"][0]["sparse"]] == [6.0, "inf"]
    assert small["hardware"]["type"] == "cpu"


def test_figures_of_merit_match_brute_force(small: dict[str, Any]) -> None:
    """Recall, density, stripes and error of what was timed, against the float64 specification."""
    for row in small["rows"]:
        q, k, v = planted(row["n"], 4, 2, 32, group=64, device="cpu", dtype=torch.float32)
        geo = reference.geometry(q, k, block=16, step=4)
        s = reference.scores(q, k, scale=32**-0.5)
        dense, _ = reference.masked_attention(s, v, reference.visible_mask(geo))
        out, _, mask = reference.anchor_attention(q, k, v, theta=6.0, block=16, step=4)
        got, full = row["sparse"]
        error = (out - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1)
        recall = reference.recall_rows(s, mask, geo).mean(-1)
        assert got["kept_pairs"] == int(mask.sum())
        assert got["density"] == pytest.approx(int(mask.sum()) / row["visible_pairs"], abs=1e-12)
        assert (got["recall"], got["recall_worst_head"]) == pytest.approx(
            (float(recall.mean()), float(recall.min())), abs=1e-5
        )
        assert (got["output_error"], got["output_error_worst_head"]) == pytest.approx(
            (error.mean().item(), error.max().item()), abs=1e-5
        )
        assert 0 < got["density"] < 1
        assert got["recall"] < 1
        assert (full["density"], full["stripe_density"]) == (1.0, 1.0)
        assert full["recall"] == pytest.approx(1, abs=1e-5)
        assert row["check"]["passed"]


def test_ratios_are_consistent(small: dict[str, Any]) -> None:
    for row in small["rows"]:
        assert row["baseline"] == "flash"
        dense_ms = row["dense"][0]["timing"]["median_ms"]
        assert row["dense"][0]["tflops"] == pytest.approx(4 * 32 * row["visible_pairs"] / dense_ms / 1e9)
        for sparse in row["sparse"]:
            assert sparse["speedup"] == pytest.approx(dense_ms / sparse["whole"]["median_ms"])
            assert sparse["efficiency"] == pytest.approx(sparse["speedup"] * sparse["density"])
            assert sparse["whole"]["repeats"] == 2


def broken(**change: Any) -> Any:
    """A back end with one stage replaced, to be installed in place of the resolved one."""

    def resolve(name: str, device: torch.device) -> SparseBackend:
        return dataclasses.replace(resolve_backend("torch", device), **change)

    return resolve


def drops_a_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> Any:
    k = k.clone()
    k[:, :, 0] = 0  # the sink is gone: the released kernels' kind of mistake
    return resolve_backend("torch", q.device).whole(q, k, v, **kwargs)


def other_theta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, theta: float, **kwargs: Any) -> Any:
    return resolve_backend("torch", q.device).whole(q, k, v, theta=theta - 1, **kwargs)


def selects_too_little(state: Any, k: torch.Tensor, *, theta: float, **kwargs: Any) -> Any:
    return resolve_backend("torch", k.device).identify(state, k, theta=min(theta, 8.0), **kwargs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"whole": drops_a_key}, "output error"),
        ({"whole": other_theta}, "the stages and the whole pipeline differ"),
        ({"identify": selects_too_little}, "pairs kept at theta = inf"),
    ],
)
def test_no_speed_up_on_a_failed_check(monkeypatch: pytest.MonkeyPatch, change: Any, reason: str) -> None:
    monkeypatch.setattr(request, "resolve_backend", broken(**change))
    config = dataclasses.replace(SMALL, lengths=(300,), thetas=(6.0,))
    result = run_bench(config)
    row = result.rows[0]
    assert not result.passed
    assert row.check.reason is not None
    assert reason in row.check.reason
    assert row.sparse[0].speedup is row.sparse[0].efficiency is None
    jsonschema.validate(result.to_json(), SCHEMA)


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter() -> None:
    """Wiring of the Triton stages, the in-place one included, where there is no GPU."""
    shape = ["--lengths", "70", "--heads", "2", "--kv-heads", "1", "--head-dim", "32"]
    shape += ["--block", "16", "--step", "1", "--theta", "4", "--repeats", "2"]
    command = [sys.executable, "-m", "anchorscope", "bench", "--backend", "triton", *shape, "--device", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["check"]["passed"]
    assert row["check"]["recall"] == pytest.approx(1, abs=1e-4)
    q, k, v = planted(70, 2, 1, 32, group=16, device="cpu", dtype=torch.float32)
    mask = reference.anchor_attention(q, k, v, theta=4.0, block=16, step=1)[2]
    assert row["sparse"][0]["kept_pairs"] == int(mask.sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_a_gpu(dtype: str) -> None:
    """Triton stages against every dense back end there; N is no multiple of anything."""
    config = BenchConfig(
        lengths=(3001, 9000),
        thetas=(6.0, 12.0),
        params=AnchorParams(64, 8),
        heads=8,
        kv_heads=2,
        head_dim=64,
        dtype=dtype,
        device="cuda",
        repeats=3,
    )
    result = run_bench(config)
    jsonschema.validate(result.to_json(), SCHEMA)
    assert result.settings["backend"] == "triton"
    for row in result.rows:
        assert row.check.passed, row.check.reason
        assert {"flash", "flex"} <= {dense.name for dense in row.dense}, row.absent
        for sparse in row.sparse:
            assert sparse.speedup is not None
            assert sparse.extra_memory_bytes is not None
            assert 0.9 < sparse.recall <= 1.001


def test_failed_check_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(request, "resolve_backend", broken(whole=drops_a_key))
    assert main(["bench", "--lengths", "300", *FLAGS]) == 1
    out, err = capsys.readouterr()
    assert "refused" in out
    assert "the check against dense failed" in err


def test_dense_back_end_that_is_wrong_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.dense_backends

    def wrong(*args: Any, **kwargs: Any) -> Any:
        present, absent = real(*args, **kwargs)
        return [dataclasses.replace(x, run=lambda run=x.run: run() * 1.5) for x in present], absent

    monkeypatch.setattr(measure, "dense_backends", wrong)
    row = run_bench(dataclasses.replace(SMALL, lengths=(300,))).rows[0]
    assert row.baseline is None
    assert "wrong here" in row.absent[0].reason
    assert row.sparse[0].speedup is None


def test_dump_entries_at_their_own_scale(dump: Path) -> None:
    config = BenchConfig(params=AnchorParams(16, 2), thetas=(3.0,), device="cpu", repeats=1, lengths=(200, 90))
    result = run_bench(config, dump)
    rows = result.rows
    assert [(row.source, row.n, row.scale) for row in rows] == [
        ("p/layer 3", 200, 0.3),
        ("p/layer 3", 90, 0.3),
        ("p/layer 5", 200, 0.25),
        ("p/layer 5", 90, 0.25),
    ]
    assert result.settings["dump_sha256"]
    jsonschema.validate(result.to_json(), SCHEMA)
    only = run_bench(dataclasses.replace(config, layers=(5,), lengths=None), dump)
    assert [(row.source, row.n) for row in only.rows] == [("p/layer 5", 200)]


def test_figures(small: dict[str, Any], dump: Path) -> None:
    lines = figure_time(small)
    assert isinstance(lines, Figure)
    axes = lines.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    curves = {c.get_label(): c for c in axes.containers}
    whole = [row["sparse"][0]["whole"]["median_ms"] for row in small["rows"]]
    assert curves["whole pipeline"].lines[0].get_ydata().tolist() == whole
    assert "dense flash" in curves
    density = figure_density(small)
    assert density is not None
    want = sorted([s["density"], 1 / s["speedup"]] for s in small["rows"][0]["sparse"])
    assert density.axes[0].lines[0].get_xydata().tolist() == want
    one = run_bench(BenchConfig(params=AnchorParams(16, 2), device="cpu", repeats=1), dump).to_json()
    bars = figure_time(one).axes[0]
    assert len(bars.patches) == 2 * 4  # two layers: three stages and the baseline
    marks = [line.get_segments()[0][0][0] for line in bars.collections]
    assert marks == [row["sparse"][0]["whole"]["median_ms"] for row in one["rows"]]
    assert figure_density(one) is None


def test_density_can_be_read_on_narrow_axes(small: dict[str, Any]) -> None:
    narrow = json.loads(json.dumps(small))
    for row in narrow["rows"]:
        for sparse, density in zip(row["sparse"], (0.57, 0.9), strict=False):
            sparse["density"] = density
    figure = figure_density(narrow)
    assert figure is not None
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert high < 1.5
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 4


def test_command_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert main(["bench", "--lengths", "300", "--theta", "4,6", "--out", str(out), *FLAGS]) == 0
    text, err = capsys.readouterr()
    assert "CPU TIMING" in text
    assert "CPU TIMING" in err
    assert max(map(len, text.splitlines())) <= 80
    files = ["bench.json", "density.png", "parts", "run.json", "time.png"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert "1 input to time; needs about" in err
    saved = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    jsonschema.validate(saved, SCHEMA)

    assert main(["bench", "--lengths", "300,400", "--json", "--against", str(out), *FLAGS]) == 0
    text, err = capsys.readouterr()
    data = json.loads(text)
    jsonschema.validate(data, SCHEMA)
    whats = [x["what"] for x in data["against"]["ratios"]]
    assert whats == ["dense flash", "anchor", "identification theta=6", "sparse theta=6", "whole theta=6"]
    assert "5 of 10 times have no counterpart" in err

    assert main(["bench", "--lengths", "200", "--theta", "6", "--against", str(out), *FLAGS]) == 0
    assert "nothing to compare" in capsys.readouterr().out

    assert main(["bench", "--lengths", "300", "--out", str(out), *FLAGS]) == 2
    assert f"--out {out} holds a finished bench; add --overwrite" in capsys.readouterr().err
    assert main(["bench", "--lengths", "300", "--out", str(out), "--overwrite", *FLAGS]) == 0
    # One theta: no density figure is left over.
    assert sorted(p.name for p in out.iterdir()) == ["bench.json", "parts", "run.json", "time.png"]


def test_compare_ratios(small: dict[str, Any]) -> None:
    slower = json.loads(json.dumps(small))
    for row in slower["rows"]:
        for sparse in row["sparse"]:
            for key in ("median_ms", "p20_ms", "p80_ms"):
                sparse["whole"][key] *= 100
    ratios, notes = compare(slower, small)
    assert not notes
    for ratio in ratios:
        whole = ratio.what.startswith("whole")
        assert ratio.ratio == pytest.approx(100 if whole else 1)
        assert ratio.beyond_spread is whole
    slower["hardware"]["name"] = "another"
    slower["settings"]["seed"] = 1
    ratios, notes = compare(slower, small)
    assert not ratios
    assert any("different hardware" in x for x in notes)
    assert any("no counterpart" in x for x in notes)


@pytest.mark.parametrize("missing", [["versions"], ["settings", "backend"]])
def test_compare_with_a_result_that_leaves_optional_facts_out(small: dict[str, Any], missing: list[str]) -> None:
    older = json.loads(json.dumps(small))
    inner = older
    for key in missing[:-1]:
        inner = inner[key]
    del inner[missing[-1]]
    words = "torch" if missing == ["versions"] else "back end"
    for new, old in ((small, older), (older, small)):
        ratios, notes = compare(new, old)
        assert ratios
        assert any(f"different {words}: " in note and "None" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON|too deeply"),
        ("[" * 100_000, "not JSON|too deeply"),
        ("[]", "not a bench result"),
        ('{"format": "anchorscope-bench", "format_version": 9}', "format version 9"),
        ('{"format": "anchorscope-bench", "format_version": 1, "rows": [{}]}', "damaged"),
        ('{"format": "anchorscope-bench", "format_version": 1, "rows": 3}', "damaged"),
    ],
)
def test_bad_older_result(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "old.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_result(file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block 0", "--block 0 is out of range"),
        ("--step 0", "step must be"),
        ("--theta abc", "--theta"),
        ("--theta nan", "--theta"),
        ("--theta 9:1:1", "backwards"),
        ("--theta 0:20:0", "has step 0"),
        ("--theta 4,6,4", "theta 4 is given twice"),
        ("--lengths 4096,,8", "--lengths"),
        ("--lengths 0", "out of range"),
        ("--lengths 4k,4096", "twice"),
        ("--lengths 9999999", "out of range"),
        ("--heads 3 --kv-heads 2", "cannot share 2 kv heads evenly"),
        ("--heads 0", "heads must be at least 1"),
        ("--head-dim 8", "head dimension of at least 17"),
        ("--dtype fp8", "--dtype 'fp8' is unknown"),
        ("--device tpu", "--device"),
        ("--backend cuda", "--backend 'cuda' is unknown; use auto"),
        ("--dense fast", "--dense 'fast' is unknown"),
        ("--repeats 0", "repeats must be at least 1"),
        ("--period 0", "--period 0 is out of range"),
        ("--layers 3", "planted input has no layers"),
        ("--against missing.json", "cannot be read"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["bench", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads 4", "heads belongs to planted input"),
        ("--lengths 201", "more than the 200 tokens of prompt p"),
        ("--layers 4", "--layers: 4 does not exist"),
    ],
)
def test_bad_usage_on_a_dump(dump: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["bench", str(dump), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_bad_folders(tmp_path: Path, dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    for out, message in ((file, "is a file"), (file / "below", "is a file or lies below one")):
        assert main(["bench", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "nothing")]) == 2
    assert file.read_text(encoding="utf-8") == "x"
    bare = tmp_path / "bare"
    write_dump(bare, [{"prompt": "p", "layer": 0, "q": torch.ones(1, 8, 4), "k": torch.ones(1, 8, 4), "scale": 0.5}])
    assert main(["bench", str(bare)]) == 2
    assert "without --no-values" in capsys.readouterr().err


def test_out_of_memory_says_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = cases.planted

    def small_machine(plant: Plant, **kwargs: Any) -> Any:
        if plant.n > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(plant, **kwargs)

    monkeypatch.setattr(cases, "planted", small_machine)
    assert main(["bench", "--lengths", "300,600", *FLAGS]) == 1
    assert "out of memory on cpu at N = 600 with 4 heads of 32; N = 300 fitted" in capsys.readouterr().err


def test_a_result_can_be_saved_later(tmp_path: Path, small: dict[str, Any]) -> None:
    """One that was measured without a folder; the folder is guarded like any other."""
    written = save(small, tmp_path / "o")
    assert [path.name for path in written] == ["bench.json", "time.png", "density.png"]
    assert load_result(tmp_path / "o") == small
    with pytest.raises(InputError, match="holds a finished bench; add --overwrite"):
        save(small, tmp_path / "o")
    save({**small, "command": "again"}, tmp_path / "o", overwrite=True)
    assert load_result(tmp_path / "o")["command"] == "again"
    with pytest.warns(DeprecationWarning, match="checks its"), pytest.raises(InputError, match="add --overwrite"):
        check_out(tmp_path / "o")
