"""`anchorscope compare`."""

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
    stdout_console,
    warn,
    warn_of_model,
)
from anchorscope.cli.help import completes
from anchorscope.cli.merge import parse_shard, print_result
from anchorscope.cli.source import ModelChoice, runs_models
from anchorscope.cli.tables import clean_name, new_table, print_places
from anchorscope.cli.workforce import executor, takes_ray
from anchorscope.errors import InputError
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, share_text

if TYPE_CHECKING:
    from anchorscope.compare import Comparison


def _method_names() -> list[str]:
    from anchorscope.methods import known_methods

    return ["all", *known_methods()]


@runs_models
@takes_ray
def compare(
    dump: opt.DumpOrNone = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; new, or an unfinished run to continue.", metavar="OUT"),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, or all; --list names them.",
            metavar="NAMES",
            autocompletion=completes(_method_names),
        ),
    ] = "all",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Settings, like anchor.block=64,anchor.step=4; the swept one takes a/b/c or low:high:step. (default:"
            " those of --list)",
            metavar="METHOD.NAME=VALUE",
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            help="One per --set: show that variant under this label, beside the others. (default: in their place)",
            metavar="LABEL",
        ),
    ] = None,
    target_recall: Annotated[
        float, opt.share("--target-recall", "Recall that the figures are about, as a share of attention mass.")
    ] = 0.95,
    layers: opt.Layers = "all",
    heads: opt.Heads = "all",
    prompts: opt.Prompts = "all",
    device: opt.Device = "auto",
    devices: opt.Devices = None,
    shard: opt.ShardOf = None,
    ray: opt.RayAddress = None,
    no_figures: opt.NoFigures = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier comparison in OUT")] = False,
    as_json: Annotated[bool, opt.prints_json("compare.json")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="List methods and their settings, and stop.")] = False,
    *,
    run: ModelChoice,
) -> None:
    """Compare sparse attention methods on the heads of a dump or a model: what density does each need for a recall?

    Writes methods.csv, compare.json and figures/ into OUT. Interrupted runs continue when the same command is given
    again.
    """
    if list_methods:
        print_methods()
        return
    run.check("compare", dump is not None)
    if out is None:
        raise InputError(
            "compare needs a dump or a model, and a place for the results: anchorscope compare DIR --out OUT"
        )
    # Before anything heavy or slow: a misspelt method should not wait for it.
    from anchorscope.methods import line_up

    part = parse_shard(shard)
    pictures = drawn(form, dpi, no_figures)
    lineup = line_up(methods, settings or (), labels or ())

    from anchorscope.compare import compare as score
    from anchorscope.compare import plan_compare
    from anchorscope.compare.run import FOLDER

    FOLDER.refuse_early(out, asked_pictures(**pictures), overwrite=overwrite)
    check_early(device, target_recall=target_recall)
    source = run.source("compare", dump, device)
    picked = chosen(source, layers, heads, prompts)
    plan = plan_compare(
        source,
        lineup=lineup,
        target_recall=target_recall,
        **picked,
        device=device,
        devices=devices,
    )
    settings_count = sum(len(c.sweep) for c in plan.lineup)
    what = ", ".join(
        (counted(len(plan.units), "head"), counted(len(lineup), "method"), counted(settings_count, "setting"))
    )
    announce(plan, what, **pictures)
    warn_of_model(source, picked["prompts"])
    with progress_bar() as bar:
        result = score(
            source,
            out,
            **pictures,
            overwrite=overwrite,
            progress=bar,
            notify=warn,
            plan=plan,
            shard=part,
            executor=executor(ray),
        )
    print_result(result, "compare.json", part, as_json, print_summary)


def print_summary(result: Comparison) -> None:
    """The table a comparison ends with, at most 80 columns wide."""
    report = result.report
    console = stdout_console()
    shared = {row["method"]: row["needed"] for row in report["needed"]["shared"]}
    own = {row["method"]: row["needed"] for row in report["needed"]["per-head"]}
    oracles = {m["label"] for m in report["settings"]["methods"] if m["oracle"]}
    target = report["settings"]["target_recall"]
    recalls = [c["recall"] for c in next(iter(shared.values()))]
    shown = [r for r in recalls if r in (0.9, 0.95, 0.99)][:3]
    if target not in shown:
        shown = sorted([target, *(r for r in shown if r != 0.95)])
    table = new_table(
        ["method", *(f"{kind}\n{r:g}" for kind in ("shared", "own") for r in shown), "search\ncost"],
        title=f"density needed (interpolated between settings), {counted(report['heads'], 'head')}",
        left=("method",),
        drop=("search\ncost", *(f"{kind}\n{r:g}" for r in shown if r != target for kind in ("shared", "own"))),
    )

    def order(label: str) -> tuple[bool, float]:
        density = _at(own[label], target)["density"]
        return label in oracles, 2.0 if density is None else density

    ends = {m["label"]: m["end"] for m in report["settings"]["methods"]}
    short: list[str] = []
    ranked = sorted(shared, key=order)
    for i, label in enumerate(ranked):
        if label in oracles and i and ranked[i - 1] not in oracles:
            table.add_section()
        missed = "cannot" if ends[label] == "most" else "-"
        needed = [_at(rows[label], r)["density"] for rows in (shared, own) for r in shown]
        cells = [missed if density is None else share_text(density) for density in needed]
        if None in needed:
            short.append(_falls_short(report, label, ends[label] == "most"))
        cost = _at(own[label], target)["identify_cost"]
        table.add_row(clean_name(label, 22), *cells, share_text(cost))
    console.print(table)
    console.print(
        "shared: one setting for all heads, recall their mean; own: each head reaches the recall at its own setting; -:"
        " not reached by the settings tried; cannot: by none. search cost: arithmetic of identification where each head"
        f" reaches {target:g}, share of dense."
    )
    for sentence in short:
        console.print(sentence, highlight=False, markup=False)
    print_places(console, "Tables", result.path, result.figures)


def _falls_short(report: dict[str, Any], label: str, cannot: bool) -> str:
    """What a method that does not reach every recall of the table reaches at most."""
    most = next(row for row in report["needed"]["largest"] if row["method"] == label)
    mean, head = (
        f"recall {share_text(most[name]['recall'])} at density {share_text(most[name]['density'])}"
        for name in ("mean", "hardest_head")
    )
    why = next(m["never_dense"] for m in report["settings"]["methods"] if m["label"] == label) if cannot else None
    return (
        f"{clean_name(label, 22)} {'cannot' if cannot else 'does not'} reach every recall: largest mean {mean};"
        f" of its hardest head {head}{f'; {why}' if why else ''}."
    )


def _at(cells: list[dict[str, Any]], recall: float) -> dict[str, Any]:
    return next(c for c in cells if c["recall"] == recall)


def print_methods() -> None:
    """All methods with their settings and defaults; the swept one is marked."""
    from dataclasses import fields

    from anchorscope.methods import known_methods

    for name, cls in known_methods().items():
        print(f"{name}  ({cls.source})")
        for item in fields(cls):
            mark = "*" if item.name == cls.parameter else " "
            print(f"  {mark} {name}.{item.name}={item.default:g}  {item.metadata.get('help', '')}")
    print("* swept")
