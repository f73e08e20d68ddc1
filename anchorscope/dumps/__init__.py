"""The dump format: Q, K and V of attention layers on disk, as safetensors and JSON (docs/dump-format.md)."""

from __future__ import annotations

from anchorscope.dumps.arrays import write_dump
from anchorscope.dumps.format import FORMAT, MANIFEST, VERSION, Entry, Prompt
from anchorscope.dumps.layer import LayerSpec, LayerWriter
from anchorscope.dumps.reader import Dump, EntryCheck, LayerTensors, Verification, open_dump, verify
from anchorscope.dumps.writer import DumpWriter

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "Dump",
    "DumpWriter",
    "Entry",
    "EntryCheck",
    "LayerSpec",
    "LayerTensors",
    "LayerWriter",
    "Prompt",
    "Verification",
    "open_dump",
    "verify",
    "write_dump",
]
