"""Realistic head profiles without a model: a sink, a local band and stripes, at any prompt length.

Every curve and count follows from the drawn attention mass with the project's own integer geometry, so that the
profiles satisfy the invariants of real ones (partition, monotone curves, end points).
"""

from __future__ import annotations

import math

import numpy as np

from anchorscope.params import AnchorParams
from anchorscope.profiles import MAX_COLUMNS, MAX_ROWS, MAX_STEPS, HeadProfile, bin_edges

CURVE = np.concatenate([[-np.inf], np.arange(-4.0, 24.1, 0.25), [np.inf]])


def make_profile(
    *,
    prompt: str = "prose",
    layer: int = 0,
    head: int = 0,
    tokens: int = 8192,
    block: int = 64,
    step: int = 4,
    init: int | None = None,
    lookback: int | None = None,
    thetas: tuple[float, ...] = (8.0, 4.0, 12.0),
    window: int | None = None,
    values: bool = True,
    seed: int = 0,
) -> HeadProfile:
    """A synthetic head; its share of local, sink and stripe mass follows from the seed, layer and head."""
    rng = np.random.default_rng([seed, layer, head])
    params = AnchorParams(block, step, init, lookback)
    groups, n = params.groups(tokens), tokens
    rows = bin_edges(n, MAX_ROWS, params.group)
    columns = bin_edges(n, MAX_COLUMNS)
    geo = params.at(n, window)
    visible, anchored = geo.visible_pairs, geo.anchor_pairs

    # What the head is like: deep layers are more streaming, some heads are retrieval heads with wide-spread
    # mass.
    spread = 0.4 * rng.beta(1.0, 5.0)
    sink = rng.beta(1.5, 2.0)
    local = rng.beta(2.0, 2.0)
    reach = rng.choice([20.0, 60.0, 150.0, 400.0])
    sharpness, offset = rng.uniform(0.9, 1.5), rng.normal(1.0, 2.0)
    stripes = max(3, int(n * rng.uniform(0.002, 0.012)))
    hot = np.sort(rng.choice(n, size=min(stripes, n), replace=False))
    strength = rng.gamma(0.6, 1.0, size=hot.size)

    shape = (rows.size - 1, columns.size - 1)
    mass, kept = np.zeros(shape), np.zeros(shape)
    margin, share = np.full(shape, np.inf), np.zeros(shape)
    levels = np.unique(thetas)
    steps, candidates_of = np.zeros((2, *shape, len(levels) + 1)), np.zeros(shape)
    curve_stripes = np.zeros(CURVE.size, dtype=np.int64)
    curve_mass = np.zeros(CURVE.size)  # summed over queries
    stripe_pairs = np.zeros(len(thetas), dtype=np.int64)
    stripe_mass = np.zeros((len(thetas), groups))
    anchor_mass = np.zeros(groups)
    oracle: list[tuple[np.ndarray, np.ndarray]] = []
    per_column = np.zeros(n)
    bins = np.searchsorted(columns, np.arange(n), side="right") - 1

    for g in range(groups):
        first, last = g * params.group, min((g + 1) * params.group, n)
        queries = last - first
        start, stop = geo.candidates(g)
        pairs = geo.column_pairs(np.arange(start, stop), first, last)
        weight = np.zeros(last)  # mass per query of the group, by key
        weight[0] += sink
        distance = (first + last) / 2 - np.arange(last)
        near = np.exp(-np.maximum(np.abs(distance) - queries / 2, 0) / reach)
        weight += local * near / near.sum()
        weight += spread * rng.gamma(0.15, 1.0, size=last) / last * 6
        live = rng.random(hot.size) < 0.6  # each stripe is read by some groups only
        earlier = live & (hot < last)
        weight[hot[earlier]] += strength[earlier] * rng.uniform(0.3, 1.0, earlier.sum()) / max(strength.sum(), 1e-9)
        if window is not None:
            weight[: max(first - window, 0)] = 0
        weight /= weight.sum()
        candidate = np.zeros(last, dtype=bool)
        candidate[start:stop] = pairs > 0
        count = np.zeros(last, dtype=np.int64)
        count[start:stop] = pairs

        # Margins follow the mass with noise, as real ones do: about -log(mass) below the anchor.
        with np.errstate(divide="ignore"):
            delta = -sharpness * np.log(weight * 4) + offset + rng.normal(0, 0.7, last)
        delta[~candidate] = np.inf
        anchor_mass[g] = weight[~candidate].sum()
        per_column[:last] += weight * queries
        row = int(np.searchsorted(rows, first, side="right")) - 1
        portion = queries / (rows[row + 1] - rows[row])
        np.add.at(mass[row], bins[:last], weight * portion)
        chosen = ~candidate | (delta <= thetas[0])
        np.add.at(kept[row], bins[:last], weight * portion * chosen)
        np.minimum.at(margin[row], bins[:last], delta)
        candidates = np.bincount(bins[:last], weights=candidate, minlength=shape[1])
        picked = np.bincount(bins[:last], weights=candidate & chosen, minlength=shape[1])
        share[row] = np.maximum(share[row], picked / np.maximum(candidates, 1))
        at = (row, bins[:last][candidate], np.searchsorted(levels, delta[candidate]))
        np.add.at(steps[0], at, (weight * portion)[candidate])
        np.add.at(steps[1], at, 1)
        candidates_of[row] += candidates

        order = np.argsort(delta[candidate])
        sorted_delta = delta[candidate][order]
        cumulative = np.append(0, np.cumsum(weight[candidate][order]))
        counted = np.append(0, np.cumsum(count[candidate][order]))
        at = np.searchsorted(sorted_delta, CURVE, side="right")
        curve_stripes += counted[at]
        curve_mass += cumulative[at] * queries
        for t, theta in enumerate(thetas):
            k = int(np.searchsorted(sorted_delta, theta, side="right"))
            stripe_pairs[t] += counted[k]
            stripe_mass[t, g] = cumulative[k]
        oracle.append((weight[candidate] * queries, count[candidate]))

    there = steps[1] > 0
    kept_steps = {
        "step_rows": rows,
        "step_columns": columns,
        "step_count": there.sum(2),
        "step_theta": np.nonzero(there)[2],
        "step_mass": steps[0][there],
        "step_stripes": (steps[1] / np.maximum(candidates_of, 1)[..., None])[there],
    }
    sizes = np.diff(np.append(np.arange(0, n, params.group), n))
    base = float((anchor_mass * sizes).sum() / n)
    curve_recall = np.maximum.accumulate(np.clip(base + curve_mass / n, 0, 1))
    gain = np.concatenate([m for m, _ in oracle]) if oracle else np.zeros(0)
    cost = np.concatenate([c for _, c in oracle]) if oracle else np.zeros(0, dtype=np.int64)
    best = np.argsort(-gain / np.maximum(cost, 1))
    oracle_pairs = anchored + np.append(0, np.cumsum(cost[best]))
    oracle_recall = np.clip(base + np.append(0, np.cumsum(gain[best])) / n, 0, 1)
    thin = np.unique(np.linspace(0, oracle_pairs.size - 1, 400).astype(int))

    recall_group = np.clip(anchor_mass + stripe_mass, 0, 1)  # (T, groups)
    edges = bin_edges(n, 64)
    middle = np.minimum((edges[:-1] + edges[1:]) // 2 // params.group, groups - 1)
    wobble = rng.normal(0, 0.02, size=(len(thetas), edges.size - 1))
    position = np.clip(recall_group[:, middle] + wobble * (1 - recall_group[:, middle]), 0, 1)
    recall = np.clip((recall_group * sizes).sum(1) / n, 0, 1)
    error = np.sqrt(1 - recall) * 0.4 if values else np.full(len(thetas), math.nan)
    top = np.argsort(-per_column)[: min(64, n)]
    return HeadProfile(
        prompt=prompt,
        layer=layer,
        head=head,
        kv_head=head // 3,
        tokens=n,
        head_dim=64,
        block=block,
        step=step,
        init=params.init_tokens,
        lookback=params.lookback_tokens,
        window=window,
        softcap=None,
        scale=0.125,
        backend="torch",
        dump_identity="0" * 64,
        visible_pairs=visible,
        anchor_pairs=anchored,
        candidate_pairs=visible - anchored,
        thetas=np.array(thetas),
        recall=recall,
        recall_p05=np.clip(recall - 0.1, 0, 1),
        recall_min=np.clip(recall - 0.3, 0, 1),
        recall_last=position[:, -1],
        kept_pairs=anchored + stripe_pairs,
        stripe_pairs=stripe_pairs,
        output_error=error,
        output_close_01=1 - error,
        output_close_005=np.clip(1 - 2 * error, 0, 1),
        curve_theta=CURVE,
        curve_recall=curve_recall,
        curve_pairs=anchored + curve_stripes,
        oracle_pairs=oracle_pairs[thin],
        oracle_recall=oracle_recall[thin],
        heat_rows=rows,
        heat_columns=columns,
        heat_mass=mass,
        heat_kept=kept,
        heat_margin=margin,
        heat_stripes=share,
        **(kept_steps if there.sum() <= MAX_STEPS else {}),  # as an earlier version, which saved none
        position_recall=position,
        position_edges=edges,
        top_columns=top,
        top_mass=per_column[top] / n,
    )
