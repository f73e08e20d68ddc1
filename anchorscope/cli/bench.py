"""`anchorscope bench`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchorscope.cli import options as opt
from anchorscope.cli.common import announce, drawn, note, progress_bar, stdout_console, warn
from anchorscope.cli.help import completes
from anchorscope.cli.tables import FittingTable, new_table, optional
from anchorscope.errors import InputError, RunFailure
from anchorscope.files import human_bytes
from anchorscope.names import DENSE
from anchorscope.pictures import asked_pictures
from anchorscope.shown import counted, exact_theta, share_text, threads_text

if TYPE_CHECKING:
    from anchorscope.bench import BenchPlan

RATIO_ROWS = 40
MAX_LENGTH = 1 << 20  # tokens


def bench(
    dump: Annotated[
        Path | None,
        typer.Argument(help="Dump folder to take Q, K, V from; planted input without.", metavar="DIR"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Lengths in tokens, like 4096,8192 or 4k,8k. (default: 16k to 128k, CPU 2k to 8k; with a dump whole"
            " prompts)",
            metavar="TOKENS,...",
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Query heads of planted input. (default: 32; CPU 4)", metavar="N")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Kv heads of planted input. (default: 8; CPU 1)", metavar="N")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Head dimension of planted input. (default: 128; CPU 64)", metavar="N")
    ] = None,
    theta: Annotated[
        str | None,
        typer.Option(
            help="Thetas in nats: 6, or 4,6,8, or 0:12:2; inf is dense. (default: planted 6, dump 12)", metavar="NATS"
        ),
    ] = None,
    block: opt.Block = 128,
    step: opt.Step = 16,
    init: opt.Init = None,
    lookback: opt.Lookback = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What is computed in: bf16, fp16 or fp32. (default: bf16, fp16 of a dump in it; CPU fp32)",
            metavar="DTYPE",
            autocompletion=completes(lambda: opt.DTYPES),
        ),
    ] = None,
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    dense: Annotated[
        str | None,
        typer.Option(
            help=f"Dense baselines, separated by commas: {', '.join(DENSE)}. (default: all but math; CPU flash)",
            metavar="NAMES",
            autocompletion=completes(lambda: DENSE),
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the dump, like 0,5,10-15. (default: all)", metavar="LIST")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed repetitions. (default: 3 to 20 by time)", metavar="N")
    ] = None,
    period: Annotated[
        int | None, opt.token_count("--period", "Queries that share one planted direction. (default: block * step)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of planted input. (default: 0)", metavar="N")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for bench.json and figures. (default: none, tables only)", metavar="OUT"),
    ] = None,
    form: opt.Format = None,
    dpi: opt.Dpi = None,
    overwrite: Annotated[bool, opt.overwrites("an earlier bench in OUT")] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="bench.json of an earlier bench: print the ratio of every time. (default: none)", metavar="FILE"
        ),
    ] = None,
    as_json: Annotated[bool, opt.prints_json("the result as JSON")] = False,
) -> None:
    """Time sparse against dense attention on the same inputs, with recall, density and output error.

    No speed-up is printed unless the pipeline equals dense attention at theta = inf.
    """
    from anchorscope.parse import parse_indices, parse_lengths, parse_thetas

    sizes = None if lengths is None else parse_lengths(lengths, most=MAX_LENGTH)
    thetas = None if theta is None else parse_thetas(theta)
    pictures = drawn(form, dpi)
    if out is None and (form is not None or dpi is not None):
        raise InputError("--format and --dpi are about the figures in OUT: give --out too")

    from anchorscope.bench import BenchConfig, load_result
    from anchorscope.params import AnchorParams

    config = BenchConfig(
        lengths=sizes,
        thetas=thetas,
        params=AnchorParams(block, step, init, lookback),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        period=period,
        seed=seed,
        dtype=dtype,
        device=device,
        backend=backend,
        dense=None if dense is None else tuple(x.strip() for x in dense.split(",")),
        layers=None if layers is None or layers == "all" else parse_indices(layers, "--layers", _layers(dump)),
        repeats=repeats,
    )
    if out is not None:
        from anchorscope.bench.output import FOLDER

        FOLDER.refuse_early(out, asked_pictures(**pictures), overwrite=overwrite)
    elif overwrite:
        raise InputError("--overwrite replaces a bench in a folder: give the folder with --out, or leave it out")
    old = None if against is None else (against.name, load_result(against))
    plan = config.plan(dump)
    what = f"{counted(len(plan.units), 'input')} to time"
    if out is None:
        note(f"{what}; needs about {plan.memory_words()}")
    else:
        announce(plan, what, **pictures)
    data = _carry_out(plan, out, {**pictures, "overwrite": overwrite}, old)
    for sentence in data["against"]["notes"] if old is not None else ():
        warn(sentence)
    if data["hardware"]["type"] == "cpu":
        warn("CPU TIMING: says how this machine's CPU does, nothing about a GPU")
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        print_result(data)
    for row in data["rows"]:
        if not row["check"]["passed"]:
            reason = f"at N = {row['n']:,} ({row['source']}) the check against dense failed: {row['check']['reason']}"
            raise RunFailure(f"no speed-up is given: {reason}")


def _carry_out(
    plan: BenchPlan, out: Path | None, how: dict[str, Any], old: tuple[str, dict[str, Any]] | None
) -> dict[str, Any]:
    """The content of bench.json, measured into a folder if there is one."""
    from anchorscope.bench.run import Remarks, bench_plan, measure_plan
    from anchorscope.runs.life import RunOptions

    remarks = Remarks(shlex.join(["anchorscope", *sys.argv[1:]]), old)
    with progress_bar() as bar:
        if out is None:
            return measure_plan(plan, bar, remarks)
        done = bench_plan(plan, out, RunOptions(**how, progress=bar, notify=warn), remarks)
    for path in (out / "bench.json", *done.figures):
        note(f"wrote {path}")
    return done.report


def _layers(dump: Path | None) -> list[int]:
    if dump is None:
        raise InputError("--layers chooses from a dump; planted input has no layers")
    from anchorscope.dumps import open_dump

    return [entry.layer for entry in open_dump(dump).entries]


def print_result(data: dict[str, Any]) -> None:
    """The tables of a bench, at most 80 columns wide, from the content of bench.json."""
    console = stdout_console()
    settings, machine = data["settings"], data["hardware"]
    cpu = machine["type"] == "cpu"
    shape = data["rows"][0]
    console.print(
        f"{'CPU TIMING: ' if cpu else ''}{machine['name']}"
        f"{', ' + threads_text(machine['threads']) if cpu else ''}; torch {data['versions']['torch']},"
        f" {settings['backend']} back end"
    )
    console.print(
        f"{counted(shape['heads'], 'query head')}, {counted(shape['kv_heads'], 'kv head')}, d = {shape['head_dim']},"
        f" {settings['dtype']}, groups of {settings['block']} x {settings['step']}"
    )
    for source, number in _numbers(data).items():
        if data["settings"]["input"] == "dump":
            console.print(f"#{number} {source}", soft_wrap=True)
    console.print()
    console.print(_dense_table(data))
    console.print("* baseline; memory: peak beyond the inputs; error: relative, against float32")
    for sentence in _absent_notes(data):
        console.print(sentence)
    console.print()
    console.print(_time_table(data))
    console.print("spread: p20 to p80 of whole; first: first call; speed-up over *")
    console.print()
    console.print(_quality_table(data))
    console.print("effic.: speed-up * density; TFLOP/s: of kept pairs; memory: beyond the output")
    if "against" in data:
        ratios = data["against"]["ratios"]
        console.print()
        if ratios:
            console.print(_ratio_table(data))
            console.print("= : the p20 to p80 ranges overlap")
        else:
            console.print("Against the older result: nothing to compare, no input is in both")
        if len(ratios) > RATIO_ROWS:
            console.print(f"{len(ratios) - RATIO_ROWS} more in bench.json (--out) or --json")


def _table(title: str, names: list[str], drop: Sequence[str]) -> FittingTable:
    texts = [name for name in names if name in ("back end", "time")]
    return new_table(names, title=title, left=("",), fold=texts, drop=drop, pad_edge=False, show_edge=False)


def _sections(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with their label: N, after the input's number where there are several."""
    numbers = _numbers(data)
    several = len(numbers) > 1
    return [(f"#{numbers[row['source']]} {row['n']:,}" if several else f"{row['n']:,}", row) for row in data["rows"]]


