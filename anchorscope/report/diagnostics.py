"""What the page shows of a folder of `heads`: every column it measured, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchorscope.report.read import Kind, Table

NOTES = ("hidden_sink_tokens", "stripe_tokens")  # columns of words: read head by head, nothing to color by


def pack_diagnostics(tables: Sequence[Table], prompt: str) -> dict[str, Any] | None:
    """What `heads` measured, whatever its columns: `columns`, which of them are `notes`, and texts by "layer:head"."""
    for table in tables:
        names = [c for c in table.columns if c not in ("prompt", "layer", "head", "kv_head")]
        heads = {table.head_key(row): [row[n] for n in names] for row in table.of_prompt(prompt)}
        if heads:
            return {"columns": names, "notes": [n for n in names if n in NOTES], "heads": heads}
    return None


KIND = Kind(
    name="diagnostics",
    command="heads",
    what="diagnosis of heads",
    table="diagnostics.csv",
    report="heads.json",
    state="anchorscope-heads-run",
    within="heads",
    pack=pack_diagnostics,
)
