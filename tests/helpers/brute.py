"""Every reported quantity of one head by brute force in float64, written from docs/method.md; N x N tensors."""

from __future__ import annotations

import math

import numpy as np
import torch

from anchorscope.kernels import reference
from anchorscope.params import AnchorParams


class Brute:
    """Dense masks and weights of one head. q, k, v: (N, d)."""

    def __init__(self, q, k, v, params: AnchorParams, *, scale, window=None, softcap=None):
        q, k = q.double()[None, None], k.double()[None, None]
        self.v = None if v is None else v.double()[None, None]
        self.geo = reference.geometry(
            q,
            k,
            block=params.block,
            step=params.step,
            init=params.init,
            lookback=params.lookback,
            window=window,
        )
        self.params = params
        self.s = reference.scores(q, k, scale=scale, softcap=softcap)
        self.margin = reference.margins(q, k, self.geo, scale=scale, softcap=softcap)
        self.visible = reference.visible_mask(self.geo)
        self.p = torch.softmax(self.s.masked_fill(~self.visible, -math.inf), -1)[0, 0]

    def keep(self, theta):
        return reference.keep_mask(self.margin, theta, self.geo)[0, 0]

    def at(self, theta) -> dict[str, float]:
        """The per-theta columns of heads.csv."""
        keep = self.keep(theta)
        rows = (self.p * keep).sum(1).numpy()
        anchor = reference.anchor_mask(self.geo)
        candidates = int((self.visible & ~anchor).sum())
        out = {
            "recall": rows.mean(),
            "recall_p05": np.percentile(rows, 5),
            "recall_min": rows.min(),
            "recall_last": rows[-self.params.block :].mean(),
            "kept_pairs": int(keep.sum()),
            "stripe_pairs": int((keep & ~anchor).sum()),
            "visible_pairs": int(self.visible.sum()),
            "candidate_pairs": candidates,
        }
        if self.v is not None:
            dense = self.p @ self.v[0, 0]
            kept = reference.masked_attention(self.s, self.v, keep)[0][0, 0]
            out["output_error"] = float((kept - dense).norm() / dense.norm())
            out["output_close_01"] = float(((kept - dense).abs() < 0.01).double().mean())
            out["output_close_005"] = float(((kept - dense).abs() < 0.005).double().mean())
        return out

    def columns(self):
        """(groups, N): attention mass and visible pairs of each column, summed over the group's queries."""
        mass = torch.stack([x.sum(0) for x in self.p.split(self.params.group)])
        pairs = torch.stack([x.sum(0) for x in self.visible.split(self.params.group)])
        return mass, pairs

    def oracle(self) -> tuple[np.ndarray, np.ndarray]:
        """Kept pairs and recall of every prefix of the stripe oracle, anchor region first."""
        mass, pairs = self.columns()
        candidate = reference.candidate_mask(self.geo) & (pairs > 0)
        anchor = reference.anchor_mask(self.geo)
        m, c = mass[candidate].numpy(), pairs[candidate].numpy()
        order = np.argsort(-(m / c), kind="stable")
        base = float((self.p * anchor).sum())
        recall = np.concatenate([[0.0], m[order].cumsum()]) + base
        return np.concatenate([[0], c[order].cumsum()]) + int(anchor.sum()), recall / len(self.p)
