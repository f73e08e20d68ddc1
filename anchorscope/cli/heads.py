"""`anchorscope heads`."""

from __future__ import annotations

import sys
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
from anchorscope.cli.merge import parse_shard, print_result
from anchorscope.cli.source import ModelChoice, runs_models
from anchorscope.cli.tables import clean_name, new_table, optional, print_places
from anchorscope.cli.workforce import executor, takes_ray
from anchorscope.errors import InputError
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, share_text

if TYPE_CHECKING:
    from anchorscope.heads import Diagnosis

MOST_ROWS = 24  # heads listed one by one; more are summed up by layer


@runs_models
@takes_ray
def heads(
    out: opt.Out,
    dump: opt.DumpOrNone = None,
    theta: Annotated[
        str, typer.Option(help="Theta of the stripes whose overlap is measured, in nats.", metavar="NATS")
    ] = "12",
    block: opt.Block = 128,
    step: opt.Step = 4,
    layers: opt.Layers = "all",
    heads: opt.Heads = "all",
    prompts: opt.Prompts = "all",
    tokenizer: opt.Tokenizer = None,
    device: opt.Device = "auto",
    devices: opt.Devices = None,
    shard: opt.ShardOf = None,
    ray: opt.RayAddress = None,
    no_figures: opt.NoFigures = False,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier run in OUT")] = False,
    as_json: Annotated[bool, opt.prints_json("heads.json")] = False,
    *,
    run: ModelChoice,
) -> None:
    """What kind of head is this? Sinks, locality, distance, concentration, streaming or retrieval, stripe overlap.

    Writes diagnostics.csv, heads.json and figures/ into OUT. Interrupted runs continue when the same command is given
    again.
    """
    # Before anything heavy or slow: a misspelt option should not wait for it.
    from anchorscope.params import AnchorParams
    from anchorscope.parse import parse_thetas

    part = parse_shard(shard)
    thetas = parse_thetas(theta)
    if len(thetas) != 1:
        raise InputError(f"--theta {theta!r} lists {counted(len(thetas), 'theta')}; heads takes one")
    params, pictures = AnchorParams(block, step), drawn(form, dpi, no_figures)
    pieces = None
    if tokenizer is not None:
        from anchorscope.tokens import load_vocabulary

        pieces = load_vocabulary(tokenizer)

    from anchorscope.heads import diagnose, plan_heads
    from anchorscope.heads.run import FOLDER, asked_of

    FOLDER.refuse_early(out, asked_of(asked_pictures(**pictures), pieces), overwrite=overwrite)
    check_early(device)
    source = run.source("heads", dump, device)
    picked = chosen(source, layers, heads, prompts)
    plan = plan_heads(
        source,
        params=params,
        theta=thetas[0],
        **picked,
        device=device,
        devices=devices,
    )
    announce(plan, counted(plan.heads, "head"), **pictures)
    warn_of_model(source, picked["prompts"])
    with progress_bar() as bar:
        result = diagnose(
            source,
            out,
            pieces=pieces,
            **pictures,
            overwrite=overwrite,
            progress=bar,
            notify=warn,
            plan=plan,
            shard=part,
            executor=executor(ray),
        )
    print_result(result, "heads.json", part, as_json, print_summary)


