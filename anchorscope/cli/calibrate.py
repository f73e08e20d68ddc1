"""`anchorscope calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import announce, drawn, progress_bar, stdout_console, warn, warn_of_model
from anchorscope.cli.help import completes
from anchorscope.cli.merge import parse_shard, print_result
from anchorscope.cli.source import ModelChoice, runs_models
from anchorscope.cli.tables import FittingTable, new_table, print_places
from anchorscope.cli.workforce import executor, takes_ray
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, share_text, theta_text

if TYPE_CHECKING:
    from rich.console import Console

    from anchorscope.calibration import Calibration, CalibrationPlan

SHORT_ROWS = 8


@runs_models
@takes_ray
def calibrate(
    out: opt.Out,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Dumps of one model, or finished `analyze` folders; or give --model and its prompts.",
            metavar="DIR",
        ),
    ] = None,
    target_recall: Annotated[
        float | None,
        opt.share("--target-recall", "Recall, by the statistic, to reach at least cost. (default: 0.95)"),
    ] = None,
    budget_density: Annotated[
        float | None,
        opt.share(
            "--budget-density",
            "Mean density over all heads to get the best recall for, in place of a target. (default: none)",
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="Who shares a theta and is promised the target: head, layer or model.",
            metavar="NAME",
            autocompletion=completes(lambda: ("head", "layer", "model")),
        ),
    ] = "head",
    statistic: Annotated[
        str,
        typer.Option(
            help="Recall to promise: mean, p05 (worst 5% of queries) or last (last block).",
            metavar="NAME",
            autocompletion=completes(lambda: ("mean", "p05", "last")),
        ),
    ] = "mean",
    holdout: Annotated[
        str,
        typer.Option(
            help="Share of the prompts that only check the promise, or their names: a,b.", metavar="SHARE|NAMES"
        ),
    ] = "0.3",
    seed: Annotated[int, typer.Option(help="Changes which prompts a share holds out.", metavar="N")] = 0,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Kinds of groups, block (tokens) x step (blocks), one chosen per layer. (default: 64x8,128x4,128x16)",
            metavar="BxS,...",
        ),
    ] = None,
    minimise: Annotated[
        str,
        typer.Option(
            help="What a target should cost the least of: density, or time by --costs.",
            metavar="NAME",
            autocompletion=completes(lambda: ("density", "time")),
        ),
    ] = "density",
    costs: Annotated[
        list[Path] | None,
        typer.Option(help="bench.json of `anchorscope bench`; once per kind of group. (default: none)", metavar="FILE"),
    ] = None,
    dense_above: Annotated[float, opt.share("--dense-above", "Density from which on a head runs dense.")] = 0.9,
    theta: Annotated[
        str | None,
        typer.Option(help="Thetas in nats to measure p05 and last at. (default: -inf,0:16:0.25,inf)", metavar="NATS"),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to calibrate, like 0,5,10-15, or all; others run dense.", metavar="LIST")
    ] = "all",
    backend: opt.Backend = "auto",
    device: opt.Device = "auto",
    devices: opt.Devices = None,
    shard: opt.ShardOf = None,
    ray: opt.RayAddress = None,
    no_figures: opt.NoFigures = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier calibration in OUT; its analyses are used again")] = False,
    as_json: Annotated[bool, opt.prints_json("calibration.json")] = False,
    *,
    run: ModelChoice,
) -> None:
    """Choose groups and theta of every head for a recall, or for a density, and check them on held-out prompts.

    Writes anchors.json, calibration.json, calibration.csv, figures/ and analysis/ into OUT. Interrupted runs continue
    when the same command is given again.
    """
    # Before anything heavy or slow: a misspelt option should not wait for it.
    from anchorscope.calibration.sources import parse_groups
    from anchorscope.parse import parse_thetas

    part = parse_shard(shard)
    pictures = drawn(form, dpi, no_figures)
    kinds = None if groups is None else parse_groups(groups)
    thetas = None if theta is None else parse_thetas(theta)

    from anchorscope.calibration import calibrate as choose
    from anchorscope.calibration import plan_calibration
    from anchorscope.calibration.run import FOLDER

    run.check("calibrate", bool(sources))
    FOLDER.refuse_early(out, asked_pictures(**pictures), overwrite=overwrite)
    given = sources or run.running(device)
    plan = plan_calibration(
        given,
        target_recall=target_recall,
        budget_density=budget_density,
        by=by,
        statistic=statistic,
        minimise=minimise,
        costs=costs or None,
        dense_above=dense_above,
        groups=kinds,
        layers=layers,
        thetas=thetas,
        holdout=_holdout(holdout),
        seed=seed,
        backend=backend,
        device=device,
        devices=devices,
    )
    announce(plan, _what(plan, " beside the passes of the model" if run.model else ""), **pictures)
    for source in {unit.dump.identity: unit.dump for unit in plan.units}.values():
        warn_of_model(source)
    with progress_bar() as bar:
        result = choose(
            given,
            out,
            **pictures,
            overwrite=overwrite,
            progress=bar,
            notify=warn,
            plan=plan,
            shard=part,
            executor=executor(ray),
        )
    print_result(result, "calibration.json", part, as_json, print_summary)


def _what(plan: CalibrationPlan, beside: str) -> str:
    """What will be measured, in words."""
    if not plan.units:
        return f"{counted(len(plan.sources.prompts), 'prompt')}, measured already"
    engine = plan.units[0].analysis.backend
    what = f"{counted(plan.heads, 'head')} to measure, back end {engine.name} on {engine.hardware}"
    if plan.seconds:  # which nobody timed where a cluster measures
        what += f", about {_duration(plan.seconds)}{beside} (less what is measured already)"
    return what


def _holdout(text: str) -> float | list[str]:
    """A share, or names of prompts."""
    try:
        return float(text)
    except ValueError:
        return [name.strip() for name in text.split(",")]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_summary(result: Calibration) -> None:
    """The tables a calibration ends with, at most 80 columns wide."""
    from anchorscope.calibration.tables import aim

    console, report = stdout_console(), result.report
    s = report["settings"]
    held = sum(p["held_out"] for p in report["prompts"])
    console.print(f"{aim(s)}; {counted(len(report['prompts']) - held, 'prompt')} fitted, {held} held out")
    console.print(_layer_table(report))
    console.print(_pooled_table(report))
    if report["dense_heads"] == len(report["heads"]):
        console.print(
            f"Every head runs dense: none keeps the target below density {s['dense_above']:g}. Longer prompts or other"
            " --groups may save something."
            if s["target"] is not None
            else "Every head runs dense, and nothing is saved."
        )
    _print_promise(console, report)
    _print_comparison(console, report)
    if report["lengths"]:
        console.print(_length_table(report))
    print_places(console, "Anchors", result.path / "anchors.json", result.figures)


def _layer_table(report: dict[str, Any]) -> FittingTable:
    names = ("layer", "groups", "theta", "dense", "density", "fitted", "held out", "short")
    table = new_table(names, drop=("dense", "fitted", "short", "groups", "theta"))
    for row in report["layers"]:
        low, high = row["theta_min"], row["theta_max"]
        thetas = "-" if low is None else theta_text(low) if low == high else f"{theta_text(low)} to {theta_text(high)}"
        table.add_row(
            str(row["layer"]),
            f"{row['block']}x{row['step']}",
            thetas,
            f"{row['dense_heads']} of {row['heads']}",
            share_text(row["fitted_density"]),
            share_text(row["fitted_recall"]),
            share_text(row["held_out_recall"]),
            "-" if row["heads_missed"] is None else str(row["heads_missed"]),
        )
    return table


def _pooled_table(report: dict[str, Any]) -> FittingTable:
    timed = report["fitted"]["time"] is not None
    names = ("all heads", "recall", "p05", "last", "worst head", "density", *(["time"] if timed else []))
    table = new_table(names, drop=(*(["time"] if timed else []), "last", "p05", "worst head"))
    for name, part in (("fitted", "fitted"), ("held out", "held_out")):
        row = report[part]
        if row is not None:
            cells = ("recall", "recall_p05", "recall_last", "recall_worst_head", "density")
            table.add_row(name, *(share_text(row[c]) for c in cells), *([share_text(row["time"])] if timed else []))
    return table


def _print_promise(console: Console, report: dict[str, Any]) -> None:
    p = report["promise"]
    if p is None:
        if report["held_out"] is None:
            console.print("Nothing was held out: the promise is not checked.\n")
        return
    console.print(
        f"Held out, {p['statistic']} recall is {share_text(p['pooled'], below=p['target'])} over all heads, for"
        f" {p['target']:g} promised."
    )
    if p["to"] != "model":
        console.print(f"{p['broken']} of {p['units']} {p['to']}s miss it, {p['broken_clearly']} by more than 0.01.")
    if p["to"] != "head":
        console.print(f"{p['heads_missed']} of {len(report['heads'])} single heads lie below it.")
    if p["shortfalls"] and p["to"] == "head":
        shown = p["shortfalls"][:SHORT_ROWS]
        lines = [
            "  ".join(f"{x['layer']}:{x['head']} {share_text(x['value'], below=p['target'])}" for x in shown[i : i + 4])
            for i in (0, 4)
        ]
        console.print("Furthest below (layer:head): " + "\n".join(line for line in lines if line))
    console.print()


def _print_comparison(console: Console, report: dict[str, Any]) -> None:
    found = report["against_one_theta"]
    part = "held_out" if report["held_out"] else "fitted"
    where = "held-out" if report["held_out"] else "fitting"
    table = new_table(
        ("", "theta", report["settings"]["statistic"], "worst head", "5% of heads", "density"),
        title=f"Against one theta for all heads at equal density ({where} prompts)",
        fold=("",),
        drop=("5% of heads", "theta", "worst head"),
    )
    for row in found["at_choice"]:
        name = row["method"]
        if "group" in row:
            if not row["best"]:
                continue
            name = f"one theta, all {row['group']}"
        value = row[part]
        cells = ("value", "value_worst_head", "value_heads_p05", "density")
        table.add_row(name, theta_text(row["theta"]), *(share_text(value[c]) for c in cells))
    console.print(table)
    better = found["gain"][part]
    if better is not None:
        console.print(
            f"Against the best of those: mean {better['value']:+.3f}, worst head {better['value_worst_head']:+.3f},"
            f" density {better['density']:+.3f}.\n"
        )


def _length_table(report: dict[str, Any]) -> FittingTable:
    cells = report["lengths"]
    tokens = sorted({c["tokens"] for c in cells})
    title = "Recall, density, share of heads short, by prompt length"
    names = ["fitted at", *(f"at {n:,}" for n in tokens)]
    table = new_table(names, title=title, drop=names[1:-1])
    for fit in sorted({c["fit_tokens"] for c in cells}):
        row = [next(c for c in cells if (c["fit_tokens"], c["tokens"]) == (fit, n)) for n in tokens]
        table.add_row(
            f"{fit:,}",
            *(
                f"{share_text(c['value'])} {share_text(c['density'])}"
                + ("" if c["heads_missed_share"] is None else f" {c['heads_missed_share']:.0%}")
                for c in row
            ),
        )
    return table
