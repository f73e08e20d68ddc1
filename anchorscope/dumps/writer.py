"""Writing a dump: the incremental `DumpWriter` and the one-call `write_dump`.

Every tensor file is written under a temporary name, flushed to the disk and renamed; only then does the manifest,
itself replaced atomically, list it. Whenever the process dies, the folder holds a manifest whose entries are all whole
and which says `"complete": false` until the last one. Tensors are streamed head by head, so writing needs no second
copy of a layer: that is why the (small) safetensors header is written here instead of by
`safetensors.torch.save_file`, which serialises in memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from anchorscope._version import __version__
from anchorscope.dtypes import dtype_name, torch_dtype
from anchorscope.dumps.format import (
    DTYPE_BYTES,
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSION,
    canonical_sha256,
    is_int,
    is_name,
    is_positive,
    plain_file,
    read_manifest,
    token_sha256,
)
from anchorscope.dumps.reader import Dump, file_sha256, nonfinite_row, open_dump
from anchorscope.errors import DumpError, InputError, RunFailure
from anchorscope.files import human_bytes
from anchorscope.locks import LOCK, folder_lock

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

PARTIAL = ".partial"
PROOF = "proof"  # key of a prompt: not known before it has run
TENSOR_NAMES = ("q", "k", "v")


def layer_bytes(heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: str, values: bool = True) -> int:
    """Bytes of one tensor file, header (under 1 KiB) included."""
    return 1024 + (heads + kv_heads * (2 if values else 1)) * tokens * head_dim * DTYPE_BYTES[dtype]


class LayerWriter:
    """One tensor file being written; made by `DumpWriter.layer`.

    `put` takes any contiguous run of positions of all heads, in any order of calls, so a chunked prefill can stream.
    `close` refuses a file that is not complete.
    """

    def __init__(
        self,
        owner: DumpWriter,
        record: dict[str, Any],
        shapes: Mapping[str, tuple[int, int, int]],
        dtype: str,
    ) -> None:
        self._owner = owner
        self._record = record
        self._shapes = dict(shapes)
        self._dtype = torch_dtype(dtype)
        self._size = DTYPE_BYTES[dtype]
        self._path = owner.path / record["file"]
        self._partial = owner.path / (record["file"] + PARTIAL)
        self._next: dict[str, int] = dict.fromkeys(shapes, 0)
        header, self._offsets = _header(self._shapes, dtype, self._size)
        self._end = 0
        self._digest: hashlib._Hash | None = hashlib.sha256()  # None once writes come out of file order
        with _disk_errors(self._partial):
            self._file: IO[bytes] = self._partial.open("w+b")
            self._write(0, header)

    def put(self, name: str, start: int, x: Tensor, rows: Sequence[int] | None = None) -> None:
        """Store positions start ... start + n of tensor `name`.

        Args:
            name: "q", "k" or "v".
            start: first position; each tensor is filled in ascending order without gaps.
            x: (heads, n, d), any device, any floating dtype; converted to the dump's dtype.
            rows: the rows of x to store, all by default (no copy of x is made to pick them).

        Raises:
            InputError: wrong shape or position; NaN or infinity after conversion, named by layer and head.
            RunFailure: the disk is full or failed.
        """
        import torch

        heads, tokens, head_dim = self._shapes[name]
        where = f"layer {self._record['layer']} of prompt {self._record['prompt']}"
        shape = tuple(x.shape)
        rows = range(shape[0] if shape else 0) if rows is None else rows
        n = shape[1] if len(shape) == 3 else 0
        if len(rows) != heads or shape[1:] != (n, head_dim) or not 0 < n <= tokens - start or start != self._next[name]:
            raise InputError(
                f"{where}: {name} {shape} at position {start} does not continue"
                f" ({heads}, {tokens}, {head_dim}) at position {self._next[name]}"
            )
        labels = self._record["query_heads" if name == "q" else "kv_heads"]
        with _disk_errors(self._partial):
            for index, row in enumerate(rows):
                # head by head: the extra memory is one head, whatever device or strides x has
                part = x[row].detach().to("cpu", self._dtype).contiguous()
                if nonfinite_row(part[None]) is not None:
                    kind = "query" if name == "q" else "kv"
                    raise InputError(
                        f"{where}: {name} of {kind} head {labels[index]} holds NaN or infinity;"
                        " compute or store it with more range (bf16 or fp32)"
                    )
                data = part.view(torch.uint8).numpy().reshape(-1).data
                self._write(self._offsets[name] + (index * tokens + start) * head_dim * self._size, data)
        self._next[name] = start + n

    def close(self, *, window: int | None = None) -> None:
        """Flush, rename and list the file in the manifest.

        Args:
            window: the sliding window, if it was not known when the layer was begun.

        Raises:
            InputError: positions are missing.
            RunFailure: the disk is full or failed.
        """
        for name, (_, tokens, _) in self._shapes.items():
            if self._next[name] != tokens:
                raise InputError(f"{self._path.name}: {name} holds {self._next[name]} of {tokens} positions")
        with _disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            digest = file_sha256(self._partial) if self._digest is None else self._digest.hexdigest()
            os.replace(self._partial, self._path)
        if window is not None:
            self._record["window"] = window
        self._owner._commit({**self._record, "bytes": self._path.stat().st_size, "sha256": digest})

    def abort(self) -> None:
        """Drop the unfinished file."""
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        if offset != self._end:
            self._digest = None
            self._file.seek(offset)
        self._file.write(data)
        self._end = offset + len(data)
        if self._digest is not None:
            self._digest.update(data)


class DumpWriter:
    """Writes a dump folder entry by entry; use it as a context manager and call `finish` at the end.

    On an exception the folder is emptied again, unless the run was interrupted (KeyboardInterrupt) or, where the caller
    `continues`, the disk failed: then the finished layers stay, marked incomplete, for `resume`.

    Args:
        path: the folder; created with its parents. It must be absent or empty, unless `overwrite` or `resume`.
        header: what the manifest says beside the entries: `prompts` (required, each with `name` and `tokens`),
            `model`, `tokenizer`, and any settings. Resuming demands an equal header.
        overwrite: replace the dump that is there (never a folder that is not a dump).
        resume: continue an unfinished dump with the same header; whole layers are kept, everything else is redone.
        continues: the caller offers `resume`, so a full disk is no reason to lose what is finished.

    Raises:
        InputError: the folder cannot be used, or another process is writing to it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
        continues: bool = False,
    ) -> None:
        self.path = Path(path)
        self._continues = continues
        self._order = {prompt["name"]: index for index, prompt in enumerate(header["prompts"])}
        check_output(self.path, overwrite=overwrite, resume=resume)
        self._resumed = resume and (self.path / MANIFEST).exists()
        self._made = _make_folder(self.path)
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(folder_lock(self.path))
        self._open = True
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "complete": False,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "created_by": f"anchorscope {__version__}",
            **header,
            "prompts": [dict(prompt) for prompt in header["prompts"]],
            "entries": [],
        }
        try:
            if self._resumed:
                self._take_over()
            old = _listed_files(self.path) if overwrite and not self._resumed else None
            self._flush()
            if old is not None:  # behind the new manifest: whenever this stops, the folder is an unfinished dump
                _remove_tensor_files(self.path, old)
        except BaseException:
            self._release()
            raise

    @property
    def done(self) -> frozenset[tuple[str, int]]:
        """The (prompt, layer) pairs that are complete."""
        return frozenset((e["prompt"], e["layer"]) for e in self._manifest["entries"])

    @property
    def proven(self) -> frozenset[str]:
        """The prompts that have a proof."""
        return frozenset(p["name"] for p in self._manifest["prompts"] if PROOF in p)

    def prove(self, prompt: str, proof: Mapping[str, Any]) -> None:
        """Record how well the model predicts a prompt (`anchorscope.proof.PromptProof.to_json`)."""
        self._manifest["prompts"][self._order[prompt]][PROOF] = dict(proof)
        self._flush()

    def layer(
        self,
        prompt: str,
        layer: int,
        *,
        query_heads: Sequence[int],
        kv_heads: Sequence[int],
        tokens: int,
        head_dim: int,
        dtype: str,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        values: bool = True,
    ) -> LayerWriter:
        """Start the file of one layer of one prompt.

        Raises:
            InputError: a value is out of range, the prompt is unknown, or the entry exists already.
        """
        where = f"layer {layer!r} of prompt {prompt!r}"
        if prompt not in self._order:
            raise InputError(f"{where}: the header names no such prompt")
        if not is_int(layer):
            raise InputError(f"{where}: layer must be a whole number")
        if (prompt, layer) in self.done:
            raise InputError(f"{where} is in the dump already")
        if not is_positive(scale):
            raise InputError(f"{where}: scale must be a positive finite number, not {scale!r}")
        if window is not None and not is_int(window, 1):
            raise InputError(f"{where}: window must be None or a whole number of at least 1, not {window!r}")
        if softcap is not None and not is_positive(softcap):
            raise InputError(f"{where}: softcap must be None or a positive finite number, not {softcap!r}")
        for name, heads in (("query_heads", query_heads), ("kv_heads", kv_heads)):
            if not heads or not all(is_int(h) for h in heads) or list(heads) != sorted(set(heads)):
                raise InputError(f"{where}: {name} must be ascending head indices, not {list(heads)}")
        if len(query_heads) % len(kv_heads):
            raise InputError(f"{where}: {len(query_heads)} query heads cannot share {len(kv_heads)} kv heads evenly")
        shapes = {"q": (len(query_heads), tokens, head_dim), "k": (len(kv_heads), tokens, head_dim)}
        record = {
            "prompt": prompt,
            "layer": layer,
            "file": f"prompt{self._order[prompt]:02d}-layer{layer:03d}.safetensors",
            "scale": float(scale),
            "window": window,
            "softcap": None if softcap is None else float(softcap),
            "query_heads": list(query_heads),
            "kv_heads": list(kv_heads),
            "shape": {name: list(shape) for name, shape in shapes.items()},
            "dtype": dtype,
            "values": values,
        }
        if values:
            shapes["v"] = shapes["k"]
        return LayerWriter(self, record, shapes, dtype)

    def finish(self) -> Dump:
        """Mark the dump complete and open it.

        Raises:
            InputError: it holds no entry.
        """
        if not self._manifest["entries"]:
            raise InputError(f"{self.path}: a dump needs at least one entry")
        self._manifest["complete"] = True
        self._flush()
        self._release()
        return open_dump(self.path)

    def __enter__(self) -> DumpWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        for stray in self.path.glob(f"*{PARTIAL}"):
            stray.unlink(missing_ok=True)
        stopped = kind is not None and not issubclass(kind, Exception)  # Ctrl-C
        full = kind is not None and self._continues and issubclass(kind, RunFailure)
        keep = kind is None or (bool(self._manifest["entries"]) and (self._resumed or stopped or full))
        if not keep:
            remove_dump_files(self.path)
        self._release()
        if not keep:
            for folder in self._made:  # the innermost first; stops at one that holds something else
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _commit(self, record: dict[str, Any]) -> None:
        entries = self._manifest["entries"]
        entries.append(record)
        entries.sort(key=lambda e: (self._order[e["prompt"]], e["layer"]))
        self._flush()

    def _flush(self) -> None:
        self._manifest.pop("sha256", None)
        self._manifest["sha256"] = canonical_sha256(self._manifest)
        partial = self.path / (MANIFEST + PARTIAL)
        with _disk_errors(self.path / MANIFEST):
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(_layout(self._manifest))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / MANIFEST)
            _sync_folder(self.path)

    def _take_over(self) -> None:
        """Adopt an earlier, interrupted run's manifest: keep its start time and its whole layers."""
        old = read_manifest(self.path)
        fixed = ("created", "entries", "complete", "sha256")
        mine, theirs = ({k: v for k, v in m.items() if k not in fixed} for m in (self._manifest, old))
        theirs["prompts"] = [{k: v for k, v in p.items() if k != PROOF} for p in old["prompts"] if isinstance(p, dict)]
        if mine != theirs:
            what = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            raise InputError(
                f"{self.path} was started with other settings ({', '.join(what)}):"
                " repeat the same command to resume, or use --overwrite"
            )
        self._manifest["created"] = old["created"]
        self._manifest["prompts"] = old["prompts"]
        for record in old["entries"]:
            path = plain_file(self.path, record.get("file"))
            if (
                path is not None
                and path.stat().st_size == record.get("bytes")
                and file_sha256(path) == record.get("sha256")
            ):
                self._manifest["entries"].append(record)
        kept = {record["file"] for record in self._manifest["entries"]}
        for stray in self.path.glob("prompt*-layer*.safetensors*"):
            if stray.name not in kept:
                stray.unlink()

    def _release(self) -> None:
        self._open = False
        self._lock.close()


