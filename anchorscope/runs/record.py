"""What the folder of a run without a dump says of its source: the model and the prompts (`folder.SOURCE`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorscope.dumps.format import MAX_MANIFEST_BYTES, Prompt, parse_prompts
from anchorscope.errors import DumpError, InputError
from anchorscope.files import read_json
from anchorscope.runs.folder import SOURCE
from anchorscope.shapes import check

FORMAT = "anchorscope-source"
VERSION = 1
_SHAPE = {"format": FORMAT, "identity": str, "model": dict, "prompts": [dict], "proof": (dict, None)}


@dataclass(frozen=True)
class SourceRecord:
    """A model and prompts that were measured as the model ran.

    Attributes:
        path: the file.
        manifest: its content, with the keys of a dump's manifest.
        prompts: the prompts, with token ids and what was found out about each.
    """

    path: Path
    manifest: Mapping[str, Any]
    prompts: tuple[Prompt, ...]

    @property
    def identity(self) -> str:
        """What results name in the place of a dump's identity."""
        return str(self.manifest["identity"])

    @property
    def model(self) -> Mapping[str, Any]:
        """What is known of the model."""
        return dict(self.manifest["model"])


def read_record(folder: Path) -> SourceRecord | None:
    """The record in a folder of results, or None where results came from a dump.

    Raises:
        DumpError: it is damaged.
    """
    path = folder / SOURCE
    if not path.is_file():
        return None
    hint = "it is damaged; give the same command again"
    try:
        value: Any = read_json(path, MAX_MANIFEST_BYTES, "source")
    except InputError as error:
        raise DumpError(str(error)) from None
    check(value, _SHAPE, str(path), hint=hint, error=DumpError)
    try:
        prompts = parse_prompts(value, folder)
    except DumpError as error:
        raise DumpError(f"{path}: {hint} ({error})") from None
    return SourceRecord(path, value, tuple(prompts))
