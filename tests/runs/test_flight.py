"""Layers of a running model are measured as they pass: the same bytes as through a dump, nothing kept, any accident."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accidents import Killed, killed_at
from families import CHUNK, prompt, tiny
from resumable import contents, still_clock

from anchorscope import ModelSource, analyze, calibrate, capture_model, compare_methods, diagnose
from anchorscope.cli.app import main
from anchorscope.compare import plan_compare
from anchorscope.errors import InputError, Interrupted, RunFailure
from anchorscope.files import human_bytes
from anchorscope.methods import line_up
from anchorscope.params import AnchorParams
from anchorscope.runs.flight import Job
from anchorscope.runs.folder import SOURCE

PARAMS = AnchorParams(8, 2)
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3_next")  # GQA; windows with soft-caps; windows among others; hybrid


def quiet(_: str) -> None:
    """A `notify` that says nothing."""


def run_analyze(source, out, **how):
    how = {"figure_theta": 4.0, "diagnose": True, **how}
    return analyze(source, out, params=PARAMS, thetas=(4.0, 8.0), device="cpu", figures=False, **how)


def run_heads(source, out, **how):
    return diagnose(source, out, params=PARAMS, theta=4.0, device="cpu", figures=False, **how)


def run_compare(source, out, **how):
    lineup = line_up("anchor,streaming", ["anchor.block=8,anchor.step=2"])
    return compare_methods(source, out, lineup=lineup, device="cpu", figures=False, **how)


def run_calibrate(source, out, **how):
    groups = [PARAMS, AnchorParams(16, 1)]
    thetas = (0.0, 4.0, float("inf"))
    return calibrate(source, out, groups=groups, thetas=thetas, holdout=["b"], device="cpu", figures=False, **how)


COMMANDS = {"analyze": run_analyze, "heads": run_heads, "compare": run_compare, "calibrate": run_calibrate}
every = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


@pytest.fixture(scope="module", autouse=True)
def still():
    """Two threads, as on an ordinary machine, and a clock that stands still."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with still_clock():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    made = {}

    def find(family):
        if family not in made:
            made[family] = tiny(family)
        return made[family]

    return find


def prompts():
    return [prompt(60, "a"), prompt(41, "b", seed=1)]


@pytest.fixture(scope="module")
def sources(models):
    """A model in flight by family and chunk; what it takes is estimated once."""
    made = {}

    def find(family, chunk=None):
        if (family, chunk) not in made:
            made[family, chunk] = ModelSource(models(family), prompts(), notify=quiet, chunk=chunk)
        return made[family, chunk]

    return find


def results(folder: Path) -> dict[str, bytes]:
    """Everything but the names of the source: its own file, and the folders of a calibration's analyses."""
    found = {re.sub(r"analysis/[^/]*?(\d+x\d+)/", r"analysis/\1/", n): x for n, x in contents(folder).items()}
    return {name: data for name, data in found.items() if not name.endswith(SOURCE)}


@pytest.fixture(scope="module")
def through_dump(models, tmp_path_factory):
    """What a command makes of a dump of the same model and prompts, with the identity of the model in flight."""
    dumps, made = {}, {}

    def find(command, family, source, **options):
        key = family, tuple(options.items())
        if key not in dumps:
            folder = tmp_path_factory.mktemp("dump") / "d"
            dumps[key] = capture_model(models(family), prompts(), folder, notify=quiet, **options)
        dump = dumps[key]
        dump.identity = source.identity  # the one field that says where the tensors came from
        if (command, key) not in made:
            out = tmp_path_factory.mktemp("through-dump") / "o"
            command(dump, out)
            made[command, key] = results(out)
        return made[command, key]

    return find


@every
@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bytes_as_through_a_dump(command, family, chunk, sources, through_dump, tmp_path):
    source = sources(family, chunk)
    if command is run_calibrate and not any(e.window is None for e in source.entries):
        pytest.skip("layers with a window are not calibrated")
    want = through_dump(command, family, source, chunk=chunk)
    command(source, tmp_path / "o")
    assert results(tmp_path / "o") == want
    assert sum("/" in name for name in want) >= 2  # parts


def prefills(source, run):
    """How often a prompt passes the first layer of the model while something runs."""
    source.memory(source.entries, torch.device("cpu"))  # its trials count for nothing
    found = []
    hook = source._plan.loaded.model.model.layers[0].register_forward_pre_hook(lambda *_: found.append(1))
    try:
        run()
    finally:
        hook.remove()
    return len(found)


