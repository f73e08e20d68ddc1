"""What the page shows of a folder of `calibrate`: which head runs how, what was promised, and what was kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anchorscope.anchors import MAX_HEADS, MAX_LAYERS
from anchorscope.errors import DumpError
from anchorscope.report.blocks import Block, Cell, cards, chart, facts, grid, grids, remarks, table, whole
from anchorscope.report.sections import MODEL, Section
from anchorscope.shown import counted, exact_theta, share_text, theta_text

STATISTICS = {"mean": "recall", "p05": "p05", "last": "last"}  # its column of a head
IN_WORDS = {"mean": "mean recall", "p05": "recall of the worst 5% of queries", "last": "recall of the last block"}
PROMISED_TO = {"head": "in every head", "layer": "in every layer's mean", "model": "in the mean over all heads"}
MOST_MISSED = 40  # heads below the promise that are listed one by one

_SHARE = (float, None)
_THETA = (float, "inf", "-inf")
_SUMMARY = {
    **dict.fromkeys(("recall", "recall_heads_p05", "recall_worst_head", "recall_p05", "recall_last", "density"), float),
    "worst_head": {"layer": int, "head": int, "recall": float},
    "time": (float, None),
}
_SPREAD = {"value": float, "value_worst_head": float, "value_heads_p05": float, "density": float}
_ROW = {
    "method": str,
    "group": (str, ...),
    "best": (bool, ...),
    "theta": (*_THETA, None),
    "fitted": _SPREAD,
    "held_out": (_SPREAD, None),
}
SHAPE: dict[str, Any] = {
    "model": MODEL,
    "versions": {str: (str, None)},
    "started": str,
    "settings": {
        "target": (float, None),
        "budget_density": (float, None),
        "by": ("head", "layer", "model"),
        "statistic": ("mean", "p05", "last"),
        "minimise": str,
        "dense_above": (float, None),
        "groups": [str],
    },
    "prompts": [{"name": str, "tokens": int, "dump": (str, None, ...), "held_out": bool}],
    "warnings": [str],
    "fitted": _SUMMARY,
    "held_out": (_SUMMARY, None),
    "promise": (
        {
            "pooled": float,
            "target": float,
            "units": int,
            "broken": int,
            "broken_clearly": int,
            "heads_missed": int,
            "shortfalls": [{"layer": (int, None), "head": (int, None), "value": float, "shortfall": float}],
        },
        None,
    ),
    "dense_heads": int,
    "heads": [
        {
            **dict.fromkeys(("layer", "head", "block", "step"), int),
            "theta": (*_THETA, "dense"),
            **{f"fitted_{name}": float for name in ("recall", "density", "p05", "last")},
            **{f"held_out_{name}": _SHARE for name in ("recall", "density", "p05", "last")},
            "kept": (bool, None),
        }
    ],
    "layers": [
        {
            "layer": int,
            "block": (int, None),
            "step": (int, None),
            "theta_min": (*_THETA, None),
            "theta_max": (*_THETA, None),
            "heads": int,
            "dense_heads": int,
            "fitted_recall": float,
            "fitted_density": float,
            "held_out_recall": _SHARE,
            "held_out_density": _SHARE,
            "heads_missed": (int, None),
        }
    ],
    "lengths": (
        [
            {
                "fit_tokens": int,
                "tokens": int,
                "held_out": bool,
                "value": float,
                "density": float,
                "heads_missed_share": _SHARE,
            }
        ],
        None,
    ),
    "against_one_theta": {"at_choice": [_ROW], "budgets": [{"rows": [_ROW]}], "targets": [_ROW]},
}

Report = Mapping[str, Any]


def aim(settings: Mapping[str, Any]) -> str:
    """What was asked for, in words: "mean recall 0.95 in every head"."""
    if settings["target"] is None:
        budget = settings["budget_density"]
        return "density as asked for" if budget is None else f"density {budget:g} on average over the heads"
    return f"{IN_WORDS[settings['statistic']]} {settings['target']:g} {PROMISED_TO[settings['by']]}"


def part_of(report: Report) -> str:
    """The part of the numbers to believe: "held_out" where prompts were held out, else "fitted"."""
    return "held_out" if report["held_out"] is not None else "fitted"


def kinds_of_groups(report: Report) -> list[str]:
    """Block x step of the heads that run sparse."""
    return list(dict.fromkeys(f"{h['block']}x{h['step']}" for h in report["heads"] if h["theta"] != "dense"))


def blocks(report: Report) -> list[Block]:
    """The section."""
    if any(h["layer"] >= MAX_LAYERS or h["head"] >= MAX_HEADS for h in report["heads"]):
        raise DumpError("calibration.json names a layer or head beyond any model: run `anchorscope calibrate` again")
    found = [
        remarks([_lead(report)], warning=False),
        _cards(report),
        remarks(report["warnings"]),
        grids("How each head runs, and what it keeps", list(_grids(report))),
        _pooled(report),
        _layers(report),
        *_missed(report),
        *_against(report),
        *_lengths(report),
        table(
            "Prompts",
            ["prompt", "tokens", "used for"],
            [
                [p["name"], f"{p['tokens']:,}", "checking the promise (held out)" if p["held_out"] else "fitting"]
                for p in report["prompts"]
            ],
            words=(0, 2),
        ),
        _facts(report),
    ]
    return [b for b in found if b.get("texts") != []]


def _lead(report: Report) -> str:
    held = sum(p["held_out"] for p in report["prompts"])
    fitted = len(report["prompts"]) - held
    checked = f"checked on {counted(held, 'other prompt')}" if held else "checked on no other prompt"
    return f"Asked for: {aim(report['settings'])}. Thetas were fitted on {counted(fitted, 'prompt')} and {checked}."


def _cards(report: Report) -> Block:
    s, judged, held = report["settings"], report["promise"], report["held_out"]
    fitted, heads = report["fitted"], len(report["heads"])
    if s["target"] is None:
        first = ("asked for", f"density {share_text(s['budget_density'])}", "on average over the heads")
    else:
        first = ("promised", share_text(s["target"], 2), f"{IN_WORDS[s['statistic']]} {PROMISED_TO[s['by']]}")
    if judged:
        kept = share_text(judged["pooled"], below=judged["target"])
        second = ("kept on held-out prompts", kept, f"{IN_WORDS[s['statistic']]}, all heads")
        missed = (f"{judged['heads_missed']:,} of {heads:,}", f"{judged['broken_clearly']} by more than 0.01")
    else:
        second = ("kept on held-out prompts", share_text(held["recall"]) if held else "-", "mean recall, all heads")
        second = second if held else (second[0], "not checked", "no prompt was held out")
        missed = ("-", "not checked: no prompt was held out" if not held else "a budget promises no recall")
    found = [
        first,
        ("kept on fitting prompts", share_text(fitted["recall"]), "mean recall, all heads"),
        second,
        ("density, fitted", share_text(fitted["density"]), "mean over the calibrated heads"),
        ("density, held out", share_text(held["density"]) if held else "-", "mean over the calibrated heads"),
        ("heads below the promise", *missed),
        ("dense heads", f"{report['dense_heads']:,} of {heads:,}", "sparse attention would not pay there"),
    ]
    part = report[part_of(report)]
    if part["time"] is not None:
        found.append(("time by the costs given", share_text(part["time"], 2), "of dense attention, estimated"))
    return cards(*found)


def _grids(report: Report) -> Iterator[Block]:
    """Theta, recall and density of every head, and its groups."""
    heads, s = report["heads"], report["settings"]
    layers, columns = (sorted({h[name] for h in heads}) for name in ("layer", "head"))
    places = [(layers.index(h["layer"]), columns.index(h["head"])) for h in heads]
    labels = ([str(x) for x in layers], [str(x) for x in columns])
    wheres = [f"layer {h['layer']}, head {h['head']}" for h in heads]
    numbers = [h["theta"] for h in heads if isinstance(h["theta"], (int, float))]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)

    def cells(values: Sequence[tuple[float | None, str, str, bool]]) -> list[Cell]:
        return [
            Cell(*place, value, text, f"{where}: {about}", marked)
            for place, where, (value, text, about, marked) in zip(places, wheres, values, strict=True)
        ]

    def theta(head: Mapping[str, Any]) -> tuple[float | None, str, str, bool]:
        value = head["theta"]
        shade = {"inf": high, "-inf": low, "dense": None}.get(value, value)
        about = "runs dense" if value == "dense" else f"theta {exact_theta(value)} nats"
        return shade, theta_text(value), f"{about}, groups of {head['block']} x {head['step']}", False

    yield grid("theta, nats", ("layer", "head"), labels, cells([theta(h) for h in heads]), ends=(low, high))
    statistic = STATISTICS[s["statistic"]]
    parts = ["held_out", "fitted"] if report["held_out"] is not None else ["fitted"]
    for part in parts:
        where = part.replace("_", " ")
        for name in dict.fromkeys((statistic, "recall", "density")):
            promised = name == statistic and s["target"] is not None
            values = []
            for h in heads:
                x = h[f"{part}_{name}"]
                short = bool(promised and x is not None and x < s["target"] - 1e-9)
                full = f"{_NAMES[name]} {share_text(x, 4)}, {where}; {theta(h)[2]}"
                values.append((x, "-" if x is None else whole(x), full, short))
            yield grid(
                f"{_NAMES[name]}, {where}",
                ("layer", "head"),
                labels,
                cells(values),
                ends=(0, 1) if name == "density" else (0.5, 1),
                colors="viridis" if name == "density" else "cividis",
                framed=f"framed: below the promised {s['target']:g}" if promised else "",
            )


_NAMES = {"recall": "recall", "p05": "recall p05", "last": "recall, last rows", "density": "density"}


def _pooled(report: Report) -> Block:
    rows = []
    for part in ("fitted", "held_out"):
        x = report[part]
        if x is None:
            continue
        worst = x["worst_head"]
        rows.append(
            [
                part.replace("_", " "),
                *(share_text(x[name]) for name in ("recall", "recall_p05", "recall_last", "recall_heads_p05")),
                f"{share_text(worst['recall'])} (layer {worst['layer']}, head {worst['head']})",
                share_text(x["density"]),
            ]
        )
    columns = ["all heads", "recall", "recall p05", "recall, last rows", "recall of the worst 5% of heads"]
    return table("Recall and density, pooled over heads and prompts", [*columns, "worst head", "density"], rows)


def _layers(report: Report) -> Block:
    parts = ["fitted", "held_out"] if report["held_out"] is not None else ["fitted"]
    judged = report["promise"] is not None
    rows = []
    for x in report["layers"]:
        ends = [theta_text(x[name]) for name in ("theta_min", "theta_max")]
        row = [str(x["layer"]), "-" if x["block"] is None or x["dense_heads"] == x["heads"] else _groups(x)]
        row += [ends[0] if ends[0] == ends[1] else " to ".join(ends), f"{x['dense_heads']} of {x['heads']}"]
        row += [share_text(x[f"{part}_{name}"]) for part in parts for name in ("density", "recall")]
        rows.append([*row, *([str(x["heads_missed"] or 0)] if judged else [])])
    columns = ["layer", "groups", "theta", "dense heads"]
    columns += [f"{name}, {part.replace('_', ' ')}" for part in parts for name in ("density", "recall")]
    return table("Layer by layer", [*columns, *(["heads below the promise"] if judged else [])], rows)


def _groups(x: Mapping[str, Any]) -> str:
    return f"{x['block']}x{x['step']}"


def _missed(report: Report) -> Iterator[Block]:
    """Who misses the promise on held-out prompts, worst first."""
    judged = report["promise"]
    if judged is None or not judged["shortfalls"]:
        return
    settings = {(h["layer"], h["head"]): h for h in report["heads"]}
    rows = []
    for x in judged["shortfalls"][:MOST_MISSED]:
        head = settings.get((x["layer"], x["head"]))
        rows.append(
            [
                "all heads" if x["layer"] is None else f"layer {x['layer']}",
                "-" if x["head"] is None else str(x["head"]),
                share_text(x["value"], 4, below=judged["target"]),
                share_text(x["shortfall"], 4),
                "-" if head is None else exact_theta(head["theta"]),
            ]
        )
    left = len(judged["shortfalls"]) - len(rows)
    more = f"; the {MOST_MISSED} worst of {len(judged['shortfalls'])}" if left else ""
    caption = f"Below the promised {judged['target']:g} on held-out prompts{more}"
    yield table(caption, ["where", "head", IN_WORDS[report["settings"]["statistic"]], "short by", "theta"], rows)


def _against(report: Report) -> Iterator[Block]:
    """The choice against one theta for all heads at equal density."""
    found, part = report["against_one_theta"], part_of(report)
    words = part.replace("_", " ")
    rows = []
    for x in found["at_choice"]:
        if x.get("best") is False or x[part] is None:
            continue
        method = f"one theta, all {x['group']}" if "group" in x else x["method"]
        values = [share_text(x[part][name]) for name in ("value", "value_worst_head", "value_heads_p05", "density")]
        rows.append([method, exact_theta(x["theta"]), *values])
    statistic = IN_WORDS[report["settings"]["statistic"]]
    yield table(
        f"A theta for each head against one theta for all, at equal density ({words} prompts)",
        ["settings", "theta", statistic, "worst head", "worst 5% of heads", "density"],
        rows,
    )
    lines: dict[str, list[tuple[float, float]]] = {}
    for budget in found["budgets"]:
        for x in budget["rows"]:
            if x.get("best") is not False and x[part] is not None:
                name = "one theta, best group" if "group" in x else x["method"]
                lines.setdefault(name, []).append((x[part]["density"], x[part]["value"]))
    for x in found["targets"]:
        if x[part] is not None:
            lines.setdefault("each head at the same recall", []).append((x[part]["density"], x[part]["value"]))
    if lines:
        yield chart(
            f"{statistic[0].upper()}{statistic[1:]} against density, mean over the heads ({words} prompts)",
            ("density", statistic),
            [(name, [x for x, _ in sorted(points)], [y for _, y in sorted(points)]) for name, points in lines.items()],
            log=(True, False),
        )


def _lengths(report: Report) -> Iterator[Block]:
    if not report["lengths"]:
        return
    rows = [
        [
            f"{x['fit_tokens']:,}",
            f"{x['tokens']:,}",
            share_text(x["value"]),
            share_text(x["density"]),
            "-" if x["heads_missed_share"] is None else f"{100 * x['heads_missed_share']:.0f}%",
            "held out" if x["held_out"] else "fitted",
        ]
        for x in report["lengths"]
    ]
    columns = ["fitted at, tokens", "used at, tokens", IN_WORDS[report["settings"]["statistic"]], "density"]
    yield table("Thetas fitted at one length and used at another", [*columns, "heads below", "prompts"], rows, words=())


def _facts(report: Report) -> Block:
    s = report["settings"]
    items = [
        ("model", str((report["model"] or {}).get("name") or "-")),
        ("asked for", aim(s)),
        ("least", s["minimise"]),
        ("groups to choose from", ", ".join(s["groups"])),
        ("runs dense from density", "-" if s["dense_above"] is None else f"{s['dense_above']:g}"),
        ("started", report["started"]),
        *((f"version of {name}", str(x)) for name, x in report["versions"].items() if x is not None),
    ]
    return facts("Settings and versions", items)


SECTION = Section(
    name="calibration",
    title="Calibration: how each head runs",
    command="calibrate",
    what="a calibration",
    file="calibration.json",
    format="anchorscope-calibration",
    version=1,
    state="anchorscope-calibration-run",
    shape=SHAPE,
    blocks=blocks,
)
