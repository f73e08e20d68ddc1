"""FlashPrefill: blocks by their difference to the block row's maximum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anchorscope.methods.base import Method, setting
from anchorscope.methods.head import Head
from anchorscope.methods.selection import Blocks, Selection


@dataclass(frozen=True)
class FlashPrefill(Method):
    """Keep the key blocks whose summed exponential is at least alpha times the largest of the query block.

    B[I, J] is the sum over the queries r of block I of exp(score(q_r, mean key of J)); the maximum that the authors
    subtract first cancels. Also kept: the first `sinks` blocks, the last `window` blocks up to the diagonal, and
    everything for the last `dense` query blocks. The mean key of the diagonal block includes later keys, as in the
    authors' code.
    """

    name: ClassVar = "flashprefill"
    parameter: ClassVar = "alpha"
    sweep: ClassVar = (0.5, 0.3, 0.18, 0.12, 0.08, 0.03, 0.01, 0.001, 1e-5)
    sweep_end: ClassVar = 0.0
    granularity: ClassVar = "block"
    source: ClassVar = "FlashPrefill (released code), as described in docs/methods.md"

    alpha: float = setting(0.08, "share of the row's maximum to keep (0.18, 0.12, 0.08 by model)", low=0.0)
    block: int = setting(128, "block side, tokens", low=1)
    sinks: int = setting(2, "first key blocks kept", low=0)
    window: int = setting(4, "last key blocks kept, the diagonal included", low=0)
    dense: int = setting(2, "last query blocks that keep everything", low=0)

    def select(self, head: Head) -> Selection:
        estimate = head.once(("flashprefill", self.block), lambda: self._log_mass(head))
        visible = head.visible_blocks(self.block, self.block)
        count = len(visible)
        at = torch.arange(count, device=head.device)
        top = estimate.amax(1, keepdim=True)
        near = estimate - top >= (math.log(self.alpha) if self.alpha > 0 else -math.inf)
        keep = near | (at < self.sinks) | (at[:, None] - at < self.window) | (at[:, None] >= count - self.dense)
        products = int(block_rows(visible, self.block, head.n))
        return Selection((Blocks(keep & visible, self.block, self.block),), identify=products)

    def _log_mass(self, head: Head) -> Tensor:
        """ln B, (blocks, blocks); -inf where no pair is visible."""
        keys = head.pooled_keys(self.block)
        visible = head.visible_blocks(self.block, self.block)
        scores = [head.cap(x @ keys.T).logsumexp(0) for x in head.q.split(self.block)]
        return torch.stack(scores).masked_fill_(~visible, -math.inf)


def block_rows(visible: Tensor, block: int, n: int) -> Tensor:
    """Visible (query, key block) pairs: every query of a block scores each key block that its block sees."""
    rows = torch.full((len(visible),), block, device=visible.device)
    rows[-1] = n - (len(visible) - 1) * block
    return (visible.sum(1) * rows).sum()