def test_one_pass_serves_the_analysis_and_its_diagnosis_and_all_kinds_of_groups(sources, tmp_path):
    source = sources("llama")
    for name, command in COMMANDS.items():
        assert prefills(source, lambda c=command, n=name: c(source, tmp_path / n)) == len(source.prompts), name


def test_a_diagnosis_by_a_theta_that_is_found_takes_a_second_pass(sources, through_dump, tmp_path):
    source = sources("llama")

    def run(given, out, **how):
        return run_analyze(given, out, figure_theta=None, **how)

    want = through_dump(run, "llama", source, chunk=None)
    told = []
    assert prefills(source, lambda: run(source, tmp_path / "o", notify=told.append)) == 2 * len(source.prompts)
    assert [x for x in told if "the prompts run once more" in x]
    assert results(tmp_path / "o") == want


def test_the_page_and_info_know_the_model_and_the_prompts(sources, tmp_path, capsys):
    source = sources("llama")
    run_analyze(source, tmp_path / "o")
    assert main(["info", str(tmp_path / "o"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["source"]
    assert told["identity"] == source.identity
    assert told["model"]["class"] == "LlamaForCausalLM"
    assert [(p["name"], p["tokens"]) for p in told["prompts"]] == [("a", 60), ("b", 41)]
    assert all(p["proof"]["tokens"] > 0 for p in told["prompts"])
    assert main(["info", str(tmp_path / "o" / "heads")]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    saved = json.loads((tmp_path / "o" / SOURCE).read_text())
    assert tuple(saved["prompts"][0]["token_ids"]) == prompts()[0].token_ids
    (tmp_path / "o" / SOURCE).write_text("{}")
    assert main(["info", str(tmp_path / "o")]) == 2
    assert "source.json" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# accidents


@every
def test_interrupted_at_each_layer_it_continues_to_the_same_bytes(command, sources, tmp_path, monkeypatch):
    source = sources("llama")
    command(source, tmp_path / "whole")
    want = contents(tmp_path / "whole")
    layers = len(source.entries)
    for stop in range(1, layers + 1):
        visited = []

        def visit(self, entry, *rest, real=Job.visit, stop=stop, visited=visited):
            visited.append(entry)
            if len(set(visited)) == stop:
                raise KeyboardInterrupt
            real(self, entry, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Job, "visit", visit)
            with pytest.raises(Interrupted, match=r"interrupted; [\d,]+ of [\d,]+ .*give the same command again"):
                command(source, tmp_path / str(stop))
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(Job, "visit", lambda self, e, *r, real=Job.visit, s=seen: (s.append(e), real(self, e, *r)))
            command(source, tmp_path / str(stop))
        assert contents(tmp_path / str(stop)) == want
        first = stop - 1 if command in (run_compare, run_calibrate) else max(0, stop - 2)  # heads look one layer back
        assert set(seen) <= set(source.entries[first:]), "a layer that was measured passed again"


def test_the_model_stops_behind_the_last_layer_that_is_needed(models, sources, tmp_path, monkeypatch):
    source = sources("llama")
    run_compare(source, tmp_path / "o")
    want = contents(tmp_path / "o")
    part = next(iter(sorted((tmp_path / "o" / "scores").glob("p000-layer001-*"))))
    part.write_bytes(part.read_bytes()[:-20])
    (tmp_path / "o" / "compare.json").unlink()
    calls = []
    layers = models("llama").model.layers
    hooks = [x.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, x in enumerate(layers)]
    told = []
    try:
        run_compare(source, tmp_path / "o", notify=told.append)
    finally:
        for hook in hooks:
            hook.remove()
    assert contents(tmp_path / "o") == want
    assert calls == [0, 1], "one prompt, up to the damaged layer"
    assert "measured again" in told[0]


def test_killed_before_every_change_of_the_disk(sources, tmp_path):
    source, step = sources("llama"), 0
    run_heads(source, tmp_path / "whole")
    want = contents(tmp_path / "whole")
    while True:
        step += 1
        with contextlib.suppress(Killed), killed_at(step) as steps:
            run_heads(source, tmp_path / str(step))
        if steps.count < step:
            break
        run_heads(source, tmp_path / str(step), resume=True)
        assert contents(tmp_path / str(step)) == want, f"killed at change {step}"
    assert step > 8


def test_errors_in_the_middle_of_a_pass_keep_their_sentences(sources, tmp_path, monkeypatch):
    source = sources("llama")

    def no_memory(*_, **__):
        raise MemoryError

    def no_disk(*_, **__):
        raise RunFailure("the disk is full: it could not be written")

    for broken, sentence in ((no_memory, "out of memory on cpu: one head of 60 tokens"), (no_disk, "the disk is full")):
        with monkeypatch.context() as patch:
            patch.setattr("anchorscope.compare.run.score_lineup", broken)
            with pytest.raises(RunFailure, match=sentence):
                run_compare(source, tmp_path / "o")
    with monkeypatch.context() as patch:
        layer = source._plan.loaded.model.model.layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(IndexError("no such row")))
        with pytest.raises(RunFailure, match="the model failed in its own code: IndexError: no such row"):
            run_compare(source, tmp_path / "o")
        hook.remove()
    run_compare(source, tmp_path / "o")


@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_nothing_of_a_layer_outlives_its_measurement(sources, tmp_path, monkeypatch, chunk):
    """Storages of Q, K and V: of a whole prompt one layer's at a time, of chunks what the plan says."""
    alive, most, layers = weakref.WeakSet(), [], []
    real, visit = torch.empty, Job.visit

    def empty(*shape, **options):
        made = real(*shape, **options)
        if "capture/held" in sys._getframe(1).f_code.co_filename.replace("\\", "/"):
            alive.add(made.untyped_storage())
        return made

    def watch(self, entry, *rest):
        gc.collect()
        layers.append(entry)
        most.append(sum(x.nbytes() for x in alive))
        visit(self, entry, *rest)

    source = sources("llama", chunk)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(Job, "visit", watch)
        run_analyze(source, tmp_path / "o")
    gc.collect()
    assert not alive
    one = {p: 4 * (6 + 2 + 2) * 8 * n for p, n in (("a", 60), ("b", 41))}  # float32; 6 query heads, 2 kv heads, d 8
    left = [sum(x.prompt == e.prompt and x.layer >= e.layer for x in source.entries) for e in layers]
    assert most == [one[e.prompt] * (1 if chunk is None else n) for e, n in zip(layers, left, strict=True)]


@pytest.mark.parametrize(("chunk", "layers"), [(None, 1), (CHUNK, 3)])
def test_the_plan_says_how_much_is_held(models, chunk, layers):
    told = []
    source = ModelSource(models("llama"), prompts(), notify=told.append, chunk=chunk)
    one = source.entries[0].bytes
    assert one - 1024 == 4 * (6 + 2 + 2) * 8 * 60
    everything = plan_compare(source, lineup=line_up("streaming"), device="cpu").memory
    alone = plan_compare(source, lineup=line_up("streaming"), layers=[1], device="cpu").memory
    assert everything - alone == (layers - 1) * one
    assert sum("memory: " in x and human_bytes(layers * one) in x for x in told) == 1


def test_chunks_pass_as_often_as_the_memory_asks(models, sources, through_dump, tmp_path):
    told = []
    source = ModelSource(models("llama"), prompts(), notify=told.append, chunk=CHUNK)
    source.__dict__["_room"] = 2.5 * source.entries[0].bytes
    want = through_dump(run_compare, "llama", source, chunk=CHUNK)
    passes = []
    hook = models("llama").model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    run_compare(source, tmp_path / "o")
    hook.remove()
    assert results(tmp_path / "o") == want
    assert any(
        "of 2 layers, which are complete when their last chunk is in; the prompt passes 2 times" in x for x in told
    )
    assert len(passes) > 2 * (-(-60 // CHUNK) + -(-41 // CHUNK))  # and the trials


# ----------------------------------------------------------------------------------------------------------------
# refusals


def refusal(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "bert", "mamba", "llama4_text"])
def test_what_capture_refuses_is_refused_in_the_same_words(family, models, tmp_path):
    model = models(family)
    for layers in (None, [0]):
        want = refusal(lambda x=layers: capture_model(model, prompts(), tmp_path / "d", layers=x, notify=quiet))
        source = ModelSource(model, prompts(), notify=quiet)
        assert refusal(lambda x=layers, s=source: run_compare(s, tmp_path / str(x), layers=x)) == want


def test_layers_that_are_not_asked_for_may_be_what_they_like(models, tmp_path):
    """Of this family only the last layer has full attention; the others look at chunks."""
    source = ModelSource(models("llama4_text"), prompts(), notify=quiet)
    run_compare(source, tmp_path / "o", layers=[2])
    dump = capture_model(models("llama4_text"), prompts(), tmp_path / "d", layers=[2], notify=quiet)
    dump.identity = source.identity
    run_compare(dump, tmp_path / "through-dump")
    assert results(tmp_path / "o") == results(tmp_path / "through-dump")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    want = refusal(lambda: capture_model(model, prompts(), tmp_path / "d", notify=quiet))
    assert "NaN" in want
    assert refusal(lambda: run_compare(ModelSource(model, prompts(), notify=quiet), tmp_path / "o")) == want


def test_a_model_near_chance_is_warned_of(models, tmp_path):
    told = []
    run_compare(ModelSource(models("llama"), prompts(), notify=told.append), tmp_path / "o")
    assert any("better than chance" in x for x in told)


def test_a_layer_that_is_not_what_the_trial_showed_is_refused(sources, tmp_path):
    source = sources("llama")
    entries = tuple(replace(e, window=7) if e.layer == 1 else e for e in source.entries)
    source.__dict__["entries"], kept = entries, source.entries
    try:
        text = refusal(lambda: run_compare(source, tmp_path / "o"))
    finally:
        source.__dict__["entries"] = kept
    assert "layer 1 of prompt a runs with window None, but with 7 in a trial run" in text


def test_several_devices_read_dumps(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("anchorscope.runs.units.resolve_devices", lambda *_: (torch.device("cpu"),) * 2)
    assert "leave out --devices" in refusal(lambda: run_compare(sources("llama"), tmp_path / "o"))


def test_the_source_says_what_it_is_of(models):
    def identity(**options):
        return ModelSource(models("llama"), options.pop("given", prompts()), notify=quiet, **options).identity

    same = identity()
    assert identity(layers=[0]) == same
    assert identity(tokenizer=None) == same
    others = [identity(chunk=CHUNK), identity(dtype="bf16"), identity(tokens=20), identity(given=prompts()[:1])]
    others.append(ModelSource(models("gemma2"), prompts(), notify=quiet).identity)
    assert len({same, *others}) == 6


# ----------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture(scope="module")
def saved_model(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    models("llama").save_pretrained(folder)
    for p in prompts():
        (folder.parent / f"{p.name}.json").write_text(json.dumps(list(p.token_ids)))
    return folder


def test_a_command_line_from_model_to_anchors(saved_model, sources, through_dump, tmp_path, capsys):
    given = [x for p in prompts() for x in ("--token-ids", str(saved_model.parent / f"{p.name}.json"))]
    end = ["--groups", "8x2,16x1", "--theta", "0,4,inf", "--holdout", "b", "--device", "cpu", "--no-figures", "--json"]
    code = main(["calibrate", "--model", str(saved_model), *given, "--out", str(tmp_path / "o"), *end])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.err.startswith("loading ")
    assert "for one layer at a time" in said.err
    assert "needs about" in said.err
    assert json.loads(said.out) == json.loads((tmp_path / "o" / "calibration.json").read_text())
    capture_model(str(saved_model), prompts(), tmp_path / "dump", device="cpu", notify=quiet)
    code = main(["calibrate", str(tmp_path / "dump"), "--out", str(tmp_path / "through-dump"), *end])
    assert code == 0, capsys.readouterr().err
    flown, dumped = (json.loads((tmp_path / x / "anchors.json").read_text()) for x in ("o", "through-dump"))
    assert flown["layers"] == dumped["layers"]
    assert flown["model"] == dumped["model"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "needs a dump, or a model and its prompts"),
        (["dump", "--model", "m"], "give DIR or --model, not both"),
        (["dump", "--prompt", "f"], r"--prompt is about the model that --model names.*--prompts"),
        (["dump", "--tokens", "1k"], "--tokens is about the model"),
        (["--model", "m"], "give at least one prompt"),
        (["--model", "m", "--text", "x", "--shard", "1/2"], "--model and --shard contradict each other"),
        (["--model", "m", "--text", "x", "--ray", "auto"], "--model and --ray contradict each other"),
        (["--model", "m", "--text", "x", "--devices", "all"], "--model and --devices contradict each other"),
        (["--model", "m", "--prompt", "nothing.txt"], r"nothing\.txt"),
        (["--model", "m", "--text", "x", "--dtype", "fp8"], "--dtype 'fp8' is unknown"),
        (["--model", "nowhere/at-all", "--text", "x", "--tokens", "1"], "--tokens 1"),
        (["--model", "/no/such/folder", "--text", "some words"], "/no/such/folder"),
    ],
)
def test_misuse_is_one_sentence(command, given, sentence, tmp_path, capsys):
    assert main([command, *given, "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert re.search(sentence, last), said.err
    assert not said.out
    assert not (tmp_path / "o").exists()