def write_dump(
    path: str | os.PathLike[str],
    entries: Iterable[Mapping[str, Any]],
    *,
    model: Mapping[str, Any] | None = None,
    prompts: Mapping[str, Mapping[str, Any]] | None = None,
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
        overwrite: replace a dump that is there.

    Returns:
        The written dump, opened.

    Raises:
        InputError: an entry is incomplete or inconsistent, or the folder cannot be used.
        RunFailure: the disk is full or failed.
    """
    import torch

    items = [dict(entry) for entry in entries]
    tensors: list[dict[str, Tensor]] = []
    lengths: dict[str, int] = {}
    for index, item in enumerate(items):
        allowed = {"prompt", "layer", "q", "k", "v", "scale", "window", "softcap", "query_heads", "kv_heads"}
        if missing := [key for key in ("prompt", "layer", "q", "k", "scale") if item.get(key) is None]:
            raise InputError(f"entry {index} lacks {missing[0]!r}")
        if unknown := sorted(item.keys() - allowed):
            raise InputError(
                f"entry {index} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(allowed))}"
            )
        if not is_name(item["prompt"]):
            raise InputError(f"entry {index}: prompt must be a name of 1 to 200 printable characters")
        where = f"entry {index} (prompt {item['prompt']}, layer {item['layer']})"
        found = {name: torch.as_tensor(item[name]) for name in TENSOR_NAMES if item.get(name) is not None}
        for name, x in found.items():
            expected = (
                (x.shape[0] if name == "q" else found["k"].shape[0], *found["q"].shape[1:]) if x.ndim == 3 else None
            )
            if tuple(x.shape) != expected or 0 in x.shape or x.dtype != found["q"].dtype:
                raise InputError(
                    f"{where}: {name} is {tuple(x.shape)} {x.dtype};"
                    " q must be (H, N, d), k and v (Hkv, N, d), all of one dtype"
                )
        dtype_name(found["q"].dtype)
        for key, x in (("query_heads", found["q"]), ("kv_heads", found["k"])):
            if item.get(key) is not None and len(item[key]) != x.shape[0]:
                raise InputError(f"{where}: {key} names {len(item[key])} heads for {x.shape[0]} rows")
        if lengths.setdefault(item["prompt"], found["q"].shape[1]) != found["q"].shape[1]:
            raise InputError(f"{where} has {found['q'].shape[1]} tokens where the prompt has {lengths[item['prompt']]}")
        tensors.append(found)
    if not items:
        raise InputError("write_dump needs at least one entry")
    extra = prompts or {}
    if unknown := sorted(extra.keys() - lengths.keys()):
        raise InputError(f"prompts names {unknown[0]!r}, which no entry uses")
    dtypes = {dtype_name(found["q"].dtype) for found in tensors}
    header = {
        "model": None if model is None else dict(model),
        "dtype": dtypes.pop() if len(dtypes) == 1 else None,
        "prompts": [prompt_record(name, n, **extra.get(name, {})) for name, n in lengths.items()],
    }
    with DumpWriter(path, header, overwrite=overwrite) as writer:
        for item, found in zip(items, tensors, strict=True):
            heads, tokens, head_dim = found["q"].shape
            out = writer.layer(
                item["prompt"],
                item["layer"],
                query_heads=list(range(heads) if item.get("query_heads") is None else item["query_heads"]),
                kv_heads=list(range(found["k"].shape[0]) if item.get("kv_heads") is None else item["kv_heads"]),
                tokens=tokens,
                head_dim=head_dim,
                dtype=dtype_name(found["q"].dtype),
                scale=item["scale"],
                window=item.get("window"),
                softcap=item.get("softcap"),
                values="v" in found,
            )
            try:
                for name, x in found.items():
                    out.put(name, 0, x)
                out.close()
            except BaseException:
                out.abort()
                raise
        return writer.finish()


def prompt_record(
    name: str, tokens: int, *, text: str | None = None, token_ids: Sequence[int] | None = None, **more: Any
) -> dict[str, Any]:
    """A prompt as the manifest records it, with the hash of its token ids.

    Raises:
        InputError: `token_ids` and `tokens` disagree.
    """
    record: dict[str, Any] = {"name": name, "tokens": tokens, **more}
    if token_ids is not None:
        ids = [int(i) for i in token_ids]
        if len(ids) != tokens:
            raise InputError(f"prompt {name}: {len(ids)} token ids for {tokens} tokens")
        record.update(sha256=token_sha256(ids), token_ids=ids)
    if text is not None:
        record["text"] = text
    return record


def check_output(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that must not be written to, before any work is done.

    Raises:
        InputError: it is a file, is not writable, or holds something and neither `overwrite` nor `resume` allows that.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: give a folder")
        if path.is_dir():
            names = {p.name for p in path.iterdir()} - {LOCK}
            if names and MANIFEST not in names and any(PARTIAL not in n for n in names):
                raise InputError(f"{path} holds other files and no dump: give a new folder")
            if MANIFEST in names and not overwrite and not resume:
                if not _is_complete(path):
                    raise InputError(f"{path} holds an unfinished dump: --resume continues it, --overwrite replaces it")
                raise InputError(f"{path} exists already: give another folder, or --overwrite to replace the dump")
            if MANIFEST in names and resume and not overwrite and _is_complete(path):
                raise InputError(f"{path} is complete: there is nothing to resume")
        base = path.absolute()
        while not base.exists():
            base = base.parent
        if not base.is_dir():
            raise InputError(f"{path} cannot be created: {base} is a file")
        if not os.access(base, os.W_OK | os.X_OK):
            raise InputError(f"{path} cannot be written: no permission in {base}")
    except OSError as error:
        raise InputError(f"{path} cannot be used: {error.strerror}") from None


def _is_complete(path: Path) -> bool:
    try:
        return read_manifest(path).get("complete", True)
    except DumpError:
        return True  # whatever it is, it cannot be resumed


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start when the disk below `path` has less than `needed` bytes (and 1 MiB) free.

    Raises:
        RunFailure: with both numbers.
    """
    base = path.absolute()
    while not base.exists():
        base = base.parent
    free = shutil.disk_usage(base).free
    if free < needed + (1 << 20):
        raise RunFailure(
            f"{path} needs {human_bytes(needed)} and its disk has {human_bytes(free)} free:"
            " use fewer --tokens, --layers or --kv-heads, or another disk"
        )


def remove_dump_files(path: Path) -> None:
    """Delete a dump's files, its manifest last, and nothing else in its folder.

    Whenever this stops, the folder can be overwritten; the manifest should say before that the dump is unfinished.
    """
    _remove_tensor_files(path, _listed_files(path))
    (path / MANIFEST).unlink(missing_ok=True)


def _listed_files(path: Path) -> list[Path]:
    """The tensor files that a manifest, if there is a good one, lists."""
    with contextlib.suppress(DumpError):
        names = [e.get("file") for e in read_manifest(path)["entries"] if isinstance(e, dict)]
        return [file for name in names if (file := _plain_or_none(path, name)) is not None]
    return []


def _plain_or_none(path: Path, name: object) -> Path | None:
    with contextlib.suppress(DumpError):
        return plain_file(path, name)
    return None


def _remove_tensor_files(path: Path, listed: Iterable[Path]) -> None:
    found = [file for pattern in ("prompt*-layer*.safetensors", f"*{PARTIAL}") for file in path.glob(pattern)]
    for file in (*listed, *found):
        file.unlink(missing_ok=True)


def _header(shapes: Mapping[str, tuple[int, int, int]], dtype: str, size: int) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, padded to 8 bytes as the format advises, and the absolute offset of each tensor."""
    code = next(code for code, name in DTYPES.items() if name == dtype)
    table: dict[str, Any] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + shape[0] * shape[1] * shape[2] * size
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + t["data_offsets"][0] for name, t in table.items()}


def _layout(manifest: Mapping[str, Any]) -> str:
    """The manifest as JSON for people: one key a line, one prompt or entry a line (token ids on one line too)."""
    lines = []
    for key, value in manifest.items():
        if key in ("prompts", "entries") and value:
            rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in value)
            text = f"[\n{rows}\n  ]"
        else:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _make_folder(path: Path) -> list[Path]:
    """Create `path` and its parents; the folders that were created, innermost first."""
    made = []
    folder = path.absolute()
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be created: {error.strerror}") from None
    return made


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there; NTFS journals the rename
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailure(
                f"the disk is full: {path} could not be written; free some space or use another disk"
            ) from None
        raise RunFailure(f"{path} could not be written: {error.strerror or error}") from None
