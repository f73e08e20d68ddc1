"""What the page shows of a folder of `evaluate`: what running sparse costs in perplexity, agreement and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anchorscope.report.blocks import Block, Cell, cards, chart, facts, grid, grids, interval, remarks, table, whole
from anchorscope.report.sections import MODEL, Section
from anchorscope.shapes import Row
from anchorscope.shown import counted, partly_sparse, share_text, theta_text

_SHARE = (float, None)
_THETA = (float, "inf", "-inf", None)
_PAIR = Row(float, float)
_METRICS = dict.fromkeys(("perplexity_dense", "perplexity_sparse", "perplexity_ratio", "kl_mean", "kl_p99"), float)
_TIMES = {side: {"prefill_seconds": float, "attention_share": float} for side in ("dense", "sparse")}
_TASK = {
    "task": str,
    "length": int,
    "depth": (float, None),
    "arm": str,
    "samples": int,
    **dict.fromkeys(("score_dense", "score_sparse", "logprob_dense", "logprob_sparse", "logprob_difference"), float),
    "recall": _SHARE,
    "density": float,
    "intervals": {
        **dict.fromkeys(("score_dense", "score_sparse"), _PAIR),
        "logprob_difference": (_PAIR, None, ...),
    },
    "times": _TIMES,
}
SHAPE: dict[str, Any] = {
    "model": MODEL,
    "started": (str, ...),
    "settings": {
        "device": (str, ...),
        "backend": (str, ...),
        "samples": (int, ...),
        "seed": (int, ...),
        "chat": (bool, ...),
    },
    "environment": ({str: (str, int, None)}, ...),
    "arms": [
        {
            "name": str,
            "layers": int,
            "heads": int,
            "dense_heads": int,
            "theta_low": _THETA,
            "theta_high": _THETA,
            "groups": [str],
            "coverage": (
                {
                    **dict.fromkeys(("layers", "heads", "sparse_heads", "dense_heads"), int),
                    "sparse_share": float,
                    "unnamed": [int],
                },
                ...,
            ),
        }
    ],
    "prompts": [
        {
            "prompt": str,
            "length": int,
            "arm": str,
            **_METRICS,
            "top1_agreement": float,
            "recall": _SHARE,
            "density": float,
            "intervals": dict.fromkeys(("perplexity_ratio", "kl_mean", "top1_agreement"), _PAIR),
            "last_half": {"perplexity_ratio": float},
            "layers": [{"layer": int, "kind": str, "density": float, "recall": _SHARE}],
            "times": _TIMES,
        }
    ],
    "tasks": [_TASK],
    "depths": [_TASK],
    "proof": (
        {
            "warnings": ([str], ...),
            "prompts": [{"prompt": str, "length": int, "near_chance": bool, "perplexity": (float, ...)}],
        },
        ...,
    ),
}

Report = Mapping[str, Any]


def blocks(report: Report) -> list[Block]:
    """The section."""
    found = [
        remarks([_lead(report)], warning=False),
        _cards(report),
        remarks(doubts(report)),
        _arms(report),
        *_prompts(report),
        *_layers(report),
        *_tasks(report),
        *_needles(report),
        *_times(report),
        _facts(report),
    ]
    return [b for b in found if b.get("texts") != []]


def doubts(report: Report) -> list[str]:
    """What speaks against trusting the numbers: a model that does not predict, layers that ran dense."""
    proof = report.get("proof") or {}
    found = [
        f"The model predicts the end of {x['prompt']} ({x['length']:,} tokens) no better than chance: its weights may"
        " be missing, the tokenizer may be another model's, or the text is noise."
        for x in proof.get("prompts", ())
        if x["near_chance"]
    ]
    found += [str(text) for text in proof.get("warnings", ())]
    return found + partial(report)


def partial(report: Report) -> list[str]:
    """The arms of which a part ran dense, in sentences."""
    return [
        f"{arm['name']} runs {part}: these costs are those of a partly sparse model."
        for arm in report["arms"]
        if (part := _dense_part(report, arm)) is not None
    ]


def _dense_part(report: Report, arm: Mapping[str, Any]) -> str | None:
    """That a part of the model ran dense in an arm, in words; evaluations of before counted layers alone."""
    if "coverage" in arm:
        return partly_sparse(arm["coverage"])
    depth = (report["model"] or {}).get("layers")
    if not isinstance(depth, int) or not 0 <= arm["layers"] < depth:
        return None
    return f"{arm['layers']} of the model's {counted(depth, 'layer')} sparse; the rest runs dense"


def on_cpu(report: Report) -> bool:
    """Whether the times are a CPU's."""
    return str(report["settings"].get("device", "")).startswith("cpu")


