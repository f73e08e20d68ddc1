"""The Triton kernels against the float64 specification, on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")

from anchorscope.kernels import reference  # noqa: E402
from anchorscope.kernels.anchor import anchor  # noqa: E402
from anchorscope.kernels.column_mass import column_mass  # noqa: E402
from anchorscope.kernels.dense_lse import dense_lse  # noqa: E402
from anchorscope.kernels.geometry import geometry  # noqa: E402
from anchorscope.kernels.identify import candidates, identify  # noqa: E402
from anchorscope.kernels.margins import margins  # noqa: E402
from anchorscope.kernels.pipeline import Attention, anchor_attention  # noqa: E402
from anchorscope.kernels.sparse import sparse  # noqa: E402
from anchorscope.kernels.sweep import bin_columns, sweep  # noqa: E402

pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU and not INTERPRET else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INF = math.inf
EPS = {F16: 2.0**-10, BF16: 2.0**-7, F32: 2.0**-20}


@dataclass(frozen=True)
class Case:
    """One problem; `theta` in nats. The defaults are small enough for the interpreter."""

    n: int = 150
    keys: int = 0  # 0: n, a whole prompt
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    dim: int = 16
    dtype: torch.dtype = F32
    block: int = 16
    step: int = 2
    init: int | None = None
    lookback: int | None = None
    window: int | None = None
    softcap: float | None = None
    theta: float | None = None  # None: the 0.3 quantile of the margins
    size: float = 1.0
    transposed: bool = False
    scale: float | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Keyword arguments of `anchor` and its siblings."""
        names = ("block", "step", "init", "lookback", "window", "softcap", "scale")
        return {name: getattr(self, name) for name in names}

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q, k, v of the case."""
        gen = torch.Generator().manual_seed(seed)
        keys = self.keys or self.n

        def draw(heads: int, tokens: int, size: float) -> torch.Tensor:
            shape = (self.batch, tokens, heads, self.dim) if self.transposed else (self.batch, heads, tokens, self.dim)
            x = torch.randn(shape, generator=gen).mul(size).to(self.dtype).to(DEVICE)
            return x.transpose(1, 2) if self.transposed else x

        return draw(self.heads, self.n, self.size), draw(self.kv_heads, keys, 2.0), draw(self.kv_heads, keys, 1.0)

    def __str__(self) -> str:
        base = Case()
        parts = [
            f"{f}={str(v).removeprefix('torch.')}"
            for f in self.__dataclass_fields__
            if (v := getattr(self, f)) != getattr(base, f)
        ]
        return ",".join(parts) or "default"


def lengths(group: int, block: int) -> list[int]:
    """The lengths where the geometry changes, and primes between."""
    return [1, block - 1, block, block + 1, group - 1, group, group + 1, 3 * group, 2 * group + block + 1, 97, 131]


SMALL = [
    *[Case(n=n) for n in lengths(32, 16)],
    *[Case(n=n, dtype=F16) for n in (1, 16, 33, 97, 128)],
    *[Case(theta=t) for t in (-INF, INF, 0.0)],
    *[Case(theta=t, dtype=F16, heads=3, kv_heads=1, n=110) for t in (-INF, INF, None)],
    Case(heads=4, kv_heads=2, batch=2, n=70),
    Case(heads=2, kv_heads=2, n=100),
    Case(heads=3, kv_heads=1, step=3, n=160),
    Case(n=70, keys=150),
    Case(n=64, keys=160, dtype=F16),
    Case(n=1, keys=131),
    *[Case(window=w, theta=t) for w in (1, 7, 40, 500) for t in (None, INF)],
    Case(window=60, n=70, keys=150, dtype=F16),
    *[Case(softcap=5.0, theta=t) for t in (None, INF)],
    Case(softcap=5.0, window=60, dtype=F16),
    *[Case(init=i, lookback=b) for i, b in ((0, 0), (1, 0), (0, 5), (37, 50), (500, 3), (3, 500))],
    Case(dim=24, dtype=F16),
    Case(dim=40, n=80),
    Case(transposed=True, dtype=F16, heads=4, kv_heads=2),
    Case(block=20, step=2),
    Case(block=16, step=1),
    Case(block=8, step=40, n=345, heads=1),
    Case(block=200, step=3, n=150),
    Case(size=300.0),
    Case(size=300.0, dtype=F16),
    Case(scale=0.7),
]


def large() -> Iterator[Case]:
    """The grid for a GPU: every dtype, head dimension, kind of grouping and length, sharing few specialisations."""
    for dtype, dim in itertools.product((BF16, F16), (64, 80, 96, 128, 192, 256)):
        for heads, kv_heads in ((4, 4), (4, 1), (3, 1)):
            for n in (1, 127, 128, 129, 2047, 2048, 2049, 3001, 4096):
                yield Case(n, 0, heads, kv_heads, 1, dim, dtype, 128, 16, size=2.0)
    for block, step in ((32, 1), (32, 32), (64, 8), (128, 4), (64, 4), (128, 1)):
        for n, theta in itertools.product((31, 257, 1000, 2048, 3001), (-INF, None, 9.0, INF)):
            yield Case(n, 0, 4, 2, 1, 128, BF16, block, step, theta=theta, size=2.0)
    for n, keys in ((1, 4096), (300, 2500), (512, 4096), (2048, 4096), (100, 4001)):
        for window, cap in ((None, None), (700, None), (None, 20.0), (700, 20.0)):
            for theta in (None, INF):
                yield Case(n, keys, 4, 2, 2, 128, BF16, 64, 4, window=window, softcap=cap, theta=theta, size=2.0)
    for init, lookback in ((0, 0), (1, 0), (4, 64), (700, 1), (128, 4000), (4000, 128)):
        for n, theta in itertools.product((1000, 3001), (None, INF)):
            yield Case(n, 0, 4, 2, 1, 128, BF16, 64, 4, init=init, lookback=lookback, theta=theta)
    for dim, n, theta in itertools.product((64, 128, 256), (97, 1000, 2049), (None, INF)):
        yield Case(n, 0, 4, 2, 1, dim, F32, 128, 4, theta=theta)
    for size in (50.0, 2000.0):
        for dtype in (BF16, F16):
            yield Case(3001, 0, 4, 2, 1, 128, dtype, 64, 4, size=size)
    for transposed_n in (100, 1999, 4096):
        yield Case(transposed_n, 0, 8, 2, 2, 128, BF16, 64, 4, transposed=True)


# A GPU run splits into processes: ANCHORSCOPE_SHARD=2/8 takes every eighth case from the third on.
SHARD, SHARDS = (int(x) for x in os.environ.get("ANCHORSCOPE_SHARD", "0/1").split("/"))
CASES = (SMALL if INTERPRET else [*SMALL, *large()])[SHARD::SHARDS]


def keep_of(stripes, geo: reference.Geometry, q: torch.Tensor) -> torch.Tensor:
    """Kept mask (B, H, n, N) of listed stripes plus the anchor region; checks the list's form on the way."""
    batch, heads = q.shape[:2]
    offsets, columns = stripes.offsets.tolist(), stripes.columns
    assert offsets == [0, *itertools.accumulate(stripes.counts.flatten().tolist())]
    chosen = torch.zeros(batch * heads * geo.groups, geo.keys, dtype=torch.bool, device=q.device)
    for r in range(len(offsets) - 1):
        row = columns[offsets[r] : offsets[r + 1]].long()
        assert bool((row[1:] > row[:-1]).all()), "columns must ascend"
        chosen[r, row] = True
    chosen = chosen.view(batch, heads, geo.groups, geo.keys)
    assert not bool((chosen & ~reference.candidate_mask(geo, q.device)).any()), "a stripe that is no candidate"
    rows = torch.arange(geo.queries, device=q.device) // geo.group
    return reference.visible_mask(geo, q.device) & (reference.anchor_mask(geo, q.device) | chosen[:, :, rows])


