"""`evaluate` end to end: files, resume, refusals, the command line."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from byte_model import byte_model

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.cli import main
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.evaluation import EvaluateRequest, evaluate, load_evaluation, plan_evaluation, results
from anchorscope.evaluation import request as request_module
from anchorscope.evaluation import run as run_module
from anchorscope.evaluation.lanes import Arm
from anchorscope.evaluation.text import OWN_TEXT
from anchorscope.models import PromptInput, model_facts
from anchorscope.params import AnchorParams
from anchorscope.runs.executors import Context

ROOT = Path(__file__).parents[2]
PARAMS = AnchorParams(16, 2)
ARMS = {"all": math.inf, "none": -math.inf}
REQUEST = {
    "arms": ARMS,
    "params": PARAMS,
    "prompts": [PromptInput("p", token_ids=tuple(1 + i * i % 250 for i in range(650)))],
    "tasks": ["perplexity", "needle", "common-words"],
    "lengths": [600],
    "depths": [0.0, 1.0],
    "samples": 2,
    "chunk": 224,
}


def short_words(monkeypatch):
    """Lists of words that fit into a few hundred bytes."""
    from anchorscope.evaluation import tasks

    monkeypatch.setattr(tasks, "NOUNS", tuple(f"w{i}" for i in range(60)))
    monkeypatch.setattr(tasks, "ADJECTIVES", ("a", "b", "c", "d"))
    monkeypatch.setattr(tasks, "LEAST_PROSE", 20)


@pytest.fixture(scope="module")
def finished(model, tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        short_words(patch)
        return evaluate(model, tmp_path_factory.mktemp("out") / "o", tokenizer=tokenizer, **REQUEST)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_reported(finished):
    report = finished.report
    assert [(r["prompt"], r["length"], r["arm"]) for r in finished.prompts] == [
        (p, 600, arm) for p in ("p", "alice") for arm in ARMS
    ]
    assert [(r["task"], r["arm"], r["samples"]) for r in finished.tasks] == [
        ("needle", "all", 4),
        ("needle", "none", 4),
        ("common-words", "all", 2),
        ("common-words", "none", 2),
    ]
    assert [(r["depth"], r["arm"], r["samples"]) for r in report["depths"]] == [
        (d, arm, 2) for d in (0.0, 1.0) for arm in ARMS
    ]
    assert len(report["answers"]) == 3 * (4 + 2)
    for r in (*finished.prompts, *finished.tasks):
        for name in (
            "perplexity_dense",
            "perplexity_sparse",
            "kl_mean",
            "kl_p99",
            "top1_agreement",
            "recall",
            "density",
        ):
            assert name in r
        assert r["times"]["dense"]["prefill_seconds"] > 0
        assert 0 < r["times"]["sparse"]["attention_share"] < 1
        if r["arm"] == "all":
            assert r["density"] == 1
            assert r["kl_mean"] < 1e-5
            assert r["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
        else:
            assert r["density"] < 0.5
            assert r["kl_mean"] > 1e-4
    assert all(0 < r["recall"] <= 1 for r in finished.prompts)
    assert all(r["recall"] is None for r in finished.tasks)
    assert len(finished.prompts[0]["layers"]) == 3
    assert load_evaluation(finished.path).report == json.loads(json.dumps(report))


def test_report_follows_its_schema(finished):
    schema = json.loads((ROOT / "docs" / "evaluation.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    report = json.loads((finished.path / "evaluation.json").read_text())
    jsonschema.validate(report, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report, "tasks": [{}]}, schema)


def test_the_proof_is_what_the_dense_model_predicts(model, finished):
    proof = finished.report["proof"]
    found = [(p["prompt"], p["length"], p["tokens"]) for p in proof["prompts"]]
    assert found == [
        ("p", 600, 256),
        (OWN_TEXT, 600, 256),
    ]
    ids = torch.tensor([REQUEST["prompts"][0].token_ids[:600]])
    with torch.inference_mode():
        logits = model(ids).logits[0, -257:-1].double()
    targets = ids[0, -256:]
    nats = -logits.log_softmax(-1).gather(1, targets[:, None]).mean()
    assert proof["prompts"][0]["nats"] == pytest.approx(float(nats), rel=1e-5)
    assert proof["prompts"][0]["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    assert proof["prompts"][0]["near_chance"]  # random weights
    assert (proof["loader"], proof["warnings"]) == (None, [])


def test_tasks_alone_are_proven_by_a_short_run(model, tokenizer, tmp_path, monkeypatch):
    short_words(monkeypatch)
    said: list[str] = []
    request = {**REQUEST, "prompts": (), "tasks": ["needle"], "samples": 1, "depths": [0.5], "figures": False}
    found = evaluate(model, tmp_path / "o", tokenizer=tokenizer, notify=said.append, **request)
    (proof,) = found.report["proof"]["prompts"]
    assert (proof["tokens"], proof["context"], proof["vocabulary"]) == (256, 512, 260)
    assert proof["near_chance"]
    assert len([line for line in said if "better than chance" in line]) == 1


def test_tables_hold_the_report(finished):
    prompts, tasks, answers = (rows(finished.path / f"{n}.csv") for n in ("prompts", "tasks", "answers"))
    assert tuple(prompts[0]) == results.PROMPT_COLUMNS
    assert tuple(tasks[0]) == results.TASK_COLUMNS
    assert tuple(answers[0]) == results.ANSWER_COLUMNS
    assert (len(prompts), len(tasks), len(answers)) == (4, 4 + 4, 18)
    first = finished.prompts[1]
    assert float(prompts[1]["perplexity_sparse"]) == pytest.approx(first["perplexity_sparse"])
    assert float(prompts[1]["perplexity_ratio_low"]) == pytest.approx(first["intervals"]["perplexity_ratio"][0])
    assert [t["depth"] for t in tasks] == [""] * 4 + ["0", "0", "1", "1"]
    assert [a["arm"] for a in answers[:3]] == ["dense", "all", "none"]
    assert answers[0]["answer"] == answers[1]["answer"]  # everything selected: the same words


def test_figures_are_those_of_the_results(finished):
    names = {p.stem for p in finished.figures}
    assert names == {
        "perplexity",
        "layers",
        "alice-positions",
        "p-positions",
        "needle-grid",
        "needle-grid-logprob",
        "tasks",
        "tasks-logprob",
    }
    assert all(p.stat().st_size > 5000 for p in finished.figures)


def test_chunks_change_nothing(finished, model, tokenizer, tmp_path):
    request = {**REQUEST, "tasks": [], "chunk": 1000}
    whole = evaluate(model, tmp_path / "o", tokenizer=tokenizer, figures=False, **request)
    for a, b in zip(whole.prompts, finished.prompts, strict=False):
        assert a["perplexity_sparse"] == pytest.approx(b["perplexity_sparse"], rel=1e-5)
        assert a["density"] == pytest.approx(b["density"], abs=1e-4)
        assert a["recall"] == pytest.approx(b["recall"], abs=1e-4)


def test_arms_that_are_there_are_kept(finished, model, tokenizer, tmp_path, monkeypatch):
    """One sparse arm of a sample is damaged, one of a prompt is gone: dense runs beside both, and is kept as it is."""
    short_words(monkeypatch)
    out = shutil.copytree(finished.path, tmp_path / "o")
    (out / "evaluation.json").unlink()
    gone, damaged = (out / "parts" / f"{unit:05d}-arm{arm:02d}.safetensors" for unit, arm in ((0, 2), (3, 1)))
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DumpError, match="no finished evaluation"):
        load_evaluation(out)
    kept = {p: p.stat().st_mtime_ns for p in (out / "parts").iterdir() if p != damaged}
    ran, said = [], []
    for name in ("run_prompt", "run_sample"):
        real = getattr(run_module, name)
        spy = lambda *x, real=real, **how: ran.append((real.__name__, x[1])) or real(*x, **how)  # noqa: E731
        monkeypatch.setattr(run_module, name, spy)
    found = evaluate(model, out, tokenizer=tokenizer, notify=said.append, **REQUEST)
    assert [(name, arms.name if isinstance(arms, Arm) else [x.name for x in arms]) for name, arms in ran] == [
        ("run_prompt", ["none"]),
        ("run_sample", "dense"),
        ("run_sample", "all"),
    ]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    (again,) = [x for x in said if "measured again" in x]
    assert again.startswith(f"warning: 1 part is measured again, like {damaged}")
    assert untimed(found.report) == untimed(finished.report)


def untimed(report):
    """A report without what its seconds are."""
    if isinstance(report, dict):
        return {k: untimed(v) for k, v in report.items() if k != "times" and not k.startswith("seconds")}
    return [untimed(x) for x in report] if isinstance(report, list) else report


def test_a_folder_that_cannot_be_used_is_refused_before_loading(finished, tmp_path, monkeypatch, capsys):
    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(request_module, "ready_model", load)
    (tmp_path / "notes.txt").write_text("mine")
    how = {"arms": ARMS, "tasks": ["needle"]}
    for out, why in (
        (finished.path, "holds a finished evaluation; add --overwrite"),
        (tmp_path, "is not an evaluation"),
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path / "notes.txt" / "below", "is a file or lies below one"),
    ):
        with pytest.raises(InputError, match=why):
            evaluate("some/model", out, **how)
        assert command("some/model", out, "--task", "needle", "--theta", "1") == 2
        assert why in capsys.readouterr().err
    for wrong in ({"backend": "cuda"}, {"device": "tpu"}, {"model_dtype": "int8"}, {"prompts": ["absent.txt"]}):
        with pytest.raises(InputError, match=r"cuda|tpu|int8|absent"):
            evaluate("some/model", tmp_path / "o", **wrong, **how)
    for out, options in ((finished.path, {"overwrite": True}), (finished.path, {"resume": True}), (tmp_path / "o", {})):
        with pytest.raises(Loaded):
            evaluate("some/model", out, **options, **how)


def test_a_plan_says_what_a_run_takes(finished, model, tokenizer, tmp_path, monkeypatch):
    short_words(monkeypatch)
    plan = plan_evaluation(model, tokenizer=tokenizer, **REQUEST)
    lengths = [len(u.content.token_ids) for u in plan.units]
    assert plan.extent == f"{3 * len(lengths)} prefills, {3 * sum(lengths):,} tokens in all"
    assert plan.logits == 2 * 224 * 260 * 4
    facts = model_facts(model)
    caches = 3 * 2 * facts["layers"] * facts["kv_heads"] * facts["head_dim"] * 600 * 4
    assert plan.memory == plan.logits + caches
    assert re.search(r"of memory beside the model \(logits .*, KV caches up to .*\) and .* of disk$", plan.needs())
    sizes = [(p.suffix == ".png", p.stat().st_size) for p in finished.path.rglob("*") if p.is_file()]
    for said, pictures in ((plan.disk, False), (plan.pictures, True)):
        assert said == pytest.approx(sum(size for png, size in sizes if png == pictures), rel=0.2)
    request = {"arms": {"a": AnchorConfig.uniform(1.0, [1, 2], 6, PARAMS)}, "prompts": REQUEST["prompts"], "chunk": 224}
    said = []
    for notify in (None, said.append):
        plan = EvaluateRequest(byte_model("gemma3_text"), **request).plan(notify)
        assert sum("sliding windows" in x for x in (*plan.warnings, *said)) == 1, "told at once, or kept"
    done = evaluate(plan.loaded.model, tmp_path / "o", plan=plan, figures=False, notify=said.append)
    assert [x["arm"] for x in done.prompts] == ["a"]
    assert sum("sliding windows" in x or "prefills" in x for x in said) == 1, "who made the plan has been told"
    with pytest.raises(InputError, match="chunk is decided by the plan"):
        evaluate(plan.loaded.model, tmp_path / "p", plan=plan, chunk=96)
    with pytest.raises(InputError, match=r"made of Gemma3ForCausalLM, not of [A-Z]\w+: make one"):
        evaluate(model, tmp_path / "p", plan=plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "at least one sparse arm"),
        ({"arms": {"dense": 1.0}}, "cannot be called dense"),
        ({"arms": {"a": math.nan}}, "arm a: theta must be a number of nats"),
        ({"prompts": []}, "nothing to evaluate"),
        ({"tasks": ["needles"]}, r"task 'needles' is unknown \(did you mean needle\?\); use needle, multi-needle"),
        ({"tasks": ["needle", "needle"]}, "named twice"),
        ({"lengths": [1]}, "at least 2 tokens, not 1"),
        ({"lengths": [700]}, "prompt p has 650 tokens, fewer than the length 700"),
        ({"tasks": ["needle"], "lengths": [100]}, "task needle needs at least [0-9]+ tokens"),
        ({"tasks": ["needle"], "tokenizer": None}, "brings no tokenizer"),
        ({"tasks": ["needle"], "depths": [1.5]}, "between 0 and 1, not 1.5"),
        ({"samples": 0}, "at least 1"),
        (
            {"arms": {"a": AnchorConfig.uniform(1.0, [7], 6)}},
            "a: these anchors name layer 7, but tiny has layers 0 to 2",
        ),
        ({"arms": {"a": AnchorConfig.uniform(1.0, [0], 5)}}, "a: these anchors have 5 heads in layer 0"),
        ({"backend": "cuda"}, "--backend 'cuda' is unknown"),
    ],
)
def test_mistakes_get_one_sentence(model, tokenizer, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("anchorscope.models.load.name_of", lambda _: "tiny")
    request = {**REQUEST, "tasks": [], "tokenizer": tokenizer, **change}
    with pytest.raises(InputError, match=message):
        evaluate(model, tmp_path / "o", **request)
    assert not (tmp_path / "o").exists()


def test_on_a_gpu_each_kind_of_unit_is_warmed_up_once(model, tokenizer, tmp_path, monkeypatch):
    """The plan says that the model is on a GPU, although it is not."""
    short_words(monkeypatch)
    real, steps = run_module.Lane.step, []
    monkeypatch.setattr(
        run_module.Lane, "step", lambda lane, ids, **how: steps.append(len(ids)) or real(lane, ids, **how)
    )
    request = {**REQUEST, "arms": {"none": -math.inf}, "tasks": ["needle"], "depths": [0.5]}
    plan = plan_evaluation(model, tokenizer=tokenizer, **request)
    assert [unit.kind for unit in plan.units] == ["prompts", "tasks", "tasks"]
    found = {}
    for device in ("cpu", "cuda"):
        steps.clear()
        (tmp_path / device / "parts").mkdir(parents=True)
        command = run_module.EvaluateCommand(replace(plan, device=torch.device(device)))
        for unit in plan.units:
            command.make(tmp_path / device, unit, Context(torch.device("cpu")))
        found[device] = [*steps]
    assert len(found["cpu"]) == 3 * 2 * 3, "units, arms, chunks"
    warm = 4 * [224]  # two chunks in two arms
    assert found["cuda"] == warm + found["cpu"][:6] + warm + found["cpu"][6:]


def test_another_models_anchors(model, tmp_path):
    other = model_facts(byte_model(hidden_act="gelu"), "other")
    anchors = AnchorConfig.uniform(1.0, [0], 6, PARAMS)
    request = {**REQUEST, "tasks": [], "arms": {"a": AnchorConfig(anchors.layers, {**other, "fingerprint": "0" * 64})}}
    with pytest.raises(InputError, match="a: these anchors are for another model"):
        evaluate(model, tmp_path / "o", **request)
    assert evaluate(model, tmp_path / "o", force=True, figures=False, **request).prompts[0]["density"] < 1


def test_chunks_are_multiples_of_groups_and_windows_are_warned_of(tmp_path):
    said: list[str] = []
    request = {"prompts": REQUEST["prompts"], "figures": False, "notify": said.append}
    net = byte_model("gemma3_text")
    anchors = AnchorConfig.uniform(1.0, [1, 2], 6, AnchorParams(8, 5))
    evaluate(net, tmp_path / "a", arms={"a": anchors}, chunk=100, **request)
    assert any("chunks of 120 tokens instead of 100" in x for x in said)
    assert any("layers 1 have sliding windows" in x for x in said)
    said.clear()
    evaluate(net, tmp_path / "b", arms={"a": 1.0}, chunk=1000, **request)
    part, extent = [x for x in said if "than chance" not in x]
    assert "a runs 6 of the model's 18 heads sparse (33%), naming 1 of 3 layers" in part
    assert "2 prefills, 1,300 tokens in all" in extent
    # one theta for all leaves sliding layers dense
    assert [x["density"] == 1 for x in load_evaluation(tmp_path / "b").prompts[0]["layers"]] == [True, True, True]


def test_a_model_without_chunks_runs_whole(tmp_path, monkeypatch):
    said: list[str] = []
    request = {"arms": {"a": 0.0}, "params": PARAMS, "prompts": REQUEST["prompts"], "figures": False}
    net = byte_model("jamba")
    found = evaluate(net, tmp_path / "a", chunk=96, notify=said.append, **request)
    assert any("cannot prefill in chunks: prompts run whole" in x for x in said)
    assert found.report["settings"]["chunk"]["prompts"] is None
    monkeypatch.setattr(request_module, "free_bytes", lambda _: 1000)
    with pytest.raises(InputError, match=r"its logits need \d+"):
        evaluate(net, tmp_path / "b", chunk=96, **request)


def test_out_of_memory_is_said(model, tmp_path, monkeypatch):
    def burst(*_, **__):
        raise MemoryError

    monkeypatch.setattr(run_module, "run_prompt", burst)
    with pytest.raises(RunFailure, match="out of memory: use a smaller --chunk"):
        evaluate(model, tmp_path / "o", arms={"a": 1.0}, prompts=REQUEST["prompts"])


# ------------------------------------------------------------------------------------------------------------------
# the command line


def command(model_folder, out, *options):
    return main(["evaluate", "--model", str(model_folder), "--device", "cpu", "--out", str(out), *map(str, options)])


def test_the_command_line(model_folder, tmp_path, capsys):
    text = tmp_path / "a prompt of a rather long name.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    for name, theta in (("a", 2.0), ("b", 6.0)):
        AnchorConfig.uniform(theta, [0, 1, 2], 6, PARAMS).save(tmp_path / f"{name}.json")
    options = ["--prompt", text, "--task", "needle,variable-tracking", "--lengths", "1200", "--samples", 1]
    options += ["--depths", "0.5", "--config", tmp_path / "a.json", "--config", tmp_path / "b.json", "--no-figures"]
    assert command(model_folder, tmp_path / "o", *options, "--as", "calibrated at 0.95", "--as", "b") == 0
    said = capsys.readouterr()
    lines = [x for x in said.out.splitlines() if str(tmp_path) not in x]
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in said.out
    assert "calib~0.95" in said.out
    assert "variabl~acking" in said.out
    assert "Prefill of 1,200 tokens whole" in said.out
    assert "prefills," in said.err
    warnings = [line for line in said.err.splitlines() if "warning" in line]
    assert len(warnings) == 1  # the model is random, and nothing else is amiss
    assert "better than chance" in warnings[0]
    report = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert [a["name"] for a in report["arms"]] == ["calibrated at 0.95", "b"]

    options = ["--prompt", text, "--lengths", "256,512", "--theta=-inf,6", "--block", "16", "--step", "2"]
    assert command(model_folder, tmp_path / "p", *options, "--json", "--no-measure", "--no-figures") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "p" / "evaluation.json").read_text())
    assert [(r["length"], r["arm"]) for r in printed["prompts"]] == [
        (n, arm) for n in (256, 512) for arm in ("theta -inf", "theta 6")
    ]
    assert printed["prompts"][0]["recall"] is None
    assert not (tmp_path / "p" / "figures").exists()


def test_the_part_that_runs_dense_is_said_everywhere(model_folder, tmp_path, capsys, recwarn):
    """Layers that are not named, and heads without a theta: at the start, above the tables, in JSON and in CSV."""
    text = tmp_path / "p.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 4)
    layer = LayerAnchors(1, PARAMS, (2.0, 2.0, None, None, 2.0, 2.0))
    AnchorConfig((layer,)).save(tmp_path / "some.json")
    AnchorConfig.uniform(2.0, [0, 1, 2], 6, PARAMS).save(tmp_path / "every.json")
    options = ["--prompt", text, "--lengths", "200", "--no-figures", "--no-measure"]
    options += ["--config", tmp_path / "some.json", "--config", tmp_path / "every.json"]
    assert command(model_folder, tmp_path / "o", *options) == 0
    said = capsys.readouterr()
    part = "some runs 4 of the model's 18 heads sparse (22%), naming 1 of 3 layers"
    assert f"warning: {part}; the rest runs dense" in said.err
    assert part in " ".join(said.out.split())
    assert "every runs" not in said.out + said.err
    assert not [w for w in recwarn if "these anchors" in str(w.message)], "said once"
    report = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    some, every = (arm["coverage"] for arm in report["arms"])
    assert some == {
        "layers": 3,
        "heads": 18,
        "sparse_layers": 1,
        "sparse_heads": 4,
        "dense_heads": 14,
        "sparse_share": 4 / 18,
        "unnamed": [0, 2],
    }
    assert (every["dense_heads"], every["sparse_share"], every["unnamed"]) == (0, 1.0, [])
    assert [float(r["sparse_heads_share"]) for r in rows(tmp_path / "o" / "prompts.csv")] == [pytest.approx(4 / 18), 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "needle"], "give either --config anchors.json or --theta T"),
        (["--task", "needle", "--theta", "1", "--config", "a.json"], "not both"),
        (["--theta", "1"], "nothing to evaluate: give --prompt FILE or --task NAME"),
        (["--theta", "nan", "--task", "needle"], "'nan' is not a number of nats"),
        (["--theta", "1", "--task", "hay"], "task 'hay' is unknown"),
        (["--theta", "1", "--prompt", "no.txt"], "prompt no.txt does not exist"),
        (["--theta", "1", "--task", "needle", "--lengths", "2kk"], "--lengths '2kk' is no number of tokens"),
        (["--theta", "1", "--task", "needle", "--depths", "half"], "--depths: 'half' is not a share from 0 to 1"),
        (["--theta", "1", "--task", "needle", "--depths", "2"], "--depths: '2' is not a share from 0 to 1"),
        (["--config", "none.json", "--task", "needle"], "none.json cannot be read"),
        (
            ["--theta", "1", "--task", "needle", "--model-dtype", "int8"],
            "--model-dtype 'int8' is unknown; use bf16, fp16 or fp32",
        ),
        (["--theta", "1", "--task", "needle", "--block", "0"], "--block 0 is out of range"),
    ],
)
def test_command_line_mistakes(model_folder, tmp_path, capsys, options, message):
    assert command(model_folder, tmp_path / "o", *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    assert message in said.err
    assert not (tmp_path / "o").exists()


def test_names_of_arms(model_folder, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "a.json", tmp_path / "x" / "a.json"):
        AnchorConfig.uniform(1.0, [0], 6).save(path)
    both = ["--task", "needle", "--config", tmp_path / "a.json", "--config", tmp_path / "x" / "a.json"]
    assert command(model_folder, tmp_path / "o", *both) == 2
    assert "two arms are called a: tell them apart with --as" in capsys.readouterr().err
    assert command(model_folder, tmp_path / "o", *both, "--as", "one") == 2
    assert "--as is given 1 time for 2 --config" in capsys.readouterr().err
