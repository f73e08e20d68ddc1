"""What a notebook shows of each result (`anchorscope.notebook`), made of its report: nothing is measured or drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anchorscope.notebook import View
from anchorscope.pictures import picture_format
from anchorscope.shown import counted, exact_theta, partly_sparse, share_text, theta_text

Report = dict[str, Any]


def analysis(result: Any) -> View:
    """`Analysis`: means by layer at its theta, and how many heads fall short of the target."""
    report = result.report
    thetas = [x["theta"] for x in report["overall"]]
    shown = (report.get("figure_theta") or {}).get("theta", thetas[0])
    at = thetas.index(shown) if shown in thetas else 0
    theta, target, whole = exact_theta(thetas[at]), report["target"], report["overall"][at]
    rows = [[str(x["layer"]), *_layer(x["thetas"][at])] for x in report["by_layer"]]
    notes = [
        f"{len(target['short'])} of {counted(target['heads'], 'head')} fall short of recall"
        f" {target['recall']:g} at theta {theta}; {_needed(target)}"
    ]
    if result.diagnosis is not None:
        notes.append(f"Kinds of head: {_kinds(result.diagnosis.report)}.")
    return View(
        f"Analysis of {_prompts(report)}{_model(report['dump'].get('model'))}",
        [
            ("heads", str(target["heads"])),
            ("theta", theta),
            ("recall", share_text(whole["recall_mean"])),
            ("density", share_text(whole["density_mean"])),
            ("folder", str(result.path)),
        ],
        ("layer", "recall", "worst head", "density", "output error"),
        [*rows, ["all", *_layer(whole)]],
        notes,
        _pictures(result.figures, "recall-density", "curves"),
    )


def diagnosis(result: Any) -> View:
    """`Diagnosis`: what kind each head is and what it keeps."""
    heads = result.report["heads"]
    rows = []
    for h in heads:
        words = [repr(x["token"])[:18] for x in h["stripe_tokens"] if "token" in x]
        shares = (share_text(h[name], 2) for name in ("sink_4", "local_128", "window_recall"))
        keeps = " ".join(dict.fromkeys(words[:6]))
        rows.append([h["prompt"], f"{h['layer']}:{h['head']}", h["class"] or "-", *shares, keeps])
    return View(
        f"Heads of {_prompts(result.report)}{_model(result.report['dump'].get('model'))}",
        [("heads", str(len(heads))), ("kinds", _kinds(result.report)), ("folder", str(result.path))],
        ("prompt", "layer:head", "kind", "sink", "last 128", "window", "keeps"),
        rows,
        pictures=_pictures(result.figures, "class"),
    )


def comparison(result: Any) -> View:
    """`Comparison`: the density each method needs for the target recall, least first."""
    report = result.report
    target = report["settings"]["target_recall"]
    oracles = {m["label"] for m in report["settings"]["methods"] if m["oracle"]}
    found = {
        kind: {row["method"]: _at(row["needed"], target) for row in report["needed"][kind]}
        for kind in ("shared", "per-head")
    }
    ranked = sorted(found["per-head"].items(), key=lambda x: (x[0] in oracles, 2.0 if x[1] is None else x[1]))
    rows = [[name, share_text(found["shared"][name]), share_text(own)] for name, own in ranked]
    best = next((f"{name} ({share_text(own)})" for name, own in ranked if name not in oracles and own is not None), "-")
    return View(
        f"Comparison of {counted(len(rows), 'method')} on {_prompts(report)}{_model(report['dump'].get('model'))}",
        [
            ("heads", str(report["heads"])),
            ("least density", best),
            ("for recall", f"{target:g}"),
            ("folder", str(result.path)),
        ],
        ("method", "density, one setting for all", "density, a setting per head"),
        rows,
        [*(["The last ones are oracles."] if oracles else []), "- : no setting of the sweep reaches that recall."],
        _pictures(result.figures, "pooled"),
    )


def calibration(result: Any) -> View:
    """`Calibration`: what each layer got, what that keeps and what was promised."""
    report = result.report
    promise, settings = report["promise"], report["settings"]
    rows = [
        [
            str(x["layer"]),
            f"{x['block']}x{x['step']}",
            _range(x["theta_min"], x["theta_max"]),
            f"{x['dense_heads']} of {x['heads']}",
            share_text(x["fitted_density"]),
            share_text(x["fitted_recall"]),
            share_text(x["held_out_recall"]),
        ]
        for x in report["layers"]
    ]
    note = "Nothing was held out: the promise is not checked."
    if promise is not None:
        kept = share_text(promise["pooled"], below=promise["target"])
        note = f"Held out, {promise['statistic']} recall is {kept} over all heads, for {promise['target']:g} promised."
    target = settings.get("target")
    return View(
        f"Calibration on {counted(len(report['prompts']), 'prompt')}{_model(result.config.model)}",
        [
            *([("for recall", f"{target:g}")] if target is not None else []),
            ("heads", str(len(report["heads"]))),
            ("density", share_text(report["fitted"]["density"])),
            ("recall", share_text(report["fitted"]["recall"])),
            ("anchors", str(result.path / "anchors.json")),
        ],
        ("layer", "groups", "theta", "dense heads", "density", "recall", "held out"),
        rows,
        [note],
        _pictures(result.figures, "recall-density"),
    )


def evaluation(result: Any) -> View:
    """`Evaluation`: perplexity and answers, dense and sparse."""
    report = result.report
    rows = [
        [
            x["prompt"],
            x["arm"],
            f"{x['length']:,}",
            share_text(x["density"]),
            share_text(x["recall"]),
            f"{x['perplexity_dense']:.4g}",
            f"{100 * (x['perplexity_ratio'] - 1):+.2f}%",
        ]
        for x in report["prompts"]
    ]
    rows += [
        [
            x["task"],
            x["arm"],
            f"{x['length']:,}",
            share_text(x["density"]),
            share_text(x["recall"]),
            f"{x['score_dense']:.2f}",
            f"{x['score_sparse']:.2f}",
        ]
        for x in report["tasks"]
    ]
    parts = [(arm["name"], partly_sparse(arm["coverage"])) for arm in report["arms"] if "coverage" in arm]
    return View(
        f"Evaluation{_model(report['model'])}",
        [
            ("prompts", str(len({x["prompt"] for x in report["prompts"]}))),
            ("tasks", str(len({x["task"] for x in report["tasks"]}))),
            ("arms", ", ".join(arm["name"] for arm in report["arms"])),
            ("folder", str(result.path)),
        ],
        (
            *("prompt or task", "arm", "tokens", "density", "recall"),
            "perplexity or score, dense",
            "change or score, sparse",
        ),
        rows,
        [f"{name} runs {part}." for name, part in parts if part is not None],
        _pictures(result.figures, "perplexity", "scores"),
    )


def bench(result: Any) -> View:
    """`Bench` and `BenchResult`: times and what was kept, by length and theta."""
    report: Report = getattr(result, "report", None) or result.to_json()
    rows = []
    for row in report["rows"]:
        dense = next(x for x in row["dense"] if x["name"] == row["baseline"])
        rows += [
            [
                f"{row['n']:,}",
                exact_theta(x["theta"]),
                f"{dense['timing']['median_ms']:.3g}",
                f"{x['whole']['median_ms']:.3g}",
                "-" if x["speedup"] is None else f"{x['speedup']:.2f}x",
                *(share_text(x[name]) for name in ("recall", "density", "output_error")),
            ]
            for x in row["sparse"]
        ]
    failed = [f"{row['n']:,}" for row in report["rows"] if not row["check"]["passed"]]
    hardware = report["hardware"]
    name = hardware.get("gpu") or hardware.get("device") or hardware.get("machine") or "unknown hardware"
    notes = [f"The check against dense failed at {', '.join(failed)} tokens."] if failed else []
    baselines = ", ".join(dict.fromkeys(row["baseline"] for row in report["rows"]))
    return View(
        f"Bench on {name if isinstance(name, str) else 'a GPU'}",
        [("lengths", ", ".join(dict.fromkeys(x[0] for x in rows))), ("dense baseline", baselines)],
        ("tokens", "theta", "dense, ms", "sparse, ms", "speed-up", "recall", "density", "output error"),
        rows,
        notes,
        _pictures(getattr(result, "figures", ()), "time"),
    )


def dump(result: Any) -> View:
    """`Dump`: its prompts, and which layers and heads it holds of each."""
    rows = []
    for p in result.prompts:
        mine = [e for e in result.entries if e.prompt == p.name]
        layers = ", ".join(str(e.layer) for e in mine[:12]) + (", ..." if len(mine) > 12 else "")
        first = mine[0] if mine else None
        shape = ("-", "-", "-") if first is None else _shape(first)
        rows.append([p.name, f"{p.tokens:,}", layers, *shape])
    return View(
        str(result.path),
        [
            *([("model", str((result.model or {}).get("name")))] if result.model else []),
            ("prompts", str(len(rows))),
            ("entries", str(len(result.entries))),
            ("token texts", "none" if result.vocabulary is None else counted(len(result.vocabulary), "token")),
            *([] if result.complete else [("state", "unfinished")]),
        ],
        ("prompt", "tokens", "layers", "query heads / kv heads", "head dim", "dtype"),
        rows,
    )


def profile(p: Any) -> View:
    """`HeadProfile`: one head at the thetas asked for."""
    rows = [
        [
            exact_theta(float(t)),
            share_text(float(p.recall[i])),
            share_text(float(p.recall_min[i])),
            share_text(float(p.density[i])),
            share_text(float(p.output_error[i])),
        ]
        for i, t in enumerate(p.thetas)
    ]
    return View(
        f"{p.prompt}, layer {p.layer}, head {p.head}",
        [("tokens", f"{p.tokens:,}"), ("groups", f"{p.block}x{p.step}"), ("thetas", str(len(rows)))],
        ("theta", "recall", "worst query", "density", "output error"),
        rows,
    )


def anchors(config: Any) -> View:
    """`AnchorConfig`: groups and thetas of every layer."""
    rows = [
        [
            str(x.layer),
            f"{x.params.block}x{x.params.step}",
            _range(*_ends(x.thetas)),
            f"{sum(x.dense)} of {len(x.thetas)}",
        ]
        for x in config.layers
    ]
    heads = sum(len(x.thetas) for x in config.layers)
    dense = sum(sum(x.dense) for x in config.layers)
    return View(
        f"AnchorConfig{_model(config.model)}",
        [("layers", str(len(rows))), ("heads", str(heads)), ("dense heads", str(dense))],
        ("layer", "groups", "theta", "dense heads"),
        rows,
    )


def _layer(row: Report) -> list[str]:
    worst = row["worst"]
    return [
        share_text(row["recall_mean"]),
        f"{share_text(worst['recall'])} ({worst['layer']}:{worst['head']})",
        share_text(row["density_mean"]),
        share_text(row["output_error_mean"]),
    ]


def _needed(target: Report) -> str:
    if target["density_needed_mean"] is None:
        return "some reach it at no theta"
    return f"each at its own theta, density {share_text(target['density_needed_mean'])} on average reaches it"


def _kinds(report: Report) -> str:
    counts = Counter(h["class"] or "unclassed" for h in report["heads"])
    return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def _prompts(report: Report) -> str:
    names = [p["name"] for p in report["prompts"]]
    return names[0] if len(names) == 1 else f"{len(names)} prompts"


def _model(model: Any) -> str:
    return f" ({model['name']})" if isinstance(model, dict) and model.get("name") else ""


def _at(points: Iterable[Report], recall: float) -> float | None:
    return next((x["density"] for x in points if x["recall"] == recall), None)


def _ends(thetas: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [t for t in thetas if t is not None]
    return (min(known), max(known)) if known else (None, None)


def _range(low: Any, high: Any) -> str:
    if low is None:
        return "-"
    return theta_text(low) if low == high else f"{theta_text(low)} to {theta_text(high)}"


def _shape(entry: Any) -> tuple[str, str, str]:
    return f"{len(entry.query_heads)} / {len(entry.kv_heads)}", str(entry.head_dim), entry.dtype


def _pictures(figures: Sequence[Path], *wanted: str) -> list[Path]:
    """Those whose name holds one of the words, the first word's first."""
    return [x for word in wanted for x in figures if word in x.name and picture_format(x) == "png"]