def change(ratio: float) -> str:
    """A perplexity ratio as a change: "+3.96%"; never "+0.00%" for one that is not 0."""
    percent = 100 * (ratio - 1)
    for digits in (2, 3, 4, 5):
        text = f"{percent:+.{digits}f}%"
        if ratio == 1 or float(text[:-1]) != 0:
            return text
    return f"{percent:+.0e}%"


def _change_interval(ends: Sequence[float]) -> str:
    return " to ".join(change(x) for x in ends)


def _lead(report: Report) -> str:
    prompts = list(dict.fromkeys(p["prompt"] for p in report["prompts"]))
    tasks = list(dict.fromkeys(t["task"] for t in report["tasks"]))
    parts = [f"on {', '.join(prompts)}"] if prompts else []
    parts += [f"at the tasks {', '.join(tasks)}"] if tasks else []
    where = " and ".join(parts)
    return f"The model ran dense and sparse on the same tokens, {where}; ranges are 95% intervals."


def _cards(report: Report) -> Block:
    """The worst of every arm's prompts and tasks, so that no mean hides it."""
    items = []
    for arm in (a["name"] for a in report["arms"]):
        mine = [p for p in report["prompts"] if p["arm"] == arm]
        if mine:
            p = max(mine, key=lambda p: p["perplexity_ratio"])
            small = f"{_change_interval(p['intervals']['perplexity_ratio'])}; {p['prompt']}, {p['length']:,} tokens"
            items.append((f"perplexity, {arm}", change(p["perplexity_ratio"]), small))
            items.append((f"density, {arm}", share_text(p["density"]), "while running, all heads of all layers"))
        tasks = [t for t in report["tasks"] if t["arm"] == arm]
        if tasks:
            t = min(tasks, key=lambda t: t["score_sparse"] - t["score_dense"])
            small = f"dense {t['score_dense']:.2f}; {t['task']}, {t['length']:,} tokens"
            items.append((f"answers, {arm}", f"{t['score_sparse']:.2f}", small))
    return cards(*items)


def _arms(report: Report) -> Block:
    rows = []
    for a in report["arms"]:
        ends = [theta_text(a[name]) for name in ("theta_low", "theta_high")]
        theta = ends[0] if ends[0] == ends[1] else " to ".join(ends)
        layers, heads = str(a["layers"]), f"{a['heads'] - a['dense_heads']} of {a['heads']} named"
        if (whole := a.get("coverage")) is not None:
            layers, heads = f"{a['layers']} of {whole['layers']}", f"{whole['sparse_heads']:,} of {whole['heads']:,}"
        rows.append([a["name"], layers, ", ".join(a["groups"]), theta, heads])
    columns = ["arm", "layers named", "groups", "theta", "sparse heads"]
    return table("What ran: the arms beside the dense one", columns, rows)


def _prompts(report: Report) -> Iterator[Block]:
    if not report["prompts"]:
        return
    rows = []
    for p in report["prompts"]:
        ranges = p["intervals"]
        rows.append(
            [
                p["prompt"],
                p["arm"],
                f"{p['length']:,}",
                share_text(p["density"]),
                share_text(p["recall"]),
                f"{p['perplexity_dense']:.4g}",
                f"{p['perplexity_sparse']:.4g}",
                f"{change(p['perplexity_ratio'])}\n{_change_interval(ranges['perplexity_ratio'])}",
                change(p["last_half"]["perplexity_ratio"]),
                f"{p['kl_mean']:.3g}\n" + " to ".join(f"{x:.3g}" for x in ranges["kl_mean"]),
                f"{share_text(p['top1_agreement'])}\n" + " to ".join(map(share_text, ranges["top1_agreement"])),
            ]
        )
    columns = [
        "prompt",
        "arm",
        "tokens",
        "density",
        "recall",
        "perplexity, dense",
        "perplexity, sparse",
        "change and 95%",
    ]
    columns += ["change, last half", "divergence, nats, and 95%", "top-1 agreement and 95%"]
    yield table("Prompts: perplexity and divergence, sparse against dense", columns, rows, words=(0, 1))


def _layers(report: Report) -> Iterator[Block]:
    """Density and recall while running, by layer."""
    runs = [p for p in report["prompts"] if p["layers"]]
    for name in ("density", "recall"):
        lines = []
        for p in runs:
            known = [x for x in p["layers"] if x[name] is not None]
            if known:
                label = f"{p['arm']}: {p['prompt']}, {p['length']:,} tokens"
                lines.append((label, [x["layer"] for x in known], [x[name] for x in known]))
        if lines:
            yield chart(f"{name[0].upper()}{name[1:]} while running, by layer", ("layer", name), lines)


