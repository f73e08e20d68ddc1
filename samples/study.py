"""Every number of docs/study-smollm2.md: capture, calibrate, evaluate, and write the tables into the document.

    python samples/study.py OUT            (or `make study`)

Each step resumes where it was interrupted, and is not repeated once it is finished. Needs `pip install
'anchorscope[hf]'`, 5 GB of disk, 3 GB of memory and 60 to 90 minutes on two CPU cores. The text of the document is
written by hand; what stands between its `begin` and `end` marks is replaced.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import anchorscope
from anchorscope import AnchorParams
from anchorscope.anchors import AnchorConfig, LayerAnchors

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "samples" / "prompts"
FITTED = ("prose.txt", "code.py.txt", "needles.txt")
HELD_OUT = ("play.txt", "verse.txt", "config.py.txt")
DOCUMENT = ROOT / "docs" / "study-smollm2.md"
LAYERS, HEADS, TOKENS = 30, 9, 8192
TARGETS = (0.90, 0.95, 0.99)
GROUPS = (AnchorParams(64, 4), AnchorParams(64, 8))


def main(out: Path) -> None:
    """Run what is not done yet, one step after the other."""
    out.mkdir(parents=True, exist_ok=True)
    capture(out)
    calibrations = calibrate(out)
    prompts, tasks = evaluate(out)
    default = paper_default(out)
    blocks = {
        "promise": promise(calibrations),
        "one-theta": one_theta(calibrations),
        "lengths": lengths(calibrations["lengths"]),
        "prompts": perplexities(prompts),
        "theta-12": blind_spots(default, calibrations["calibration-0.95"]) + spared(prompts, spare(out, default)),
        "tasks": scores(tasks),
        "hard-heads": hard_heads(calibrations["calibration-0.95"], diagnose(out), oracle(out)),
        "made": made(out, prompts),
    }
    rewrite(DOCUMENT, blocks)
    for folder, name in (("evaluation", "perplexity"), ("needles", "needle-grid")):
        shutil.copyfile(out / folder / "figures" / f"{name}.png", ROOT / "docs" / "images" / f"study-{name}.png")
    print(f"{DOCUMENT.relative_to(ROOT)} is up to date")


def step(report: Path, run: Callable[[], object]) -> dict[str, Any]:
    """A step that ends by writing `report`: run it unless that is there, note its cost, and return the report."""
    if not report.exists():
        wall, cpu = time.time(), time.process_time()
        run()
        note_cost(report.parent, time.time() - wall, time.process_time() - cpu)
    return json.loads(report.read_text(encoding="utf-8"))


def note_cost(folder: Path, wall: float, cpu: float) -> None:
    """Add seconds of the clock and of the processor to OUT/seconds.json; an interrupted try does not count."""
    path = folder.parent / "seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    before = known.get(folder.name, {"wall": 0, "cpu": 0})
    known[folder.name] = {"wall": round(before["wall"] + wall), "cpu": round(before["cpu"] + cpu)}
    path.write_text(json.dumps(known, indent=2) + "\n")


def capture(out: Path) -> None:
    """Q, K and V of all layers: every prompt at 8,192 tokens, and those to fit on at 4,096 and 2,048."""
    for folder, names, tokens in (
        ("dump-8192", FITTED + HELD_OUT, TOKENS),
        ("dump-4096", FITTED, 4096),
        ("dump-2048", FITTED, 2048),
    ):
        path = out / folder
        if not complete(path):
            wall, cpu = time.time(), time.process_time()
            prompts = [PROMPTS / name for name in names]
            anchorscope.capture_model("smollm2", prompts, path, tokens=tokens, dtype="bf16", resume=True)
            note_cost(path, time.time() - wall, time.process_time() - cpu)


def complete(dump: Path) -> bool:
    """Whether a capture is finished: its manifest is there from the beginning, but says so only at the end."""
    manifest = dump / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text(encoding="utf-8"))["complete"]


def calibrate(out: Path) -> dict[str, Any]:
    """Thetas for each target, and whether those of one length hold at another. Reports by name of the folder."""
    held = [Path(name).stem for name in HELD_OUT]
    first = out / "calibration-0.95"
    reports = {}
    for target in sorted(TARGETS, key=lambda t: t != 0.95):  # the first measures, the others read its analyses
        folder = out / f"calibration-{target:.2f}"
        sources = [out / "dump-8192"] if folder == first else sorted((first / "analysis").iterdir())
        reports[folder.name] = step(
            folder / "calibration.json",
            lambda s=sources, o=folder, t=target: anchorscope.calibrate(
                s, o, target_recall=t, groups=GROUPS, holdout=held, progress=show
            ),
        )
    sources = [first / "analysis" / "dump-8192-64x4", out / "dump-4096", out / "dump-2048"]
    reports["lengths"] = step(
        out / "lengths" / "calibration.json",
        lambda: anchorscope.calibrate(
            sources, out / "lengths", target_recall=0.95, groups=GROUPS[:1], holdout=held, progress=show
        ),
    )
    return reports


def evaluate(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model with each of the anchors, and with the paper's default, on held-out prompts and on tasks."""
    arms: dict[str, Any] = {
        f"recall {t:.2f}": AnchorConfig.load(out / f"calibration-{t:.2f}" / "anchors.json") for t in TARGETS
    }
    arms["theta 12"] = AnchorConfig.uniform(12.0, range(LAYERS), HEADS, AnchorParams(128, 16))

    def run(folder: str, names: Iterable[str], **request: Any) -> dict[str, Any]:
        chosen = {name: arms[name] for name in names}

        def work() -> None:
            anchorscope.evaluate("smollm2", out / folder, arms=chosen, progress=show, **request)

        return step(out / folder / "evaluation.json", work)

    prompts = run("evaluation", arms, prompts=[PROMPTS / name for name in HELD_OUT], lengths=(TOKENS,))
    some = ("recall 0.95", "recall 0.99", "theta 12")
    needles = run("needles", some, tasks=("needle",), lengths=(2048, 4096, TOKENS), samples=1)
    puzzles = ("multi-needle", "variable-tracking")
    others = run("tasks", some, tasks=puzzles, lengths=(4096,), samples=2)
    return prompts, {"tasks": needles["tasks"] + others["tasks"]}


