"""The tensor file of one layer of one prompt: what it must hold, and writing it piece by piece.

Tensors are streamed head by head, so writing needs no second copy of a layer: that is why the (small) safetensors
header is written here instead of by `safetensors.torch.save_file`, which serializes in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from anchorscope.dtypes import torch_dtype
from anchorscope.dumps.folder import PARTIAL, disk_errors
from anchorscope.dumps.format import DTYPE_BYTES, DTYPES, is_int, is_positive
from anchorscope.dumps.reader import file_sha256, nonfinite_row
from anchorscope.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def layer_bytes(heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: str, values: bool = True) -> int:
    """Bytes of one tensor file, header (under 1 KiB) included."""
    return 1024 + (heads + kv_heads * (2 if values else 1)) * tokens * head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class LayerSpec:
    """One layer of one prompt as a dump holds it.

    Attributes:
        query_heads: original indices of the query heads, ascending.
        kv_heads: original indices of the kv heads, ascending; each serves equally many query heads.
        tokens: N.
        head_dim: d.
        dtype: "fp32", "fp16" or "bf16".
        scale: the factor of the scores.
        window: sliding window in tokens, or None.
        softcap: logit soft-cap, or None.
        values: whether V is stored.
    """

    query_heads: Sequence[int]
    kv_heads: Sequence[int]
    tokens: int
    head_dim: int
    dtype: str
    scale: float
    window: int | None = None
    softcap: float | None = None
    values: bool = True

    def check(self, where: str) -> None:
        """Refuse values out of range.

        Raises:
            InputError: the message names `where` and the value.
        """
        if not is_positive(self.scale):
            raise InputError(f"{where}: scale must be a positive finite number, not {self.scale!r}")
        if self.window is not None and not is_int(self.window, 1):
            raise InputError(f"{where}: window must be None or a whole number of at least 1, not {self.window!r}")
        if self.softcap is not None and not is_positive(self.softcap):
            raise InputError(f"{where}: softcap must be None or a positive finite number, not {self.softcap!r}")
        for name, heads in (("query_heads", self.query_heads), ("kv_heads", self.kv_heads)):
            if not heads or not all(is_int(h) for h in heads) or list(heads) != sorted(set(heads)):
                raise InputError(f"{where}: {name} must be ascending head indices, not {list(heads)}")
        queries, kv = len(self.query_heads), len(self.kv_heads)
        if queries % kv:
            raise InputError(f"{where}: {queries} query heads cannot share {kv} kv heads evenly")

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(heads, N, d) of each tensor of the file."""
        shapes = {name: (len(heads), self.tokens, self.head_dim) for name, heads in self._heads.items()}
        return {**shapes, "v": shapes["k"]} if self.values else shapes

    @property
    def _heads(self) -> dict[str, Sequence[int]]:
        return {"q": self.query_heads, "k": self.kv_heads}

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "scale": float(self.scale),
            "window": self.window,
            "softcap": None if self.softcap is None else float(self.softcap),
            "query_heads": list(self.query_heads),
            "kv_heads": list(self.kv_heads),
            "shape": {name: list(self.shapes[name]) for name in self._heads},
            "dtype": self.dtype,
            "values": self.values,
        }


class LayerPieces:
    """The pieces of one layer as they come: checked and converted head by head, for whoever stores them.

    Args:
        where: the layer and its prompt, for messages.
        spec: what the layer consists of.
    """

    def __init__(self, where: str, spec: LayerSpec) -> None:
        self.shapes = spec.shapes
        self.dtype = torch_dtype(spec.dtype)
        self._where = where
        self._labels = {"q": spec.query_heads, "k": spec.kv_heads, "v": spec.kv_heads}
        self._next: dict[str, int] = dict.fromkeys(self.shapes, 0)

    def take(
        self, name: str, start: int, x: Tensor, rows: Sequence[int] | None, device: Any
    ) -> Iterator[tuple[int, Tensor]]:
        """Each head's part (n, d) in the stored dtype, contiguous, on `device`; arguments as of `LayerWriter.put`.

        Raises:
            InputError: wrong shape or position; NaN or infinity after conversion, named by layer and head.
        """
        heads, tokens, head_dim = self.shapes[name]
        shape = tuple(x.shape)
        rows = range(shape[0] if shape else 0) if rows is None else rows
        n = shape[1] if len(shape) == 3 else 0
        if len(rows) != heads or shape[1:] != (n, head_dim) or not 0 < n <= tokens - start or start != self._next[name]:
            raise InputError(
                f"{self._where}: {name} {shape} at position {start} does not continue"
                f" ({heads}, {tokens}, {head_dim}) at position {self._next[name]}"
            )
        for index, row in enumerate(rows):
            # head by head: the extra memory is one head, whatever device or strides x has
            part = x[row].detach().to(device, self.dtype).contiguous()
            if nonfinite_row(part[None]) is not None:
                kind = "query" if name == "q" else "kv"
                raise InputError(
                    f"{self._where}: {name} of {kind} head {self._labels[name][index]} holds NaN or infinity;"
                    " compute or store it with more range (bf16 or fp32)"
                )
            yield index, part
        self._next[name] = start + n

    def check_whole(self, what: str) -> None:
        """Refuse a layer of which positions are missing.

        Raises:
            InputError: they are; the message names `what`.
        """
        for name, (_, tokens, _) in self.shapes.items():
            if self._next[name] != tokens:
                raise InputError(f"{what}: {name} holds {self._next[name]} of {tokens} positions")


class LayerWriter:
    """One tensor file being written; made by `DumpWriter.layer`.

    `put` takes any contiguous run of positions of all heads, in any order of calls, so a chunked prefill can stream.
    `close` refuses a file that is not complete.

    Args:
        folder: the dump.
        record: the entry of the manifest, without size and checksum.
        spec: what the file holds.
        commit: takes the whole entry when the file is there.
    """

    def __init__(
        self, folder: Path, record: dict[str, Any], spec: LayerSpec, commit: Callable[[dict[str, Any]], None]
    ) -> None:
        self._record = record
        self._commit = commit
        self._pieces = LayerPieces(f"layer {record['layer']} of prompt {record['prompt']}", spec)
        self._size = DTYPE_BYTES[spec.dtype]
        self._path = folder / record["file"]
        self._partial = folder / (record["file"] + PARTIAL)
        header, self._offsets = _header(self._pieces.shapes, spec.dtype, self._size)
        self._end = 0
        self._digest: hashlib._Hash | None = hashlib.sha256()  # None once writes come out of file order
        with disk_errors(self._partial):
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

        _, tokens, head_dim = self._pieces.shapes[name]
        with disk_errors(self._partial):
            for index, part in self._pieces.take(name, start, x, rows, "cpu"):
                data = part.view(torch.uint8).numpy().reshape(-1).data
                self._write(self._offsets[name] + (index * tokens + start) * head_dim * self._size, data)

    def close(self, *, window: int | None = None) -> None:
        """Flush, rename and list the file in the manifest.

        Args:
            window: the sliding window, if it was not known when the layer was begun.

        Raises:
            InputError: positions are missing.
            RunFailure: the disk is full or failed.
        """
        self._pieces.check_whole(self._path.name)
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            digest = file_sha256(self._partial) if self._digest is None else self._digest.hexdigest()
            os.replace(self._partial, self._path)
        if window is not None:
            self._record["window"] = window
        self._commit({**self._record, "bytes": self._path.stat().st_size, "sha256": digest})

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
