"""What stands on top of the page: the model, what to run it with, what that keeps, how fast, and three caveats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anchorscope.profiles import HeadProfile
from anchorscope.report import benches, calibrations, evaluations
from anchorscope.report.blocks import Block, cards, remarks
from anchorscope.report.curves import curve_at
from anchorscope.report.read import Run
from anchorscope.report.sections import Result
from anchorscope.shown import counted, share_text, theta_text

CAVEATS = 3
NEAR = 0.1  # a bench of a length that differs by less speaks for a prompt
FEW = 3  # prompts that are a small sample

Analyses = Sequence[tuple[Run, Sequence[HeadProfile], np.ndarray]]  # with a grid of thetas
Item = tuple[str, str, str]


def summarize(analyses: Analyses, results: Mapping[str, Sequence[Result]]) -> list[Block]:
    """The blocks of the summary."""
    found = {name: [r.report for r in results.get(name, ())] for name in ("calibration", "evaluation", "bench")}
    prompts = _prompts(analyses, found)
    plan = _plan(analyses, found["calibration"])
    items = [
        _model(analyses, results),
        _prompt_card(prompts),
        *_configuration(plan, found["calibration"]),
        _speedup(plan, prompts, [b for b in found["bench"] if not _foreign(b, analyses, found["calibration"])]),
        *_cost(found["evaluation"]),
    ]
    doubts = [text for text in _caveats(analyses, found, prompts) if text][:CAVEATS]
    return [cards(*items), *([remarks(["Mind before using this:", *doubts])] if doubts else [])]


def _prompts(analyses: Analyses, found: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """The longest that each prompt was measured, tokens."""
    seen = [(p.prompt, p.tokens) for _, profiles, _ in analyses for p in profiles]
    seen += [(p["name"], p["tokens"]) for report in found["calibration"] for p in report["prompts"]]
    seen += [(p["prompt"], p["length"]) for report in found["evaluation"] for p in report["prompts"]]
    longest: dict[str, int] = {}
    for name, tokens in seen:
        longest[name] = max(longest.get(name, 0), tokens)
    return longest


def _model(analyses: Analyses, results: Mapping[str, Sequence[Result]]) -> Item:
    models = [run.report["dump"].get("model") for run, _, _ in analyses]
    models += [r.model for mine in results.values() for r in mine]
    known = [m for m in models if m]
    if not known:
        return ("model", "not stated", "a bench alone is of no model")
    sizes = [(key.replace("_", " "), m[key]) for m in known[:1] for key in ("layers", "query_heads") if m.get(key)]
    return ("model", str(known[0].get("name") or "-"), ", ".join(f"{value} {key}" for key, value in sizes))


def _prompt_card(prompts: Mapping[str, int]) -> Item:
    if not prompts:
        return ("prompts", "none", "nothing was measured on a prompt")
    names = list(prompts)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    low, high = min(prompts.values()), max(prompts.values())
    tokens = f"{high:,} tokens" if low == high else f"{low:,} to {high:,} tokens"
    return ("prompts", str(len(names)), f"{', '.join(names[:3])}{more}; {tokens}")


def _plan(analyses: Analyses, calibrated: Sequence[Any]) -> dict[str, Any] | None:
    """What to run with: `theta` in words, `groups`, `density`, `note`."""
    if calibrated:
        report = calibrated[0]
        part = report[calibrations.part_of(report)]
        dense = _sparse_part(report)
        groups = calibrations.kinds_of_groups(report)
        theta = "dense" if report["dense_heads"] == len(report["heads"]) else "a theta per head"
        return {"theta": theta, "groups": groups, "density": part["density"], "note": dense}
    for run, profiles, grid in analyses:
        target = float(run.report["settings"]["target_recall"])
        recall, density = np.mean([curve_at(p, grid) for p in profiles], axis=0)
        enough = np.flatnonzero(recall >= target)
        if enough.size:
            at = int(enough[0])
            note = f"one for all heads, which keep {target:g} on average; a calibration gives each its own"
            groups = list(dict.fromkeys(f"{p.block}x{p.step}" for p in profiles))
            theta = f"theta {theta_text(float(grid[at]))}"
            return {"theta": theta, "groups": groups, "density": float(density[at]), "note": note}
    return None


def _sparse_part(report: Mapping[str, Any]) -> str:
    """How many heads run sparse: of the model's, where it says how many it has, since all others run dense."""
    sparse = len(report["heads"]) - report["dense_heads"]
    model = report.get("model") or {}
    layers, each = model.get("layers"), model.get("query_heads")
    if isinstance(layers, int) and isinstance(each, int) and sparse <= layers * each:
        return f"{sparse:,} of the model's {counted(layers * each, 'head')} sparse"
    return f"{report['dense_heads']} of {counted(len(report['heads']), 'head')} dense"


def _foreign(bench: Mapping[str, Any], analyses: Analyses, calibrated: Sequence[Any]) -> bool:
    """Whether a bench timed a dump that nothing else on the page was measured on: perhaps another model's."""
    known = {run.identity for run, _, _ in analyses} | {p.get("dump") for c in calibrated for p in c["prompts"]}
    dump = bench["settings"]["dump_sha256"]
    return dump is not None and bool(known) and dump not in known


