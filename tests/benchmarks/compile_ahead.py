"""Compiles every kernel for GPUs that are not here, with the committed launch configurations: bf16, one grid, without
window, soft-cap and exact margins.

`python tests/benchmarks/compile_ahead.py [OP-ARCH-DIM ...]` (all without arguments) exits 1 when a tile does not fit
the target's shared memory or a kernel spills more than spills.json allows: bytes of stack per thread (CUDA) or spilled
registers (AMD), for the Triton named there; the budget may shrink, not grow. `--budget` prints a new one. DIM is 0 for
kernels that have none. As many processes as processors.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anchorscope.kernels import (
    anchor,
    anchor_hopper,
    column_mass,
    common,
    dense_lse,
    diagonals,
    hopper,
    identify,
    identify_hopper,
    late_mass,
    margins,
    sparse,
    sweep,
)

TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), 166912),
    "sm89": (GPUTarget("cuda", 89, 32), 101376),
    "sm90": (GPUTarget("cuda", 90, 32), 232448),
    "sm100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
DIMS = (64, 128, 256)
BUDGET = Path(__file__).with_name("spills.json")
PLAIN = {"WINDOW": False, "SOFTCAP": False, "PRECISION": "ieee"}
POINTERS = {
    "Lse": "*fp32", "RowMax": "*fp32", "ABar": "*fp32", "Theta": "*fp32", "Mass": "*fp32", "Margin": "*fp32",
    "Entropy": "*fp32", "Late": "*fp32", "Between": "*fp32", "Sums": "*fp32", "Blocks": "*fp32",
    "QSum": "*fp32", "Need": "*fp32", "ASum": "*fp32", "Bits": "*i16", "Columns": "*i32", "Offsets": "*i64",
}  # fmt: skip
# op of the launch table -> kernel, further constants; None stands for a tile size of the table
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "anchor": (anchor.anchor_kernel, {"BLOCK": 64, "HAS_V": True, "SPLIT": False, "POOL": True, **PLAIN}),
    "anchor_precise": (anchor.anchor_kernel, {"BLOCK": 64, "HAS_V": True, "SPLIT": True, "POOL": True, **PLAIN}),
    "sparse": (sparse.sparse_kernel, PLAIN),
    "identify": (identify.score_kernel, {"RC": 4, "SP": 16, "SUB": False, **PLAIN}),
    "margins": (
        margins.margin_kernel,
        {"RC": 2, "SP": 16, "SUB": False, "WINDOW": False, "SOFTCAP": False, "EXACT": False, "SHIFT": 8},
    ),
    "dense_lse": (dense_lse.dense_kernel, {"HAS_V": False, "SPLIT": False, "ENTROPY": False, **PLAIN}),
    "dense_precise": (dense_lse.dense_kernel, {"HAS_V": True, "SPLIT": True, "ENTROPY": True, **PLAIN}),
    "column_mass": (column_mass.mass_kernel, PLAIN),
    "late_mass": (late_mass.late_kernel, PLAIN),
    "diagonals": (diagonals.diagonal_kernel, PLAIN),
    "sweep": (sweep.sweep_kernel, {"HAS_V": True, "SPLIT": True, **PLAIN}),
}
# ops that take the launch configurations of another
SHARED_TABLE = {"late_mass": "column_mass"}
HOPPER = ("anchor_hopper", "identify_hopper", "sparse_hopper")
# kernels without an entry in the launch table: configuration, architectures, head dimensions
ANY = tuple(TARGETS)
SHARES = {"WINDOW": False, "SHARE": identify.SHARE}
FIXED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...], tuple[int, ...]]] = {
    "pool": (anchor.pool_kernel, {"BM": 32}, ANY, DIMS),
    "count": (identify.count_kernel, {**SHARES, **identify.COUNTING}, ANY, (0,)),
    "scan": (identify.scan_kernel, identify.SCANNING, ANY, (0,)),
    "list": (identify.list_kernel, {**SHARES, **identify.LISTING}, ANY, (0,)),
    "fold": (anchor_hopper.fold_kernel, anchor_hopper.FOLDING, ("sm90",), DIMS),
    "need": (identify_hopper.need_kernel, {"RC": 4, "ROWS": identify_hopper.ROWS, "num_warps": 4}, ("sm90",), (0,)),
}


def signature(kernel: Any, constants: dict[str, Any], own: dict[str, str]) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a kernel's arguments: bf16 tensors with aligned strides."""
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or re.fullmatch("s[qkvo]d", name):
            types[name] = "constexpr"
            values[(i,)] = constants.get(name, 1)
            continue
        types[name] = own.get(name) or POINTERS.get(name) or ("*bf16" if name[0].isupper() else "i32")
        if name.startswith(("scale", "cap")) and name != "capacity":
            types[name] = "fp32"
        if types[name].startswith("*") or re.fullmatch("s[qkvo][bhn]", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, values, attributes


def build(op: str, arch: str, dim: int) -> tuple[int, int]:
    """Compile one specialisation; its bytes of shared memory, and of stack (or spilled registers)."""
    target, _ = TARGETS[arch]
    table = SHARED_TABLE.get(op, op)
    config = dict(FIXED[op][1]) if op in FIXED else common.launch_for(table, arch, 2, dim)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages") if name in config}
    own: dict[str, str] = {}
    if op in HOPPER:
        from triton.experimental.gluon._runtime import GluonASTSource

        from anchorscope.kernels import sparse_hopper

        kernel = {
            "anchor_hopper": anchor_hopper.anchor_hopper_kernel,
            "identify_hopper": identify_hopper.score_hopper_kernel,
            "sparse_hopper": sparse_hopper.sparse_hopper_kernel,
        }[op]
        options = {"num_warps": 4, "maxnreg": config.pop("MAXNREG")}
        boxes = {"q_desc": (64, dim), "out_desc": (64, dim), "k_desc": (64, 64), "v_desc": (64, 64)}
        if "PINGPONG" in config:
            config["PINGPONG"] = bool(config["PINGPONG"])
        if op == "identify_hopper":
            config |= {"TG": 2, "RC": 4, "SP": 16}
            boxes = {"q_desc": (32, 64), "k_desc": (64, dim)}
        constants = {"D": dim, **config}
        for name, box in boxes.items():
            layout = hopper.shared_layout(*box, torch.bfloat16)
            own[name] = f"tensordesc<bf16[{box[0]}, {box[1]}],{layout!r}>"
        source: Any = GluonASTSource(kernel, *signature(kernel, constants, own))
    elif op in FIXED:
        kernel = FIXED[op][0]
        words = dict.fromkeys(("Bits", "Before", "Counts"), "*i32")
        source = ASTSource(kernel, *signature(kernel, {"DIM": dim, "D": dim, **config}, words))
    else:
        kernel, extra = KERNELS[op]
        rows = config.pop("ROWS", None)
        constants = {"DIM": dim, "D": dim, **config, **extra}
        if rows is not None:
            constants["TG"] = rows // (extra["RC"] * extra["SP"])
        if op in ("anchor_precise", "dense_lse", "dense_precise"):
            own["Out"] = "*fp32"
        if op == "diagonals":
            constants |= {"SUB": min(constants["T"], diagonals.BLOCK), "LINES": diagonals.LINES}
        if op == "sweep":
            own = dict.fromkeys(("OutA", "LseA", "OutD", "Sums"), "*fp32") | {"Bins": "*i32"}
        source = ASTSource(kernel, *signature(kernel, constants, own))
    done = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        found = re.search(r"\.vgpr_spill_count:\s*(\d+)", done.asm["amdgcn"])
        assert found is not None, "no spill count in the assembly"
        return done.metadata.shared, int(found[1])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found is not None, f"no stack size in {usage.stdout!r}"
    return done.metadata.shared, int(found[1])


ALL = [
    *((op, arch, dim) for op in KERNELS for arch in TARGETS for dim in DIMS),
    *((op, "sm90", dim) for op in HOPPER for dim in DIMS),
    *((op, arch, dim) for op, (_name, _config, archs, dims) in FIXED.items() for arch in archs for dim in dims),
]


def main(arguments: list[str]) -> int:
    """Entry point; see the module."""
    budget = json.loads(BUDGET.read_text())
    known = {"-".join(map(str, case)): case for case in ALL}
    wanted = [a for a in arguments if a != "--budget"]
    if unknown := [a for a in wanted if a not in known]:
        print(f"no such kernel, architecture and head dimension: {', '.join(unknown)}", file=sys.stderr)
        return 2
    cases = [known[a] for a in wanted] or ALL
    spills: dict[str, int] = {}
    failures = 0
    # Processes of their own: Triton's compiler is not made for threads, and must not be forked once it is loaded.
    with ProcessPoolExecutor(min(len(cases), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for (op, arch, dim), (shared, spilled) in zip(cases, pool.map(build, *zip(*cases, strict=True)), strict=True):
            name = f"{op}-{arch}-{dim}"
            if spilled:
                spills[name] = spilled
            problems = [f"shared memory {shared} > {TARGETS[arch][1]}"] if shared > TARGETS[arch][1] else []
            allowed = budget["spills"].get(name, 0)
            if budget["triton"] == triton.__version__ and spilled > allowed and "--budget" not in arguments:
                problems.append(f"spills {spilled} > {allowed}")
            failures += bool(problems)
            print(name, f"shared {shared}, spills {spilled}", *problems, flush=True)
    if "--budget" in arguments:
        print(json.dumps({"triton": triton.__version__, "spills": spills}, indent=2))
    print(f"compiled {len(cases)}, failed {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