def close(actual: torch.Tensor, expected: torch.Tensor, tol: float, what: str) -> None:
    """No NaN, and every element within tol * (1 + |expected|)."""
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    worst = ((actual.double() - expected) / (1.0 + expected.abs())).abs().max().item()
    assert worst <= tol, f"{what}: error {worst:.3g} above {tol:.3g}"


def listed(result: Attention) -> torch.Tensor:
    """The columns that a result's list holds."""
    return result.stripes.columns[: int(result.stripes.offsets[-1])]


def middle(margin: torch.Tensor) -> float:
    """A theta that selects about a third of the candidates."""
    finite = margin[torch.isfinite(margin)]
    return finite.sort().values[int(0.3 * len(finite))].item() if len(finite) else 1.0


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch):
    """Fill fresh memory with NaN (or a large integer), so that anything read before it is written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if GPU:  # several processes share the GPU's memory
        torch.cuda.empty_cache()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stages(case: Case) -> None:
    """Every stage against the specification."""
    q, k, v = case.tensors()
    geo = reference.geometry(q, k, **case.params)
    s = reference.scores(q, k, scale=geo.scale, softcap=case.softcap)
    most = s.abs().max().item()
    eps = EPS[case.dtype]
    near = 1e-4 + 1e-6 * most  # float32 sums of products

    state = anchor(q, k, v, **case.params)
    out, lse = reference.masked_attention(s, v, reference.anchor_mask(geo, q.device))
    q_bar, a_bar = reference.pooled(q, s, geo)
    big = case.size > 10  # the softmax of large logits hangs on their rounding
    close(state.out, out, (4 if big else 2) * eps + (20 * near if big else near), "anchor output")
    close(state.lse, lse, near, "anchor LSE")
    close(state.a_bar, a_bar, near, "mean anchor")
    close(state.q_bar, q_bar, eps * max(1.0, 0.1 * case.size), "mean query")

    exact = reference.margins(q, k, geo)
    theta = middle(exact) if case.theta is None else case.theta
    stripes = identify(state, k, theta=theta, queries=case.n, **case.params)
    kept = keep_of(stripes, geo, q)
    wanted = reference.keep_mask(exact, theta, geo)
    if case.theta is None and bool(torch.isfinite(exact).any()):
        assert stripes.columns.numel() > 0
    slack = near
    if case.dtype != F32:
        slack += 2.0**-7 * geo.scale * q_bar.norm(dim=-1).max().item() * k.double().norm(dim=-1).max().item()
    possible = reference.candidate_mask(geo).sum().item() * case.batch * case.heads
    assert candidates(q.shape, k.shape[2], **case.params) == possible
    if abs(theta) == INF:
        assert torch.equal(kept, wanted)
    else:
        certain = ((exact - theta).abs() > slack)[:, :, torch.arange(geo.queries, device=q.device) // geo.group]
        assert torch.equal(kept & certain, wanted & certain)

    result, all_lse = sparse(q, k, v, state, stripes, **case.params)
    out, lse = reference.masked_attention(s, v, kept)
    close(result, out, (4 if big else 3) * eps + (20 * near if big else near), "output")
    close(all_lse, lse, near, "LSE")


PROFILE = CASES[::3] if INTERPRET else [c for c in CASES if c.n < 200 or c.n in (300, 512, 2048, 3001)]


@pytest.mark.parametrize("case", PROFILE, ids=str)
def test_profile(case: Case) -> None:
    """Dense LSE, margins, column masses and the sweep against the specification, at several thetas at once."""
    q, k, v = case.tensors(1)
    geo = reference.geometry(q, k, **case.params)
    s = reference.scores(q, k, scale=geo.scale, softcap=case.softcap)
    near = 1e-4 + 1e-6 * s.abs().max().item()
    call = {n: case.params[n] for n in ("scale", "window", "softcap")}
    grid = {**call, "block": case.block, "step": case.step}

    out, lse = dense_lse(q, k, v, **call)
    visible = reference.visible_mask(geo, q.device)
    exact_out, exact_lse = reference.masked_attention(s, v, visible)
    close(lse, exact_lse, near, "dense LSE")
    assert out is not None
    close(out, exact_out, 20 * near, "dense output")
    none, alone = dense_lse(q, k, None, **call)
    assert none is None
    close(alone, exact_lse, near, "dense LSE without V")

    state = anchor(q, k, v, precise=True, **case.params)
    margin = margins(state, k, queries=case.n, **case.params)
    exact = reference.margins(q, k, geo)
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(margin), finite)
    close(margin[finite], exact[finite], 0.0 if not finite.any() else near, "margins") if finite.any() else None

    mass = column_mass(q, k, lse, **grid)
    weights = torch.exp(s - exact_lse[..., None]).masked_fill(~visible, 0.0)
    exact_mass = torch.stack([x.sum(-2) for x in weights.split(geo.group, -2)], -2)
    close(mass, exact_mass, 10 * near, "column mass")
    close(mass.double().sum((-1, -2)) / case.n, torch.ones_like(exact_lse[..., 0]), 10 * near, "total mass")

    some = middle(exact)
    thetas = torch.tensor([-INF, some, some + 0.5, INF])
    columns, bins = bin_columns(margin, thetas)
    for values in (v, None):
        result = sweep(q, k, values, state, out, columns, bins, thetas=len(thetas), **grid)
        for t, theta in enumerate(thetas.tolist()):
            kept = reference.keep_mask(torch.where(finite, margin.double(), exact), theta, geo)
            o, want = reference.masked_attention(s, v, kept)
            close(result.lse[:, :, t], want, near, f"sweep LSE at {theta}")
            if values is None:
                assert result.squares.numel() == 0
                continue
            gap = o - exact_out
            close(
                result.squares[..., t].sqrt(),
                gap.square().sum((-1, -2)).sqrt(),
                0.01 + 50 * near,
                f"squares at {theta}",
            )
            for got, tol in ((result.close_01, 0.01), (result.close_005, 0.005)):
                edge = 50 * near * (1 + o.abs())
                low = (gap.abs() < tol - edge).sum((-1, -2))
                high = (gap.abs() < tol + edge).sum((-1, -2))
                assert bool(((got[..., t] >= low) & (got[..., t] <= high)).all())


@pytest.mark.parametrize("dtype", [F32, F16] if INTERPRET else [F32, F16, BF16])
def test_infinite_theta_is_dense(dtype: torch.dtype) -> None:
    """At theta = +inf the error is at most twice that of PyTorch's attention in the same dtype."""
    case = Case(
        n=140 if INTERPRET else 3001, heads=4, kv_heads=2, dim=32 if INTERPRET else 128, dtype=dtype, block=32, step=2
    )
    q, k, v = case.tensors()
    q = q * 0.5
    geo = reference.geometry(q, k)
    exact, _ = reference.masked_attention(
        reference.scores(q, k, scale=case.dim**-0.5), v, reference.visible_mask(geo, q.device)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = anchor_attention(q, k, v, theta=INF, **case.params).out
    error, allowed = (ours - exact).norm(), (theirs - exact).norm()
    assert error <= 2 * allowed + 1e-6 * exact.norm(), f"{error:.3g} against {allowed:.3g}"
    # Without stripes the output is that of the anchor region.
    none = anchor_attention(q, k, v, theta=-INF, **case.params)
    assert int(none.stripes.offsets[-1]) == 0
    assert torch.equal(none.out, anchor(q, k, v, **case.params).out)


def test_groups_of_query_heads() -> None:
    """Grouped queries equal repeated keys and values, bit for bit."""
    case = Case(heads=4, kv_heads=2, dtype=F16, n=70)
    q, k, v = case.tensors()
    grouped = anchor_attention(q, k, v, theta=4.0, **case.params)
    repeated = anchor_attention(
        q, k.repeat_interleave(2, 1).contiguous(), v.repeat_interleave(2, 1).contiguous(), theta=4.0, **case.params
    )
    assert torch.equal(grouped.out, repeated.out)
    assert torch.equal(listed(grouped), listed(repeated))


def test_theta_per_head_and_monotone() -> None:
    """A theta per head selects what that theta alone selects; more theta never selects less."""
    case = Case(heads=4, kv_heads=2, batch=2, n=70)
    q, k, v = case.tensors()
    state = anchor(q, k, v, **case.params)
    theta = torch.tensor([[-INF, 3.0, 4.0, INF], [5.0, 3.5, -INF, 4.0]])
    mixed = identify(state, k, theta=theta, queries=case.n, **case.params).counts
    for b, h in itertools.product(range(2), range(4)):
        alone = identify(state, k, theta=theta[b, h].item(), queries=case.n, **case.params).counts
        assert torch.equal(mixed[b, h], alone[b, h])
    geo = reference.geometry(q, k, block=case.block, step=case.step)
    last = None
    for t in (-INF, 3.0, 4.5, INF):
        kept = keep_of(identify(state, k, theta=t, queries=case.n, **case.params), geo, q)
        assert last is None or not bool((last & ~kept).any())
        last = kept
    assert last is not None
    assert torch.equal(last, reference.visible_mask(geo, q.device).expand_as(last))


def test_scorching_column_and_constant_keys() -> None:
    """One column with all the weight is found, and equal keys are all selected at theta = 0 (margin zero)."""
    case = Case(n=160, heads=1, dtype=F32)
    q, k, v = case.tensors()
    q, k = q * 0.01, k * 0.01
    q[..., 0] = 4.0
    k[:, :, 40, 0] = 10.0  # a score of 10 against almost 0
    result = anchor_attention(q, k, v, theta=-5.0, **case.params)
    counts = result.stripes.counts[0, 0].tolist()
    assert counts == [0, 0, 1, 1, 1]  # candidates end 16 before a group: groups from 2 on have column 40
    assert listed(result).tolist() == [40, 40, 40]
    close(result.out[0, 0, 64:], v[0, 0, 40].double().expand(96, -1), 0.02, "output of the scorching column")
    flat = anchor_attention(q, torch.ones_like(k), v, theta=1e-3, **case.params)
    assert flat.stripes.counts[0, 0].tolist() == [0, 0, 32, 64, 96]


def test_capacity_and_overflow() -> None:
    """Too small a capacity raises the flag and leaves columns out; enough changes nothing."""
    case = Case(n=150, dtype=F16)
    q, k, v = case.tensors()
    free = anchor_attention(q, k, v, theta=4.0, **case.params)
    total = int(free.stripes.offsets[-1])
    chosen = free.stripes.columns[:total]
    roomy = anchor_attention(q, k, v, theta=4.0, capacity=total + 9, **case.params)
    assert torch.equal(roomy.out, free.out)
    assert roomy.overflow is not None
    assert not roomy.overflow
    assert total > 10
    tight = anchor_attention(q, k, v, theta=4.0, capacity=total - 5, **case.params)
    assert tight.overflow
    assert torch.isfinite(tight.out).all()
    assert torch.equal(tight.stripes.columns, chosen[: total - 5])


@pytest.mark.parametrize("theta", [2.0, 4.0, INF])
def test_shares_of_the_mask(monkeypatch: pytest.MonkeyPatch, theta: float) -> None:
    """A long mask is listed in shares: few bits a word or many, the columns are those of one share."""
    from anchorscope.kernels import identify as stage_two

    case = Case(n=600, block=16, step=4)
    q, k, _ = case.tensors()
    state = anchor(q, k, None, **case.params)
    whole = identify(state, k, theta=theta, queries=case.n, **case.params)
    monkeypatch.setattr(stage_two, "SHARE", 4)
    parts = identify(state, k, theta=theta, queries=case.n, **case.params)
    assert whole.columns.numel() > 0
    assert torch.equal(whole.columns, parts.columns)
    assert torch.equal(whole.offsets, parts.offsets)


def test_repeatable() -> None:
    """Two runs agree bit for bit."""
    case = Case(n=80 if INTERPRET else 3001, heads=4, kv_heads=2, dim=32 if INTERPRET else 128, dtype=F16, theta=4.0)
    q, k, v = case.tensors()
    one, two = (anchor_attention(q, k, v, theta=case.theta, **case.params) for _ in range(2))
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.lse, two.lse)
    assert torch.equal(listed(one), listed(two))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 9, 8, device=DEVICE)}, "does not fit q"),
        ({"q": torch.zeros(4, 9, 16, device=DEVICE)}, "must be 4-d"),
        ({"v": torch.zeros(1, 2, 8, 16, device=DEVICE)}, "must have the shape of k"),
        ({"v": torch.zeros(1, 2, 9, 16, device=DEVICE, dtype=torch.float64)}, "float16, bfloat16 or float32"),
        ({"scale": -1.0}, "positive"),
        ({"softcap": 0.0}, "softcap"),
        ({"window": 0}, "window"),
        ({"block": 0}, "block must be at least 1"),
        ({"init": -1}, "negative"),
        ({"offset": 3}, "offset 3"),
        ({"theta": math.nan}, "NaN"),
        ({"theta": torch.zeros(3)}, "theta must be"),
        ({"backend": "cuda"}, "there are"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """Each mistake is named."""
    args: dict[str, Any] = {
        "q": torch.zeros(1, 4, 9, 16, device=DEVICE),
        "k": torch.zeros(1, 2, 9, 16, device=DEVICE),
        "v": torch.zeros(1, 2, 9, 16, device=DEVICE),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        anchor_attention(**args)


HOPPER = GPU and not INTERPRET and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n", "keys", "block", "step"),
    [(1, 0, 128, 16), (127, 0, 64, 2), (129, 0, 128, 1), (2049, 0, 128, 16), (4999, 0, 64, 8), (300, 5000, 128, 4)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_hopper_equals_portable(dim: int, n: int, keys: int, block: int, step: int, transposed: bool) -> None:
    """The Hopper kernels are used where they fit, and agree with the portable ones within rounding."""
    from anchorscope.kernels import anchor_hopper, common, hopper, identify_hopper, sparse_hopper
    from anchorscope.kernels import identify as stage_two
    from anchorscope.kernels.anchor import portable as portable_anchor
    from anchorscope.kernels.sparse import portable as portable_sparse

    case = Case(n, keys, 6, 2, 2, dim, BF16, block, step, transposed=transposed)
    q, k, v = case.tensors()
    p = common.checked(q, k, v, block=block, step=step, init=block, lookback=block)
    assert p.group % 128 or anchor_hopper.suits(q, k, v, p, False)
    if p.group % 128:  # a short prompt shrinks its group
        p = p._replace(block=64, step=128 * p.queries // 64)
    ours, theirs = anchor_hopper.anchor_hopper(q, k, v, p), portable_anchor(q, k, v, p, False)
    for name, a, b, tol in zip(("out", "lse", "q_bar", "a_bar"), ours, theirs, (2e-2, 1e-5, 1e-2, 1e-5), strict=True):
        close(a, b.double(), tol, name)
    grid = {"block": p.block, "step": p.step}
    stripes = identify((ours[2], ours[3]), k, theta=10.0, queries=n, init=p.init, lookback=p.lookback, **grid)
    if p.step in (4, 8, 16, 32, 64):
        assert identify_hopper.suits(ours[2], k, p)
        theta = torch.full(q.shape[:2], 10.0, device=q.device)
        theta[0, 0], theta[1, 5] = -INF, INF
        masks = [torch.zeros_like(stage_two._outputs(ours[2], p)[0]) for _ in range(2)]
        stage_two.portable(ours[2], ours[3], k, theta, masks[0], p)
        identify_hopper.score_hopper(ours[2], ours[3], k, theta, masks[1], p)
        rows = [m.view(2, 6, p.groups, -1) for m in masks]  # beyond the candidates a mask is not defined
        limit = p.offset + torch.arange(p.groups, device=q.device) * p.group - p.lookback
        inside = torch.arange(32 * masks[0].shape[1], device=q.device) < limit[:, None]
        bits = [((m[..., None] >> torch.arange(32, device=q.device)) & 1).flatten(-2).bool() & inside for m in rows]
        assert torch.equal(bits[0][0, 0], bits[1][0, 0])
        assert torch.equal(bits[0][1, 5], bits[1][1, 5])
        assert (bits[0] != bits[1]).sum() <= 1e-4 * bits[0].sum() + 2  # sums of products in another order
    assert sparse_hopper.suits(ours[0], ours[1], q, k, v, p)
    mine, other = (ours[0].clone(), ours[1].clone()), (ours[0].clone(), ours[1].clone())
    sparse_hopper.sparse_hopper(*mine, q, k, v, stripes.columns, stripes.offsets, p)
    portable_sparse(*other, q, k, v, stripes.columns, stripes.offsets, p)
    close(mine[0], other[0].double(), 2e-2, "sparse out")
    close(mine[1], other[1].double(), 1e-5, "sparse lse")
    assert not anchor_hopper.suits(q, k, v, p._replace(window=5), False)
    assert hopper.tma_view(q[..., ::2]) is None


@pytest.mark.skipif(INTERPRET, reason="the interpreter cannot be traced")
def test_custom_ops() -> None:
    """The ops' fakes agree with what they return, and the whole pipeline compiles."""
    case = Case(n=300, heads=4, kv_heads=2, dim=64, dtype=F16, block=32)
    q, k, v = case.tensors()
    flat = geometry(q.shape, k.shape, **case.params).flat()
    torch.library.opcheck(torch.ops.anchorscope.anchor, (q, k, v, *flat, False))
    state = anchor(q, k, v, **case.params)
    theta = torch.full((1, 4), 2.0, device=q.device)
    torch.library.opcheck(torch.ops.anchorscope.stripe_bits, (state.q_bar, state.a_bar, k, theta, *flat))
    stripes = identify(state, k, theta=4.0, queries=300, **case.params)
    args = (
        state.out.clone(),
        state.lse.clone(),
        q,
        k,
        v,
        stripes.columns,
        stripes.offsets,
        *flat,
    )
    torch.library.opcheck(torch.ops.anchorscope.sparse_, args)
    lse = dense_lse(q, k, None)[1]
    torch.library.opcheck(torch.ops.anchorscope.dense_lse, (q, k, v, *flat))
    torch.library.opcheck(torch.ops.anchorscope.column_mass, (q, k, lse, *flat))
    plain = anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    compiled = torch.compile(anchor_attention, fullgraph=True)(q, k, v, theta=4.0, capacity=100_000, **case.params)
    assert torch.equal(plain.out, compiled.out)


@pytest.mark.skipif(not GPU or INTERPRET, reason="needs a GPU")
def test_no_synchronisation() -> None:
    """With a capacity nothing waits for the GPU."""
    case = Case(n=3000, heads=4, kv_heads=2, dim=64, dtype=F16, block=32)
    q, k, v = case.tensors()
    anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        anchor_attention(q, k, v, theta=4.0, capacity=100_000, **case.params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
