"""tokens.json of an analysis: what the tokens of its prompts say, so that the page shows words without the dump."""

from __future__ import annotations

import json
from collections.abc import Collection

from anchorscope.runs.sources import Source

FILE = "tokens.json"


def tokens_json(source: Source, names: Collection[str]) -> str | None:
    """Ids and their text of the prompts named, as JSON; None where the source does not tell the text.

    `prompts` holds name and `token_ids`, `token_texts` the text by id (see docs/dump-format.md).
    """
    prompts = [p for p in source.prompts if p.name in names and p.token_ids is not None]
    if source.vocabulary is None or not prompts:
        return None
    record = {
        "format": "anchorscope-tokens",
        "version": 1,
        "dump": source.identity,
        "prompts": [{"name": p.name, "token_ids": p.token_ids} for p in prompts],
        "token_texts": source.vocabulary.part(i for p in prompts for i in p.token_ids or ()).to_json(),
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
