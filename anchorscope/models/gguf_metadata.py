"""These functions read the metadata of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorscope.errors import InputError, MissingBackendError, first_line
from anchorscope.models.damage import check_file

if TYPE_CHECKING:
    from gguf import GGUFReader


def open_gguf(path: Path) -> GGUFReader:
    """Read the metadata and the table of tensors of a GGUF file.

    Raises:
        InputError: the file is damaged, cut short, or one part of several.
        MissingBackendError: the package gguf is missing.
    """
    check_file(path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingBackendError(
            f"a GGUF file needs the package gguf ({error}): pip install 'anchorscope[hf]'"
        ) from None
    try:
        reader = GGUFReader(path)
        contents(reader, "general.architecture")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise  # that is no fault of the file
    except Exception as error:  # the reader trusts the file, so a damaged one may raise anything
        what = first_line(error, 200)
        raise InputError(f"{path} is no whole GGUF file, it is damaged or cut short ({what})") from None
    parts = contents(reader, "split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise InputError(f"{path} is one of {parts} parts of a model: merge them first (llama-gguf-split --merge)")
    return reader


def contents(reader: GGUFReader, key: str, *otherwise: Any) -> Any:
    """Return a metadata value as plain Python, or `otherwise`, if given, where the key is absent.

    Raises:
        KeyError: the key is absent, and there is nothing to give instead.
    """
    if key not in reader.fields:
        if otherwise:
            return otherwise[0]
        raise KeyError(f"it names no {key}")
    return reader.fields[key].contents()
