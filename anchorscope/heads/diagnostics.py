"""Where a head's attention goes: sinks, neighbors, columns, diagonals, blocks; one pass over the exact weights.

All metrics are means over the queries of a head or sums over its weights P, so a run of queries at a time suffices:
its column sums, diagonal sums and block sums are added up and nothing of size N x N is held. Definitions, ranges and
sources: docs/heads.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anchorscope.methods import Head
from anchorscope.methods.head import chunk_rows
from anchorscope.runs.environment import full_precision
from anchorscope.runs.progress import Cancelled

SINKS = (1, 4)  # first tokens whose mass is reported
LOCAL = (128, 1024)  # last keys whose mass is reported, the query's own included
CLIP = 1024  # distances beyond it count as this, in `distance_1024`
HORIZON = (128, 1023)  # distances at which a token's influence on later queries is averaged
LEAST_QUERIES = 128  # later queries without which a token's influence is not judged
INFLUENTIAL = 8  # tokens in `influence`
STREAM_SINKS, STREAM_RECENT = 64, 256  # what a streaming head keeps: first tokens, last keys
STREAMING, RETRIEVAL = 0.95, 0.80  # recall of that window: streaming from the one, retrieval below the other
HIDDEN_FROM = 4  # sinks at this position and later are hidden ones
HIDDEN_MASS = 0.03  # mean mass a hidden sink gets from queries STREAM_RECENT and more behind it
HIDDEN_QUERIES = 8  # such queries there must be: N / 8, and 256 at least
TILE = 64  # side of the blocks in `block_mass`
TOP_SHARE = 64  # columns, diagonals and blocks: the heaviest 1/64 of them

CLASSES = ("streaming", "mixed", "retrieval")
_FLOOR = -104.0  # exp of it is zero in float32; keeps -inf * 0 out of the entropy


@dataclass(frozen=True)
class HeadDiagnostics:
    """Where one head's attention goes. Shares lie in [0, 1]; NaN where the prompt is too short for the question.

    Attributes:
        sink_1, sink_4: mean mass on token 0, on tokens 0..3.
        hidden_sinks: positions of hidden sinks, heaviest first.
        hidden_sink_masses: mean mass each gets from the queries at least 256 tokens behind it that see it.
        hidden_sink_mass: mean mass on all of them, over all queries.
        local_128, local_1024: mean mass on the last 128, 1,024 keys.
        distance: mean distance i - j, weighted by attention (tokens).
        distance_1024: the same with distances clipped at 1,024.
        effective_keys_mean, effective_keys_median: exp of a query's entropy, over queries (keys, 1..N).
        influence: mean influence of the 8 tokens that have most.
        influential: their positions, most first.
        influences: what each has.
        vertical_mass, slash_mass, block_mass: mass on the heaviest 1/64 of columns, diagonals, 64 x 64 blocks.
        window_recall: recall of the first 64 and last 256 keys, over queries that have other keys.
        kind: "streaming", "mixed", "retrieval", or "" where no query has other keys.
        column_mass: (N,) float64 mass of each column, summed over queries.
        far_mass: (N,) float64, the same from queries at least 256 tokens later.
    """

    sink_1: float
    sink_4: float
    hidden_sinks: tuple[int, ...]
    hidden_sink_masses: tuple[float, ...]
    hidden_sink_mass: float
    local_128: float
    local_1024: float
    distance: float
    distance_1024: float
    effective_keys_mean: float
    effective_keys_median: float
    influence: float
    influential: tuple[int, ...]
    influences: tuple[float, ...]
    vertical_mass: float
    slash_mass: float
    block_mass: float
    window_recall: float
    kind: str
    column_mass: np.ndarray
    far_mass: np.ndarray


def classify(window_recall: float) -> str:
    """Class of a head by the recall of a streaming window: from 0.95 on streaming, below 0.80 retrieval, else mixed;
    "" for NaN.
    """
    if math.isnan(window_recall):
        return ""
    return "streaming" if window_recall >= STREAMING else "retrieval" if window_recall < RETRIEVAL else "mixed"


def diagnose_head(head: Head, *, cancelled: Callable[[], bool] = lambda: False) -> HeadDiagnostics:
    """Measure one head in one pass over its exact attention weights, on the device and in the dtype of `head`.

    Args:
        head: queries (N, d) and keys (N, d), with window and soft-cap.
        cancelled: asked between runs of queries; once true, work stops.

    Raises:
        Cancelled: `cancelled` returned true.
    """
    with torch.inference_mode(), full_precision():
        return finish(head.n, head.window, *_sums(head, cancelled))


@dataclass
class Sums:
    """Totals of the weights over all queries, float64 but for the blocks."""

    columns: Tensor  # (N,)
    far: Tensor  # (N,), queries at least STREAM_RECENT later
    horizon: Tensor  # (N,), queries at the distances of HORIZON
    diagonals: Tensor  # (N,), by distance
    entropy: Tensor  # (N,), nats, per query


def _sums(head: Head, cancelled: Callable[[], bool]) -> tuple[Sums, Tensor]:
    n = head.n
    totals = Sums(*(torch.zeros(n, dtype=torch.float64, device=head.device) for _ in range(5)))
    tiles: list[Tensor] = []
    rows = chunk_rows(head.device, n)
    for first in range(0, n, rows):
        if cancelled():
            raise Cancelled
        last = min(first + rows, n)
        low = head.low(first) // TILE * TILE
        tiles.append(_add_chunk(head, totals, first, last, low))
    return totals, torch.cat(tiles)


def _add_chunk(head: Head, totals: Sums, first: int, last: int, low: int) -> Tensor:
    """Add queries first..last-1 (keys low..last-1) to the totals; returns the mass of their visible blocks."""
    x = head.scores(first, last, low, last)
    r, e = x.shape
    x.sub_(x.amax(1, keepdim=True)).clamp_(min=_FLOOR)
    # Weights lie in a wider zeroed buffer: read with rows one longer, its columns are the diagonals.
    width = e + 2 * r + TILE
    flat = x.new_zeros(r * width)
    at = r - 1
    buffer = flat.view(r, width)
    p = buffer[:, at : at + e]
    torch.exp(x, out=p)
    total = p.sum(1)
    totals.entropy[first:last] = total.log() - x.mul_(p).sum(1) / total
    p.mul_(total.reciprocal()[:, None])

    padded = buffer[:, at : at + -(-e // TILE) * TILE]
    bands = torch.stack([band.sum(0) for band in padded.split(TILE)])  # (query blocks, keys)
    columns = bands.sum(0, dtype=torch.float64)[:e]
    totals.columns[low:last] += columns
    _add_beyond(totals.far, p, columns, first, low, STREAM_RECENT)
    _add_between(totals.horizon, p, first, low, *HORIZON)
    # Place u of a diagonal's sum holds distance first - low + r - 1 - u; negative distances hold zeros.
    diagonals = flat.as_strided((r, e + r - 1), (width + 1, 1)).sum(0).flip(0)
    farthest = first - low + r - 1
    totals.diagonals[: farthest + 1] += diagonals[-(farthest + 1) :] if farthest + 1 < len(diagonals) else diagonals
    return _visible_tiles(head, bands.unflatten(1, (-1, TILE)).sum(2), first, low)


def _add_beyond(into: Tensor, p: Tensor, columns: Tensor, first: int, low: int, distance: int) -> None:
    """Add column sums over queries at least `distance` later than the key."""
    last = first + p.shape[0]
    whole = min(max(first - distance + 1, low), last)  # keys below it: all queries of the run are that late
    into[low:whole] += columns[: whole - low]
    stop = max(last - distance, whole)
    part = p[:, whole - low : stop - low]
    into[whole:stop] += part.tril(first - distance - whole).sum(0)


def _add_between(into: Tensor, p: Tensor, first: int, low: int, near: int, far: int) -> None:
    """Add column sums over queries `near` to `far` tokens later than the key, both included."""
    start, stop = max(first - far, low), first + p.shape[0] - near
    if stop > start:
        part = p[:, start - low : stop - low]
        into[start:stop] += part.tril(first - near - start).triu_(first - far - start).sum(0)


def _visible_tiles(head: Head, tiles: Tensor, first: int, low: int) -> Tensor:
    """Those blocks of (query blocks, key blocks) that hold a visible pair, flat."""
    return tiles[visible_blocks(head.n, head.window, tiles, first, low)]


def visible_blocks(n: int, window: int | None, tiles: Tensor, first: int = 0, low: int = 0) -> Tensor:
    """Which blocks of (query blocks, key blocks) from query `first` and key `low` on hold a visible pair, bool."""
    start = first + torch.arange(len(tiles), device=tiles.device)[:, None] * TILE
    end = (start + TILE).clamp_max(n)
    key = low + torch.arange(tiles.shape[1], device=tiles.device) * TILE
    seen = key < end
    if window is not None:
        seen &= start - (key + TILE - 1) < window
    return seen


def finish(n: int, window: int | None, sums: Sums, tiles: Tensor) -> HeadDiagnostics:
    """The diagnostics of a head from its totals and the mass of its visible blocks, flat; on their device."""
    columns, far, diagonals = sums.columns, sums.far, sums.diagonals
    position = torch.arange(n, device=columns.device)
    reach = n if window is None else window
    hidden, hidden_masses = _hidden_sinks(n, reach, far)
    influential, influences = _influential(n, reach, sums.horizon)

    kept_all = STREAM_SINKS + STREAM_RECENT
    keys = sums.entropy.exp()
    middle = [keys.kthvalue(k).values for k in ((n + 1) // 2, n // 2 + 1)]
    # One transfer for all of them; a GPU is waited for once.
    found = torch.stack(
        [
            *(columns[:first].sum() / n for first in SINKS),
            columns[hidden].sum() / n,
            *(diagonals[:near].sum() / n for near in LOCAL),
            (diagonals * position).sum() / n,
            (diagonals * position.clamp_max(CLIP)).sum() / n,
            keys.mean(),
            (middle[0] + middle[1]) / 2,
            _heaviest(columns, n),
            _heaviest(diagonals[:reach], n),
            _heaviest(tiles, n),
            1 - far[STREAM_SINKS:].sum() / max(n - kept_all, 1),
        ]
    ).tolist()
    recall = math.nan if n <= kept_all else _share(found[12])
    return HeadDiagnostics(
        sink_1=_share(found[0]),
        sink_4=_share(found[1]),
        hidden_sinks=tuple(hidden),
        hidden_sink_masses=tuple(map(_share, hidden_masses)),
        hidden_sink_mass=_share(found[2]),
        local_128=_share(found[3]),
        local_1024=_share(found[4]),
        distance=found[5],
        distance_1024=found[6],
        effective_keys_mean=found[7],
        effective_keys_median=found[8],
        influence=_share(math.fsum(influences) / len(influences)) if influences else math.nan,
        influential=tuple(influential),
        influences=tuple(map(_share, influences)),
        vertical_mass=_share(found[9]),
        slash_mass=_share(found[10]),
        block_mass=_share(found[11]),
        window_recall=recall,
        kind=classify(recall),
        column_mass=columns.cpu().numpy(),
        far_mass=far.cpu().numpy(),
    )


def _hidden_sinks(n: int, reach: int, far: Tensor) -> tuple[list[int], list[float]]:
    """Positions of the hidden sinks, heaviest first, and the mean mass each gets from far behind."""
    position = torch.arange(n, device=far.device)
    # Queries that see key j from 256 tokens behind and more.
    later = ((position + reach).clamp_max(n) - (position + STREAM_RECENT)).clamp_min(0)
    many = max(STREAM_RECENT, -(-n // HIDDEN_QUERIES))
    mean = far / later.clamp_min(1)
    hidden = ((position >= HIDDEN_FROM) & (later >= many) & (mean >= HIDDEN_MASS)).nonzero().squeeze(1)
    masses, order = mean[hidden].sort(descending=True, stable=True)
    return hidden[order].tolist(), masses.tolist()


def _influential(n: int, reach: int, horizon: Tensor) -> tuple[list[int], list[float]]:
    """Positions of the tokens with most influence on later queries, most first, and how much."""
    near, end = HORIZON
    position = torch.arange(n, device=horizon.device)
    asked = ((position + min(end, reach - 1)).clamp_max(n - 1) - (position + near) + 1).clamp_min(0)
    judged = (asked >= LEAST_QUERIES).nonzero().squeeze(1)
    influence, order = (horizon[judged] / asked[judged]).sort(descending=True, stable=True)
    return judged[order[:INFLUENTIAL]].tolist(), influence[:INFLUENTIAL].tolist()


def _heaviest(mass: Tensor, n: int) -> Tensor:
    """Share of the mass on the heaviest 1/64 of the lines, rounded up."""
    return mass.topk(-(-mass.numel() // TOP_SHARE)).values.sum(dtype=torch.float64) / n


def _share(value: float) -> float:
    """A share without the rounding that would lead out of [0, 1]."""
    return float(min(max(value, 0.0), 1.0))
