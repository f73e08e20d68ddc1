"""`SparseRun` answers a model's attention calls: some heads run sparse, the rest is left to the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anchorscope.anchors import LayerAnchors
from anchorscope.devices import resolve_backend_name
from anchorscope.errors import InputError
from anchorscope.kernels import torch_backend
from anchorscope.kernels.geometry import visible_pairs
from anchorscope.kernels.pipeline import Attention, anchor_attention
from anchorscope.models.calls import AttentionInputs, Own
from anchorscope.models.check import Unrepresentable, check_inputs
from anchorscope.models.language import Language
from anchorscope.runtime.assignment import Assignment, cannot
from anchorscope.runtime.masks import CallPositions, PositionCache, assumed, shown_pairs, window_of
from anchorscope.runtime.pieces import HeadGroup, Piece, pieces_of, runs_sparse, split_heads, split_tail
from anchorscope.runtime.speculation import candidates
from anchorscope.runtime.usage import LayerUse, Tally

# The contexts around the one that runs may do anything with a call, only count it, or do nothing (a trial run).
_outer: ContextVar[Literal["act", "count", "pass"]] = ContextVar("outer", default="act")


@contextlib.contextmanager
def outer_contexts(may: Literal["count", "pass"]) -> Iterator[None]:
    """Keep the contexts around this one from making calls sparse, or from seeing them at all."""
    token = _outer.set(may)
    try:
        yield
    finally:
        _outer.reset(token)


class _NoBackward(torch.autograd.Function):
    """The identity function. Whoever differentiates through it learns that the kernels have no backward pass."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise InputError("sparse attention has no backward pass: train the model outside of it")


class _SparseCall(NamedTuple):
    """A call for the kernels, with everything they need except which heads and rows they run."""

    call: AttentionInputs
    anchors: LayerAnchors
    window: int | None
    backend: str

    def run(self, heads: HeadGroup, piece: Piece, *, keep: bool = False) -> Attention:
        """Run some heads and rows sparse. With `keep`, every key is kept: the rows run dense."""
        q, k, v, place = self._inputs(heads, piece)
        p = self.anchors.params
        shape = {"block": p.block, "step": p.step, "init": p.init, "lookback": p.lookback}
        theta = heads.theta.expand(piece.prompts, -1)
        theta = torch.full_like(theta, torch.inf) if keep else theta
        try:
            return anchor_attention(q, k, v, theta=theta, backend=self.backend, **shape, **place)
        except ValueError as error:
            raise cannot(self.call, str(error)) from None

    def dense_lse(self, heads: HeadGroup, piece: Piece) -> Tensor:
        """Return the LSE over all visible keys, (b, H', n') float32; recall is measured against it."""
        q, k, v, place = self._inputs(heads, piece)
        if self.backend == "torch":
            return torch_backend.anchor(q, k, v, init=k.shape[2], **place).lse
        from anchorscope.kernels.dense_lse import dense_lse

        return dense_lse(q, k, None, **place)[1]

    def _inputs(self, heads: HeadGroup, piece: Piece) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        q, k, v = heads.of(self.call.q, self.call.k, self.call.v)
        place = {
            "scale": self.call.scale,
            "window": self.window,
            "softcap": self.call.softcap,
            "offset": piece.offset,
        }
        rows, keys = piece.rows, piece.keys
        return q[rows, :, piece.queries], k[rows, :, keys], v[rows, :, keys], place