def _numbers(data: dict[str, Any]) -> dict[str, int]:
    """The inputs, numbered from 1 in order of appearance: their names are too long for a table."""
    return {source: i for i, source in enumerate(dict.fromkeys(row["source"] for row in data["rows"]), 1)}


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def _spread(time: dict[str, float]) -> str:
    """The p20 to p80 range as a share of the median."""
    return f"{(time['p80_ms'] - time['p20_ms']) / time['median_ms']:.0%}"


def _bytes(count: int | None) -> str:
    return "-" if count is None else human_bytes(count)


def _dense_table(data: dict[str, Any]) -> FittingTable:
    names = ["N", "back end", "ms", "spread", "TFLOP/s", "memory", "error"]
    table = _table("Dense attention, causal", names, ("TFLOP/s", "spread", "memory", "error"))
    for label, row in _sections(data):
        for dense in row["dense"]:
            time = dense["timing"]
            best = "*" if dense["name"] == row["baseline"] else ""
            repeated = ", K/V repeated" if dense["kv_repeated"] else ""
            table.add_row(
                label,
                f"{dense['name']}{best}{repeated}",
                _ms(time["median_ms"]),
                _spread(time),
                f"{dense['tflops']:.3g}",
                _bytes(dense["peak_memory_bytes"]),
                f"{dense['output_error']:.1e}",
            )
            label = ""
    return table


