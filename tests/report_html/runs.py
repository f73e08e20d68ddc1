"""Finished analyses without a model: the files `analyze` would leave, with synthetic profiles."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from synthetic import make_profile

from anchorscope.analysis.tables import CURVES_COLUMNS, HEADS_COLUMNS, HeadLine, curves_rows, heads_rows, summarize
from anchorscope.files import csv_text
from anchorscope.profiles import HeadProfile, profile_filename

IDENTITY = "0" * 64


def make_profiles(
    *,
    prompts: Sequence[str] = ("prose",),
    layers: int = 2,
    heads: int = 3,
    tokens: int = 2048,
    thetas: tuple[float, ...] = (8.0, 4.0, 12.0),
    seed: int = 0,
    values: bool = True,
) -> list[HeadProfile]:
    """Profiles of every prompt, layer and head, in the order of heads.csv."""
    return [
        make_profile(prompt=p, layer=5 * layer, head=h, tokens=tokens, thetas=thetas, seed=seed + i, values=values)
        for i, p in enumerate(prompts)
        for layer in range(layers)
        for h in range(heads)
    ]


def write_run(folder: Path, profiles: Sequence[HeadProfile], *, target: float = 0.95, model: str = "toy") -> Path:
    """An analysis folder as `analyze` writes it."""
    (folder / "profile").mkdir(parents=True)
    prompts = list(dict.fromkeys(p.prompt for p in profiles))
    names = [profile_filename(prompts.index(p.prompt), p.layer, p.head) for p in profiles]
    for name, profile in zip(names, profiles, strict=True):
        profile.save(folder / "profile" / name)
    first = profiles[0]
    thetas = [float(t) for t in first.thetas]
    settings = {
        "theta": ["inf" if t == float("inf") else "-inf" if t == -float("inf") else t for t in thetas],
        "block": first.block,
        "step": first.step,
        "target_recall": target,
        "prompts": prompts,
        "layers": sorted({p.layer for p in profiles}),
        "heads": "all",
    }
    lines = [HeadLine.of(p, target) for p in profiles]
    report = {
        "format": "anchorscope-report",
        "version": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "dump": {"identity": first.dump_identity, "model": {"name": model, "layers": 2}},
        "prompts": [{"name": p, "tokens": first.tokens} for p in prompts],
        "settings": settings,
        "versions": {"anchorscope": "0"},
        "hardware": "CPU",
        "warnings": ["a <b>warning</b> & more"],
        "overall": summarize(lines, thetas),
    }
    state = {"format": "anchorscope-analysis", "version": 1, "profiles": names, "settings": settings}
    state |= {"started": report["started"]}
    (folder / "analysis.json").write_text(json.dumps(state))
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "heads.csv").write_text(csv_text(HEADS_COLUMNS, [r for p in profiles for r in heads_rows(p)]))
    (folder / "curves.csv").write_text(csv_text(CURVES_COLUMNS, [r for p in profiles for r in curves_rows(p)]))
    return folder


def write_methods(folder: Path, profiles: Sequence[HeadProfile], identity: str = IDENTITY) -> Path:
    """A comparison: `rival` follows the anchor curve at half its missed recall, `oracle-x` is perfect."""
    folder.mkdir(exist_ok=True)
    rows = []
    for p in profiles:
        density, recall = p.curve()
        for i in range(0, len(density), max(1, len(density) // 8)):
            better = 1 - (1 - recall[i]) / 2
            rows.append([p.prompt, p.layer, p.head, "rival", "gamma", i, better, 0, 0, density[i], "", 0.1])
            rows.append([p.prompt, p.layer, p.head, "oracle-x", "share", i, 1, 0, 0, density[i] / 2, "", 0.1])
    header = "prompt,layer,head,method,parameter,value,recall,recall_p05,recall_last,density,output_error,identify_cost"
    (folder / "methods.csv").write_text(csv_text(header.split(","), rows))
    methods = [{"label": "rival", "oracle": False}, {"label": "oracle-x", "oracle": True}]
    (folder / "compare.json").write_text(
        json.dumps({"format": "anchorscope-compare", "dump": {"identity": identity}, "settings": {"methods": methods}})
    )
    return folder


def write_diagnostics(folder: Path, profiles: Sequence[HeadProfile]) -> Path:
    """Diagnostics: a class and a number per head."""
    folder.mkdir(exist_ok=True)
    rows = [
        [p.prompt, p.layer, p.head, "streaming" if p.head == 0 else "retrieval", f"{p.head / 10}"] for p in profiles
    ]
    (folder / "diagnostics.csv").write_text(csv_text(("prompt", "layer", "head", "class", "sink_mass"), rows))
    return folder


def heads_csv(folder: Path) -> dict[tuple[str, int, int, str], dict[str, str]]:
    """Rows of heads.csv by (prompt, layer, head, theta)."""
    with open(folder / "heads.csv", newline="") as file:
        return {(r["prompt"], int(r["layer"]), int(r["head"]), r["theta"]): r for r in csv.DictReader(file)}


def renamed(profile: HeadProfile, **changes: object) -> HeadProfile:
    """A copy of a profile with other labels."""
    return dataclasses.replace(profile, **changes)


def unpack(text: str) -> bytes:
    """Bytes that the page holds as text."""
    return zlib.decompress(base64.b64decode(text), -15)


def floats(text: str) -> np.ndarray:
    """Float32 numbers that the page holds as text."""
    return np.frombuffer(unpack(text), np.uint8).reshape(4, -1).T.copy().view(np.float32).ravel()
