"""The heads of a layer through the Triton kernels: the same diagnostics and stripes, many heads at a time.

What is found of a head does not depend on the heads beside it, nor on whether `analyze` has made some of the sums for
itself (`diagnose_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anchorscope.devices import resolve_backend_name
from anchorscope.dumps import LayerTensors
from anchorscope.heads.diagnostics import HORIZON, STREAM_RECENT, HeadDiagnostics, Sums, finish, visible_blocks
from anchorscope.heads.stripes import HeadStripes, packed_stripes
from anchorscope.params import AnchorParams
from anchorscope.ranges import working_dtypes
from anchorscope.runs.batches import batches, heads_at_once, on_device
from anchorscope.runs.progress import Cancelled

MAX_DIM = 256


class Rule(NamedTuple):
    """What to find, and what scores mean in the layer.

    Attributes:
        scale, window, softcap: of the layer: softmax scale, sliding window in tokens or None, soft-cap in nats or None.
        params, theta: groups, anchor region and threshold (nats) of the stripes.
    """

    scale: float
    window: int | None
    softcap: float | None
    params: AnchorParams
    theta: float

    @property
    def scores(self) -> dict[str, Any]:
        """Scale, window and soft-cap as the kernels take them."""
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    @property
    def groups(self) -> dict[str, Any]:
        """The same with block and step."""
        return {"block": self.params.block, "step": self.params.step, **self.scores}

    @property
    def regions(self) -> dict[str, Any]:
        """The same with the anchor region."""
        return {"init": self.params.init_tokens, "lookback": self.params.lookback_tokens, **self.groups}


class Sought(NamedTuple):
    """Sums of a batch of heads that diagnostics are made of; what kernels return.

    Attributes:
        rows: of the layer's queries, one for each head.
        q, k: (1, H, N, d) and (1, Hkv, N, d).
        lse, entropy: (1, H, N), from `dense_entropy`; mass: (1, H, groups, N), from `column_mass`.
        margin: (1, H, groups, N), from `margins_apart`.
    """

    rows: Sequence[int]
    q: Tensor
    k: Tensor
    lse: Tensor
    entropy: Tensor
    mass: Tensor
    margin: Tensor


class Found(NamedTuple):
    """What is found of one head; diagnostics are None where only stripes were asked for."""

    row: int
    diagnostics: HeadDiagnostics | None
    stripes: HeadStripes


Alone = Callable[[Tensor, Tensor, bool], "tuple[HeadDiagnostics | None, HeadStripes]"]


def suits(q: Tensor, device: torch.device) -> bool:
    """Whether the kernels can measure these heads, and measure them faster than plain torch."""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    fits = device.type == "cuda" and q.dtype in kinds and q.shape[-1] <= MAX_DIM
    return fits and resolve_backend_name("auto", device) == "triton"


def layer_bytes(tokens: int, head_dim: int, params: AnchorParams, heads: int) -> int:
    """Bytes that `diagnose_layer` takes on the device, about: a batch's inputs, two maps, tiles by distance, blocks."""
    groups = params.groups(tokens)
    each = min(heads, heads_at_once(groups, tokens))
    tiles = (512 + 512) * tokens + (tokens // 64 + 1) ** 2 * 8
    return each * (11 * groups * tokens + 16 * tokens * head_dim + 120 * tokens + tiles) + (1 << 28)


def diagnose_layer(
    layer: LayerTensors,
    rule: Rule,
    *,
    wanted: Sequence[int],
    device: torch.device,
    alone: Alone,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Found]:
    """Diagnostics and stripes of the heads of a layer.

    Args:
        layer: queries and keys in the stored dtype, on the device or on the CPU.
        rule: what to find.
        wanted: rows of `layer.q` to diagnose; of the others only stripes are found.
        device: where to compute.
        alone: measures one head that needs float64, given q, k and whether it is wanted.
        cancelled: asked between batches; once true, work stops.

    Raises:
        Cancelled: `cancelled` returned true.
        InputError: NaN or infinity in a tensor, or scores that overflow float32.
    """
    chosen = set(wanted)
    tokens = layer.q.shape[1]
    each = batches(layer.kv_rows, heads_at_once(rule.params.groups(tokens), tokens))
    for batch, q, k, _ in on_device(each, layer.q, layer.k, None, device):
        if cancelled():
            raise Cancelled
        repeats = len(batch.rows) // len(batch.kv_rows)
        own = [place // repeats for place in range(len(batch.rows))]
        dtypes = working_dtypes(q, k, None, own, rule.scale, rule.softcap)
        if all(dtype == torch.float32 for dtype in dtypes):
            yield from _with_kernels(q, k, batch.rows, chosen, rule)
            continue
        for place, (row, kv, dtype) in enumerate(zip(batch.rows, own, dtypes, strict=True)):
            if dtype == torch.float32:
                yield from _with_kernels(q[place][None], k[kv][None], [row], chosen, rule)
            else:
                yield Found(row, *alone(q[place], k[kv], row in chosen))


def _with_kernels(q: Tensor, k: Tensor, rows: Sequence[int], chosen: set[int], rule: Rule) -> Iterator[Found]:
    from anchorscope.kernels.anchor import anchor
    from anchorscope.kernels.column_mass import column_mass
    from anchorscope.kernels.dense_lse import dense_entropy
    from anchorscope.kernels.margins import margins_apart

    q, k = q[None], k[None]
    state = anchor(q, k, None, **rule.regions, precise=True)
    margin = margins_apart(state, k, queries=q.shape[2], **rule.regions)
    if not chosen & set(rows):
        for row, stripes in zip(rows, stripes_of(margin, rule), strict=True):
            yield Found(row, None, stripes)
        return
    _, lse, entropy = dense_entropy(q, k, None, **rule.scores)
    mass = column_mass(q, k, lse, **rule.groups)
    for found in diagnose_batch(Sought(rows, q, k, lse, entropy, mass, margin), rule):
        yield found if found.row in chosen else found._replace(diagnostics=None)


def stripes_of(margin: Tensor, rule: Rule) -> list[HeadStripes]:
    """The stripes of a batch of heads from their margins (1, H, groups, N)."""
    return packed_stripes(margin[0], rule.theta, rule.params.at(margin.shape[-1], rule.window, softcap=rule.softcap))


def diagnose_batch(sums: Sought, rule: Rule) -> list[Found]:
    """Diagnostics and stripes of heads whose sums are at hand; `analyze` makes most of them for itself."""
    from anchorscope.kernels.diagonals import diagonals
    from anchorscope.kernels.late_mass import late_mass

    n = sums.q.shape[2]
    window = None if rule.window is None or rule.window >= n else rule.window
    columns, late, between = late_mass(sums.q, sums.k, sums.lse, sums.mass, STREAM_RECENT, HORIZON, **rule.groups)
    found = diagonals(sums.q, sums.k, sums.lse, **rule.scores)
    seen = visible_blocks(n, window, found.blocks[0, 0])
    stripes = stripes_of(sums.margin, rule)
    totals = zip(columns[0], late[0], between[0], found.distance[0], sums.entropy[0].double(), strict=True)
    with torch.inference_mode():
        return [
            Found(row, finish(n, window, Sums(*total), blocks[seen]), mine)
            for row, total, blocks, mine in zip(sums.rows, totals, found.blocks[0], stripes, strict=True)
        ]
