"""One case timed: dense and sparse attention on the same tensors, with what the sparse selection kept.

The steps, in this order: exact attention; the dense back ends, tried; the pipeline against exact attention at
theta = +inf; the first call of everything; peak memory, warm-up, interleaved repetitions; and what the timed outputs
are worth. Nothing but the calls themselves happens between the marks of a timing (see `anchorscope.bench.timing`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anchorscope.bench import measures, timing
from anchorscope.bench.backends import SparseBackend
from anchorscope.bench.cases import Case
from anchorscope.bench.dense import Absent, DenseBackend, default_names, dense_backends
from anchorscope.bench.rows import Check, DenseRow, Row, SparseRow
from anchorscope.bench.timing import Timing
from anchorscope.kernels.types import AnchorState, Stripes
from anchorscope.params import AnchorParams

STAGES = ("anchor", "identification", "sparse")
REPEATS = {"cuda": (20, 20_000.0), "cpu": (7, 4_000.0)}  # at most, and milliseconds per length
WARM_UP = {"cuda": 2, "cpu": 0}  # calls after the first

# Output error (relative, per head) that rounding explains. At theta = +inf the pipeline may err as much, or
# twice as much as dense; a dense back end that errs over `_DENSE_LIMIT` times as much is another function.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2e-5}
_DENSE_LIMIT = 5.0

Tell = Callable[[float, str], None]  # the share of a case that is done, and what comes next


@dataclass(frozen=True)
class Setup:
    """What all cases of a bench share.

    Attributes:
        params: block, step and anchor region.
        thetas: nats.
        backend: the sparse stages.
        device: where everything runs.
        dense: names of dense back ends; None means those that can do the case.
        repeats: timed repetitions; None means by time.
    """

    params: AnchorParams
    thetas: tuple[float, ...]
    backend: SparseBackend
    device: torch.device
    dense: tuple[str, ...] | None = None
    repeats: int | None = None

    def names(self, case: Case) -> tuple[str, ...]:
        """The dense back ends to try on a case."""
        return self.dense or default_names(self.device, case.window is None and case.softcap is None)


@dataclass(frozen=True)
class Subject:
    """A case at work: its tensors, what exact attention makes of them, and the stages on them.

    Attributes:
        case, setup: what is measured, and how.
        q, k, v: (1, H, N, d) and (1, Hkv, N, d), in the dtype that is timed.
        exact: (1, H, N, d) float32, the output of dense causal attention.
        lse: (1, H, N) float32, its log-sum-exp over all visible keys, nats.
    """

    case: Case
    setup: Setup
    q: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor
    lse: Tensor

    @property
    def place(self) -> dict[str, Any]:
        """Groups and attention, as the stages take them."""
        params = self.setup.params
        return {
            "block": params.block,
            "step": params.step,
            "init": params.init_tokens,
            "lookback": params.lookback_tokens,
            **self.case.attention,
        }

    @property
    def rounding(self) -> float:
        """Output error that the dtype explains."""
        return _ROUNDING[self.q.dtype]

    def anchor(self) -> Callable[[], AnchorState]:
        """The anchor stage as a call without arguments."""
        return _bind(self.setup.backend.anchor, self.q, self.k, self.v, **self.place)

    def identify(self, state: AnchorState, theta: float) -> Callable[[], Stripes]:
        """Identification as a call without arguments."""
        return _bind(self.setup.backend.identify, state, self.k, theta=theta, queries=self.case.n, **self.place)

    def sparse(self, state: AnchorState, found: Stripes, **how: Any) -> Callable[[], Any]:
        """The sparse stage as a call without arguments."""
        return _bind(self.setup.backend.sparse, self.q, self.k, self.v, state, found, **self.place, **how)

    def whole(self, theta: float) -> Callable[[], Any]:
        """The whole pipeline as a call without arguments."""
        return _bind(self.setup.backend.whole, self.q, self.k, self.v, theta=theta, **self.place)

    def count(self, found: Stripes) -> measures.Kept:
        """The pairs that a selection keeps."""
        return measures.count_pairs(self.case.n, self.setup.params, found, self.case.window)


@dataclass(frozen=True)
class Baselines:
    """The dense back ends that run and are right, those that are not, and the output error (worst head) of each."""

    present: list[DenseBackend]
    absent: list[Absent]
    errors: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    """Everything that is timed, called once.

    Attributes:
        runs: what is timed, in the order of a round.
        first: milliseconds of the first call of each.
        state: of the anchor stage.
        stripes: the selection at each theta.
    """

    runs: dict[str, Callable[[], Any]]
    first: dict[str, float]
    state: AnchorState
    stripes: tuple[Stripes, ...]


@dataclass(frozen=True)
class Measured:
    """Times, and peak memory in bytes (None where the system does not tell), by name of `Prepared.runs`."""

    times: dict[str, Timing]
    memory: dict[str, int | None]


def time_case(case: Case, setup: Setup, tell: Tell) -> Row:
    """Time one case.

    Args:
        case: the input.
        setup: what all cases share.
        tell: is told of progress.

    Raises:
        InputError: tensors that the kernels cannot sum.
    """
    with torch.cuda.device(setup.device) if setup.device.type == "cuda" else contextlib.nullcontext():
        tell(0.0, "input")
        q, k, v = case.make()
        tell(0.02, "exact attention")
        subject = Subject(case, setup, q, k, v, *measures.exact_dense(q, k, v, **case.attention))
        tell(0.15, "dense back ends")
        baselines = _try_dense(subject)
        tell(0.25, "check at inf")
        # Before anything else runs the sparse kernels: this call pays for compiling them.
        first_whole = timing.first_call(subject.whole(setup.thetas[0]), setup.device)[0]
        allowed = 2 * min((baselines.errors[dense.name] for dense in baselines.present), default=0.0)
        check = _check(subject, max(allowed, subject.rounding))
        prepared = _prepare(subject, baselines.present, first_whole)
        tell(0.4, "warm-up, memory")
        measured = _measure(prepared, setup, tell)
        tell(0.92, "recall, error")
        return _row(subject, baselines, check, prepared, measured)


def _try_dense(subject: Subject) -> Baselines:
    """Run every dense back end once; one that errs by more than rounding explains is no baseline."""
    names = subject.setup.names(subject.case)
    present, absent = dense_backends(names, subject.q, subject.k, subject.v, **subject.case.attention)
    errors: dict[str, float] = {}
    for dense in list(present):
        errors[dense.name] = measures.output_error(dense.run(), subject.exact)[1]
        if not errors[dense.name] <= _DENSE_LIMIT * subject.rounding:
            present.remove(dense)
            absent.append(Absent(dense.name, f"wrong here: output error {errors[dense.name]:.3g}"))
    return Baselines(present, absent, errors)


def _check(subject: Subject, limit: float) -> Check:
    """theta = +inf must be dense causal attention: same output, all the mass, every pair exactly once."""
    out, lse = subject.whole(math.inf)()[:2]
    error = measures.output_error(out, subject.exact)[1]
    mass = measures.recall(lse, subject.lse)
    gap = float((lse.float() - subject.lse).abs().max())
    kept = subject.count(subject.identify(subject.anchor()(), math.inf)())
    equal = kept.kept == kept.visible
    reason = None
    if not error <= limit:
        reason = f"output error {error:.3g} against exact dense attention, at most {limit:.3g} is rounding"
    elif not gap <= 1e-3 + 1e-5 * float(subject.lse.abs().max()):
        reason = f"log-sum-exp off by {gap:.3g} nats: some keys are missing or counted twice"
    elif not equal:
        reason = f"{kept.kept:,} pairs kept at theta = inf, {kept.visible:,} are visible"
    return Check(reason is None, error, limit, mass[0], equal, reason)


def _prepare(subject: Subject, present: list[DenseBackend], first_whole: float) -> Prepared:
    """Call everything that is timed once, and put it into the order of a round."""
    setup, device = subject.setup, subject.setup.device
    runs: dict[str, Callable[[], Any]] = {f"dense {dense.name}": dense.run for dense in present}
    first = {f"dense {dense.name}": dense.first_ms for dense in present}
    runs["anchor"] = subject.anchor()
    first["anchor"], state = timing.first_call(runs["anchor"], device)
    # In place, every repetition adds the stripes to the scratch state again: wrong values, the right work.
    in_place = {"inplace": True} if setup.backend.in_place else {}
    scratch = state._replace(out=state.out.clone(), lse=state.lse.clone()) if in_place else state
    stripes = []
    for i, theta in enumerate(setup.thetas):
        identify = subject.identify(state, theta)
        first[f"identification {i}"], found = timing.first_call(identify, device)
        sparse = subject.sparse(scratch, found, **in_place)
        first[f"sparse {i}"] = timing.first_call(sparse, device)[0]
        whole = subject.whole(theta)
        first[f"whole {i}"] = timing.first_call(whole, device)[0] if i else first_whole
        runs |= {f"identification {i}": identify, f"sparse {i}": sparse, f"whole {i}": whole}
        stripes.append(found)
    # Whole pipelines right behind the dense kernels: the GPU is busy while the host queues them. Identification alone
    # reads its total back, so whatever follows it in a round would wait for the host.
    runs = dict(sorted(runs.items(), key=lambda item: not item[0].startswith(("dense", "whole"))))
    return Prepared(runs, first, state, tuple(stripes))


def _measure(prepared: Prepared, setup: Setup, tell: Tell) -> Measured:
    """Peak memory of everything, warm-up, and the interleaved repetitions."""
    runs, device, kind = prepared.runs, setup.device, setup.device.type
    memory = {name: timing.peak_memory(run, device) for name, run in runs.items()}
    round_ms = 0.0
    for name, run in runs.items():
        for _ in range(WARM_UP[kind]):
            run()
        round_ms += timing.first_call(run, device)[0] if WARM_UP[kind] else prepared.first[name]
    most, budget = REPEATS[kind]
    repeats = timing.repetitions(round_ms, setup.repeats, most=most, budget_ms=budget)
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        tell(0.5 + 0.4 * count / repeats, f"timing {count}/{repeats}")

    return Measured(timing.interleaved(runs, prepared.first, repeats, device, tick), memory)


def _row(subject: Subject, baselines: Baselines, check: Check, prepared: Prepared, measured: Measured) -> Row:
    """The row of the case; no speed-up unless the check passed and the stages are what the whole pipeline does."""
    case, visible = subject.case, subject.count(prepared.stripes[0]).visible
    dense = tuple(
        DenseRow(
            x.name,
            x.kv_repeated,
            measured.times[f"dense {x.name}"],
            _rate(case) * visible / measured.times[f"dense {x.name}"].median_ms,
            measured.memory[f"dense {x.name}"],
            baselines.errors[x.name],
        )
        for x in baselines.present
    )
    fastest = min(dense, key=lambda row: row.timing.median_ms, default=None)
    rows = []
    for i in range(len(subject.setup.thetas)):
        sparse, gap = _sparse_row(subject, prepared, measured, i, fastest)
        if check.passed and not gap <= subject.rounding:
            # Density comes from the stages, time and error from the whole: they must be the same computation.
            reason = f"the stages and the whole pipeline differ by {gap:.3g} at theta {sparse.theta:g}"
            check = replace(check, passed=False, reason=reason)
        rows.append(sparse)
    if not check.passed:
        rows = [replace(row, speedup=None, efficiency=None) for row in rows]
    return Row(
        **case.facts,
        visible_pairs=visible,
        input_bytes=_bytes(subject.q, subject.k, subject.v),
        dense=dense,
        absent=tuple(baselines.absent),
        baseline=None if fastest is None else fastest.name,
        check=check,
        sparse=tuple(rows),
    )


def _sparse_row(
    subject: Subject, prepared: Prepared, measured: Measured, i: int, fastest: DenseRow | None
) -> tuple[SparseRow, float]:
    """The row of theta number `i`, and how far the outputs of the stages and of the whole pipeline are apart."""
    stripes = prepared.stripes[i]
    out, lse = prepared.runs[f"whole {i}"]()[:2]
    staged, _ = subject.sparse(prepared.state, stripes)()
    gap = measures.output_error(out, staged.float())[1]
    kept, rate = subject.count(stripes), _rate(subject.case)
    named = zip(STAGES, ("anchor", f"identification {i}", f"sparse {i}"), strict=True)
    stages = {stage: measured.times[name] for stage, name in named}
    # Identification makes one product, and one pooled query stands for `block` queries.
    work = {
        "anchor": kept.anchor,
        "identification": kept.candidates / (2 * subject.setup.params.block),
        "sparse": kept.stripes,
    }
    whole, peak = measured.times[f"whole {i}"], measured.memory[f"whole {i}"]
    speedup = None if fastest is None else fastest.timing.median_ms / whole.median_ms
    error, worst_error = measures.output_error(out, subject.exact)
    mean_recall, worst_recall = measures.recall(lse, subject.lse)
    row = SparseRow(
        theta=subject.setup.thetas[i],
        whole=whole,
        stages=stages,
        tflops=rate * kept.kept / whole.median_ms,
        stage_tflops={stage: rate * work[stage] / stages[stage].median_ms for stage in STAGES},
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
        state_bytes=_bytes(*prepared.state),
        stripes_bytes=_bytes(*stripes),
    )
    return row, gap


def _rate(case: Case) -> float:
    """TFLOP/s = rate * pairs / ms: two products of 2 d flops each per pair."""
    return 4e-9 * case.head_dim


def _bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