def _configuration(plan: Mapping[str, Any] | None, calibrated: Sequence[Any]) -> Iterator[Item]:
    if plan is None:
        yield ("recommended", "none", "neither a calibration nor an analysis is on this page")
        return
    yield ("recommended", plan["theta"], f"groups {', '.join(plan['groups']) or '-'}; {plan['note']}")
    yield ("density", share_text(plan["density"]), "pairs kept of all, mean over the heads")
    if not calibrated:
        yield ("recall promised", "none", "only a calibration promises, and checks on other prompts")
        return
    report = calibrated[0]
    s, judged, held = report["settings"], report["promise"], report["held_out"]
    promised = "none" if s["target"] is None else share_text(s["target"], 2)
    yield ("recall promised", promised, calibrations.aim(s))
    if judged is not None:
        missed = f"{judged['heads_missed']} of {counted(len(report['heads']), 'head')} below it"
        yield ("recall kept", share_text(judged["pooled"], below=judged["target"]), f"on held-out prompts; {missed}")
    elif held is not None:
        yield ("recall kept", share_text(held["recall"]), "on held-out prompts")
    else:
        yield ("recall kept", "not checked", "no prompt was held out")


def _speedup(plan: Mapping[str, Any] | None, prompts: Mapping[str, int], timed: Sequence[Any]) -> Item:
    """What a bench of the same groups says of the prompts' length and the configuration's density."""
    name, length = "expected speed-up of attention", max(prompts.values(), default=0)
    if not timed:
        return (name, "not measured", "no bench is on this page that is known to be of this model")
    if plan is None or not length:
        return (name, "not measured", "there is no configuration and no prompt to expect it for")
    matching = [b for b in timed if [benches.groups_of(b)] == plan["groups"]]
    if not matching:
        kinds = ", ".join(dict.fromkeys(benches.groups_of(b) for b in timed))
        return (
            name,
            "not measured",
            f"the bench timed groups {kinds}, not {', '.join(plan['groups']) or 'dense heads'}",
        )
    rows = [(b, row) for b in matching for row in b["rows"] if abs(row["n"] - length) <= NEAR * length]
    if not rows:
        return (name, "not measured", f"no bench of these groups at {length:,} tokens")
    found = [
        (s["density"], x, b, row)
        for b, row in rows
        for s in row["sparse"]
        if s["density"] is not None
        and s["density"] >= plan["density"] - 1e-3
        and (x := benches.speedup_of(row, s)) is not None
    ]
    if not found:
        return (
            name,
            "not measured",
            f"no bench at {length:,} tokens with a density of {share_text(plan['density'])} or more",
        )
    density, value, bench, row = min(found, key=lambda x: x[0])
    where = f"over dense {row['baseline']} at {row['n']:,} tokens and density {share_text(density)}"
    return (name, f"{value:.2f}x", f"{where}; {benches.machine(bench)}, {row['source']} input")


def _cost(evaluated: Sequence[Any]) -> Iterator[Item]:
    worst = max(
        (p for report in evaluated for p in report["prompts"]), key=lambda p: float(p["perplexity_ratio"]), default=None
    )
    if worst is not None:
        small = f"the worst: {worst['arm']} on {worst['prompt']}, {worst['length']:,} tokens"
        yield ("perplexity, change", evaluations.change(worst["perplexity_ratio"]), small)


def _caveats(analyses: Analyses, found: Mapping[str, Sequence[Any]], prompts: Mapping[str, int]) -> Iterator[str]:
    """What is true of these data and speaks against trusting them, the weightiest first."""
    calibrated, evaluated, timed = found["calibration"], found["evaluation"], found["bench"]
    said = [text for report in evaluated for text in evaluations.doubts(report)[:1]]
    yield from said
    for report in timed:
        yield from benches.failures(report)[:1]
    partial = [text for report in evaluated for text in evaluations.partial(report)]
    yield from (text for text in partial[:1] if text not in said)
    for report in calibrated:
        judged = report["promise"]
        if report["held_out"] is None:
            yield "No prompt was held out: whether the recall holds on other prompts was not checked."
        elif judged is not None and judged["heads_missed"]:
            missed = f"{judged['heads_missed']} of {counted(len(report['heads']), 'head')}"
            yield f"On held-out prompts {missed} keep less than the promised {judged['target']:g}."
        if not partial:  # once is enough
            yield from (f"Calibration: {text}." for text in report["warnings"] if "layers are calibrated" in text)
    if any(_foreign(b, analyses, calibrated) for b in timed):
        yield "A bench timed a dump that nothing else here was measured on: it may be of another model."
    lengths, longest = [row["n"] for b in timed for row in b["rows"]], max(prompts.values(), default=0)
    if lengths and longest and (longest < min(lengths) or longest > max(lengths)):
        ends = f"{min(lengths):,} to {max(lengths):,}"
        yield f"The longest prompt has {longest:,} tokens and the bench timed {ends}: they speak of different lengths."
    if any(b["hardware"]["type"] == "cpu" for b in timed):
        yield f"The bench ran on a CPU. {benches.CPU}"
    if not calibrated:
        yield "Nothing was calibrated: no recall was promised, and none was checked on prompts held out for that."
    if not evaluated:
        yield "Recall is attention kept, not answers kept: no evaluation is on this page."
    if not timed:
        yield "Density is not time: no bench is on this page."
    if prompts and len(prompts) <= FEW:
        yield f"The number of prompts is {len(prompts)}, a small sample: others may need another theta."
