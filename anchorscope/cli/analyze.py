"""`anchorscope analyze` and `anchorscope figures`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import (
    announce,
    check_early,
    chosen,
    drawn,
    progress_bar,
    refuse_both,
    stdout_console,
    warn,
    warn_of_model,
)
from anchorscope.cli.merge import parse_shard, print_result
from anchorscope.cli.source import ModelChoice, runs_models
from anchorscope.cli.tables import FittingTable, boxed_table, clean_name, print_places
from anchorscope.cli.workforce import executor, takes_ray
from anchorscope.errors import InputError
from anchorscope.figure_theta import saved_figure_theta
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, exact_theta, share_text, theta_text

if TYPE_CHECKING:
    from anchorscope.analysis.run import Analysis
    from anchorscope.figure_theta import FigureTheta

SHORT_ROWS = 10
THETA_ROWS = 8


@runs_models
@takes_ray
def analyze(
    out: opt.Out,
    dump: opt.DumpOrNone = None,
    theta: Annotated[
        str, typer.Option(help="Thetas in nats: 12, or 6,8,10, or 0:20:0.5; inf is dense.", metavar="NATS")
    ] = "12",
    block: opt.Block = 128,
    step: opt.Step = 16,
    init: opt.Init = None,
    lookback: opt.Lookback = None,
    target_recall: Annotated[
        float, opt.share("--target-recall", "Recall that each head should reach, as a share of attention mass.")
    ] = 0.95,
    figure_theta: Annotated[
        float | None,
        typer.Option(
            help="Theta of figures, tables and page, nats: one of --theta (default: the first to reach the target).",
            metavar="NATS",
        ),
    ] = None,
    layers: opt.Layers = "all",
    heads: opt.Heads = "all",
    prompts: opt.Prompts = "all",
    heatmap: opt.HeatMaps = None,
    backend: opt.Backend = "auto",
    device: opt.Device = "auto",
    devices: opt.Devices = None,
    shard: opt.ShardOf = None,
    ray: opt.RayAddress = None,
    no_diagnose: Annotated[
        bool, typer.Option("--no-diagnose", help="Skip OUT/heads: what kind of head each one is.")
    ] = False,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="Write tables and profiles only.")] = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier analysis in OUT")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue in OUT; an interrupted run of the same settings does so anyway.")
    ] = False,
    as_json: Annotated[bool, opt.prints_json("the report as JSON")] = False,
    *,
    run: ModelChoice,
) -> None:
    """Measure recall against sparsity of every head in a dump or of a model that runs, and draw what heads attend to.

    Writes heads.csv, curves.csv, thetas.csv, report.json, profile/, figures/ and heads/ into OUT. Interrupted runs
    continue when the same command is given again.
    """
    from anchorscope.parse import parse_thetas

    refuse_both(overwrite, resume)
    if no_figures and heatmap is not None:
        raise InputError("--heatmap and --no-figures contradict each other: give one of them")
    part = parse_shard(shard)
    thetas = parse_thetas(theta)
    pairs, pictures = _heatmaps(heatmap), drawn(form, dpi, no_figures)

    from anchorscope.analysis.request import asked_of
    from anchorscope.analysis.run import FOLDER, plan_analysis
    from anchorscope.analysis.run import analyze as measure
    from anchorscope.params import AnchorParams

    params = AnchorParams(block, step, init, lookback)
    wanted = asked_of(asked_pictures(**pictures), pairs, not no_diagnose, figure_theta)
    FOLDER.refuse_early(out, wanted, overwrite=overwrite, resume=resume)
    check_early(device, backend, target_recall)
    source = run.source("analyze", dump, device)
    picked = chosen(source, layers, heads, prompts)
    plan = plan_analysis(
        source,
        thetas=thetas,
        params=params,
        target_recall=target_recall,
        **picked,
        backend=backend,
        device=device,
        devices=devices,
        heatmaps=pairs,
        figure_theta=figure_theta,
        diagnose=not no_diagnose,
    )
    what = f"{counted(len(plan.units), 'head')}, back end {plan.backend.name} on {plan.backend.hardware}"
    announce(plan, what, **pictures)
    warn_of_model(source, picked["prompts"])
    with progress_bar() as bar:
        result = measure(
            source,
            out,
            **pictures,
            overwrite=overwrite,
            resume=resume,
            progress=bar,
            notify=warn,
            plan=plan,
            shard=part,
            executor=executor(ray),
        )
    print_result(result, "report.json", part, as_json, print_summary)


def figures(
    out: Annotated[Path, typer.Argument(help="Folder written by `analyze`.", metavar="OUT")],
    heatmap: opt.HeatMaps = None,
    theta: Annotated[
        float | None,
        typer.Option(
            help="Theta to draw, nats: one of those measured (default: that of the analysis).", metavar="NATS"
        ),
    ] = None,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
) -> None:
    """Draw the figures of an analysis again from its saved profiles; the dump is not needed."""
    pairs, formats = _heatmaps(heatmap), drawn(form, dpi)["formats"]
    from anchorscope.analysis.run import redraw

    with progress_bar() as bar:
        written = redraw(out, heatmaps=pairs, theta=theta, formats=formats, progress=bar)
    for path in written:
        print(path)


def _heatmaps(text: str | None) -> list[tuple[int, int]] | str | None:
    """`layer:head,...` as pairs; `all` and None pass through."""
    if text is None or text == "all":
        return text
    pairs = []
    for item in text.split(","):
        layer, colon, head = item.strip().partition(":")
        if not (colon and layer.isdecimal() and head.isdecimal()):
            raise InputError(f"--heatmap {text!r} is malformed; write layer:head pairs like 5:0,15:3, or all")
        pairs.append((int(layer), int(head)))
    return pairs


def print_summary(result: Analysis) -> None:
    """The tables an analysis ends with, at most 80 columns wide."""
    report = result.report
    console = stdout_console()
    target, settings = report["target"]["recall"], report["settings"]
    shown = saved_figure_theta(report)
    theta = exact_theta(shown.theta)

    groups = f"groups of {settings['block']} x {settings['step']}, means over prompts and heads"
    console.print(f"{shown.sentence()}\n{groups}" if shown.of > 1 else f"theta {theta}, {groups}")
    names = ("layer", "recall", "worst", "head", "sparsity", "stripes", "out.err.")
    table = boxed_table(names, drop=("stripes", "out.err.", "head", "worst"))
    for item in report["by_layer"]:
        table.add_row(str(item["layer"]), *_layer_cells(item["thetas"][shown.index]))
    table.add_section()
    table.add_row("all", *_layer_cells(report["overall"][shown.index]))
    console.print(table)

    if shown.of > 1:
        rows = _rows_shown(report["overall"], shown)
        some = f"{len(rows)} of {shown.of} thetas; all are in {result.path / 'thetas.csv'}"
        which = "each theta" if len(rows) == shown.of else some
        console.print(f"all heads, {which}", soft_wrap=True, highlight=False)
        console.print(_theta_table(rows, shown))

    short = report["target"]["short"]
    if not short:
        console.print(f"Every head reaches recall {target:g} at theta {theta}.")
    else:
        more = f"; the worst {SHORT_ROWS}:" if len(short) > SHORT_ROWS else ":"
        heads, prompts = report["target"]["heads"], len(report["by_prompt"])
        over = "" if prompts == 1 else f" over {prompts} prompts"
        console.print(
            f"{len(short)} of {counted(heads, 'head')}{over} {'falls' if len(short) == 1 else 'fall'} short of recall"
            f" {target:g} at theta {theta}{more}"
        )
        console.print(_short_table(short[:SHORT_ROWS], target))
    need, oracle = report["target"]["density_needed_mean"], report["target"]["oracle_density_needed_mean"]
    if need is not None and oracle is not None:
        console.print(
            f"Recall {target:g} in every head, each at its own theta: density {share_text(need)} on average"
            f" (stripe oracle {share_text(oracle)})."
        )
    if result.diagnosis is not None:
        counts = result.diagnosis.report["summary"]["all"]["classes"]
        line = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "prompts too short to tell"
        console.print(f"Kinds of head: {line}.")
        from anchorscope.cli.heads import print_lines, token_lines

        heads = result.diagnosis.report["heads"]
        if any("token" in item for head in heads for item in head["stripe_tokens"]):
            print_lines(token_lines(heads, console.width))
        console.print(f"Details: {result.diagnosis.path}", soft_wrap=True)
    print_places(console, "Tables and profiles", result.path, result.figures)


def _layer_cells(row: dict[str, Any]) -> list[str]:
    worst = row["worst"]
    return [
        share_text(row["recall_mean"]),
        share_text(worst["recall"]),
        f"{worst['layer']}:{worst['head']}",
        share_text(row["sparsity_mean"]),
        share_text(row["stripe_density_mean"]),
        share_text(row["output_error_mean"]),
    ]


def _rows_shown(overall: list[dict[str, Any]], shown: FigureTheta) -> list[dict[str, Any]]:
    """Few enough rows of the thetas, ascending: both ends, the one of the figures, and even steps between."""
    rows = sorted({float(row["theta"]): row for row in overall}.items())
    if len(rows) <= THETA_ROWS + 2:
        return [row for _, row in rows]
    picks = {round(i * (len(rows) - 1) / (THETA_ROWS - 1)) for i in range(THETA_ROWS)}
    return [row for i, (theta, row) in enumerate(rows) if i in picks or theta == shown.theta]


def _theta_table(rows: list[dict[str, Any]], shown: FigureTheta) -> FittingTable:
    """Means over all heads at several thetas; the theta of the figures is marked."""
    names = ("theta", "recall", "p05", "last rows", "worst", "density", "out.err.")
    table = boxed_table(names, drop=("out.err.", "last rows", "p05", "worst"))
    for row in rows:
        here = float(row["theta"]) == shown.theta
        table.add_row(
            f"> {exact_theta(row['theta'])}" if here else exact_theta(row["theta"]),
            share_text(row["recall_mean"]),
            share_text(row["recall_p05_mean"]),
            share_text(row["recall_last_mean"]),
            share_text(row["worst"]["recall"]),
            share_text(row["density_mean"]),
            share_text(row["output_error_mean"]),
        )
    return table


def _short_table(rows: list[dict[str, Any]], target: float) -> FittingTable:
    names = ("prompt", "layer", "head", "recall", "density", "theta needed", "density then")
    single = ("prompt",) if len({row["prompt"] for row in rows}) == 1 else ()
    table = boxed_table(names, fold=("prompt",), drop=("density then", *single, "theta needed", "density"))
    for row in rows:
        table.add_row(
            clean_name(row["prompt"], 18),
            str(row["layer"]),
            str(row["head"]),
            share_text(row["recall"], below=target),
            share_text(row["density"]),
            theta_text(row["theta_needed"]),
            share_text(row["density_needed"]),
        )
    return table