class SparseRun:
    """The record and the rules of a model inside `sparse_attention`; `layers()` says what it did.

    Args:
        assignment: which heads run how; None leaves everything to the model and only counts.
        backend: "auto", "torch" or "triton".
        measure: compute the recall of every sparse call, by a second exact pass over all keys.
        language: the modules of the model's language model; by default each call is judged on its own.
    """

    def __init__(
        self,
        assignment: Assignment | None,
        backend: str = "auto",
        measure: bool = False,
        language: Language | None = None,
    ) -> None:
        self._language = language or Language(None)
        self._left_out: set[str] = set()
        self._assignment = assignment
        self._backend = backend
        self._measure = measure
        self._positions = PositionCache()
        self._heads: dict[tuple[LayerAnchors, int, torch.device], tuple[HeadGroup | None, HeadGroup | None]] = {}
        self._tallies: dict[int, Tally] = {}

    def layers(self) -> list[LayerUse]:
        """Return what every layer did since the start or the last `reset`, by layer. This waits for the GPU."""
        return [self._tallies[layer].use(layer) for layer in sorted(self._tallies)]

    def left_out(self) -> list[str]:
        """Return the classes whose attention no layer counts: other towers', cross- and bidirectional attention."""
        return sorted(self._left_out)

    def reset(self) -> None:
        """Restart all counts from zero."""
        self._tallies.clear()
        self._left_out.clear()

    def foreign(self, call: AttentionInputs) -> bool:
        """Return whether a call is left to the model and not counted, as no self-attention of the language model."""
        return self._language.foreign(call)

    def attend(self, call: AttentionInputs, own: Own) -> Any:
        """Answer one call of the model; see `anchorscope.models.calls.Attend`.

        Raises:
            InputError: a layer with anchors makes a call that the kernels would compute wrongly.
        """
        may = _outer.get()
        if may == "pass" or (may == "count" and self._assignment is not None):
            return own(call.q, call.k, call.v)
        if self.foreign(call):
            self._left_out.add(type(call.module).__name__)
            return own(call.q, call.k, call.v)
        if self._assignment is None:
            return self._dense(call, own)

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Any:
            with outer_contexts("count"):
                return own(q, k, v)

        anchors = None if call.q.shape[2] == 1 else self._assignment.layer(call)
        if anchors is None:
            return self._dense(call, alone)
        try:
            return self._planned(call, alone, anchors)
        except Unrepresentable as error:
            raise cannot(call, error.reason) from None

    def _tally(self, call: AttentionInputs) -> Tally:
        return self._tallies.setdefault(-1 if call.layer is None else call.layer, Tally())

    def _dense(self, call: AttentionInputs, own: Own, positions: CallPositions | None = None) -> Any:
        """Leave a call to the model, and count its pairs by `positions`, or by its mask."""
        _, heads, n, _ = call.q.shape
        if n == 1:
            return own(call.q, call.k, call.v)
        window = window_of(call)
        found = self._counted(call, positions, window)
        if found is None:
            self._left_out.add(type(call.module).__name__)
            return own(call.q, call.k, call.v)
        tally = self._tally(call)
        with tally.clock.running(call.q.device):
            result = own(call.q, call.k, call.v)
        tally.queries += found[0]
        tally.visible += heads * found[1]
        tally.kept += heads * found[1]
        tally.calls += 1
        return result

    def _counted(
        self, call: AttentionInputs, positions: CallPositions | None, window: int | None
    ) -> tuple[int, int] | None:
        """Count the queries of a dense call and the pairs of one head; return None for attention that is not causal."""
        if call.bidirectional:
            return None
        try:
            pieces = pieces_of(positions or self._positions(call, window), call.q.shape[2])
        except Unrepresentable:
            if call.mask_tensor is not None:
                return shown_pairs(call)
            pieces = pieces_of(assumed(call), call.q.shape[2])
        return (
            sum(p.prompts * p.size for p in pieces),
            sum(p.prompts * visible_pairs(p.size, window, p.offset) for p in pieces),
        )

    def _planned(self, call: AttentionInputs, own: Own, anchors: LayerAnchors) -> Any:
        """Run a call of a layer with anchors sparse, unless all of it is to run dense.

        A chunk of up to `block` queries that follow a cache (candidates of speculative decoding, the last short chunk)
        is left to the model.
        """
        n, keys = call.q.shape[2], call.k.shape[2]
        if (n <= anchors.params.block and n < keys) or candidates(call) == n:
            return self._dense(call, own)
        check_inputs(call)
        window = window_of(call)
        if window is not None and n < keys and keys - n >= window - 1:
            return self._dense(call, own)  # the cache may have dropped the first keys, which hold anchors
        wanted = getattr(getattr(call.module, "config", None), "output_attentions", False)
        if call.options.get("output_attentions") or wanted:
            raise Unrepresentable(call, "it is asked for its attention weights (output_attentions)")
        positions = self._positions(call, window)
        pieces, verified = split_tail(pieces_of(positions, n), n, candidates(call))
        device = call.q.device
        key = anchors, call.k.shape[1], device
        if key not in self._heads:
            self._heads[key] = split_heads(*key)
        sparse, dense = self._heads[key]
        runs = [runs_sparse(piece, anchors.params) for piece in pieces] + [False] * len(verified)
        pieces += verified
        if sparse is None or not any(runs):
            return self._dense(call, own, positions)

        sparse_call = _SparseCall(call, anchors, window, resolve_backend_name(self._backend, device))
        with self._tally(call).clock.running(device), torch.no_grad():
            out = _room(call, pieces)
            if dense is not None:
                dense.place(out, own(*dense.of(call.q, call.k, call.v))[0])
            found = [sparse_call.run(sparse, p, keep=not sparsely) for p, sparsely in zip(pieces, runs, strict=True)]
            for piece, attention in zip(pieces, found, strict=True):
                sparse.place(out[piece.rows, piece.queries], attention.out.transpose(1, 2))
        self._count(sparse_call, sparse, pieces, found)
        if torch.is_grad_enabled():
            for x in (call.q, call.k, call.v):
                if x.requires_grad:
                    return _NoBackward.apply(out, x), None
        return out, None

    def _count(self, sparse_call: _SparseCall, sparse: HeadGroup, pieces: list[Piece], found: list[Attention]) -> None:
        tally, shape, window = self._tally(sparse_call.call), sparse_call.anchors.params, sparse_call.window
        heads = len(sparse.theta)
        others = sparse_call.call.q.shape[1] - heads
        tally.kind = "sparse"
        tally.calls += 1
        for piece, attention in zip(pieces, found, strict=True):
            geo = shape.at(piece.size, window, piece.offset)
            visible = geo.visible_pairs
            tally.queries += piece.prompts * piece.size
            tally.visible += piece.prompts * (heads + others) * visible
            tally.kept += piece.prompts * (heads * geo.anchor_pairs + others * visible)
            tally.stripes(attention.stripes.pairs(geo))
            if self._measure:
                rows = torch.exp(attention.lse - sparse_call.dense_lse(sparse, piece))
                tally.mass(rows, piece.prompts * piece.size * others)


def _room(call: AttentionInputs, pieces: list[Piece]) -> Tensor:
    """Return an empty output (B, n, H, dv) for the call, with zeros where its queries are padding."""
    batch, heads, n, _ = call.q.shape
    padded = sum(p.prompts * p.size for p in pieces) < batch * n
    return (call.q.new_zeros if padded else call.q.new_empty)(batch, n, heads, call.v.shape[-1])
