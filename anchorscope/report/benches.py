"""What the page shows of a folder of `bench`: how fast, against which dense attention, at which recall."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anchorscope.errors import DumpError
from anchorscope.report.blocks import Block, cards, chart, facts, remarks, table
from anchorscope.report.sections import Section
from anchorscope.shown import counted, exact_theta, share_text, threads_text

_TIMING = {"median_ms": float, "p20_ms": float, "p80_ms": float}
_SHARE = (float, None)
SHAPE: dict[str, Any] = {
    "created": (str, None, ...),
    "settings": {
        "input": ("planted", "dump"),
        "dump_sha256": (str, None),
        "dtype": str,
        "backend": str,
        **dict.fromkeys(("block", "step", "init", "lookback"), int),
    },
    "versions": {str: (str, None)},
    "hardware": {"type": str, "name": str, "threads": (int, None, ...)},
    "rows": [
        {
            "source": str,
            "n": int,
            **dict.fromkeys(("heads", "kv_heads", "head_dim"), int),
            "dense": [{"name": str, "kv_repeated": bool, "timing": _TIMING, "output_error": _SHARE}],
            "absent": [{"name": str, "reason": str}],
            "baseline": (str, None),
            "check": {"passed": bool, "reason": (str, None)},
            "sparse": [
                {
                    "theta": (float, "inf", "-inf"),
                    "whole": _TIMING,
                    "stages": {str: _TIMING},
                    **dict.fromkeys(("recall", "density", "output_error"), _SHARE),
                    "speedup": _SHARE,
                }
            ],
        }
    ],
}

Report = Mapping[str, Any]


def blocks(report: Report) -> list[Block]:
    """The section."""
    if not report["rows"]:
        raise DumpError("bench.json times nothing: run `anchorscope bench` again")
    found = [
        remarks([_lead(report)], warning=False),
        remarks([*failures(report), *([CPU] if report["hardware"]["type"] == "cpu" else [])]),
        *_cards(report),
        _speedups(report),
        *_chart(report),
        _stages(report),
        _dense(report),
        *_absent(report),
        _facts(report),
    ]
    return [b for b in found if b.get("texts") != []]


GOOD = 0.95  # recall from which on a speed-up is worth naming first
CPU = "These times are a CPU's: they tell how that CPU does, and nothing about a GPU."


def failures(report: Report) -> list[str]:
    """Checks that failed, in sentences."""
    return [
        f"The check of {row['source']} at {counted(row['n'], 'token')} failed, so no speed-up is stated there"
        + (f": {row['check']['reason']}" if row["check"]["reason"] else ".")
        for row in report["rows"]
        if not row["check"]["passed"]
    ]


def groups_of(report: Report) -> str:
    """Block x step that was timed."""
    return f"{report['settings']['block']}x{report['settings']['step']}"


def machine(report: Report) -> str:
    """The device in words."""
    threads = report["hardware"].get("threads")
    return str(report["hardware"]["name"]) + (f", {threads_text(threads)}" if threads else "")


def speedup_of(row: Mapping[str, Any], sparse: Mapping[str, Any]) -> float | None:
    """A speed-up that may be stated: only where the check passed and a dense baseline was timed."""
    stated = row["check"]["passed"] and row["baseline"] is not None
    return sparse["speedup"] if stated else None


def headline(row: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]] | None:
    """The speed-up to name first: the best at a recall of 0.95 or more, else the one of highest recall; None if none
    may be stated."""
    stated = [(x, s) for s in row["sparse"] if (x := speedup_of(row, s)) is not None and s["recall"] is not None]
    good = [pair for pair in stated if pair[1]["recall"] >= GOOD]
    if good:
        return max(good, key=lambda pair: pair[0])
    return max(stated, key=lambda pair: pair[1]["recall"], default=None)


def _lead(report: Report) -> str:
    s, first = report["settings"], report["rows"][0]
    what = "planted input" if s["input"] == "planted" else "the tensors of a dump"
    return (
        f"Timed on {machine(report)}: {what}, {counted(first['heads'], 'query head')} and"
        f" {counted(first['kv_heads'], 'kv head')} of"
        f" {first['head_dim']} dimensions, {s['dtype']}, groups of {s['block']} x {s['step']}, back end {s['backend']}."
    )


def _spread(timing: Mapping[str, float]) -> str:
    median = timing["median_ms"]
    return f"{100 * (timing['p80_ms'] - timing['p20_ms']) / median:.0f}%" if median > 0 else "-"


def _ms(timing: Mapping[str, float]) -> str:
    return f"{timing['median_ms']:.3g}" if timing["median_ms"] < 1000 else f"{timing['median_ms']:,.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _cards(report: Report) -> Iterator[Block]:
    """The speed-up at every length, with what it kept."""
    items = []
    for row in report["rows"]:
        name = counted(row["n"], "token") + ("" if row["source"] == "planted" else f", {row['source']}")
        if (found := headline(row)) is None:
            why = "the check failed" if not row["check"]["passed"] else "no dense baseline ran"
            items.append((name, "no speed-up", why))
            continue
        value, s = found
        kept = f"theta {exact_theta(s['theta'])}, recall {share_text(s['recall'])}"
        items.append((name, _times(value), f"the speed of dense {row['baseline']}; {kept}"))
    yield cards(*items[:12])


def _speedups(report: Report) -> Block:
    rows = [_speedup_row(row, s) for row in report["rows"] for s in row["sparse"]]
    columns = ["input", "tokens", "dense baseline", "dense, ms", "spread", "theta", "sparse, ms", "spread"]
    columns += ["speed-up", "recall", "density", "output error"]
    return table("Speed-up over the fastest dense attention, and what it kept", columns, rows, words=(0, 2))


def _speedup_row(row: Mapping[str, Any], s: Mapping[str, Any]) -> list[str]:
    base = next((d for d in row["dense"] if d["name"] == row["baseline"]), None)
    dense = ["none", "-", "-"] if base is None else [base["name"], _ms(base["timing"]), _spread(base["timing"])]
    return [
        row["source"],
        f"{row['n']:,}",
        *dense,
        exact_theta(s["theta"]),
        _ms(s["whole"]),
        _spread(s["whole"]),
        _times(speedup_of(row, s)) if row["check"]["passed"] else "check failed",
        share_text(s["recall"]),
        share_text(s["density"]),
        "-" if s["output_error"] is None else f"{s['output_error']:.2g}",
    ]


def _chart(report: Report) -> Iterator[Block]:
    """Time against length, where an input has several lengths."""
    lines: dict[str, list[tuple[float, float]]] = {}
    sources = {row["source"] for row in report["rows"]}
    for row in report["rows"]:
        where = "" if len(sources) == 1 else f", {row['source']}"
        for d in row["dense"]:
            lines.setdefault(f"dense {d['name']}{where}", []).append((row["n"], d["timing"]["median_ms"]))
        if row["check"]["passed"]:
            for s in row["sparse"]:
                name = f"sparse, theta {exact_theta(s['theta'])}{where}"
                lines.setdefault(name, []).append((row["n"], s["whole"]["median_ms"]))
    drawn = {name: sorted(p) for name, p in lines.items() if len(p) > 1}
    if drawn and len(drawn) <= 16:
        points = [(name, [x for x, _ in p], [y for _, y in p]) for name, p in drawn.items()]
        yield chart("Time against length of the prompt", ("tokens", "milliseconds"), points, log=(True, True))


def _stages(report: Report) -> Block:
    names = list(dict.fromkeys(name for row in report["rows"] for s in row["sparse"] for name in s["stages"]))
    rows = [
        [
            row["source"],
            f"{row['n']:,}",
            exact_theta(s["theta"]),
            *(_ms(s["stages"][name]) if name in s["stages"] else "-" for name in names),
            _ms(s["whole"]),
        ]
        for row in report["rows"]
        for s in row["sparse"]
    ]
    columns = ["input", "tokens", "theta", *(f"{name}, ms" for name in names), "whole pipeline, ms"]
    return table("Where the time of the sparse pipeline goes, each stage timed alone", columns, rows)


def _dense(report: Report) -> Block:
    rows = [
        [
            row["source"],
            f"{row['n']:,}",
            d["name"] + (" (baseline)" if d["name"] == row["baseline"] else ""),
            _ms(d["timing"]),
            _spread(d["timing"]),
            "-" if d["output_error"] is None else f"{d['output_error']:.2g}",
            "K and V repeated beforehand, not timed" if d["kv_repeated"] else "",
        ]
        for row in report["rows"]
        for d in row["dense"]
    ]
    columns = ["input", "tokens", "dense attention", "ms", "spread", "output error", "remark"]
    width = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return table("Dense attention", columns[:width], [row[:width] for row in rows], words=(0, 2, 6))


def _absent(report: Report) -> Iterator[Block]:
    rows = [[row["source"], f"{row['n']:,}", x["name"], x["reason"]] for row in report["rows"] for x in row["absent"]]
    if rows:
        yield table(
            "Dense attention that could not be timed", ["input", "tokens", "name", "why"], rows, words=(0, 2, 3)
        )


def _facts(report: Report) -> Block:
    items = [("created", report.get("created") or "-"), ("device", machine(report))]
    items += [(name, str(x)) for name, x in report["settings"].items() if isinstance(x, (str, int, float))]
    items += [(name, x) for name, x in report["hardware"].items() if isinstance(x, str)]
    items += [(f"version of {name}", x) for name, x in report["versions"].items() if x is not None]
    return facts("Settings and versions", items)


SECTION = Section(
    name="bench",
    title="Bench: how fast",
    command="bench",
    what="a bench",
    file="bench.json",
    format="anchorscope-bench",
    version=1,
    version_key="format_version",
    state="anchorscope-bench-run",
    shape=SHAPE,
    blocks=blocks,
)
