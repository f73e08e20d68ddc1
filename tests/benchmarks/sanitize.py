"""All kernels once on small shapes: `compute-sanitizer --tool memcheck python tests/benchmarks/sanitize.py`.

`--tool racecheck` does not follow mbarriers and reports what they guard (docs/benchmarks/log.md, entry 11).
"""

from __future__ import annotations

import torch

from anchorscope.kernels import anchor, common, identify, pipeline, sparse
from anchorscope.kernels.column_mass import column_mass
from anchorscope.kernels.dense_lse import dense_entropy
from anchorscope.kernels.diagonals import diagonals
from anchorscope.kernels.late_mass import late_mass
from anchorscope.kernels.margins import margins
from anchorscope.kernels.sweep import bin_columns, sweep


def main() -> None:
    """Run every kernel; the sanitizer reports on its own."""
    torch.manual_seed(0)
    for dim, n, block, step in ((128, 700, 64, 4), (64, 333, 32, 2), (80, 333, 32, 2)):
        q, k, v = (torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
        grid = {"block": block, "step": step}
        pipeline.anchor_attention(q, k, v, theta=3.0, **grid)
        geo = common.checked(q, k, v, **grid)
        out, lse, q_bar, a_bar = anchor.portable(q, k, v, geo, False)
        stripes = identify.identify((q_bar, a_bar), k, theta=4.0, queries=n, **grid)
        sparse.portable(out, lse, q, k, v, stripes.columns, stripes.offsets, geo)
        state = anchor.anchor(q, k, v, precise=True, **grid)
        full, dense, _ = dense_entropy(q, k, v)
        margin = margins(state, k, queries=n, **grid)
        mass = column_mass(q, k, dense, **grid)
        late_mass(q, k, dense, mass, 64, (32, 200), **grid)
        diagonals(q, k, dense)
        columns, bins = bin_columns(margin, torch.tensor([2.0, 4.0]))
        sweep(q, k, v, state, full, columns, bins, thetas=2, **grid)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
