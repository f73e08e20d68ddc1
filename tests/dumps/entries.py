"""Small dumps for the tests: entries, headers, edited manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from anchorscope.dumps import Dump, DumpWriter
from anchorscope.dumps.format import canonical_sha256


def entry(prompt: str = "a", layer: int = 0, tokens: int = 40, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(layer + len(prompt))

    def x(heads: int) -> torch.Tensor:
        return torch.randn(heads, tokens, 8, generator=generator).to(more.pop("dtype", torch.bfloat16))

    made = {"prompt": prompt, "layer": layer, "q": x(6), "k": x(2), "v": x(2), "scale": 0.25}
    return {**made, **more}


def edit(dump: Dump, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the manifest on disk; `seal` keeps its checksum right, so that the change itself must be caught."""
    path = dump.path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if seal:
        manifest["sha256"] = canonical_sha256(manifest)
    path.write_text(json.dumps(manifest))


def header(*names: str) -> dict[str, Any]:
    return {"prompts": [{"name": n, "tokens": 40} for n in names]}


def put(writer: DumpWriter, source: dict[str, Any]) -> None:
    out = writer.layer(
        source["prompt"],
        source["layer"],
        query_heads=range(6),
        kv_heads=range(2),
        tokens=40,
        head_dim=8,
        dtype="bf16",
        scale=0.25,
    )
    for name in "qkv":
        out.put(name, 0, source[name])
    out.close()