def diagnose(out: Path) -> dict[str, Any]:
    """What kind of head each one is, on the first of the prompts."""
    folder = out / "heads"
    prompts = [Path(FITTED[0]).stem]
    return step(
        folder / "heads.json",
        lambda: anchorscope.diagnose(out / "dump-8192", folder, prompts=prompts, figures=False, progress=show),
    )


def paper_default(out: Path) -> dict[tuple[int, int], tuple[float, float]]:
    """Recall and density of every head at theta 12 and 128 x 16 groups: means over the held-out prompts."""
    folder = out / "theta-12"
    prompts = [Path(name).stem for name in HELD_OUT]
    step(
        folder / "report.json",
        lambda: anchorscope.analyze(
            out / "dump-8192", folder, thetas=(12.0,), prompts=prompts, figures=False, progress=show
        ),
    )
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for p in anchorscope.iter_profiles(folder, heat=False):
        found.setdefault((p.layer, p.head), []).append((float(p.recall[0]), float(p.density[0])))
    return {head: (fmean(r for r, _ in x), fmean(d for _, d in x)) for head, x in found.items()}


def spare(out: Path, default: dict[tuple[int, int], tuple[float, float]]) -> dict[str, Any]:
    """Theta 12 again, with the heads that fall below recall 0.95 dense: are they what does the harm?"""

    def thetas(layer: int) -> tuple[float | None, ...]:
        return tuple(12.0 if default[layer, h][0] >= 0.95 else None for h in range(HEADS))

    params = AnchorParams(128, 16)
    config = AnchorConfig(tuple(LayerAnchors(i, params, thetas(i)) for i in range(LAYERS)))
    folder = out / "spared"
    prompts = [PROMPTS / HELD_OUT[-1]]
    return step(
        folder / "evaluation.json",
        lambda: anchorscope.evaluate(
            "smollm2", folder, arms={"spared": config}, prompts=prompts, lengths=(TOKENS,), progress=show
        ),
    )


