"""Check a finished analysis against the float64 brute force, head by head: `python verify_analysis.py DUMP OUT
[--every K]`.

Reads heads.csv as a user would, recomputes every per-theta column from N x N float64 masks and weights (about 4 GB at
8,192 tokens) and prints the largest differences as JSON. Kept pairs must be equal, except for columns whose margin
lies within the float32 tolerance of theta, which are counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from brute import Brute

from anchorscope import AnchorParams, load_report, open_dump
from anchorscope.params import visible_pairs

RECALLS = ("recall", "recall_p05", "recall_min", "recall_last")
OTHERS = ("output_error", "output_close_01", "output_close_005")


def main() -> None:
    """Compare and report; exit code 1 on a difference beyond the promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dump", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="check every K-th head only")
    args = parser.parse_args()
    settings = load_report(args.out)["settings"]
    params = AnchorParams(settings["block"], settings["step"], settings["init"], settings["lookback"])
    dump = open_dump(args.dump)
    with (args.out / "heads.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    heads = list(dict.fromkeys((r["prompt"], int(r["layer"]), int(r["head"])) for r in table))[:: args.every]
    worst = dict.fromkeys(RECALLS + OTHERS, 0.0)
    rows = excused = wrong = 0
    started = time.time()
    for prompt, layer, head in heads:
        entry = dump.entry(prompt, layer)
        tensors = dump.load(entry, [head])
        kv = tensors.kv_index(head)
        v = None if tensors.v is None else tensors.v[kv]
        brute = Brute(
            tensors.q[0], tensors.k[kv], v, params, scale=entry.scale, window=entry.window, softcap=entry.softcap
        )
        tolerance = 1e-4 + 1e-6 * float(brute.s.abs().max())
        for row in table:
            if (row["prompt"], int(row["layer"]), int(row["head"])) != (prompt, layer, head):
                continue
            rows += 1
            want, theta = brute.at(float(row["theta"])), float(row["theta"])
            kept = round(float(row["density"]) * visible_pairs(entry.tokens, entry.window))
            if kept != want["kept_pairs"]:
                near = (brute.margin - theta).abs() <= tolerance
                slack = int(near.sum()) * params.group
                excused += bool(abs(kept - want["kept_pairs"]) <= slack)
                wrong += bool(abs(kept - want["kept_pairs"]) > slack)
            for name in worst:
                if row[name]:
                    worst[name] = max(worst[name], abs(float(row[name]) - float(want[name])))
        del brute
    result = {
        "heads": len(heads),
        "rows": rows,
        "kept_pairs_equal": rows - excused - wrong,
        "kept_pairs_within_margin_tolerance": excused,
        "kept_pairs_wrong": wrong,
        "largest_difference": worst,
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    raise SystemExit(int(wrong > 0 or max(worst[n] for n in RECALLS) > 1e-3))


if __name__ == "__main__":
    main()