def _absent_notes(data: dict[str, Any]) -> list[str]:
    """Every back end that is missing somewhere, once per reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in data["rows"]:
        for item in row["absent"]:
            found.setdefault((item["name"], item["reason"]), []).append(f"{row['n']:,}")
    return [
        f"not timed: {name} at N = {', '.join(dict.fromkeys(lengths))} ({reason})"
        for (name, reason), lengths in found.items()
    ]


def _time_table(data: dict[str, Any]) -> FittingTable:
    names = ["N", "theta", "anchor", "identif.", "sparse", "whole", "spread", "first", "speed-up"]
    table = _table("Anchor attention, milliseconds", names, ("first", "spread", "identif.", "anchor", "sparse"))
    for label, row in _sections(data):
        for sparse in row["sparse"]:
            stages, whole = sparse["stages"], sparse["whole"]
            table.add_row(
                label,
                exact_theta(sparse["theta"]),
                *(_ms(stages[stage]["median_ms"]) for stage in ("anchor", "identification", "sparse")),
                _ms(whole["median_ms"]),
                _spread(whole),
                _ms(whole["first_ms"]),
                "refused" if not row["check"]["passed"] else optional(sparse["speedup"], ".2f"),
            )
            label = ""
    return table


def _quality_table(data: dict[str, Any]) -> FittingTable:
    names = ["N", "theta", "recall", "density", "stripes", "error", "effic.", "TFLOP/s", "memory"]
    table = _table("What that kept and cost", names, ("memory", "TFLOP/s", "effic.", "stripes", "error"))
    for label, row in _sections(data):
        for sparse in row["sparse"]:
            table.add_row(
                label,
                exact_theta(sparse["theta"]),
                share_text(sparse["recall"], 4),
                share_text(sparse["density"], 4),
                share_text(sparse["stripe_density"], 4),
                f"{sparse['output_error']:.1e}",
                optional(sparse["efficiency"], ".2f"),
                f"{sparse['tflops']:.3g}",
                _bytes(sparse["extra_memory_bytes"]),
            )
            label = ""
    return table


def _ratio_table(data: dict[str, Any]) -> FittingTable:
    table = _table("Against the older result", ["N", "time", "old ms", "new ms", "new/old", ""], ("new ms", "old ms"))
    numbers = _numbers(data)
    for ratio in data["against"]["ratios"][:RATIO_ROWS]:
        label = f"#{numbers[ratio['source']]} {ratio['n']:,}" if len(numbers) > 1 else f"{ratio['n']:,}"
        verdict = ("slower" if ratio["ratio"] > 1 else "faster") if ratio["beyond_spread"] else "="
        times = _ms(ratio["old_ms"]), _ms(ratio["new_ms"])
        table.add_row(label, ratio["what"], *times, f"{ratio['ratio']:.2f}", verdict)
    return table