# ----------------------------------------------------------------------------------------------------------------
# tables


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def promise(reports: dict[str, Any]) -> str:
    """Per target: what was chosen, and what it keeps on fitting and on held-out prompts."""
    rows = []
    for target in TARGETS:
        r = reports[f"calibration-{target:.2f}"]
        thetas = sorted(h["theta"] for h in r["heads"] if isinstance(h["theta"], float))
        groups = Counter(f"{x['block']} x {x['step']}" for x in r["layers"])
        kept, broken = r["promise"], r["promise"]["heads_missed_share"]
        rows.append(
            (
                f"{target:.2f}",
                ", ".join(f"{name}: {count}" for name, count in sorted(groups.items())),
                f"{quantile(thetas, 0.05):.1f}, {quantile(thetas, 0.5):.1f}, {quantile(thetas, 0.95):.1f}",
                r["dense_heads"],
                f"{r['fitted']['recall']:.3f}",
                f"{r['fitted']['density']:.3f}",
                f"**{r['held_out']['recall']:.3f}**",
                f"**{r['held_out']['density']:.3f}**",
                f"{r['held_out']['recall_p05']:.3f}",
                f"{broken:.0%} ({kept['broken_clearly'] / kept['units']:.0%})",
            )
        )
    return table(
        (
            "target",
            "layers by groups",
            "theta: 5%, median, 95%",
            "dense heads",
            "fitted recall",
            "density",
            "held-out recall",
            "density",
            "worst 5% of queries",
            "heads that miss (by > 0.01)",
        ),
        rows,
    )


def one_theta(reports: dict[str, Any]) -> str:
    """Against one theta for the whole model, at equal density on the fitting prompts; held-out values."""
    rows = []
    for target in TARGETS:
        found = reports[f"calibration-{target:.2f}"]["against_one_theta"]["at_choice"]
        singles = [x["held_out"] for x in found if "group" in x]
        for x in found:
            if x["method"] == "one theta, same groups" and x["held_out"] in singles:
                continue  # every layer has the same kind of group
            method = x["method"] + (f" ({x['group']})" if "group" in x else "")
            theta = "per head" if x["theta"] is None else f"{x['theta']:.2f}" if x["theta"] != "-inf" else "-inf"
            v = x["held_out"]
            rows.append(
                (
                    f"{target:.2f}",
                    method,
                    theta,
                    f"{v['density']:.3f}",
                    f"{v['value']:.3f}",
                    f"{v['value_heads_p05']:.3f}",
                    f"{v['value_worst_head']:.3f}",
                )
            )
    return table(("target", "method", "theta", "density", "recall", "5% of heads below", "worst head"), rows)


def lengths(report: dict[str, Any]) -> str:
    """Thetas fitted at one length, used at another."""
    rows = [
        (
            f"{c['fit_tokens']:,}",
            f"{c['tokens']:,}",
            "held-out" if c["held_out"] else "fitting",
            f"{c['value']:.3f}",
            f"{c['density']:.3f}",
            f"{c['heads_missed_share']:.0%}",
        )
        for c in report["lengths"]
    ]
    return table(("fitted at", "used at", "prompts", "recall", "density", "heads below 0.95"), rows)


