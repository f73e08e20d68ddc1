"""Writing a dump entry by entry: `DumpWriter`.

Every tensor file is written under a temporary name, flushed to the disk and renamed (`layer.py`); only then does the
manifest, itself replaced atomically, list it. Whenever the process dies, the folder holds a manifest whose entries are
all whole and which says `"complete": false` until the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope._version import __version__
from anchorscope.dumps.folder import (
    PARTIAL,
    check_output,
    disk_errors,
    listed_files,
    make_folder,
    remove_dump_files,
    remove_tensor_files,
    sync_folder,
)
from anchorscope.dumps.format import (
    FORMAT,
    MANIFEST,
    TOKEN_TEXTS,
    VERSION,
    canonical_sha256,
    is_int,
    plain_file,
    read_manifest,
    token_sha256,
)
from anchorscope.dumps.layer import LayerSpec, LayerWriter
from anchorscope.dumps.reader import Dump, file_sha256, open_dump
from anchorscope.errors import InputError, RunFailure
from anchorscope.locks import folder_lock
from anchorscope.moved import moved
from anchorscope.shown import counted
from anchorscope.vocabulary import Vocabulary

if TYPE_CHECKING:
    from types import TracebackType

PROOF = "proof"  # key of a prompt: not known before it has run


class DumpWriter:
    """Writes a dump folder entry by entry; use it as a context manager and call `finish` at the end.

    On an exception the folder is emptied again, unless the run was interrupted (KeyboardInterrupt) or, where the caller
    `continues`, the disk failed: then the finished layers stay, marked incomplete, for `resume`.

    Args:
        path: the folder; created with its parents. It must be absent or empty, unless `overwrite` or `resume`.
        header: what the manifest says beside the entries: `prompts` (required, each with `name` and `tokens`),
            `model`, `tokenizer`, `token_texts`, and any settings. Resuming demands an equal header.
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
        self._made = make_folder(self.path)
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
            old = listed_files(self.path) if overwrite and not self._resumed else None
            self._flush()
            if old is not None:  # behind the new manifest: whenever this stops, the folder is an unfinished dump
                remove_tensor_files(self.path, old)
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

    def layer(self, prompt: str, layer: int, spec: LayerSpec | None = None, **fields: Any) -> LayerWriter:
        """Start the file of one layer of one prompt.

        Args:
            prompt: the name that the header gives it.
            layer: index.
            spec: what the file holds; or give the fields of `LayerSpec` by name.

        Raises:
            InputError: a value is out of range, the prompt is unknown, or the entry exists already.
            TypeError: a field is missing or unknown.
        """
        spec = LayerSpec(**fields) if spec is None else replace(spec, **fields)
        where = f"layer {layer!r} of prompt {prompt!r}"
        if prompt not in self._order:
            raise InputError(f"{where}: the header names no such prompt")
        if not is_int(layer):
            raise InputError(f"{where}: layer must be a whole number")
        if (prompt, layer) in self.done:
            raise InputError(f"{where} is in the dump already")
        spec.check(where)
        file = f"prompt{self._order[prompt]:02d}-layer{layer:03d}.safetensors"
        record = {"prompt": prompt, "layer": layer, "file": file, **spec.to_json()}
        return LayerWriter(self.path, record, spec, self._commit)

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
        with disk_errors(self.path / MANIFEST):
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(_layout(self._manifest))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / MANIFEST)
            sync_folder(self.path)

    def _take_over(self) -> None:
        """Adopt an earlier, interrupted run's manifest: keep its start time and its whole layers."""
        old = read_manifest(self.path)
        fixed = ("created", "entries", "complete", "sha256")
        mine, theirs = ({k: v for k, v in m.items() if k not in fixed} for m in (self._manifest, old))
        theirs["prompts"] = [{k: v for k, v in p.items() if k != PROOF} for p in old["prompts"] if isinstance(p, dict)]
        if TOKEN_TEXTS not in theirs:  # it was begun before token texts were recorded, or where they were not known
            mine.pop(TOKEN_TEXTS, None)
            self._manifest.pop(TOKEN_TEXTS, None)
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
            raise InputError(f"prompt {name}: {counted(len(ids), 'token id')} for {counted(tokens, 'token')}")
        record.update(sha256=token_sha256(ids), token_ids=ids)
    if text is not None:
        record["text"] = text
    return record


def texts_record(texts: Vocabulary | Mapping[int, str | bytes] | None, used: Iterable[int]) -> dict[str, Any]:
    """What the manifest says of the text of the ids used, to be merged into a header; empty if nothing is known.

    Raises:
        InputError: `texts` holds something else than text or bytes by token id.
    """
    if texts is None:
        return {}
    if not isinstance(texts, Vocabulary):
        for i, text in texts.items():
            if not is_int(i) or not isinstance(text, (str, bytes)):
                raise InputError(
                    f"token_texts must hold text or bytes by token id; token {i!r} is {type(text).__name__}"
                )
        texts = Vocabulary(texts)
    found = texts.part(used).to_json()
    return {TOKEN_TEXTS: found} if found else {}


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


__getattr__ = moved(
    __name__,
    {
        "check_disk": "anchorscope.dumps.folder",
        "layer_bytes": "anchorscope.dumps.layer",
        "write_dump": "anchorscope.dumps.arrays",
        "dtype_name": "anchorscope.dtypes",
        "torch_dtype": "anchorscope.dtypes",
    },
)
