"""Dump format v1: the manifest's vocabulary, its validation, and the checks of one tensor file's header.

A dump is a folder with `manifest.json` and one safetensors file per (prompt, layer). docs/dump-format.md specifies it;
this module is the only place that interprets it. Whatever comes from the folder is untrusted: every value is checked
before use, file names cannot leave the folder, and only JSON and safetensors are parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorscope.errors import DumpError, InputError
from anchorscope.files import member, read_json, visible
from anchorscope.proof import PromptProof
from anchorscope.shown import counted
from anchorscope.vocabulary import Vocabulary

FORMAT = "anchorscope-dump"
VERSION = 1
MANIFEST = "manifest.json"
TOKEN_TEXTS = "token_texts"
MAX_MANIFEST_BYTES = 1 << 29  # token ids and texts of many long prompts fit; a hostile file does not fill the memory
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' names -> ours
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dump.

    Attributes:
        name: unique within the dump.
        tokens: prefill length N in tokens.
        token_ids: the N ids the model read, if recorded.
        text: the text they came from, if recorded.
        sha256: hash of the token ids (decimal, comma separated), if recorded.
        proof: how well the model predicts its last tokens, if recorded.
    """

    name: str
    tokens: int
    token_ids: list[int] | None = None
    text: str | None = None
    sha256: str | None = None
    proof: PromptProof | None = None


