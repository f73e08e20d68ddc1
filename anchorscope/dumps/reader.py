"""Reading a dump: `open_dump`, `Dump.load` and `verify`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope import views
from anchorscope.dumps.format import (
    MANIFEST,
    Entry,
    Prompt,
    canonical_sha256,
    damaged,
    parse_entry,
    parse_prompts,
    parse_token_texts,
    read_manifest,
)
from anchorscope.errors import DumpError, InputError
from anchorscope.notebook import InNotebook
from anchorscope.shown import counted

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from anchorscope.vocabulary import Vocabulary

HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class LayerTensors:
    """Q, K and V of one layer exactly as attention consumed them, in the stored dtype, on the CPU.

    Attributes:
        q: (H, N, d), the query heads `query_heads` in that order.
        k: (Hkv, N, d), every kv head of the file, not repeated.
        v: (Hkv, N, d), or None if the dump holds no values.
        query_heads: original index of each row of `q`.
        kv_heads: original index of each row of `k` and `v`.
        kv_rows: the row of `k` and `v` that each row of `q` reads.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kv_rows: tuple[int, ...]

    def kv_index(self, head: int) -> int:
        """The row of `k` and `v` that an original query head reads.

        Raises:
            InputError: the query head is not among `query_heads`.
        """
        if head not in self.query_heads:
            raise InputError(f"query head {head} was not loaded; loaded are {_listing(self.query_heads)}")
        return self.kv_rows[self.query_heads.index(head)]


