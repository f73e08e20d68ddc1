"""`run_bench`: dense and sparse attention timed on the same inputs, with what the sparse selection kept.

For every input and length: dense back ends are tried, the sparse pipeline is checked against exact dense attention at
theta = +inf, everything is warmed up and timed with interleaved repetitions, and the outputs of what was timed are
measured. A speed-up is given only where the check passed, next to its recall and density.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorscope.bench import measures, timing
from anchorscope.bench.backends import SparseBackend, resolve_backend
from anchorscope.bench.dense import NAMES, Absent, default_names, dense_backends
from anchorscope.bench.environment import hardware
from anchorscope.bench.timing import Timing
from anchorscope.devices import BACKENDS, is_out_of_memory, resolve_device
from anchorscope.dumps import Dump, Entry, open_dump
from anchorscope.errors import InputError, RunFailure
from anchorscope.params import AnchorParams
from anchorscope.planted import Plant, planted
from anchorscope.ranges import check_float32_sums
from anchorscope.runs.environment import versions

FORMAT = "anchorscope-bench"
FORMAT_VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STAGES = ("anchor", "identification", "sparse")
PLANTED_THETA, DUMP_THETA = 6.0, 12.0
LENGTHS = {"cuda": (16384, 32768, 65536, 131072), "cpu": (2048, 4096, 8192)}
SHAPE = {"cuda": (32, 8, 128), "cpu": (4, 1, 64)}  # query heads, kv heads, head dimension
REPEATS = {"cuda": (20, 20_000.0), "cpu": (7, 4_000.0)}  # at most, and milliseconds per length
WARM_UP = {"cuda": 2, "cpu": 0}  # calls after the first

# Output error (relative, per head) that rounding explains. At theta = +inf the pipeline may err as much, or
# twice as much as dense; a dense back end that errs over `_DENSE_LIMIT` times as much is another function.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2e-5}
_DENSE_LIMIT = 5.0


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
        dense: names of dense back ends (`dense.NAMES`).
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
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if self.dense is not None:
            for name in self.dense or ("",):
                if name not in NAMES:
                    raise InputError(f"dense back ends must be among {', '.join(NAMES)}, not {name!r}")
        if self.repeats is not None and self.repeats < 1:
            raise InputError(f"repeats must be at least 1, not {self.repeats}")


@dataclass(frozen=True)
class Case:
    """One input to time: how to make its tensors, and what attention they need."""

    source: str
    n: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    make: Callable[[], tuple[Tensor, Tensor, Tensor]] = field(repr=False)

    @property
    def attention(self) -> dict[str, Any]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


@dataclass(frozen=True)
class DenseRow:
    """A dense back end: times, rate over causal pairs, peak memory, output error against exact attention."""

    name: str
    kv_repeated: bool
    timing: Timing
    tflops: float
    peak_memory_bytes: int | None
    output_error: float


@dataclass(frozen=True)
class Check:
    """The pipeline at theta = +inf against exact dense attention; no speed-up unless it passed."""

    passed: bool
    output_error: float
    limit: float
    recall: float
    pairs_equal: bool
    reason: str | None


@dataclass(frozen=True)
class SparseRow:
    """The pipeline at one theta; all figures from the same inputs and selection. See docs/bench.md."""

    theta: float
    whole: Timing
    stages: dict[str, Timing]
    tflops: float
    stage_tflops: dict[str, float]
    recall: float
    recall_worst_head: float
    density: float
    stripe_density: float | None
    kept_pairs: int
    output_error: float
    output_error_worst_head: float
    speedup: float | None
    efficiency: float | None
    peak_memory_bytes: int | None
    extra_memory_bytes: int | None
    state_bytes: int
    stripes_bytes: int


@dataclass(frozen=True)
class Row:
    """All that was measured on one input."""

    source: str
    n: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    visible_pairs: int
    input_bytes: int
    dense: tuple[DenseRow, ...]
    absent: tuple[Absent, ...]
    baseline: str | None
    check: Check
    sparse: tuple[SparseRow, ...]


@dataclass(frozen=True)
class BenchResult:
    """A whole bench; `to_json` gives the documented file."""

    created: str
    command: str | None
    settings: dict[str, Any]
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every check against dense passed."""
        return all(row.check.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The content of bench.json: finite numbers, infinite thetas as the strings "inf" and "-inf"."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(asdict(self))}


def plain(value: Any) -> Any:
    """Tuples to lists, infinities to strings, NaN to null: what strict JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


Progress = Callable[[float, str], None]


def run_bench(
    config: BenchConfig,
    dump: str | Path | None = None,
    *,
    progress: Progress = lambda share, text: None,
    command: str | None = None,
) -> BenchResult:
    """Time sparse against dense attention.

    Args:
        config: what to time.
        dump: a dump folder to take inputs from; planted input without.
        progress: called with (share done from 0 to 1, what is being done).
        command: the command line, recorded in the result.

    Raises:
        InputError: settings that do not fit each other or the dump; DumpError for the dump itself.
        MissingBackendError: CUDA or Triton was asked for and is absent.
        RunFailure: out of memory.
    """
    device = resolve_device(config.device)
    backend = resolve_backend(config.backend, device)
    thetas = config.thetas or ((PLANTED_THETA,) if dump is None else (DUMP_THETA,))
    if dump is None:
        dtype_name = config.dtype or ("bf16" if device.type == "cuda" else "fp32")
        cases = _planted_cases(config, device, DTYPES[dtype_name])
    else:
        opened = open_dump(dump)
        dtype_name = config.dtype or _dump_dtype(opened, device)
        cases = _dump_cases(config, opened, device, DTYPES[dtype_name])

    total = sum(case.n**2 for case in cases)
    rows: list[Row] = []
    done = 0.0
    for case in cases:
        share = case.n**2 / total

        def report(part: float, text: str, case: Case = case, done: float = done, share: float = share) -> None:
            progress(done + part * share, f"{case.n:,}: {text}")

        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                rows.append(_time_case(case, config, tuple(thetas), backend, device, report))
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                finished = max((row.n for row in rows), default=None)
                fits = f"; N = {finished:,} fitted, use --lengths up to that" if finished else ""
                raise RunFailure(
                    f"out of memory on {device} at N = {case.n:,} with {case.heads} heads of {case.head_dim}"
                    f"{fits} (or fewer heads, or a shorter --lengths)"
                ) from None
            raise
        done += share
    progress(1.0, "done")
    return BenchResult(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        settings={
            "input": "planted" if dump is None else "dump",
            "dump_sha256": None if dump is None else opened.identity,
            "dtype": dtype_name,
            "device": device.type,
            "backend": backend.name,
            "thetas": list(thetas),
            "block": config.params.block,
            "step": config.params.step,
            "init": config.params.init_tokens,
            "lookback": config.params.lookback_tokens,
            "seed": (config.seed or 0) if dump is None else None,
            "period": (config.period or config.params.group) if dump is None else None,
            "repeats": config.repeats,
        },
        versions=versions(),
        hardware=hardware(device),
        rows=tuple(rows),
    )


def _planted_cases(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    if config.layers is not None:
        raise InputError("layers can only be chosen from a dump; planted input has none")
    shape = zip((config.heads, config.kv_heads, config.head_dim), SHAPE[device.type], strict=True)
    heads, kv_heads, head_dim = (default if given is None else given for given, default in shape)
    if config.heads is not None and config.kv_heads is None:
        kv_heads = math.gcd(kv_heads, heads)
    for name, value in (("heads", heads), ("kv heads", kv_heads)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if heads % kv_heads:
        raise InputError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    if head_dim < 17:
        raise InputError(f"planted input needs a head dimension of at least 17, not {head_dim}")
    period = config.params.group if config.period is None else config.period
    if period < 1:
        raise InputError(f"period must be at least 1, not {period}")

    def make(n: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        plant = Plant(n, heads, kv_heads, head_dim, config.seed or 0, period)
        return lambda: planted(plant, device=device, dtype=dtype)

    return [
        Case("planted", n, heads, kv_heads, head_dim, head_dim**-0.5, None, None, make(n))
        for n in config.lengths or LENGTHS[device.type]
    ]


def _dump_dtype(dump: Dump, device: torch.device) -> str:
    if device.type == "cpu":
        return "fp32"
    stored = {entry.dtype for entry in dump.entries}
    return "fp16" if stored == {"fp16"} else "bf16"


def _dump_cases(config: BenchConfig, dump: Dump, device: torch.device, dtype: torch.dtype) -> list[Case]:
    for name in ("heads", "kv_heads", "head_dim", "period", "seed"):
        if getattr(config, name) is not None:
            raise InputError(f"{name.replace('_', ' ')} belongs to planted input; a dump brings its own tensors")
    entries = [e for e in dump.entries if config.layers is None or e.layer in config.layers]
    known = sorted({e.layer for e in dump.entries})
    if missing := sorted(set(config.layers or ()) - set(known)):
        raise InputError(f"{dump.path} has no layer {missing[0]}; it has {', '.join(map(str, known))}")
    if not entries:
        raise InputError(f"{dump.path} holds no layers to time")
    if bare := [e for e in entries if not e.has_values]:
        raise InputError(
            f"{dump.path} holds no values for layer {bare[0].layer}, and attention needs V;"
            " capture it without --no-values"
        )
    cases = []
    for entry in entries:
        for n in config.lengths or (entry.tokens,):
            if n > entry.tokens:
                raise InputError(
                    f"length {n} is more than the {entry.tokens} tokens of prompt {entry.prompt} in {dump.path}"
                )
            cases.append(_dump_case(dump, entry, n, device, dtype))
    return cases


def _dump_case(dump: Dump, entry: Entry, n: int, device: torch.device, dtype: torch.dtype) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor]:
        layer = dump.load(entry)
        assert layer.v is not None  # checked before anything is timed
        check_float32_sums(
            layer.q, layer.k, layer.v, entry.scale, entry.softcap, dtype, f"{entry.prompt}, layer {entry.layer}"
        )
        q, k, v = (x[None, :, :n].to(device, dtype).contiguous() for x in (layer.q, layer.k, layer.v))
        return q, k, v

    return Case(
        f"{entry.prompt}/layer {entry.layer}",
        n,
        len(entry.query_heads),
        len(entry.kv_heads),
        entry.head_dim,
        entry.scale,
        entry.window,
        entry.softcap,
        make,
    )


def _time_case(
    case: Case,
    config: BenchConfig,
    thetas: tuple[float, ...],
    backend: SparseBackend,
    device: torch.device,
    report: Callable[[float, str], None],
) -> Row:
    params, kind = config.params, device.type
    report(0.0, "input")
    q, k, v = case.make()
    place: dict[str, Any] = {
        "block": params.block,
        "step": params.step,
        "init": params.init_tokens,
        "lookback": params.lookback_tokens,
        **case.attention,
    }
    report(0.02, "exact attention")
    exact, lse_all = measures.exact_dense(q, k, v, **case.attention)

    report(0.15, "dense back ends")
    plain_attention = case.window is None and case.softcap is None
    names = config.dense or default_names(device, plain_attention)
    present, absent = dense_backends(names, q, k, v, **case.attention)
    errors: dict[str, float] = {}
    for dense in list(present):
        errors[dense.name] = measures.output_error(dense.run(), exact)[1]
        if not errors[dense.name] <= _DENSE_LIMIT * _ROUNDING[q.dtype]:
            present.remove(dense)
            absent.append(Absent(dense.name, f"wrong here: output error {errors[dense.name]:.3g}"))

    report(0.25, "check at inf")
    # Before anything else runs the sparse kernels: this call pays for compiling them.
    first_whole, _ = timing.first_call(_bind(backend.whole, q, k, v, theta=thetas[0], **place), device)
    allowed = 2 * min((errors[dense.name] for dense in present), default=0.0)
    check = _check(backend, q, k, v, exact, lse_all, max(allowed, _ROUNDING[q.dtype]), case, params, place)

    runs: dict[str, Callable[[], Any]] = {f"dense {dense.name}": dense.run for dense in present}
    first = {f"dense {dense.name}": dense.first_ms for dense in present}
    first["anchor"], state = timing.first_call(lambda: backend.anchor(q, k, v, **place), device)
    runs["anchor"] = lambda: backend.anchor(q, k, v, **place)
    # In place, every repetition adds the stripes to the scratch state again: wrong values, the right work.
    in_place = {"inplace": True} if backend.in_place else {}
    scratch = state._replace(out=state.out.clone(), lse=state.lse.clone()) if in_place else state
    stripes = []
    for i, theta in enumerate(thetas):
        identify = _bind(backend.identify, state, k, theta=theta, queries=case.n, **place)
        first[f"identification {i}"], found = timing.first_call(identify, device)
        sparse = _bind(backend.sparse, q, k, v, scratch, found, **place, **in_place)
        first[f"sparse {i}"], _ = timing.first_call(sparse, device)
        whole = _bind(backend.whole, q, k, v, theta=theta, **place)
        first[f"whole {i}"] = timing.first_call(whole, device)[0] if i else first_whole
        runs |= {f"identification {i}": identify, f"sparse {i}": sparse, f"whole {i}": whole}
        stripes.append(found)

    # Whole pipelines right behind the dense kernels: the GPU is busy while the host queues them. Identification alone
    # reads its total back, so whatever follows it in a round would wait for the host.
    runs = dict(sorted(runs.items(), key=lambda item: not item[0].startswith(("dense", "whole"))))
    report(0.4, "warm-up, memory")
    memory = {name: timing.peak_memory(run, device) for name, run in runs.items()}
    round_ms = 0.0
    for name, run in runs.items():
        for _ in range(WARM_UP[kind]):
            run()
        round_ms += timing.first_call(run, device)[0] if WARM_UP[kind] else first[name]
    most, budget = REPEATS[kind]
    repeats = timing.repetitions(round_ms, config.repeats, most=most, budget_ms=budget)
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        report(0.5 + 0.4 * count / repeats, f"timing {count}/{repeats}")

    times = timing.interleaved(runs, first, repeats, device, tick)

    report(0.92, "recall, error")
    pairs = measures.count_pairs(case.n, params, stripes[0], case.window)
    rate = 4e-9 * case.head_dim  # TFLOP/s = rate * pairs / ms: two products of 2 d flops each per pair
    dense_rows = tuple(
        DenseRow(
            dense.name,
            dense.kv_repeated,
            times[f"dense {dense.name}"],
            rate * pairs.visible / times[f"dense {dense.name}"].median_ms,
            memory[f"dense {dense.name}"],
            errors[dense.name],
        )
        for dense in present
    )
    fastest = min(dense_rows, key=lambda row: row.timing.median_ms, default=None)
    sparse_rows = []
    for i, theta in enumerate(thetas):
        out, lse = runs[f"whole {i}"]()[:2]
        staged, _ = backend.sparse(q, k, v, state, stripes[i], **place)
        if check.passed and not (gap := measures.output_error(out, staged.float())[1]) <= _ROUNDING[q.dtype]:
            # Density comes from the stages, time and error from the whole: they must be the same computation.
            reason = f"the stages and the whole pipeline differ by {gap:.3g} at theta {theta:g}"
            check = replace(check, passed=False, reason=reason)
        kept = measures.count_pairs(case.n, params, stripes[i], case.window)
        stages = {
            "anchor": times["anchor"],
            "identification": times[f"identification {i}"],
            "sparse": times[f"sparse {i}"],
        }
        whole_time, peak = times[f"whole {i}"], memory[f"whole {i}"]
        speedup = None if fastest is None else fastest.timing.median_ms / whole_time.median_ms
        error, worst_error = measures.output_error(out, exact)
        mean_recall, worst_recall = measures.recall(lse, lse_all)
        sparse_rows.append(
            SparseRow(
                theta=theta,
                whole=whole_time,
                stages=stages,
                tflops=rate * kept.kept / whole_time.median_ms,
                stage_tflops={
                    "anchor": rate * kept.anchor / stages["anchor"].median_ms,
                    # One product, and one pooled query for `block` queries.
                    "identification": rate * kept.candidates / (2 * params.block) / stages["identification"].median_ms,
                    "sparse": rate * kept.stripes / stages["sparse"].median_ms,
                },
                recall=mean_recall,
                recall_worst_head=worst_recall,
                density=kept.density,
                stripe_density=kept.stripe_density,
                kept_pairs=kept.kept,
                output_error=error,
                output_error_worst_head=worst_error,
                speedup=speedup,
                efficiency=None if speedup is None else speedup * kept.density,
                peak_memory_bytes=peak,
                extra_memory_bytes=None if peak is None else max(peak - _bytes(out), 0),
                state_bytes=_bytes(*state),
                stripes_bytes=_bytes(*stripes[i]),
            )
        )
    if not check.passed:
        sparse_rows = [replace(row, speedup=None, efficiency=None) for row in sparse_rows]
    return Row(
        source=case.source,
        n=case.n,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        **case.attention,
        visible_pairs=pairs.visible,
        input_bytes=_bytes(q, k, v),
        dense=dense_rows,
        absent=tuple(absent),
        baseline=None if fastest is None else fastest.name,
        check=check,
        sparse=tuple(sparse_rows),
    )


def _bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _check(
    backend: SparseBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    lse_all: Tensor,
    limit: float,
    case: Case,
    params: AnchorParams,
    place: dict[str, Any],
) -> Check:
    """theta = +inf must be dense causal attention: same output, all the mass, every pair exactly once."""
    out, lse = backend.whole(q, k, v, theta=math.inf, **place)[:2]
    error = measures.output_error(out, exact)[1]
    mass = measures.recall(lse, lse_all)
    gap = float((lse.float() - lse_all).abs().max())
    state = backend.anchor(q, k, v, **place)
    found = backend.identify(state, k, theta=math.inf, queries=case.n, **place)
    kept = measures.count_pairs(case.n, params, found, case.window)
    equal = kept.kept == kept.visible
    reason = None
    if not error <= limit:
        reason = f"output error {error:.3g} against exact dense attention, at most {limit:.3g} is rounding"
    elif not gap <= 1e-3 + 1e-5 * float(lse_all.abs().max()):
        reason = f"log-sum-exp off by {gap:.3g} nats: some keys are missing or counted twice"
    elif not equal:
        reason = f"{kept.kept:,} pairs kept at theta = inf, {kept.visible:,} are visible"
    return Check(reason is None, error, limit, mass[0], equal, reason)
