"""`write_dump`: a dump from tensors or arrays of any source, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from anchorscope.dtypes import dtype_name
from anchorscope.dumps.format import is_name
from anchorscope.dumps.layer import LayerSpec
from anchorscope.dumps.reader import Dump
from anchorscope.dumps.writer import DumpWriter, prompt_record, texts_record
from anchorscope.errors import InputError
from anchorscope.shown import counted
from anchorscope.tokens import tokenizer_texts

if TYPE_CHECKING:
    import os

    from torch import Tensor

REQUIRED = ("prompt", "layer", "q", "k", "scale")
ALLOWED = {*REQUIRED, "v", "window", "softcap", "query_heads", "kv_heads"}


def write_dump(
    path: str | os.PathLike[str],
    entries: Iterable[Mapping[str, Any]],
    *,
    model: Mapping[str, Any] | None = None,
    prompts: Mapping[str, Mapping[str, Any]] | None = None,
    token_texts: Mapping[int, str | bytes] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Dump:
    """Write Q, K and V from any source as a dump that every AnchorScope command reads.

    Args:
        path: the folder to create.
        entries: mappings with `prompt` (name), `layer`, `q` (H, N, d), `k` (Hkv, N, d), `scale`, and optionally `v`
            (Hkv, N, d), `window`, `softcap`, `query_heads`, `kv_heads` (original indices, ascending; 0, 1, 2, ... by
            default). Tensors or numpy arrays, as attention consumes them: after rotary embedding and norms, K and V
            not repeated, causal.
        model: anything worth recording about the model (JSON values).
        prompts: optional `text` and `token_ids` by prompt name.
        token_texts: text of token ids, so that results show words: a string, or UTF-8 bytes where a token is a part of
            a character. Only ids that the prompts use are kept.
        tokenizer: a transformers tokenizer that knows the texts, in place of `token_texts`.
        overwrite: replace a dump that is there.

    Returns:
        The written dump, opened.

    Raises:
        InputError: an entry is incomplete or inconsistent, or the folder cannot be used.
        RunFailure: the disk is full or failed.
    """
    items = [dict(entry) for entry in entries]
    tensors = [_tensors(index, item) for index, item in enumerate(items)]
    if not items:
        raise InputError("write_dump needs at least one entry")
    lengths = _lengths(items, tensors)
    extra = prompts or {}
    if unknown := sorted(extra.keys() - lengths.keys()):
        raise InputError(f"prompts names {unknown[0]!r}, which no entry uses")
    dtypes = {dtype_name(found["q"].dtype) for found in tensors}
    records = [prompt_record(name, n, **extra.get(name, {})) for name, n in lengths.items()]
    used = {i for record in records for i in record.get("token_ids", ())}
    header = {
        "model": None if model is None else dict(model),
        "dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "prompts": records,
        **texts_record(token_texts if tokenizer is None else tokenizer_texts(tokenizer, used), used),
    }
    with DumpWriter(path, header, overwrite=overwrite) as writer:
        for item, found in zip(items, tensors, strict=True):
            out = writer.layer(item["prompt"], item["layer"], _spec(item, found))
            try:
                for name, x in found.items():
                    out.put(name, 0, x)
                out.close()
            except BaseException:
                out.abort()
                raise
        return writer.finish()


def _place(index: int, item: Mapping[str, Any]) -> str:
    return f"entry {index} (prompt {item['prompt']}, layer {item['layer']})"


def _tensors(index: int, item: Mapping[str, Any]) -> dict[str, Tensor]:
    """q, k and, if given, v of an entry.

    Raises:
        InputError: the entry is incomplete or does not fit together.
    """
    import torch

    if missing := [key for key in REQUIRED if item.get(key) is None]:
        raise InputError(f"entry {index} lacks {missing[0]!r}")
    if unknown := sorted(item.keys() - ALLOWED):
        raise InputError(f"entry {index} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(ALLOWED))}")
    if not is_name(item["prompt"]):
        raise InputError(f"entry {index}: prompt must be a name of 1 to 200 printable characters")
    where = _place(index, item)
    found = {name: torch.as_tensor(item[name]) for name in ("q", "k", "v") if item.get(name) is not None}
    for name, x in found.items():
        rows = x if name == "q" else found["k"]
        expected = (rows.shape[0], *found["q"].shape[1:]) if x.ndim == 3 else None
        if tuple(x.shape) != expected or 0 in x.shape or x.dtype != found["q"].dtype:
            raise InputError(
                f"{where}: {name} is {tuple(x.shape)} {x.dtype};"
                " q must be (H, N, d), k and v (Hkv, N, d), all of one dtype"
            )
    dtype_name(found["q"].dtype)
    for key, x in (("query_heads", found["q"]), ("kv_heads", found["k"])):
        if item.get(key) is not None and len(item[key]) != x.shape[0]:
            raise InputError(f"{where}: {key} names {counted(len(item[key]), 'head')} for {counted(x.shape[0], 'row')}")
    return found


def _lengths(items: list[dict[str, Any]], tensors: list[dict[str, Tensor]]) -> dict[str, int]:
    """Tokens by prompt.

    Raises:
        InputError: entries of one prompt differ.
    """
    lengths: dict[str, int] = {}
    for index, (item, found) in enumerate(zip(items, tensors, strict=True)):
        tokens = found["q"].shape[1]
        if lengths.setdefault(item["prompt"], tokens) != tokens:
            raise InputError(
                f"{_place(index, item)} has {counted(tokens, 'token')} where the prompt has {lengths[item['prompt']]}"
            )
    return lengths


def _spec(item: Mapping[str, Any], found: Mapping[str, Tensor]) -> LayerSpec:
    heads, tokens, head_dim = found["q"].shape
    query_heads, kv_heads = item.get("query_heads"), item.get("kv_heads")
    return LayerSpec(
        query_heads=list(range(heads)) if query_heads is None else list(query_heads),
        kv_heads=list(range(found["k"].shape[0])) if kv_heads is None else list(kv_heads),
        tokens=tokens,
        head_dim=head_dim,
        dtype=dtype_name(found["q"].dtype),
        scale=item["scale"],
        window=item.get("window"),
        softcap=item.get("softcap"),
        values="v" in found,
    )
