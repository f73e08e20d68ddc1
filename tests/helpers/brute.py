"""Every reported quantity of one head by brute force in float64, written from docs/method.md; N x N tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
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
            scale=scale,
            softcap=softcap,
        )
        self.params = params
        self.s = reference.scores(q, k, scale=scale, softcap=softcap)
        self.margin = reference.margins(q, k, self.geo)
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


THETAS = (3.0, -math.inf, 0.5, math.inf, 1.5, 3.0)


def make(n, d, seed=0, strength=3.0):
    """Random Q/K/V with a sink and a few strong columns, so that stripes exist."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, d, generator=g) for _ in range(3))
    u = torch.randn(d, generator=g)
    q += 0.5 * u
    k[:2] += 0.5 * strength * u
    k[torch.randint(0, n, (max(1, n // 20),), generator=g)] += 0.3 * strength * u
    return q, k, v


def compare(got, brute, thetas):
    """Every per-theta quantity, except where a margin is too close to theta to call."""
    for t, theta in enumerate(thetas):
        want = brute.at(theta)
        margin = brute.margin[torch.isfinite(brute.margin)]
        near = ((margin - theta).abs() < 1e-4 + 1e-6 * float(brute.s.abs().max())).any()
        for name in ("visible_pairs", "candidate_pairs"):
            assert getattr(got, name) == want[name], name
        if not near:
            assert got.kept_pairs[t] == want["kept_pairs"]
            assert got.stripe_pairs[t] == want["stripe_pairs"]
            for name in ("recall", "recall_p05", "recall_min", "recall_last", "output_error"):
                assert getattr(got, name)[t] == pytest.approx(want[name], abs=2e-5), (name, theta)
            for name in ("output_close_01", "output_close_005"):
                assert getattr(got, name)[t] == pytest.approx(want[name], abs=2e-3), (name, theta)