@dataclass(frozen=True)
class Entry:
    """One attention layer of one prompt: a tensor file and what its scores mean.

    Attributes:
        prompt: name of the prompt.
        layer: index of the layer in the model.
        file: plain file name inside the dump's folder.
        scale: softmax scale (score = scale * q.k, nats).
        window: sliding window w (key j visible to query i only if i - j < w), or None.
        softcap: logit soft-cap c (score becomes c * tanh(score / c)), or None.
        query_heads: original index of each row of `q`.
        kv_heads: original index of each row of `k` and `v`; row r of `q` reads row r // (H // Hkv).
        tokens: N.
        head_dim: d.
        dtype: "fp32", "fp16" or "bf16", as stored.
        has_values: whether the file holds `v`.
        bytes: size of the file.
        sha256: hash of the whole file, or None (then `verify` says "unverified").
    """

    prompt: str
    layer: int
    file: str
    scale: float
    window: int | None
    softcap: float | None
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    tokens: int
    head_dim: int
    dtype: str
    has_values: bool
    bytes: int
    sha256: str | None = None

    def kv_head(self, head: int) -> int:
        """Original index of the kv head that a query head reads."""
        return self.kv_heads[self.query_heads.index(head) // (len(self.query_heads) // len(self.kv_heads))]


def damaged(message: str) -> DumpError:
    """The error for a dump that cannot be used; what it quotes comes from an untrusted file."""
    return DumpError(visible(message, 600))


def canonical_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 (hex) of a manifest without its own `sha256` key: sorted keys, no spaces, UTF-8."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def token_sha256(token_ids: list[int]) -> str:
    """SHA-256 (hex) of token ids written in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def is_int(value: object, low: int = 0) -> bool:
    """Whether a JSON value is an integer of at least `low` (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 1 << 53


def is_positive(value: object) -> bool:
    """Whether a JSON value is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:
        return False


def is_name(value: object) -> bool:
    """Whether a JSON value can name a prompt: 1 to 200 printable characters (fit for a CSV field and a plot title)."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable() and value == value.strip()


def plain_file(folder: Path, name: object) -> Path | None:
    """The path of a regular file directly inside `folder`, or None if `name` could mean anything else.

    Refused: separators of any system, drive letters, `..`, hidden names, symbolic links (they may lead outside),
    devices, pipes.
    """
    path = member(folder, name, ".safetensors")
    if path is None:
        return None
    try:
        return path if stat.S_ISREG(os.lstat(path).st_mode) else None
    except FileNotFoundError:
        raise damaged(f"{path} is missing: the manifest lists it; capture this dump again") from None
    except OSError as error:
        raise damaged(f"{path} cannot be read: {error.strerror}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse and check `manifest.json`, everything except the tensor files.

    Raises:
        DumpError: folder missing or not a dump, manifest truncated, edited, of a newer version or inconsistent.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        what = "is a file, not a dump folder" if folder.exists() else "does not exist"
        raise damaged(f"{folder} {what}: give the folder that `anchorscope capture` wrote")
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise damaged(f"{path} must be a regular file, not a link, folder or device")
    except FileNotFoundError:
        raise damaged(f"{folder} is not a dump: it holds no {MANIFEST}") from None
    except OSError as error:
        raise damaged(f"{path} cannot be read: {error.strerror}") from None
    try:
        manifest = read_json(path, MAX_MANIFEST_BYTES, "manifest")
        if not isinstance(manifest, dict):
            raise InputError(f"manifest {path} holds no JSON object")
        checksum = canonical_sha256(manifest)
    except RecursionError:
        raise damaged(f"manifest {path} is nested too deeply") from None
    except InputError as error:
        raise damaged(f"{error}; capture this dump again") from None

    version: Any = manifest.get("version")
    if manifest.get("format") != FORMAT:
        raise damaged(f"{path} is not an AnchorScope manifest: its format is not {FORMAT!r}")
    if is_int(version, 1) and version > VERSION:
        raise damaged(f"{path} has format version {version}, this AnchorScope reads {VERSION}: upgrade anchorscope")
    if not is_int(version, 1):
        raise damaged(f"{path} has no valid format version ({version!r}); it should be {VERSION}")
    if "sha256" in manifest and manifest["sha256"] != checksum:
        raise damaged(
            f"{path} does not match its own checksum: it is damaged or was edited"
            " (delete its key sha256 to use it as unverified)"
        )
    complete = manifest.get("complete", True)
    if not isinstance(complete, bool):
        raise damaged(f"{path}: complete must be true or false, not {complete!r}")
    for key in ("model", "tokenizer", "proof"):
        if not isinstance(manifest.get(key), (dict, type(None))):
            raise damaged(f"{path}: {key} must be an object or null")
    for key in ("prompts", "entries"):
        if not isinstance(manifest.get(key), list) or not (manifest[key] or not complete):
            raise damaged(f"{path}: {key} must be a list with at least one element")
    return manifest


def parse_prompts(manifest: dict[str, Any], folder: Path) -> list[Prompt]:
    """The prompts of a manifest; `tokens` is 0 where the manifest leaves it to the tensor files.

    Raises:
        DumpError: a prompt is malformed or named twice.
    """
    prompts: list[Prompt] = []
    for index, item in enumerate(manifest["prompts"]):
        where = f"{folder / MANIFEST}: prompt {index}"
        if not isinstance(item, dict) or not is_name(item.get("name")):
            raise damaged(f"{where} needs a name of 1 to 200 printable characters")
        name, tokens, ids = item["name"], item.get("tokens"), item.get("token_ids")
        if any(name == other.name for other in prompts):
            raise damaged(f"{where}: the name {name!r} is used twice")
        if tokens is not None and not is_int(tokens, 1):
            raise damaged(f"{where} ({name}): tokens must be a whole number of at least 1, not {tokens!r}")
        if ids is not None:
            if not isinstance(ids, list) or not all(is_int(i) for i in ids) or len(ids) != (tokens or len(ids)):
                raise damaged(f"{where} ({name}): token_ids must be {tokens or 'a list of'} whole numbers")
            if item.get("sha256", token_sha256(ids)) != token_sha256(ids):
                raise damaged(f"{where} ({name}): token_ids do not match their sha256")
        for key in ("text", "sha256"):
            if not isinstance(item.get(key), (str, type(None))):
                raise damaged(f"{where} ({name}): {key} must be text")
        try:
            proof = None if item.get("proof") is None else PromptProof.from_json(item["proof"])
        except ValueError as error:
            raise damaged(f"{where} ({name}): {error}") from None
        prompts.append(Prompt(name, tokens or 0, ids, item.get("text"), item.get("sha256"), proof))
    return prompts


def parse_token_texts(manifest: dict[str, Any], folder: Path) -> Vocabulary | None:
    """What the tokens of the prompts say, if the manifest tells.

    Raises:
        DumpError: it is malformed.
    """
    if manifest.get(TOKEN_TEXTS) is None:
        return None
    try:
        return Vocabulary.from_json(manifest[TOKEN_TEXTS])
    except ValueError as error:
        raise damaged(f"{folder / MANIFEST}: {TOKEN_TEXTS} {error}") from None


def parse_entry(item: object, index: int, folder: Path, prompts: dict[str, Prompt]) -> Entry:
    """Check one entry of a manifest together with the header of its tensor file.

    Raises:
        DumpError: anything that does not fit, with the file or the prompt and layer named.
    """
    where = f"{folder / MANIFEST}: entry {index}"
    if not isinstance(item, dict):
        raise damaged(f"{where} is not an object")
    prompt: Any = item.get("prompt")
    layer: Any = item.get("layer")
    if not isinstance(prompt, str) or prompt not in prompts:
        raise damaged(f"{where}: no prompt is named {prompt!r}")
    if not is_int(layer):
        raise damaged(f"{where}: layer must be a whole number, not {layer!r}")
    where = f"{where} (prompt {prompt}, layer {layer})"
    _check_attention(item, where)
    path = _entry_file(item, where, folder)
    shapes, dtype = read_header(path)
    _check_against_file(item, path, shapes, dtype)
    heads, tokens, head_dim = shapes["q"]
    if (expected := prompts[prompt].tokens) and expected != tokens:
        raise damaged(f"{path} holds {counted(tokens, 'token')} where the prompt has {expected}")
    return Entry(
        prompt=prompt,
        layer=layer,
        file=path.name,
        scale=float(item["scale"]),
        window=item.get("window"),
        softcap=None if item.get("softcap") is None else float(item["softcap"]),
        query_heads=_head_indices(item, "query_heads", heads, path, where),
        kv_heads=_head_indices(item, "kv_heads", shapes["k"][0], path, where),
        tokens=tokens,
        head_dim=head_dim,
        dtype=dtype,
        has_values="v" in shapes,
        bytes=path.stat().st_size,
        sha256=item.get("sha256"),
    )


def _check_attention(item: dict[str, Any], where: str) -> None:
    """Scale, window and soft-cap of an entry, and the form of its checksum."""
    if not is_positive(item.get("scale")):
        raise damaged(f"{where}: scale must be a positive finite number, not {item.get('scale')!r}")
    window, softcap, sha256 = (item.get(key) for key in ("window", "softcap", "sha256"))
    if window is not None and not is_int(window, 1):
        raise damaged(f"{where}: window must be null or a whole number of at least 1, not {window!r}")
    if softcap is not None and not is_positive(softcap):
        raise damaged(f"{where}: softcap must be null or a positive finite number, not {softcap!r}")
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64):
        raise damaged(f"{where}: sha256 must be null or 64 hexadecimal digits")


def _entry_file(item: dict[str, Any], where: str, folder: Path) -> Path:
    """The tensor file of an entry, which is there at the size stated."""
    path = plain_file(folder, item.get("file"))
    if path is None:
        raise damaged(
            f"{where}: file must be the plain name of a .safetensors file inside the dump's folder"
            f" (no path, no link), not {item.get('file')!r}"
        )
    actual, size = path.stat().st_size, item.get("bytes")
    if size is not None and size != actual:
        raise damaged(f"{path} is {actual} bytes long where the manifest says {size}: truncated or damaged")
    return path


def _check_against_file(item: dict[str, Any], path: Path, shapes: dict[str, tuple[int, int, int]], dtype: str) -> None:
    """What an entry says of its tensors, if it does, is what the file holds."""
    if (shape := item.get("shape")) is not None and shape != {"q": list(shapes["q"]), "k": list(shapes["k"])}:
        raise damaged(f"{path}: tensor shapes {shapes} differ from the manifest's {shape}")
    if (declared := item.get("dtype")) is not None and declared != dtype:
        raise damaged(f"{path} holds {dtype} where the manifest says {declared!r}")
    if (values := item.get("values")) is not None and values is not ("v" in shapes):
        raise damaged(f"{path}: the manifest says values: {values!r}, the file disagrees")


def _head_indices(item: dict[str, Any], key: str, count: int, path: Path, where: str) -> tuple[int, ...]:
    """Original indices of the heads of a file: as listed, else 0, 1, 2, ..."""
    indices = item.get(key, list(range(count)))
    if not isinstance(indices, list) or not all(is_int(i) for i in indices) or len(indices) != count:
        raise damaged(f"{where}: {key} must list the {count} original head indices of {path.name}")
    if indices != sorted(set(indices)):
        raise damaged(f"{where}: {key} must be ascending without repetition, not {indices}")
    return tuple(indices)


def read_header(path: Path) -> tuple[dict[str, tuple[int, int, int]], str]:
    """Shapes of `q`, `k` and (if present) `v`, and the dtype they share, checked against each other.

    Raises:
        DumpError: not a safetensors file, truncated, tensors missing or unexpected, shapes or dtypes that do not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(f"{path} is truncated or not a safetensors file ({error}); capture it again") from None
    if not {"q", "k"} <= found.keys() <= {"q", "k", "v"}:
        raise damaged(
            f"{path} must hold the tensors q, k and optionally v; it holds {', '.join(sorted(found)) or 'none'}"
        )
    for name, (shape, dtype) in found.items():
        if len(shape) != 3 or 0 in shape:
            raise damaged(f"{path}: {name} must be (heads, tokens, head_dim) with none of them zero, not {shape}")
        if dtype not in DTYPES:
            raise damaged(f"{path}: {name} is {dtype}; dumps hold fp32, fp16 or bf16")
    (heads, tokens, head_dim), dtype = found["q"]
    kv = found["k"][0][0]
    for name in found.keys() - {"q"}:
        if found[name] != ((kv, tokens, head_dim), dtype):
            raise damaged(
                f"{path}: {name} is {found[name][0]} {DTYPES[found[name][1]]}"
                f" where q {found['q'][0]} {DTYPES[dtype]} needs {(kv, tokens, head_dim)} {DTYPES[dtype]}"
            )
    if heads % kv:
        raise damaged(f"{path}: {counted(heads, 'query head')} cannot share {counted(kv, 'kv head')} evenly")
    return {name: (shape[0], shape[1], shape[2]) for name, (shape, _) in found.items()}, DTYPES[dtype]
