"""Every rule against itself written as a dense N x N mask in float64, and one tiny case worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anchorscope.methods import METHODS, Head
from anchorscope.methods.hyper import gray_place

VARIANTS = [
    {"n": 203, "window": None, "softcap": None},
    {"n": 160, "window": None, "softcap": 2.0},
    {"n": 203, "window": 70, "softcap": None},
]


def make_head(n=203, window=None, softcap=None, seed=0, d=8):
    """A float64 head with a sink, stripes and a diagonal, so that every rule has something to choose."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.randn(d, generator=g, dtype=torch.float64)
    q += 0.7 * u
    k[:2] += 2 * u
    k[torch.randint(0, n, (n // 20,), generator=g)] += 1.5 * u
    k[n // 3 : n // 3 + 20] += 0.5 * u
    return Head(q, k, scale=d**-0.5, window=window, softcap=softcap, dtype=torch.float64)


def visible(head):
    i, j = np.arange(head.n)[:, None], np.arange(head.n)[None]
    seen = j <= i
    return seen if head.window is None else seen & (i - j < head.window)


def cap(x, head):
    return x if head.softcap is None else head.softcap * np.tanh(x / head.softcap)


def scores(head):
    return np.where(visible(head), cap(head.q.numpy() @ head.k.numpy().T, head), -np.inf)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights(head):
    return softmax(scores(head))


def kept(selection, head):
    """The selection as a dense mask of visible pairs."""
    w = torch.as_tensor(weights(head))
    return selection.mask(0, head.n, 0, head.n, w).numpy() & visible(head)


def cut(n, block):
    return [(a, min(a + block, n)) for a in range(0, n, block)]


def means(x, block):
    return np.stack([x[a:b].mean(0) for a, b in cut(len(x), block)])


def spread(blocks, head, bq, bk):
    """A block mask as token mask."""
    out = np.zeros((head.n, head.n), bool)
    for i, (a, b) in enumerate(cut(head.n, bq)):
        for j, (c, e) in enumerate(cut(head.n, bk)):
            out[a:b, c:e] = blocks[i, j]
    return out & visible(head)


def block_seen(head, bq, bk):
    seen = visible(head)
    return np.array([[seen[a:b, c:e].any() for c, e in cut(head.n, bk)] for a, b in cut(head.n, bq)])


def best_first(x):
    """Indices by descending value, lowest index first among equals."""
    return sorted(range(len(x)), key=lambda t: (-x[t], t))


# ---------------------------------------------------------------------------------------------------------- dense rules


def anchor_rule(head, m):
    n, q, k, s, seen = head.n, head.q.numpy(), head.k.numpy(), scores(head), visible(head)
    init, back = (m.block if x < 0 else x for x in (m.init, m.lookback))
    keep = np.zeros((n, n), bool)
    j = np.arange(n)
    for a, b in cut(n, m.block * m.step):
        region = (j < init) | (j >= a - back)
        keep[a:b] = region
        anchors = np.array([s[i][region & seen[i]].max() for i in range(a, b)])
        for c in range(init, a - back):
            for t0 in range(a, b, m.block):
                t1 = min(t0 + m.block, b)
                if not seen[t0, c]:
                    continue
                pooled = cap(q[t0:t1].mean(0) @ k[c], head)
                if anchors[t0 - a : t1 - a].mean() - pooled <= m.theta:
                    keep[a:b, c] = True
    return keep & seen


def released_rule(head, m):
    n, q, k, s, seen = head.n, head.q.numpy(), head.k.numpy(), scores(head), visible(head)
    group = m.block * m.step
    keep = np.zeros((n, n), bool)
    j = np.arange(n)
    for a in range(0, n, group):
        if a + group > n:
            keep[a:] = True
            continue
        b = a + group
        region = (j < group) | (j >= a)
        keep[a:b] = region
        anchors = np.array([s[i][region & seen[i]].max() for i in range(a, b)])
        for c in range(m.block, a - m.block):
            for t0 in range(a, b, m.block):
                if not seen[t0, c]:
                    continue
                pooled = cap(q[t0 : t0 + m.block].mean(0) @ k[c], head)
                if anchors[t0 - a : t0 - a + m.block].mean() - pooled <= m.theta:
                    keep[a:b, c] = True
    return keep & seen


def streaming_rule(head, m):
    i, j = np.arange(head.n)[:, None], np.arange(head.n)[None]
    return ((j < m.sinks) | (i - j < m.window)) & visible(head)


def last_lines(head, last):
    n, w = head.n, weights(head)
    columns, slashes = np.zeros(n), np.zeros(n)
    for i in range(max(n - last, 0), n):
        for j in range(i + 1):
            columns[j] += w[i, j]
            slashes[i - j] += w[i, j]
    return columns, slashes


def vertical_slash_rule(head, m):
    columns, slashes = last_lines(head, m.last)
    columns[:30], slashes[:100] = np.inf, np.inf
    v, s = max(1, round(m.vertical * m.budget)), max(1, round(m.slash * m.budget))
    keep = np.zeros((head.n, head.n), bool)
    keep[:, best_first(columns)[:v]] = True
    for o in best_first(slashes)[:s]:
        for a, b in cut(head.n, m.block):
            # the tile: `block` keys from where the diagonal enters at the tile's first query
            low, high = a - o, a - o + m.block
            keep[a:b, max(low, 0) : max(high, 0)] = True
    return keep & visible(head)


def flexprefill_rule(head, m):
    n, b = head.n, m.block
    count, least = math.ceil(n / b), math.ceil(m.min_budget / b)
    if n <= max(2 * b, least * b):
        return visible(head)
    columns, slashes = (x / b for x in last_lines(head, b))
    pooled = np.array([columns[a:e].sum() for a, e in cut(n, b)])
    pooled_slashes = np.array([slashes[a:e].sum() for a, e in cut(n, b)])
    guess = cap(head.q.numpy()[-b:].mean(0) @ means(head.k.numpy(), b).T, head)
    seen = block_seen(head, b, b)
    guess = softmax(np.where(seen[-1], guess, -np.inf))
    middle = (guess + pooled) / 2
    div = sum(
        float(p * math.log(p / mid)) / 2 for x in (guess, pooled) for p, mid in zip(x, middle, strict=True) if p > 0
    )
    aware = math.sqrt(max(div, 0)) < m.tau

    def size(x):
        total, used = 0.0, 0
        for value in sorted(x, reverse=True):
            total += value
            if total > m.gamma:
                break
            used += 1
        return max(least, (used + 1) // b + 1)

    wide, tall = (least, least) if aware else (size(columns), size(slashes))
    pooled[0] = pooled_slashes[0] = np.inf
    blocks = np.zeros((count, count), bool)
    blocks[:, best_first(pooled)[:wide]] = True
    for t in best_first(pooled_slashes)[:tall]:
        for i in range(t, count):
            blocks[i, i - t] = True
    if aware:
        p = softmax(np.where(seen, cap(means(head.q.numpy(), b) @ means(head.k.numpy(), b).T, head), -np.inf))
        total = 0.0
        for x in best_first(p.ravel()):
            total += p.ravel()[x]
            if total > m.gamma * count:
                break
            blocks[x // count, x % count] = True
    return spread(blocks, head, b, b)


def xattention_rule(head, m):
    n, s = head.n, m.stride
    strides = math.ceil(n / s)
    q, k = np.zeros((strides * s, head.d)), np.zeros((strides * s, head.d))
    q[:n], k[:n] = head.q.numpy(), head.k.numpy()
    seen = block_seen(head, s, s)
    a = np.full((strides, strides), -np.inf)
    for u in range(strides):
        for v in range(strides):
            if seen[u, v]:
                a[u, v] = cap(sum(q[u * s + s - 1 - t] @ k[v * s + t] for t in range(s)) / s, head)
    p, per = softmax(a), m.block // s
    count = math.ceil(n / m.block)
    blocks = np.zeros((count, count), bool)
    blocks_seen = block_seen(head, m.block, m.block)
    for i in range(count):
        mass = np.array([p[i * per : (i + 1) * per, j * per : (j + 1) * per].sum() for j in range(count)])
        forced = {x for x in (0, i) if blocks_seen[i, x]}
        have, target = sum(mass[x] for x in forced), m.threshold * mass.sum()
        chosen = set(forced)
        for x in best_first(np.where([y in forced for y in range(count)], 0, mass)):
            if have >= target or x in forced:
                break
            chosen.add(x)
            have += mass[x]
        blocks[i, list(chosen)] = True
    return spread(blocks, head, m.block, m.block)


def flashprefill_rule(head, m):
    b = m.block
    s = cap(head.q.numpy() @ means(head.k.numpy(), b).T, head)
    seen = block_seen(head, b, b)
    count = len(seen)
    blocks = np.zeros((count, count), bool)
    for i, (a, e) in enumerate(cut(head.n, b)):
        row = np.where(seen[i], np.exp(s[a:e] - s[a:e][:, seen[i]].max()).sum(0), 0)
        for j in range(i + 1):
            blocks[i, j] = row[j] >= m.alpha * row.max() or j < m.sinks or i - j < m.window or i >= count - m.dense
    return spread(blocks, head, b, b)


def pooled_topk(q, k, head, block, count):
    seen = block_seen(head, block, block)
    s = np.where(seen, cap(q @ k.T, head), -np.inf)
    blocks = np.zeros_like(seen)
    for i in range(len(seen)):
        blocks[i, best_first(s[i])[:count]] = True
    return spread(blocks, head, block, block)


def block_topk_rule(head, m):
    return pooled_topk(means(head.q.numpy(), m.block), means(head.k.numpy(), m.block), head, m.block, m.k)


def dhsa_rule(head, m):
    root = np.array([math.sqrt(b - a) for a, b in cut(head.n, m.chunk)])[:, None]
    q, k = (means(x.numpy(), m.chunk) * root for x in (head.q, head.k))
    return pooled_topk(q, k, head, m.chunk, m.k)


def skip_softmax_rule(head, m):
    s, b = scores(head), m.block
    count = math.ceil(head.n / b)
    blocks = np.zeros((count, count), bool)
    for i, (a, e) in enumerate(cut(head.n, b)):
        running = np.full(e - a, -np.inf)
        for j, (c, f) in enumerate(cut(head.n, b)):
            tile = s[a:e, c:f].max(1)
            running = np.maximum(running, tile)
            with np.errstate(invalid="ignore"):
                blocks[i, j] = any(
                    t > -np.inf and t - r >= math.log(m.threshold) for t, r in zip(tile, running, strict=True)
                )
    return spread(blocks, head, b, b)


def sparge_rule(head, m):
    def similarity(x, block):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return [float((unit[a:b] @ unit[a:b].T).mean()) for a, b in cut(len(x), block)]

    q, k = head.q.numpy(), head.k.numpy()
    sim_q, sim_k = similarity(q, m.query_block), similarity(k, m.key_block)
    seen = block_seen(head, m.query_block, m.key_block)
    s = cap(means(q, m.query_block) @ means(k, m.key_block).T, head)
    blocks = np.zeros_like(seen)
    for i in range(len(seen)):
        alike = [j for j in range(seen.shape[1]) if seen[i, j] and sim_k[j] >= m.similarity]
        blocks[i] = [x < m.similarity for x in sim_k]
        if sim_q[i] < m.similarity:
            blocks[i] = True
        elif alike:
            p = softmax(s[i, alike])
            total = 0.0
            for x in best_first(p):
                if total >= m.cdf:
                    break
                blocks[i, alike[x]] = True
                total += p[x]
    return spread(blocks, head, m.query_block, m.key_block)


def oracle_row_rule(head, m):
    return (weights(head) >= m.threshold) & visible(head)


def oracle_stripe_rule(head, m):
    w, seen, j = weights(head), visible(head), np.arange(head.n)
    keep = np.zeros_like(seen)
    for a, b in cut(head.n, m.block * m.step):
        keep[a:b] = (j < m.block) | (j >= a - m.block)
        for c in range(head.n):
            pairs = seen[a:b, c].sum()
            if pairs and w[a:b, c].sum() / pairs >= m.threshold:
                keep[a:b, c] = True
    return keep & seen


def oracle_block_rule(head, m):
    w, seen = weights(head), visible(head)
    blocks = np.zeros((math.ceil(head.n / m.block),) * 2, bool)
    for i, (a, b) in enumerate(cut(head.n, m.block)):
        for j, (c, e) in enumerate(cut(head.n, m.block)):
            pairs = seen[a:b, c:e].sum()
            blocks[i, j] = i == j or (pairs > 0 and w[a:b, c:e].sum() / pairs >= m.threshold)
    return spread(blocks, head, m.block, m.block)


def power_rule(head, m):
    count = math.ceil(head.n / m.block)
    powers = {2**p for p in range(20)}
    blocks = [[j == 0 or i - j < m.window or i - j in powers for j in range(count)] for i in range(count)]
    return spread(np.array(blocks), head, m.block, m.block)


def hip_rule(head, m):
    n, k = head.n, head.k.numpy()
    keep = np.zeros((n, n), bool)
    for a, b in cut(n, m.block):
        query = head.q.numpy()[a:b].mean(0)
        budget = max(1, m.k // m.key_block)
        count = max(1, min(2 * budget, math.ceil(a / m.key_block)))
        ranges = [(r * a // count, (r + 1) * a // count) for r in range(count)]

        def value(r, a=a, query=query):
            hidden = head.window is not None and r[1] <= a - head.window + 1
            return -math.inf if hidden else float(cap(query @ k[(r[0] + r[1]) // 2], head))

        while True:
            ranges = [r for r in ranges if r[1] > r[0]]
            ranges = sorted(sorted(ranges, key=lambda r: (-value(r), r))[:budget])
            if all(y - x <= m.key_block for x, y in ranges):
                break
            halves = []
            for x, y in ranges:
                halves += [(x, (x + y) // 2), ((x + y) // 2, y)] if y - x > m.key_block else [(x, y)]
            ranges = halves
        for x, y in ranges:
            keep[a:b, x:y] = True
        keep[a:b, : m.sinks] = True
        keep[a:b, max(a - m.window, 0) :] = True
    return keep & visible(head)


def hyper_rule(head, m):
    g = torch.Generator().manual_seed(m.seed)
    planes = torch.randn(head.d, m.planes, generator=g, dtype=torch.float64).numpy()
    gray = [format(x ^ (x >> 1), f"0{m.planes}b") for x in range(2**m.planes)]
    place = {bits: x for x, bits in enumerate(gray)}
    code = [
        [place["".join("1" if y > 0 else "0" for y in row)] for row in x.numpy() @ planes] for x in (head.q, head.k)
    ]
    g = torch.Generator().manual_seed(m.seed)
    keep = np.zeros((head.n, head.n), bool)
    level = [(0, head.n)]
    while level:
        deeper = []
        for a, b in level:
            if b - a <= m.leaf:
                keep[a:b, a:b] = True
                continue
            mid = a + (b - a + 1) // 2
            deeper += [(a, mid), (mid, b)]
            if b - mid < m.leaf:
                keep[mid:b, a:mid] = True
                continue
            runs = math.ceil((mid - a) / m.block)
            rows = sorted(range(mid, b), key=lambda i: (code[0][i], i))
            cols = sorted(range(a, mid), key=lambda j: (code[1][j], j))
            size_r, size_c = math.ceil(len(rows) / runs), math.ceil(len(cols) / runs)
            for r in range(runs):
                keep[np.ix_(rows[r * size_r : (r + 1) * size_r], cols[r * size_c : (r + 1) * size_c])] = True
            drawn = torch.randint(a, mid, (m.samples,), generator=g).numpy()
            keep[mid:b, drawn] = True
        level = deeper
    return keep & visible(head)


# Small blocks, so that a 200-token head has many; values of the swept parameter from sparse to dense.
CASES = {
    "anchor": (anchor_rule, {"block": 8, "step": 3}, (-math.inf, -1.0, 0.5, 1.5, math.inf)),
    "anchor-released": (released_rule, {"block": 8, "step": 4}, (-math.inf, 0.5, 1.5, math.inf)),
    "streaming": (streaming_rule, {"sinks": 5}, (1, 16, 500)),
    "vertical-slash": (
        vertical_slash_rule,
        {"vertical": 40, "slash": 110, "last": 16, "block": 16},
        (0.3, 0.9, 1.0, 1.1, 4.0),
    ),
    "flexprefill": (flexprefill_rule, {"block": 16, "min_budget": 32}, (0.3, 0.7, 0.95, 1.0)),
    "xattention": (xattention_rule, {"block": 16, "stride": 4}, (0.0, 0.5, 0.9, 1.0)),
    "flashprefill": (
        flashprefill_rule,
        {"block": 16, "sinks": 1, "window": 2, "dense": 1},
        (0.9, 0.5, 0.2, 0.0),
    ),
    "block-topk": (block_topk_rule, {"block": 16}, (1, 3, 50)),
    "skip-softmax": (skip_softmax_rule, {"block": 16}, (1.0, 0.5, 0.1, 1e-6)),
    "spargeattn": (
        sparge_rule,
        {"query_block": 32, "key_block": 16, "similarity": 0.1},
        (0.2, 0.6, 0.98, 1.0),
    ),
    "power": (power_rule, {"block": 8}, (1, 3, 30)),
    "hip": (hip_rule, {"block": 16, "key_block": 4, "sinks": 3, "window": 5}, (4, 16, 40, 300)),
    "dhsa": (dhsa_rule, {"chunk": 16}, (1, 3, 50)),
    "hyper": (hyper_rule, {"block": 8, "samples": 4, "planes": 4}, (10, 30, 60, 300)),
    "oracle-row": (oracle_row_rule, {}, (0.1, 0.01, 1e-3, 0.0)),
    "oracle-stripe": (oracle_stripe_rule, {"block": 8, "step": 3}, (0.1, 0.01, 0.0)),
    "oracle-block": (oracle_block_rule, {"block": 16}, (0.1, 0.01, 0.0)),
}


def test_every_method_has_a_case():
    assert set(CASES) == set(METHODS)


@pytest.mark.parametrize("variant", VARIANTS, ids=["full", "softcap", "window"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name, variant):
    rule, fields, values = CASES[name]
    head = make_head(**variant)
    sizes = []
    for value in values:
        method = METHODS[name](**{**fields, METHODS[name].parameter: value})
        got, want = kept(method.select(head), head), rule(head, method)
        assert np.array_equal(got, want), (name, value, np.argwhere(got != want)[:5])
        sizes.append(int(got.sum()))
    # The settings must tell something: not all dense, not all the same.
    assert sizes[0] < head.pairs, "the sparsest setting kept everything"
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("tau", [0.0, 10.0])
def test_both_branches_of_flexprefill(tau):
    head = make_head()
    method = METHODS["flexprefill"](block=16, min_budget=32, gamma=0.6, tau=tau)
    assert np.array_equal(kept(method.select(head), head), flexprefill_rule(head, method))


def test_vertical_slash_with_exact_diagonals():
    head = make_head()
    method = METHODS["vertical-slash"](vertical=40, slash=110, last=16, block=1)
    assert np.array_equal(kept(method.select(head), head), vertical_slash_rule(head, method))


# ---------------------------------------------------------------------------------------------------------------- by
# hand


def tiny(q, k, **options):
    """One-dimensional queries and keys: the score of (i, j) is q[i] * k[j]."""
    column = [torch.tensor(x, dtype=torch.float64)[:, None] for x in (q, k)]
    return Head(*column, scale=1.0, dtype=torch.float64, **options)


def rows(selection, head):
    """Kept keys per query, as a list of strings of key numbers."""
    return ["".join(str(j) for j in np.flatnonzero(row)) for row in kept(selection, head)]


ONES = [1.0] * 8


def test_anchor_by_hand():
    """Block 1, step 2: groups (0,1) (2,3) (4,5) (6,7); init 1, lookback 1. All queries are 1, so score = key.

    Group at 4: candidates are 1 and 2. Query 4 sees the region {0, 3, 4}: anchor max(0, 0, 0) = 0; key 2 has score 3,
    so its difference is -3; key 1 has score -2, difference 2. Theta 1 keeps key 2 and not key 1. Group at 6:
    candidates 1..4 with scores -2, 3, 0, 0; anchor of query 6 is 0 (keys 0, 5, 6), of query 7 is 5 (its own). Blocks
    are single queries: the least difference counts, so query 6 decides: 2, -3, 0, 0. Keys 2, 3, 4 are kept.
    """
    head = tiny(ONES, [0.0, -2, 3, 0, 0, 0, 0, 5])
    got = rows(METHODS["anchor"](block=1, step=2, theta=1.0).select(head), head)
    assert got == ["0", "01", "012", "0123", "0234", "02345", "023456", "0234567"]


def test_anchor_released_by_hand():
    """Block 1, step 2, theta 1: region = keys 0, 1 and the own group; searched 1 <= j < start - 1.

    Group at 4 searches 1 and 2: key 2 (score 3) is kept, key 3 (just before the group) is never seen, key 1 is in the
    region anyway. Its difference is 0 - (-2) = 2 > 1: not twice. Group at 6 searches 1..4 and never sees 5. With theta
    2, key 1 is selected as well and enters the softmax twice.
    """
    head = tiny(ONES, [0.0, -2, 3, 0, 0, 0, 0, 5])
    method = METHODS["anchor-released"](block=1, step=2, theta=1.0)
    got = method.select(head)
    assert rows(got, head) == ["0", "01", "012", "0123", "0124", "01245", "012346", "0123467"]
    assert got.twice is not None
    assert not got.twice.keep.any()
    assert method.at(2.0).select(head).twice.keep.nonzero().tolist() == [[2, 1], [3, 1]]


def test_streaming_by_hand():
    """One sink, window 2: query 3 keeps 0, 2 and 3."""
    head = tiny([1.0] * 4, [0.0] * 4)
    assert rows(METHODS["streaming"](sinks=1, window=2).select(head), head) == ["0", "01", "012", "023"]


def test_vertical_slash_by_hand():
    """140 tokens, the last query looked at; one column and one diagonal of budget go to the forced ones: key 0, offset
    0.

    As tiles of 4, the main diagonal keeps each query's own block of 4 keys.
    """
    head = tiny([1.0] * 140, [0.0] * 140)
    got = rows(METHODS["vertical-slash"](vertical=1, slash=1, last=1, block=4).select(head), head)
    assert got[2] == "012"
    assert got[6] == "0456"
    assert got[9] == "089"


def test_flexprefill_by_hand():
    """Blocks of 2, no least budget, tau 0 (never query-aware); 8 tokens; the last two queries look at keys 2 and 3
    only.

    Columns: keys 2 and 3 hold all the mass, half each; cover 0.4: the largest alone exceeds it, so 0 + 1 = 1 token and
    1 // 2 + 1 = 1 block: the forced block column 0. Diagonals: offsets 3 (7-?), 4, 5 hold 0.25, 0.5, 0.25; the largest
    alone exceeds 0.4: one block again, the forced main diagonal. With gamma 0.6: columns 0.5, 1.0 -> one within, 2
    tokens, 2 blocks: column block 1 joins. Diagonals 0.5, 0.75: one within, two blocks: offsets 4 and 5 form block
    diagonal 2 (mass 0.75), which adds block 0 to block 2 and block 1 to block 3.
    """
    head = tiny(ONES, [0.0, 0, 50, 50, 0, 0, 0, 0])
    method = METHODS["flexprefill"](block=2, min_budget=0, tau=0.0, gamma=0.4)
    assert rows(method.select(head), head) == ["0", "01", "012", "0123", "014", "0145", "016", "0167"]
    got = rows(method.at(0.6).select(head), head)
    assert got == ["0", "01", "012", "0123", "01234", "012345", "01236", "012367"]


def test_xattention_by_hand():
    """Blocks of 2, stride 2: block = stride. Query stride 3 scores 0, 3, 0, 0 on the four key strides (means of 6 and
    0).

    Softmax of (0, 3, 0, 0) is (.043, .870, .043, .043): forced are 0 and 3 (.087); threshold 0.5 adds block 1. Query
    stride 2 sees (0, 3, 0): (.045, .909, .045), block 1 joins too.
    """
    head = tiny(ONES, [0.0, 0, 6, 0, 0, 0, 0, 0])
    got = rows(METHODS["xattention"](block=2, stride=2, threshold=0.5).select(head), head)
    assert got[5] == "012345"
    assert got[7] == "012367"


def test_flashprefill_by_hand():
    """Blocks of 2, nothing forced: mean keys 0, ln 4, ln 2, 0, so B is (1, 4, 2, 1) times two rows for the last block.

    Alpha 0.5 keeps at least 2: blocks 1 and 2, not even the diagonal.
    """
    head = tiny(ONES, [0.0, 0, math.log(4), math.log(4), math.log(2), math.log(2), 0, 0])
    method = METHODS["flashprefill"](block=2, alpha=0.49, sinks=0, window=0, dense=0)
    assert rows(method.select(head), head)[7] == "2345"


def test_block_topk_by_hand():
    """Mean keys 0, 5, 5, 1: two blocks for the last query block are 1 and 2; with one, the tie goes to block 1."""
    head = tiny(ONES, [0.0, 0, 5, 5, 5, 5, 1, 1])
    method = METHODS["block-topk"](block=2, k=2)
    assert rows(method.select(head), head)[7] == "2345"
    assert rows(method.at(1).select(head), head)[7] == "23"


def test_skip_softmax_by_hand():
    """Tile maxima 0, 5, 3, 5 for the last query; threshold e^-1: tile 2 is 2 below the running 5 and is skipped.

    Tile 0 comes first, so it is computed although the row's maximum dwarfs it.
    """
    head = tiny(ONES, [0.0, 0, 5, 5, 3, 3, 5, 5])
    assert rows(METHODS["skip-softmax"](block=2, threshold=math.exp(-1)).select(head), head)[7] == "012367"


def test_spargeattn_by_hand():
    """Key block 2 holds 1 and -1: mean cosine 0, always kept. The others have mean keys 0+, 5, 1; cdf 0.9 keeps block
    1.
    """
    head = tiny(ONES, [0.1, 0.1, 5, 5, 1, -1, 1, 1])
    assert rows(METHODS["spargeattn"](query_block=2, key_block=2, cdf=0.9).select(head), head)[7] == "2345"


def test_power_by_hand():
    """Blocks of 1, window 1: query 7 keeps itself, 7-1, 7-2, 7-4 and key 0."""
    head = tiny(ONES, [0.0] * 8)
    assert rows(METHODS["power"](block=1, window=1).select(head), head)[7] == "03567"


def test_hip_by_hand():
    """Blocks of 8 queries, one key kept per search, key blocks of 1: the 8 earlier keys are cut into [0,4) and [4,8).

    Their middle keys 2 and 6 score 1 and 3, so [4,8) is halved: middle keys 5 and 7 score 0 and 9; [6,8) is halved
    into 6 and 7: key 7 wins.
    """
    head = tiny([1.0] * 16, [0.0, 0, 1, 0, 0, 0, 3, 9] + [0.0] * 8)
    got = kept(METHODS["hip"](block=8, key_block=1, k=1, sinks=0, window=0).select(head), head)
    assert np.flatnonzero(got[8]).tolist() == [7, 8]


def test_dhsa_by_hand():
    """Five tokens, chunks of 2: the last chunk has one token. Its query scores 2*2, 3*2, 4 (vectors are means * sqrt
    2, and 1 for the last): with root 2 = 1.41: 2.83, 4.24, 4. The best chunk is 1, although the last key alone is
    larger.
    """
    head = tiny([1.0] * 5, [2.0, 2, 3, 3, 4])
    assert rows(METHODS["dhsa"](chunk=2, k=1).select(head), head)[4] == "23"


def test_hyper_by_hand():
    """Eight tokens, leaf 4: halves of 4 are dense; the later half has 4 queries, not fewer than the leaf, so it
    hashes.

    All rows are alike and get one code; runs of 2 in stable order pair queries 4, 5 with keys 0, 1 and 6, 7 with 2, 3.
    """
    head = tiny(ONES, [1.0] * 8)
    got = rows(METHODS["hyper"](leaf=4, block=2, samples=0).select(head), head)
    assert got == ["0", "01", "012", "0123", "014", "0145", "23456", "234567"]


def test_gray_order_changes_one_bit():
    bits = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    assert gray_place(bits).tolist() == [0, 1, 2, 3]


def test_oracles_by_hand():
    """Scores 0, ln 6, 0, 0 for the last query: weights 1/9, 6/9, 1/9, 1/9. Earlier rows: 1; 1/7, 6/7; 1/8, 6/8, 1/8.

    Threshold 0.2 per pair keeps (0,0) and column 1. Columns of the group (2,3), anchor region aside: there are no
    candidates with blocks of 1 (init 1, lookback 1). Blocks of 2: block (1, 0) holds (1 + 6) / 8 + 7 / 9 over 4 pairs
    = 0.41.
    """
    head = tiny([1.0] * 4, [0.0, math.log(6), 0, 0])
    assert rows(METHODS["oracle-row"](threshold=0.2).select(head), head) == ["0", "1", "1", "1"]
    assert rows(METHODS["oracle-block"](block=2, threshold=0.4).select(head), head)[3] == "0123"
    assert rows(METHODS["oracle-block"](block=2, threshold=0.42).select(head), head)[3] == "23"


def test_oracle_stripe_by_hand():
    """Groups of 2 (block 1, step 2), six tokens; key 1 scores ln 6. Group at 4 has candidates 1 and 2.

    Query 4 gives key 1 a weight of 6/10, query 5 6/11: mean 0.573; key 2 gets 1/10 and 1/11: mean 0.095.
    """
    head = tiny([1.0] * 6, [0.0, math.log(6), 0, 0, 0, 0])
    method = METHODS["oracle-stripe"](block=1, step=2, threshold=0.57)
    assert rows(method.select(head), head)[5] == "01345"
    assert rows(method.at(0.58).select(head), head)[5] == "0345"
    assert rows(method.at(0.09).select(head), head)[5] == "012345"


# -------------------------------------------------------------------------------------------------------------
# identities


def test_theta_inf_is_dense_and_minus_inf_the_anchor_region():
    from anchorscope.params import AnchorParams, anchor_pairs

    head = make_head()
    method = METHODS["anchor"](block=8, step=3)
    assert kept(method.at(math.inf).select(head), head).sum() == head.pairs
    want = anchor_pairs(head.n, AnchorParams(8, 3))
    assert kept(method.at(-math.inf).select(head), head).sum() == want


def test_anchor_released_leaves_a_hole_where_anchor_does_not():
    """At theta = +inf, everything is selected: the partition of docs/method.md is dense, the released one is not."""
    head = make_head(n=192)
    got = kept(METHODS["anchor-released"](block=8, step=4, theta=math.inf).select(head), head)
    hole = visible(head) & ~got
    groups = [(a, a + 32) for a in range(64, 192, 32)]
    assert hole.sum() == sum(8 * (b - a) for a, b in groups)
    for a, b in groups:
        assert hole[a:b, a - 8 : a].all()