class Dump(InNotebook):
    """A checked dump folder; tensors are read when asked for. Make one with `open_dump`.

    Attributes:
        path: the folder.
        manifest: `manifest.json` as parsed.
        prompts: the prompts, in the manifest's order.
        entries: one per (prompt, layer), in the manifest's order.
        vocabulary: text of the tokens of the prompts, or None if it was not recorded.
        identity: SHA-256 of the canonical manifest (it covers the tensors through their checksums).
    """

    look = views.dump

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        prompts: tuple[Prompt, ...],
        entries: tuple[Entry, ...],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.prompts = prompts
        self.entries = entries
        self.vocabulary = vocabulary
        self.identity = canonical_sha256(manifest)
        self._hashed: set[str] = set()

    @property
    def model(self) -> dict[str, Any] | None:
        """What the manifest says about the model, or None."""
        return self.manifest.get("model")

    @property
    def complete(self) -> bool:
        """False while a capture is unfinished."""
        return self.manifest.get("complete", True)

    def entry(self, prompt: str, layer: int) -> Entry:
        """The entry of one prompt and layer.

        Raises:
            InputError: the dump holds no such entry; the message lists what there is.
        """
        for entry in self.entries:
            if entry.prompt == prompt and entry.layer == layer:
                return entry
        layers = sorted({e.layer for e in self.entries if e.prompt == prompt})
        if not layers:
            raise InputError(f"{self.path} has no prompt {prompt!r}; it has {', '.join(p.name for p in self.prompts)}")
        raise InputError(f"{self.path} has no layer {layer} of prompt {prompt}; it has {_listing(layers)}")

    def load(self, entry: Entry, heads: Sequence[int] | None = None) -> LayerTensors:
        """Read one layer; the file's checksum is checked the first time.

        Args:
            entry: one of `entries`.
            heads: original query head indices to load, in this order; all of the file by default.

        Raises:
            InputError: a head that the file does not hold.
            DumpError: the file changed, is damaged, holds NaN or infinity, or Q and K whose scores overflow float32
                (named by layer and head).
        """
        wanted = entry.query_heads if heads is None else tuple(heads)
        if unknown := [h for h in wanted if h not in entry.query_heads]:
            raise InputError(
                f"layer {entry.layer} of prompt {entry.prompt} holds no query head {unknown[0]};"
                f" it holds {_listing(entry.query_heads)}"
            )
        if not wanted:
            raise InputError("heads must name at least one query head")
        path = self.path / entry.file
        if entry.sha256 is None or entry.file in self._hashed:
            return self._checked(path, entry, wanted)
        with ThreadPoolExecutor(1) as beside:  # the checksum takes longer than everything else
            digest = beside.submit(file_sha256, path)
            failed: DumpError | None = None
            try:
                result = self._checked(path, entry, wanted)
            except DumpError as error:
                failed = error
            if digest.result() != entry.sha256:
                raise damaged(f"{path} does not match its checksum: it is damaged; capture this dump again")
        if failed is not None:
            raise failed
        self._hashed.add(entry.file)
        return result

    def _checked(self, path: Path, entry: Entry, wanted: tuple[int, ...]) -> LayerTensors:
        """The tensors of a file, whose numbers are looked at; see `load`."""

        tensors = _read_tensors(path, entry, wanted)
        group = len(entry.query_heads) // len(entry.kv_heads)
        rows = tuple(entry.query_heads.index(h) // group for h in wanted)
        result = LayerTensors(tensors["q"], tensors["k"], tensors.get("v"), wanted, entry.kv_heads, rows)
        for name, x, labels in (
            ("q", result.q, wanted),
            ("k", result.k, entry.kv_heads),
            ("v", result.v, entry.kv_heads),
        ):
            if x is not None and (row := nonfinite_row(x)) is not None:
                kind = "query head" if name == "q" else "kv head"
                raise damaged(
                    f"{path}: {name} of layer {entry.layer}, {kind} {labels[row]} holds NaN or infinity;"
                    " capture it again, with --model-dtype fp32 if it overflowed"
                )
        if (sentence := overflow(entry, result)) is not None:
            raise damaged(f"{path}: {sentence}")
        return result

    def stream(self, wanted: Iterable[tuple[Entry, Sequence[int]]], *, ahead: int = 0) -> Iterator[LayerTensors]:
        """Layer after layer, each with the query heads asked for; see `load`. `ahead` layers are read beforehand, while
        the one before is worked on.
        """
        if not ahead:
            yield from (self.load(entry, heads) for entry, heads in wanted)
            return
        pool = ThreadPoolExecutor(ahead)
        try:
            under_way: deque[Future[LayerTensors]] = deque()
            for entry, heads in wanted:
                under_way.append(pool.submit(self.load, entry, heads))
                if len(under_way) > ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def open_dump(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Dump:
    """Open a dump folder and check its manifest and the headers of all its tensor files.

    Args:
        path: the folder that holds `manifest.json`.
        allow_incomplete: accept a capture that was interrupted (only its finished layers are listed).

    Raises:
        DumpError: missing, not a dump, truncated, inconsistent, of a newer version, or incomplete.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    prompts = parse_prompts(manifest, folder)
    if not manifest.get("complete", True) and not allow_incomplete:
        raise damaged(
            f"{folder} is an unfinished capture ({counted(len(manifest['entries']), 'layer')} so far):"
            " run the same capture with --resume, or start again with --overwrite"
        )
    by_name = {prompt.name: prompt for prompt in prompts}
    entries = [parse_entry(item, i, folder, by_name) for i, item in enumerate(manifest["entries"])]
    return _assemble(folder, manifest, prompts, entries)


def _assemble(folder: Path, manifest: dict[str, Any], prompts: list[Prompt], entries: list[Entry]) -> Dump:
    seen: dict[tuple[str, int] | str, None] = {}
    lengths: dict[str, int] = {}
    for entry in entries:
        for key in ((entry.prompt, entry.layer), entry.file):
            if key in seen:
                what = f"layer {entry.layer} of prompt {entry.prompt}" if isinstance(key, tuple) else f"the file {key}"
                raise damaged(f"{folder / MANIFEST} lists {what} twice")
            seen[key] = None
        if lengths.setdefault(entry.prompt, entry.tokens) != entry.tokens:
            raise damaged(f"{folder}: the layers of prompt {entry.prompt} differ in length")
    filled = tuple(p if p.tokens else replace(p, tokens=lengths.get(p.name, 0)) for p in prompts)
    return Dump(folder, manifest, filled, tuple(entries), parse_token_texts(manifest, folder))


@dataclass(frozen=True)
class EntryCheck:
    """What `verify` found in one entry: "verified", "unverified" (no checksum) or "damaged", and why."""

    prompt: str
    layer: int | None
    file: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """Result of `verify`: `state` is the worst of the entries'; `dump` holds those that could be read."""

    state: str
    complete: bool
    checks: tuple[EntryCheck, ...]
    dump: Dump

    @property
    def damaged(self) -> tuple[EntryCheck, ...]:
        """The damaged entries."""
        return tuple(check for check in self.checks if check.state == "damaged")


def verify(path: str | os.PathLike[str] | Dump, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read everything in a dump and compare it with its checksums; look for NaN and infinity.

    "verified" means that the manifest and every file match their checksums; "unverified" that all is well-formed but
    some checksum is absent; "damaged" that at least one file is missing, malformed or does not match.

    Args:
        path: folder or open dump.
        progress: called with (entries done, entries in all).

    Raises:
        DumpError: the manifest itself cannot be used.
    """
    folder = path.path if isinstance(path, Dump) else Path(path)
    manifest = read_manifest(folder)
    prompts = parse_prompts(manifest, folder)
    by_name = {prompt.name: prompt for prompt in prompts}
    checks: list[EntryCheck] = []
    entries: list[Entry] = []
    for index, item in enumerate(manifest["entries"]):
        try:
            entry = parse_entry(item, index, folder, by_name)
            Dump(folder, manifest, tuple(prompts), ()).load(entry)
            sealed = entry.sha256 is not None and "sha256" in manifest
            entries.append(entry)
            checks.append(EntryCheck(entry.prompt, entry.layer, entry.file, "verified" if sealed else "unverified"))
        except DumpError as error:
            known = item if isinstance(item, dict) else {}
            layer = known.get("layer")
            checks.append(
                EntryCheck(
                    str(known.get("prompt")),
                    layer if isinstance(layer, int) else None,
                    str(known.get("file")),
                    "damaged",
                    str(error),
                )
            )
        if progress is not None:
            progress(index + 1, len(manifest["entries"]))
    dump = _assemble(folder, manifest, prompts, entries)
    states = {check.state for check in checks}
    state = next((s for s in ("damaged", "unverified") if s in states), "verified" if checks else "unverified")
    return Verification(state, dump.complete, tuple(checks), dump)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file.

    Raises:
        DumpError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise damaged(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def overflow(entry: Entry, tensors: LayerTensors) -> str | None:
    """The sentence for a layer with a head whose scores float32 cannot hold, or None."""
    from anchorscope.ranges import overflow_sentence, overflowing_head

    found = overflowing_head(tensors.q, tensors.k, tensors.kv_rows, entry.scale)
    if found is None:
        return None
    where = f"prompt {entry.prompt}, layer {entry.layer}, query head {tensors.query_heads[found[0]]}"
    return overflow_sentence(where, found[1])


def nonfinite_row(x: Tensor) -> int | None:
    """The first row (head) of x (H, N, d) that holds NaN or infinity, or None."""
    import torch

    for row in range(x.shape[0]):
        # A sum is finite only if every element is: infinities never cancel to a number, NaN stays. Large float32
        # values may overflow it, then look closer. One fast pass instead of a boolean for every element.
        total = x[row].sum(dtype=torch.float32)
        if not torch.isfinite(total) and not torch.isfinite(x[row]).all():
            return row
    return None


def _read_tensors(path: Path, entry: Entry, heads: Sequence[int]) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError, safe_open

    expected = (entry.tokens, entry.head_dim)
    rows = {"q": [entry.query_heads.index(h) for h in heads], "k": list(range(len(entry.kv_heads)))}
    if entry.has_values:
        rows["v"] = rows["k"]
    try:
        result: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name, picked in rows.items():
                part = file.get_slice(name)
                if tuple(part.get_shape()[1:]) != expected:
                    raise damaged(f"{path} changed while it was open")
                if picked == list(range(picked[0], picked[0] + len(picked))):
                    result[name] = part[picked[0] : picked[-1] + 1]
                else:
                    result[name] = torch.cat([part[row : row + 1] for row in picked])
        return result
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, DumpError):
            raise
        raise damaged(f"{path} cannot be read ({error}); capture this dump again") from None


def _listing(values: Sequence[int]) -> str:
    text = ", ".join(map(str, values[:12]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > 12 else text