def print_summary(result: Diagnosis) -> None:
    """The tables a run ends with, at most 80 columns wide."""
    console = stdout_console()
    report = result.report
    far = False  # whether an overlap is with a layer that is not the one before
    prompts = [p["name"] for p in report["prompts"]]
    for prompt in prompts:
        rows = [h for h in report["heads"] if h["prompt"] == prompt]
        single = len(rows) <= MOST_ROWS
        counts = {k: sum(h["class"] == k for h in rows) for k in ("streaming", "mixed", "retrieval")}
        names = ["layer", "head", "class"] if single else ["layer", "S/M/R"]
        names += ["sink", "hid-\nden", "last\n128", "win-\ndow", "keys", *([] if single else ["dist."])]
        names += ["next\ngroup", "same\nkv", "prev.\nlayer"]
        title = f"{clean_name(prompt, 36)}: " + ", ".join(f"{n} {k}" for k, n in counts.items())
        least = ("prev.\nlayer", "same\nkv", "next\ngroup", "dist.", "keys", "hid-\nden", "last\n128")
        table = new_table(names, title=title, left=("class",), drop=[x for x in least if x in names])
        groups = [[h] for h in rows] if single else _by_layer(rows)
        for group in groups:
            kinds = "/".join(str(sum(h["class"] == k for h in group)) for k in counts)
            first = group[0]
            key = [str(first["layer"])]
            key += [str(first["head"]), first["class"] or "-"] if single else [kinds]
            shares = [_mean(group, m) for m in ("sink_4", "hidden_sink_mass", "local_128", "window_recall")]
            overlaps = [_mean(group, m) for m in ("overlap_groups", "overlap_heads")]
            over = _layer_overlap(group)
            far = far or "<" in over
            table.add_row(
                *key,
                *map(_share, shares),
                optional(_mean(group, "effective_keys_median"), ",.0f"),
                *([] if single else [optional(_mean(group, "distance"), ",.0f")]),
                *map(_share, overlaps),
                over,
            )
        console.print(table)
        if lines := token_lines(rows, console.width):
            print_lines([*lines, ""])
    console.print(
        "sink: mass on the first 4 tokens; hidden: on sinks further in; last 128: on the last 128 keys; window: recall"
        " of the first 64 and last 256 keys; keys: effective number, median. next group, same kv, prev. layer: Jaccard"
        " overlap of stripes with the next group, the kv head's other heads, the same head one layer before"
        + (
            "; 0.40 <5: no such layer is in the dump, it is with layer 5, which says little about consecutive layers"
            if far
            else ""
        )
        + "."
    )
    print_places(console, "Tables", result.path, result.figures)


def token_lines(rows: list[dict[str, Any]], width: int) -> list[str]:
    """The stripes that later queries attend to most, a line for each of the three heads that need most beyond the
    window.

    Args:
        rows: heads as in heads.json; their prompts are named where there are several.
        width: columns of the terminal.
    """
    from rich.cells import cell_len

    from anchorscope.heads.tables import by_token, places

    prompts = {h["prompt"] for h in rows}
    ranked = sorted((h for h in rows if h["window_recall"] is not None), key=lambda h: h["window_recall"])
    lines = []
    for h in ranked[:3]:
        line = f"{clean_name(h['prompt'], 16)}, " if len(prompts) > 1 else ""
        line += f"layer {h['layer']}, head {h['head']} keeps"
        found = by_token(h["stripe_tokens"])
        # without a name, every position stands for itself
        items = [x for name, where in found.items() for x in ([f"{name} {places(where)}"] if name else map(str, where))]
        for item in items:
            if line.endswith(" keeps") and cell_len(line) + 2 + cell_len(item) > width:
                lines.append(line)  # a narrow terminal: the tokens stand below
                line = ""
            if line and cell_len(line) + 2 + cell_len(item) > width:
                break
            line += f"  {item}"
        lines += [line] if items else []
    return lines


def print_lines(lines: list[str]) -> None:
    """Foreign text on standard output; what its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def _by_layer(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    layers = sorted({h["layer"] for h in rows})
    return [[h for h in rows if h["layer"] == layer] for layer in layers]


def _mean(rows: list[dict[str, Any]], metric: str) -> float | None:
    known = [h[metric] for h in rows if h[metric] is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    return share_text(value, 2)


def _layer_overlap(rows: list[dict[str, Any]]) -> str:
    """Overlap with the layer before; "0.40 <5" where the nearest one captured is layer 5 and not the one before."""
    text, before = _share(_mean(rows, "overlap_layer")), rows[0]["previous_layer"]
    return text if text == "-" or before is None or before == rows[0]["layer"] - 1 else f"{text} <{before}"
