"""`anchorscope evaluate`: what running sparse costs and gains, on prompts and on tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import announce, drawn, note, progress_bar, quiet_loading, stdout_console
from anchorscope.cli.help import completes
from anchorscope.cli.tables import clean_name, new_table, print_places
from anchorscope.errors import InputError
from anchorscope.names import PERPLEXITY, TASKS
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, partly_sparse, share_text

if TYPE_CHECKING:
    from anchorscope.anchors import AnchorConfig
    from anchorscope.evaluation import Evaluation
    from anchorscope.params import AnchorParams


def evaluate(
    model: opt.Model,
    out: opt.Out,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="UTF-8 text file; repeat it for several. (default: none)", metavar="FILE"),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            help=f"Tasks, separated by commas: {', '.join((*TASKS, PERPLEXITY))} (of the project's own text)."
            " (default: none)",
            metavar="NAMES",
            show_default=False,
            autocompletion=completes(lambda: (*TASKS, PERPLEXITY)),
        ),
    ] = "",
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            help="anchors.json of `calibrate`; repeat it for several sparse arms. (default: none, give --theta)",
            metavar="FILE",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--as", help="Name of the arm of each --config, in order. (default: the file's)", metavar="NAME"),
    ] = None,
    theta: Annotated[
        str | None,
        typer.Option(
            help="Theta in nats for all heads, in place of --config; several make several arms. (default: none)",
            metavar="NATS",
        ),
    ] = None,
    block: Annotated[
        int | None, opt.token_count("--block", "With --theta: queries pooled together. (default: 128)")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(help="With --theta: query blocks that share one selection. (default: 16)", metavar="BLOCKS"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Lengths in tokens, like 2048,8192 or 2k,8k. (default: whole prompts; tasks at 2048,4096,8192)",
            metavar="TOKENS,...",
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the needle stands, as shares of the text.", metavar="SHARES")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Questions per task, length and depth.", metavar="N")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the tasks and of the intervals.", metavar="N")] = 0,
    chunk: Annotated[
        int | None, opt.token_count("--chunk", "Tokens prefilled at a time. (default: prompts 2048; tasks whole)")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put tasks into the model's chat template.")] = False,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Measure recall while running, by an extra exact pass. (default: for prompts only)",
            show_default=False,
        ),
    ] = None,
    backend: opt.Backend = "auto",
    device: opt.Device = "auto",
    model_dtype: opt.ModelDtype = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept a configuration made for another model of the same shape.")
    ] = False,
    no_figures: opt.NoFigures = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier run in OUT")] = False,
    as_json: Annotated[bool, opt.prints_json("evaluation.json")] = False,
) -> None:
    """Run a model dense and sparse side by side: perplexity, divergence, agreement, task scores, times.

    Writes evaluation.json, prompts.csv, tasks.csv, answers.csv and figures/ into OUT. Interrupted runs continue when
    the same command is given again.

    Example: anchorscope evaluate --model smollm2 --prompt book.txt --task needle --config anchors.json --out eval
    """
    # Before anything heavy or slow: a misspelt option should not wait for it.
    from anchorscope.parse import parse_lengths, parse_shares

    pictures = drawn(form, dpi, no_figures)
    asked: dict[str, Any] = {
        "arms": _arms(config or [], names or [], theta),
        "params": _groups(block, step, theta),
        "prompts": prompt or (),
        "tasks": [x.strip() for x in task.split(",") if x.strip()],
        "lengths": None if lengths is None else sorted(parse_lengths(lengths, least=2)),
        "depths": parse_shares(depths, "--depths"),
        "samples": samples,
        "seed": seed,
        "chunk": chunk,
        "chat": chat,
        "measure": measure,
        "backend": backend,
        "device": device,
        "model_dtype": model_dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "force": force,
    }
    if not prompt and not asked["tasks"]:
        raise InputError("nothing to evaluate: give --prompt FILE or --task NAME")
    quiet_loading(model)

    from anchorscope.models.load import quiet_transformers, require_transformers

    require_transformers()
    from anchorscope.evaluation import EvaluateRequest
    from anchorscope.evaluation import evaluate as run
    from anchorscope.evaluation.run import FOLDER

    quiet_transformers()
    FOLDER.refuse_early(out, asked_pictures(**pictures), overwrite=overwrite)
    request = EvaluateRequest(model, **asked)
    request.check()
    note(f"loading {model}")
    plan = request.plan(note)
    announce(plan, plan.extent, **pictures)
    with progress_bar() as bar:
        result = run(model, out, **pictures, overwrite=overwrite, progress=bar, notify=note, plan=plan)
    if as_json:
        sys.stdout.write((result.path / "evaluation.json").read_text(encoding="utf-8"))
        return
    print_summary(result)


def _groups(block: int | None, step: int | None, theta: str | None) -> AnchorParams:
    """The groups of arms that are given as a theta; those of a configuration are its own."""
    from anchorscope.params import AnchorParams

    if theta is None and not (block is None and step is None):
        raise InputError("--block and --step are for --theta: the groups of a --config are in its file")
    return AnchorParams(block or 128, 16 if step is None else step)


def _arms(configs: list[Path], names: list[str], theta: str | None) -> dict[str, AnchorConfig | float]:
    """The sparse arms by name."""
    from anchorscope.anchors import AnchorConfig
    from anchorscope.parse import parse_thetas

    if bool(configs) == (theta is not None):
        raise InputError("give either --config anchors.json or --theta T" + (", not both" if configs else ""))
    if theta is not None and names:
        raise InputError("--as names the arms of --config; those of --theta are called after their theta")
    if theta is not None:
        return {f"theta {t:g}": t for t in parse_thetas(theta)}
    if names and len(names) != len(configs):
        raise InputError(
            f"--as is given {counted(len(names), 'time')} for {len(configs)} --config: name each of them, or none"
        )
    titles = names or [path.stem for path in configs]
    twice = next((t for t in titles if titles.count(t) > 1), None)
    if twice is not None:
        raise InputError(f"two arms are called {twice}: tell them apart with --as NAME, once per --config")
    return {title: AnchorConfig.load(path) for title, path in zip(titles, configs, strict=True)}


def print_summary(result: Evaluation) -> None:
    """The tables a run ends with, at most 80 columns wide."""
    console = stdout_console()
    _print_coverage(console, result.report["arms"])
    if result.prompts:
        _print_prompts(console, result.prompts, result.report["settings"]["chunk"]["prompts"])
    if result.tasks:
        _print_tasks(console, result.tasks, result.report["settings"]["chunk"]["tasks"])
    print_places(console, "Tables", result.path, result.figures)


def _print_coverage(console: Any, arms: list[dict[str, Any]]) -> None:
    """Loudly, above the tables: the arms of which a part ran dense."""
    from rich.text import Text

    for arm in arms:
        if (part := partly_sparse(arm["coverage"])) is not None:
            console.print(Text(f"{clean_name(arm['name'], 24)} runs {part}.", style="bold"), soft_wrap=False)


def _print_prompts(console: Any, prompts: list[dict[str, Any]], chunk: int | None) -> None:
    table = new_table(
        ["prompt", "arm", "tokens", "den-\nsity", "recall", "dense\nppl", "change", "95%", "KL", "same\ntop 1"],
        title="Prompts: sparse against dense",
        left=("prompt", "arm"),
        drop=("same\ntop 1", "KL", "dense\nppl", "95%", "tokens"),
        padding=0,
    )
    for r in prompts:
        low, high = (_signed(100 * (x - 1)) for x in r["intervals"]["perplexity_ratio"])
        table.add_row(
            clean_name(r["prompt"], 6, "~"),
            clean_name(r["arm"], 10, "~"),
            str(r["length"]),
            share_text(r["density"]),
            share_text(r["recall"]),
            f"{r['perplexity_dense']:.4g}",
            f"{_signed(100 * (r['perplexity_ratio'] - 1))}%",
            f"{low} {high}",
            f"{r['kl_mean']:.4f}" if r["kl_mean"] >= 1e-4 else f"{r['kl_mean']:.0e}",
            share_text(r["top1_agreement"]),
        )
    console.print(table)
    _print_times(console, prompts, chunk)


def _print_tasks(console: Any, tasks: list[dict[str, Any]], chunk: int | None) -> None:
    scores = ("dense\nscore", "sparse\nscore")
    table = new_table(
        ["task", "arm", "tokens", "n", "den-\nsity", *scores, "95%", "dense\nlogp", "sparse\nlogp"],
        title="Tasks: score, and log-probability of the answer (nats per token)",
        left=("task", "arm"),
        drop=("dense\nlogp", "sparse\nlogp", "n", "95%", "tokens"),
        padding=0,
    )
    for r in tasks:
        low, high = r["intervals"]["score_sparse"]
        table.add_row(
            clean_name(r["task"], 14, "~"),
            clean_name(r["arm"], 10, "~"),
            str(r["length"]),
            str(r["samples"]),
            share_text(r["density"]),
            f"{r['score_dense']:.2f}",
            f"{r['score_sparse']:.2f}",
            f"{low:.2f} {high:.2f}",
            f"{r['logprob_dense']:.2f}",
            f"{r['logprob_sparse']:.2f}",
        )
    console.print(table)
    _print_times(console, tasks, chunk)


def _print_times(console: Any, results: list[dict[str, Any]], chunk: int | None) -> None:
    """Seconds of a prefill at the largest length, arm by arm."""
    longest = max(r["length"] for r in results)
    found: dict[str, list[dict[str, float]]] = {}
    for r in results:
        if r["length"] == longest:
            found.setdefault("dense", []).append(r["times"]["dense"])
            found.setdefault(r["arm"], []).append(r["times"]["sparse"])
    how = f"in chunks of {chunk:,}" if chunk is not None and chunk < longest else "whole"
    console.print(f"Prefill of {counted(longest, 'token')} {how}, means:")
    for arm, times in found.items():
        seconds, attention = (sum(t[k] for t in times) for k in ("prefill_seconds", "attention_seconds"))
        name = clean_name(arm, 24, "~")
        console.print(f"  {name:<24} {seconds / len(times):8.2f} s, {attention / seconds:.0%} of it in attention")
    console.print()


def _signed(percent: float) -> str:
    return f"{percent:+.{2 if abs(percent) < 9.995 else 1 if abs(percent) < 99.95 else 0}f}"
