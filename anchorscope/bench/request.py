"""What `bench` is asked for, and what that will take: checked before the first case is timed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anchorscope.bench.backends import resolve_backend
from anchorscope.bench.cases import Case, dump_cases, planted_cases
from anchorscope.bench.dense import NAMES
from anchorscope.bench.environment import machine
from anchorscope.bench.measure import Setup
from anchorscope.bench.needs import case_bytes
from anchorscope.bench.rows import plain
from anchorscope.devices import BACKENDS, resolve_device
from anchorscope.dumps import Dump, open_dump
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams
from anchorscope.parse import check_word
from anchorscope.runs.environment import versions
from anchorscope.runs.life import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLANTED_THETA, DUMP_THETA = 6.0, 12.0


@dataclass(frozen=True)
class BenchConfig:
    """What to time. `None` means the default of the device (and of planted input or dump).

    Attributes:
        lengths: tokens; on a dump, its prompts are cut to these.
        thetas: nats.
        params: block, step and anchor region.
        heads, kv_heads, head_dim, period, seed: of the planted input; not allowed with a dump.
        dtype: "bf16", "fp16" or "fp32".
        device: "auto", "cpu", "cuda" or "cuda:i".
        backend: "auto", "torch" or "triton".
        dense: names of dense back ends (`anchorscope.bench.dense.NAMES`).
        layers: layers of the dump.
        repeats: timed repetitions.
    """

    lengths: tuple[int, ...] | None = None
    thetas: tuple[float, ...] | None = None
    params: AnchorParams = field(default_factory=AnchorParams)
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    period: int | None = None
    seed: int | None = None
    dtype: str | None = None
    device: str = "auto"
    backend: str = "auto"
    dense: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    repeats: int | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise InputError("lengths must be whole numbers of at least 1")
        if self.thetas is not None and (not self.thetas or any(math.isnan(x) for x in self.thetas)):
            raise InputError("theta must be a number of nats (inf and -inf are legal), not NaN")
        if self.thetas is not None and len(set(self.thetas)) < len(self.thetas):
            twice = next(x for x in self.thetas if self.thetas.count(x) > 1)
            raise InputError(f"theta {twice:g} is given twice")
        if self.dtype is not None:
            check_word("--dtype", self.dtype, DTYPES)
        check_word("--backend", self.backend, BACKENDS)
        if self.dense is not None:
            for name in self.dense or ("",):
                check_word("--dense", name, NAMES)
        if self.repeats is not None and self.repeats < 1:
            raise InputError(f"repeats must be at least 1, not {self.repeats}")

    def plan(self, dump: Dump | Path | str | None = None) -> BenchPlan:
        """Check the request and say what it will take.

        Args:
            dump: a dump folder, or an open dump, to take inputs from; planted input without.

        Raises:
            InputError: settings that do not fit each other or the dump.
            DumpError: the dump is missing or damaged.
            MissingBackendError: CUDA or Triton was asked for and is absent.
        """
        device = resolve_device(self.device)
        backend = resolve_backend(self.backend, device)
        source = open_dump(dump) if isinstance(dump, (str, Path)) else dump
        dtype = self.dtype or _default_dtype(source, device)
        if source is None:
            cases = planted_cases(self, device, DTYPES[dtype])
        else:
            cases = dump_cases(self, source, device, DTYPES[dtype])
        thetas = self.thetas or ((PLANTED_THETA,) if source is None else (DUMP_THETA,))
        setup = Setup(self.params, tuple(map(float, thetas)), backend, device, self.dense, self.repeats)
        settings = {
            "input": "planted" if source is None else "dump",
            "dump_sha256": None if source is None else source.identity,
            "model": None if source is None else (source.model or {}).get("name"),
            "dtype": dtype,
            "device": device.type,
            "backend": backend.name,
            "thetas": list(setup.thetas),
            "block": self.params.block,
            "step": self.params.step,
            "init": self.params.init_tokens,
            "lookback": self.params.lookback_tokens,
            "seed": (self.seed or 0) if source is None else None,
            "period": (self.period or self.params.group) if source is None else None,
            "repeats": self.repeats,
        }
        return BenchPlan(
            request=self,
            units=cases,
            identity={
                "settings": plain(settings),
                "dense": None if self.dense is None else list(self.dense),
                "cases": [case.facts for case in cases],
                "hardware": machine(device),
                "versions": versions(),
            },
            settings=settings,
            source=source,
            device=device,
            memory=max(case_bytes(case, setup, DTYPES[dtype]) for case in cases),
            # Parts, bench.json and state, as measured.
            disk=1_300 + sum(1_750 + 700 * len(setup.names(case)) + 2_950 * len(thetas) for case in cases),
            pictures=_picture_bytes(cases, len(thetas)),
            setup=setup,
        )


@dataclass(frozen=True, kw_only=True)
class BenchPlan(Plan[Case]):
    """The plan of a bench; cases are timed one after another, and memory is that of the largest.

    Attributes:
        setup: what all cases share.
    """

    setup: Setup

    @property
    def digest(self) -> str:
        """Names request, machine and versions, so that a part of another bench is never taken for one of this."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def _picture_bytes(cases: Sequence[Case], thetas: int) -> int:
    """What the figures take, as measured: a panel per input that has several lengths, bars otherwise."""
    inputs = len({case.source for case in cases})
    if len(cases) > inputs:
        time = 50_000 + 25_000 * min(inputs, 9) + 3_500 * len(cases)
    else:
        time = 34_000 + 4_500 * min(len(cases), 36)
    return time + (45_000 if thetas > 1 else 0)


def _default_dtype(dump: Dump | None, device: torch.device) -> str:
    """float32 on a CPU; on a GPU what the dump holds, in 16 bits."""
    if device.type == "cpu":
        return "fp32"
    return "fp16" if dump is not None and {entry.dtype for entry in dump.entries} == {"fp16"} else "bf16"