def perplexities(report: dict[str, Any]) -> str:
    """Per held-out prompt and arm: what the model loses."""
    rows = []
    for x in report["prompts"]:
        low, high = x["intervals"]["perplexity_ratio"]
        rows.append(
            (
                x["prompt"],
                x["arm"],
                f"{x['recall']:.3f}",
                f"{x['density']:.3f}",
                f"{x['perplexity_dense']:.2f}",
                f"{x['perplexity_ratio'] - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})",
                f"{x['kl_mean']:.4f}",
                f"{x['kl_p99']:.3f}",
                f"{x['top1_agreement']:.3f}",
            )
        )
    header = (
        "prompt",
        "arm",
        "recall",
        "density",
        "perplexity dense",
        "change (95%)",
        "KL, nats",
        "KL, 99%",
        "same top 1",
    )
    return table(header, rows)


def blind_spots(default: dict[tuple[int, int], tuple[float, float]], calibration: dict[str, Any]) -> str:
    """The heads that one theta for all serves worst, next to what their own theta keeps."""
    own = {(h["layer"], h["head"]): h for h in calibration["heads"]}
    worst = sorted(default, key=lambda head: default[head][0])
    rows = []
    for layer, head in worst[:6]:
        h = own[layer, head]
        theta = f"{h['theta']:.1f}" if isinstance(h["theta"], float) else h["theta"]
        recall, density = default[layer, head]
        rows.append(
            (
                f"layer {layer}, head {head}",
                f"{recall:.3f}",
                f"{density:.3f}",
                theta,
                f"{h['held_out_recall']:.3f}",
                f"{h['held_out_density']:.3f}",
            )
        )
    low = sum(recall < 0.95 for recall, _ in default.values())
    high = sum(default[x][0] > own[x]["held_out_recall"] and default[x][1] > own[x]["held_out_density"] for x in own)
    header = ("head", "recall at theta 12", "density", "calibrated theta", "recall", "density")
    return table(header, rows) + (
        f"\n\nAt theta 12, {low} of {len(default)} heads fall below recall 0.95; {high} keep more than calibrated, at"
        " more density."
    )


def spared(report: dict[str, Any], again: dict[str, Any]) -> str:
    """What theta 12 does to one prompt with and without the heads it fails."""
    after = again["prompts"][0]
    before = next(x for x in report["prompts"] if x["arm"] == "theta 12" and x["prompt"] == after["prompt"])
    heads = again["arms"][0]["dense_heads"]
    return (
        f" With those {heads} heads dense and all others at theta 12, the perplexity of `{after['prompt']}` changes by"
        f" {after['perplexity_ratio'] - 1:+.2%} instead of {before['perplexity_ratio'] - 1:+.2%}, and the mean KL is"
        f" {after['kl_mean']:.4f} instead of {before['kl_mean']:.4f}, at density {after['density']:.3f} instead of"
        f" {before['density']:.3f}."
    )


