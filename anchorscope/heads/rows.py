"""The rows of a layer's heads: what was found of each, and what its stripes have in common with others'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from anchorscope.heads.diagnostics import HeadDiagnostics
from anchorscope.heads.request import LayerUnit
from anchorscope.heads.stripes import HeadStripes, overlap
from anchorscope.heads.tables import HeadRow, row_json

STRIPE_TOKENS = 12


def layer_rows(
    unit: LayerUnit,
    found: Mapping[int, HeadDiagnostics],
    selections: Mapping[int, HeadStripes],
    previous: Mapping[int, HeadStripes],
) -> list[dict[str, Any]]:
    """The rows of a layer as a part holds them.

    Args:
        unit: the layer.
        found: diagnostics of its heads.
        selections: stripes of its heads, and of their siblings.
        previous: stripes of the same heads one layer before.
    """
    return [row_json(_row(unit, head, found[head], selections, previous)) for head in unit.heads]


def _row(
    unit: LayerUnit,
    head: int,
    found: HeadDiagnostics,
    selections: Mapping[int, HeadStripes],
    previous: Mapping[int, HeadStripes],
) -> HeadRow:
    entry, mine = unit.entry, selections[head]
    owner = entry.kv_head(head)
    others = [s for h, s in sorted(selections.items()) if h != head and entry.kv_head(h) == owner]
    shared = [x for x in (overlap(mine, s) for s in others) if not math.isnan(x)]
    before = previous.get(head)
    return HeadRow(
        prompt=entry.prompt,
        layer=entry.layer,
        head=head,
        kv_head=owner,
        kind=found.kind,
        window_recall=found.window_recall,
        sink_1=found.sink_1,
        sink_4=found.sink_4,
        hidden_sinks=tuple(zip(found.hidden_sinks, found.hidden_sink_masses, strict=True)),
        hidden_sink_mass=found.hidden_sink_mass,
        local_128=found.local_128,
        local_1024=found.local_1024,
        distance=found.distance,
        distance_1024=found.distance_1024,
        effective_keys_mean=found.effective_keys_mean,
        effective_keys_median=found.effective_keys_median,
        influence=found.influence,
        influential=tuple(zip(found.influential, found.influences, strict=True)),
        vertical_mass=found.vertical_mass,
        slash_mass=found.slash_mass,
        block_mass=found.block_mass,
        stripe_density=mine.density,
        stripe_tokens=_stripe_tokens(mine, found.far_mass),
        overlap_groups=overlap(mine, mine, shift=1),
        overlap_heads=math.fsum(shared) / len(shared) if shared else math.nan,
        overlap_layer=math.nan if before is None else overlap(mine, before),
        previous_layer=None if before is None or unit.previous is None else unit.previous.layer,
    )


def _stripe_tokens(stripes: HeadStripes, far_mass: np.ndarray) -> tuple[tuple[int, float, int, int], ...]:
    """The stripes that later queries attend to most, see `HeadRow.stripe_tokens`."""
    columns = stripes.columns()
    columns = columns[far_mass[columns] > 0]
    if len(columns) > STRIPE_TOKENS:  # sorting all of them would take long; equal ones stay in
        least = np.partition(far_mass[columns], len(columns) - STRIPE_TOKENS)[len(columns) - STRIPE_TOKENS]
        columns = columns[far_mass[columns] >= least]
    top = columns[np.argsort(-far_mass[columns], kind="stable")[:STRIPE_TOKENS]]
    selected, candidate = stripes.chosen(top)
    return tuple(
        (int(j), float(far_mass[j] / stripes.tokens), int(s), int(c))
        for j, s, c in zip(top, selected, candidate, strict=True)
    )