def _tasks(report: Report) -> Iterator[Block]:
    if not report["tasks"]:
        return
    rows = []
    for t in report["tasks"]:
        ranges, difference = t["intervals"], t["intervals"].get("logprob_difference")
        rows.append(
            [
                t["task"],
                t["arm"],
                f"{t['length']:,}",
                str(t["samples"]),
                share_text(t["density"]),
                share_text(t["recall"]),
                *(f"{t[f'score_{side}']:.2f}\n{interval(ranges[f'score_{side}'], 2)}" for side in ("dense", "sparse")),
                f"{t['logprob_dense']:.4g}",
                f"{t['logprob_sparse']:.4g}",
                f"{t['logprob_difference']:+.2g}"
                + ("" if difference is None else "\n" + " to ".join(f"{x:+.2g}" for x in difference)),
            ]
        )
    columns = ["task", "arm", "tokens", "samples", "density", "recall", "score, dense, and 95%"]
    columns += ["score, sparse, and 95%", "log-probability, dense", "log-probability, sparse", "difference and 95%"]
    yield table("Tasks: answers found, and log-probability of the right answer in nats", columns, rows, words=(0, 1))


def _needles(report: Report) -> Iterator[Block]:
    """Scores by depth and length, of every task that has depths: sparse arms, and dense."""
    choices = []
    for task in dict.fromkeys(t["task"] for t in report["depths"]):
        mine = [t for t in report["depths"] if t["task"] == task and t["depth"] is not None]
        depths, lengths = (sorted({t[name] for t in mine}) for name in ("depth", "length"))
        if not mine:
            continue
        labels = ([f"{depth:g}" for depth in depths], [f"{length:,}" for length in lengths])
        arms = list(dict.fromkeys(t["arm"] for t in mine))
        for arm, side in [*((arm, "sparse") for arm in arms), (arms[0], "dense")]:
            cells = []
            for t in (t for t in mine if t["arm"] == arm):
                score, place = t[f"score_{side}"], (depths.index(t["depth"]), lengths.index(t["length"]))
                about = (
                    f"depth {t['depth']:g}, {t['length']:,} tokens: {score:.4g} of"
                    f" {counted(t['samples'], 'sample')} found"
                )
                lost = side == "sparse" and score < t["score_dense"]
                cells.append(Cell(*place, score, whole(score, 2) if score else "0", about, lost))
            name = f"{task}: {'dense' if side == 'dense' else arm}"
            framed = "framed: dense finds more" if side == "sparse" else ""
            axes = ("depth", "tokens")
            choices.append(grid(name, axes, labels, cells, ends=(0, 1), colors="cividis", framed=framed))
    if choices:
        yield grids("Answers found, by depth of what is hidden and length of the prompt", choices)


def _times(report: Report) -> Iterator[Block]:
    rows = [
        [
            x.get("prompt") or x["task"],
            x["arm"],
            f"{x['length']:,}",
            *(f"{x['times'][side]['prefill_seconds']:.3g}" for side in ("dense", "sparse")),
            *(f"{100 * x['times'][side]['attention_share']:.0f}%" for side in ("dense", "sparse")),
        ]
        for x in [*report["prompts"], *report["tasks"]]
    ]
    columns = ["prompt or task", "arm", "tokens", "prefill, dense, s", "prefill, sparse, s"]
    columns += ["in attention, dense", "in attention, sparse"]
    yield table("Prefill times, whole model", columns, rows, words=(0, 1))
    if on_cpu(report):
        text = "These times are a CPU's with the plain torch reference: they say nothing about the speed of the method."
        yield remarks([text])


def _facts(report: Report) -> Block:
    items = [("model", str((report["model"] or {}).get("name") or "-")), ("started", report.get("started") or "-")]
    items += [(name.replace("_", " "), str(x)) for name, x in report["settings"].items() if isinstance(x, (str, int))]
    items += [(name, str(x)) for name, x in (report.get("environment") or {}).items() if x is not None]
    return facts("Settings and versions", items)


SECTION = Section(
    name="evaluation",
    title="Evaluation: what running sparse costs",
    command="evaluate",
    what="an evaluation",
    file="evaluation.json",
    format="anchorscope-evaluation",
    version=1,
    state="anchorscope-evaluation-run",
    shape=SHAPE,
    blocks=blocks,
)