def scores(report: dict[str, Any]) -> str:
    """Tasks by length: a column per arm, scores and the log-probability of the right answer."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for x in report["tasks"]:
        found.setdefault((x["task"], x["length"]), {})[x["arm"]] = x
    arms = [x["arm"] for x in report["tasks"]]
    arms = list(dict.fromkeys(arms))
    rows = []
    for (task, length), by in found.items():
        first = by[arms[0]]
        cells = [f"{by[a]['score_sparse']:.2f} ({by[a]['logprob_sparse']:.2f})" for a in arms]
        rows.append(
            (
                task,
                f"{length:,}",
                first["samples"],
                f"{first['score_dense']:.2f} ({first['logprob_dense']:.2f})",
                *cells,
            )
        )
    return table(("task", "tokens", "questions", "dense", *arms), rows)


def oracle(out: Path) -> dict[tuple[int, int], float]:
    """Density the best choice of columns needs for recall 0.95, mean over the fitting prompts, by layer and head."""
    found: dict[tuple[int, int], list[float]] = {}
    fitted = {Path(name).stem for name in FITTED}
    analysis = out / "calibration-0.95" / "analysis" / "dump-8192-64x4"
    for p in anchorscope.iter_profiles(analysis, heat=False):
        if p.prompt in fitted:
            found.setdefault((p.layer, p.head), []).append(p.density_at_recall(0.95, "oracle") or 1.0)
    return {head: fmean(values) for head, values in found.items()}


def hard_heads(calibration: dict[str, Any], diagnosis: dict[str, Any], best: dict[tuple[int, int], float]) -> str:
    """The heads that need most density for the target, and what they are like."""
    kinds = {(h["layer"], h["head"]): {**h, "oracle": best[h["layer"], h["head"]]} for h in diagnosis["heads"]}
    heads = sorted(calibration["heads"], key=lambda h: -h["fitted_density"])
    rows = [
        (f"layer {h['layer']}, head {h['head']}", *head_cells([h], [kinds[h["layer"], h["head"]]])) for h in heads[:10]
    ]
    for name in ("streaming", "mixed", "retrieval"):
        mine = [h for h in heads if kinds[h["layer"], h["head"]]["class"] == name]
        if mine:
            label = f"all {len(mine)} {name}"
            rows.append((label, *head_cells(mine, [kinds[h["layer"], h["head"]] for h in mine])))
    names = ("heads", "theta", "density", "recall, held out", *METRICS.values())
    needed = [h["fitted_density"] for h in calibration["heads"]]
    ranks = ", ".join(
        f"{label} {spearman(needed, [kinds[h['layer'], h['head']][m] for h in calibration['heads']]):+.2f}"
        for m, label in METRICS.items()
    )
    return table(names, rows) + f"\n\nRank correlation with the density needed, over {len(needed)} heads: {ranks}."


METRICS = {
    "oracle": "density of the oracle",
    "effective_keys_median": "effective keys",
    "window_recall": "recall of a window",
    "sink_4": "sink mass",
    "distance": "distance",
    "vertical_mass": "vertical mass",
}


def head_cells(heads: Sequence[dict[str, Any]], kinds: Sequence[dict[str, Any]]) -> list[object]:
    """Theta, density, held-out recall and diagnostics: of one head, or means."""
    thetas = [h["theta"] for h in heads]
    numbers = [t for t in thetas if isinstance(t, float)]
    theta = f"{fmean(numbers):.1f}" if numbers else str(thetas[0])
    cells: list[object] = [theta]
    cells += [f"{fmean(h[key] for h in heads):.3f}" for key in ("fitted_density", "held_out_recall")]
    for metric in METRICS:
        value = fmean(k[metric] for k in kinds)
        cells.append(f"{value:,.0f}" if value > 10 else f"{value:.3f}" if metric == "oracle" else f"{value:.2f}")
    return cells


def made(out: Path, report: dict[str, Any]) -> str:
    """Cost of each step, versions and machine."""
    costs = json.loads((out / "seconds.json").read_text())
    steps = ", ".join(f"{name} {x['cpu'] / 60:.1f}" for name, x in costs.items())
    cpu, wall = (sum(x[key] for x in costs.values()) / 60 for key in ("cpu", "wall"))
    e = report["environment"]
    return (
        f"Minutes of processor time: {steps}; {cpu:.0f} in all. By the clock {wall:.0f} minutes, on {e['cpus']} CPU"
        f" cores (python {e['python']}, torch {e['torch']}, transformers {e['transformers']})."
    )


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    at = q * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def rewrite(document: Path, blocks: dict[str, str]) -> None:
    """Put each block between its marks."""
    text = document.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, found, rest = text.partition(begin)
        if not found or end not in rest:
            sys.exit(f"{document} lacks the marks of {name}")
        text = head + begin + block + "\n" + end + rest.partition(end)[2]
    document.write_text(text, encoding="utf-8")


def show(event: anchorscope.Progress) -> None:
    """One line that is written over, on a terminal."""
    if sys.stderr.isatty():
        share = event.work / max(event.total, 1)
        print(f"\r{event.stage:<8} {share:4.0%}  {event.detail:<40.40}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python samples/study.py OUT")
    main(Path(sys.argv[1]))
