"""`analyze` on one device and on several, from a planted dump: seconds, and whether every byte is the same.

    python tests/benchmarks/devices.py --layers 8 --device all --out devices.json     # on a host with several GPUs
    python tests/benchmarks/devices.py --tokens 2048 --device cpu,cpu                 # the script itself, on a CPU

One device and several take turns, each as a program of its own (start of Python, reading the dump and its checksums,
and the tables included) and into a folder of its own; the first turn of each warms the caches and is not counted.
Only `started` may differ between two folders: it is the time of day. Between the two numbers of devices the table of
the kernels, the input and everything else is the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from anchorscope import write_dump
from anchorscope.files import human_bytes
from anchorscope.planted import planted
from anchorscope.runs.environment import hardware_name, versions

STARTED = ("report.json", "heads.json", "analysis.json", "run.json")


def make_dump(folder: Path, args: argparse.Namespace) -> None:
    """Planted Q, K and V in bfloat16, another seed in each layer."""
    where = "cuda" if torch.cuda.is_available() else "cpu"

    def entries() -> Any:
        for layer in range(args.layers):
            q, k, v = planted(args.tokens, args.heads, args.kv_heads, args.dim, seed=layer, device=where)
            yield {"prompt": "planted", "layer": layer, "q": q[0], "k": k[0], "v": v[0], "scale": args.dim**-0.5}

    write_dump(folder, entries())


def command(dump: Path, out: Path, devices: str, diagnose: bool, args: argparse.Namespace) -> list[str]:
    """The program that is timed; several processes on a CPU have no option, so their executor is given."""
    how, before = f"device={devices!r}", ""
    if devices.startswith("cpu,"):
        before = "import torch; from anchorscope.runs.pool import Devices; "
        how = f"device='cpu', executor=Devices([torch.device('cpu')] * {devices.count(',') + 1})"
    elif "," in devices or devices == "all":
        how = f"devices={devices!r}"
    rest = f"thetas={tuple(args.theta)}, diagnose={diagnose}, figures={args.figures}, {how}"
    return [
        sys.executable,
        "-c",
        f"{before}from anchorscope import analyze; analyze({str(dump)!r}, {str(out)!r}, {rest})",
    ]


def timed(words: list[str]) -> float:
    """Seconds of a command, which must succeed."""
    begin = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def different(one: Path, other: Path) -> list[str]:
    """Files that differ, but for the time of day at which a run started."""

    def files(folder: Path) -> dict[str, Path]:
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    a, b = files(one), files(other)
    found = sorted(a.keys() ^ b.keys())
    for name in sorted(a.keys() & b.keys()):
        x, y = a[name].read_bytes(), b[name].read_bytes()
        if a[name].name in STARTED:
            x, y = (json.dumps({**json.loads(z), "started": ""}).encode() for z in (x, y))
        if x != y:
            found.append(name)
    return found


def measure(dump: Path, folder: Path, diagnose: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Both numbers of devices in turns."""
    one = args.device.split(",")[0] if "," in args.device else "cuda:0"
    choices = {"one": one, "several": args.device}
    times: dict[str, list[float]] = {name: [] for name in choices}
    differ: list[str] = []
    for turn in range(args.turns + 1):
        for name, devices in choices.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            words = command(dump, folder / name, devices, diagnose, args)
            seconds = timed(words)
            if turn or not args.turns:
                times[name].append(round(seconds, 3))
        differ += different(folder / "one", folder / "several")
    best = {name: min(found) for name, found in times.items()}
    return {
        "diagnose": diagnose,
        "seconds": times,
        "speed_up": round(best["one"] / best["several"], 3),
        "files": sum(1 for p in (folder / "one").rglob("*") if p.is_file()),
        "different": sorted(set(differ)),
        "program": command(Path("DUMP"), Path("OUT"), args.device, diagnose, args)[-1],
    }


def main() -> None:
    """Make the dump, measure with and without diagnostics, print JSON; fail if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--theta", type=float, nargs="+", default=[6.0, 12.0])
    parser.add_argument("--device", default="all", help="all, cuda:0,cuda:1, or cpu,cpu")
    parser.add_argument("--turns", type=int, default=1, help="counted turns, after one that is not")
    parser.add_argument("--figures", action="store_true", help="draw figures too")
    parser.add_argument("--diagnose", choices=("off", "on", "both"), default="both")
    parser.add_argument("--folder", type=Path, help="where dump and results go; removed at the end")
    parser.add_argument("--out", type=Path, help="file for the JSON, besides standard output")
    args = parser.parse_args()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        begin = time.perf_counter()
        make_dump(folder / "dump", args)
        size = sum(p.stat().st_size for p in (folder / "dump").iterdir())
        result: dict[str, Any] = {
            "what": "analyze, one device against several",
            "input": f"planted, {args.layers} layers x {args.heads}/{args.kv_heads} heads x {args.tokens} tokens, bf16",
            "dump": {"bytes": size, "words": human_bytes(size), "seconds": round(time.perf_counter() - begin, 3)},
            "devices": args.device,
            "gpus": gpus or [hardware_name(torch.device("cpu"))],
            "versions": versions(),
            "argv": sys.argv[1:],
            "runs": [],
        }
        for diagnose in {"off": (False,), "on": (True,), "both": (False, True)}[args.diagnose]:
            result["runs"].append(measure(folder / "dump", folder, diagnose, args))
            print(json.dumps(result["runs"][-1]), file=sys.stderr, flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if any(run["different"] for run in result["runs"]):
        sys.exit("the folders differ")


if __name__ == "__main__":
    main()
