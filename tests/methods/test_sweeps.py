"""Default sweeps end where everything is kept, at any length; the one rule that cannot says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from anchorscope.compare import score, score_lineup
from anchorscope.methods import Contender, Head, Method, Sinks, line_up, setting
from anchorscope.methods.selection import Selection

SMALL = "anchor.block=8,anchor.step=2", "oracle-stripe.block=8,oracle-stripe.step=2", "flexprefill.min_budget=16"
SMALL += ("flexprefill.block=16", "anchor-released.block=8,anchor-released.step=2", "hip.window=3", "hip.sinks=2")
CANNOT = "anchor-released"


def lineup(tokens: int, small: bool = True) -> tuple[Contender, ...]:
    merged: dict[str, list[str]] = {}
    for text in SMALL if small else ():
        merged.setdefault(text.split(".")[0], []).append(text)
    return tuple(c.at_length(tokens) for c in line_up("all", [",".join(x) for x in merged.values()]))


def flat_head(n: int, window: int | None = None, dtype: torch.dtype = torch.float64) -> Head:
    """Attention so flat that no rule finds anything to prefer."""
    g = torch.Generator().manual_seed(n)
    q, k = (torch.randn(n, 8, generator=g, dtype=dtype) for _ in range(2))
    return Head(q, k, scale=1e-3, window=window, dtype=dtype)


def steep_head(n: int, strength: float) -> Head:
    """Anchors that differ by many nats from the keys that carry the mass: queries of a block look at different keys."""
    g = torch.Generator().manual_seed(5)
    keys = torch.nn.functional.normalize(torch.randn(n, 16, generator=g), dim=1)
    return Head(strength * keys[torch.randint(0, n, (n,), generator=g)], keys, scale=1.0)


@pytest.mark.parametrize(("n", "window"), [(1, None), (64, None), (100, 30), (203, None), (203, 70)])
def test_the_last_value_keeps_every_pair_of_the_mask(n, window):
    """Against the visible pairs written as an N x N mask."""
    head = flat_head(n, window)
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    seen = (j <= i) & (i - j < (window or n))
    weights = torch.as_tensor(np.where(seen, 1.0, 0.0))
    for c in lineup(n):
        kept = c.method.at(c.sweep[-1]).select(head).mask(0, n, 0, n, weights).numpy() & seen
        if c.label == CANNOT:
            lost = seen & ~kept
            group = 16
            starts = i // group * group
            assert (lost <= ((j >= starts - 8) & (j < starts))).all()  # the block before the group, and nothing else
            assert c.end(n) == "most"
            assert lost.any() == (n >= 3 * group)
            continue
        assert (kept == seen).all(), c.label
        assert c.end(n) == "dense"


@pytest.mark.parametrize("n", [64, 500, 2100])
def test_flat_attention_is_reached_by_every_method(n):
    """In both arithmetics, with the settings shown by default."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(n, 4, generator=g)
    for dtype in (torch.float32, torch.float64) if n < 1000 else (torch.float32,):
        head = flat_head(n, dtype=dtype)
        contenders = [c for c in lineup(n, small=n < 1000) if c.label != CANNOT]
        ends = [c.method.at(c.sweep[-1]).select(head) for c in contenders]
        for c, found in zip(contenders, score(head, v, ends), strict=True):
            assert found.recall == 1.0, (c.label, dtype)
            assert found.density == 1.0, c.label
            assert found.output_error < 1e-5, c.label


def test_values_ascend_to_the_end_and_are_few():
    for n in (64, 1000, 4096, 8192, 131072):
        for c in lineup(n, small=False):
            assert len(c.sweep) <= (22 if c.method.oracle else 18), c.label
            assert len(set(c.sweep)) == len(c.sweep)
            steps = np.diff(c.sweep)
            assert (steps > 0).all() or (steps < 0).all(), c.label
            if c.method.sweep_doubles:  # no gap to fall into
                assert (np.array(c.sweep[1:]) <= 2.1 * np.array(c.sweep[:-1])).all(), c.label


def test_steep_heads_need_the_values_that_were_missing():
    """Margins beyond the largest theta of before: 14 keeps less than 0.9 of the mass."""
    head = steep_head(600, 60.0)
    contenders = [c for c in lineup(600) if c.method.name == "anchor"]
    found = {value: s for _, value, s in score_lineup(head, None, contenders)}
    assert found[14.0].recall < 0.9
    assert found[math.inf].recall == found[math.inf].density == 1.0
    between = [v for v in found if 14 < v < math.inf and found[v].recall > found[14.0].recall]
    assert between
    assert found[32.0].recall > 0.9


def test_cannot_is_the_released_rule_alone():
    assert [c.label for c in lineup(8192, small=False) if c.end(8192) != "dense"] == [CANNOT]
    (released,) = (c for c in lineup(8192, small=False) if c.label == CANNOT)
    assert released.sweep[-1] == math.inf
    assert "never attended" in released.method.never_dense
    both_zero = line_up("vertical-slash", ["vertical-slash.vertical=0,vertical-slash.slash=0"])[0]
    assert both_zero.end(100) == "given"


@dataclass(frozen=True)
class Strange(Method):
    """Somebody's method, which knows nothing of ends; its fields may have any name."""

    name: ClassVar = "strange"
    parameter: ClassVar = "share"
    sweep: ClassVar = (0.1, 0.5)
    granularity: ClassVar = "token"
    source: ClassVar = "a test"

    share: float = setting(0.1, "a share", low=0.0, high=1.0)
    dense: int = setting(2, "a number", low=0)

    def select(self, head: Head) -> Selection:
        return Selection((Sinks(round(self.share * head.n), head.device),))


def test_sweeps_of_others_and_of_users_stay():
    (given,) = line_up("anchor", ["anchor.theta=4/8"])
    assert given.at_length(4096).sweep == (4.0, 8.0)
    assert given.end(4096) == "given"
    own = Contender("mine", given.method, (3.0,))
    assert own.at_length(4096).sweep == (3.0,)
    theirs = Contender("s", Strange(), Strange.sweep, default=True)
    assert theirs.at_length(4096) == theirs
    assert theirs.end(4096) == "given"
