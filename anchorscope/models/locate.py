"""This module finds a model's files, and says in one sentence why transformers cannot read them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anchorscope.devices import is_out_of_memory
from anchorscope.errors import AnchorScopeError, InputError, MissingBackendError, RunFailure, first_line, type_and_line
from anchorscope.models.damage import check_folder, has_tokenizer
from anchorscope.models.gguf_metadata import open_gguf
from anchorscope.models.hub import hub_options, hub_sentence
from anchorscope.models.presets import PRESETS, preset_file
from anchorscope.parse import closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # transformers' switch against weights from a conversion service


@dataclass(frozen=True)
class Place:
    """The place where a model's files are.

    Attributes:
        source: the model, as the user named it.
        folder: a local folder or a Hugging Face id, for transformers' loaders.
        name: the name to record.
        local: whether the files are on this machine.
        gguf: the GGUF file, or None for a folder or an id.
        options: keyword arguments for transformers' loaders.
    """

    source: str
    folder: str
    name: str
    local: bool
    gguf: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def unreached(self) -> bool:
        """Whether it is a model of the hub, and the hub cannot be reached."""
        return not self.local and "local_files_only" in self.options


def locate(source: str, revision: str | None, notify: Callable[[str], None]) -> Place:
    """Find a model, and look at its files where they are on this machine.

    Args:
        source: a preset, a GGUF file, a local folder, or a Hugging Face id; tried in this order.
        revision: the revision of a Hugging Face id.
        notify: told about downloads.

    Raises:
        InputError: there is no such model, or its files are damaged.
    """
    check_source(source, revision)
    path, name = Path(source), Path(source).name
    if (preset := named_preset(source)) is not None:
        path, name = preset_file(preset, notify), preset
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(_no_config(path, source))
        check_folder(path, source)
        return Place(source, str(path), name, True, options={"local_files_only": True})
    if path.suffix.lower() == ".gguf":
        open_gguf(path)
        return Place(source, str(path.parent), name, True, path, {"gguf_file": path.name, "local_files_only": True})
    return Place(source, source, source, False, options=hub_options(source, revision, notify))


def check_source(source: str, revision: str | None = None) -> None:
    """Refuse what can be no model, before anything is fetched or loaded.

    Args:
        source: a preset, a GGUF file, a local folder, or a Hugging Face id.
        revision: the revision of a Hugging Face id.

    Raises:
        InputError: there is no such file or folder and it is no id, a preset is misspelt, or a revision is given for
            what has none.
    """
    path = Path(source)
    preset = named_preset(source)
    there, folder = (True, True) if preset is not None else _exists(path, source)
    if not there and path.suffix.lower() == ".gguf":
        raise InputError(f"model {source} does not exist: give the path of a .gguf file")
    if not there and not HUB_ID.fullmatch(source):
        raise InputError(
            f"model {source} does not exist here and is no Hugging Face id; presets are {', '.join(sorted(PRESETS))}"
        )
    if there and not folder and path.suffix.lower() != ".gguf":
        raise InputError(f"model {source} is neither a folder nor a .gguf file")
    if there and revision is not None:
        kind = "a preset" if preset is not None else "on this machine"
        raise InputError(
            f"--revision {revision} is for a model of the Hugging Face hub, and {source} is {kind}: leave it out"
        )


def named_preset(source: str) -> str | None:
    """Return the preset that a name means, in letters of any case; None for a path or a Hugging Face id.

    Raises:
        InputError: it is neither, but almost a preset's name.
    """
    if source in PRESETS:
        return source
    if "/" in source or os.sep in source or source.lower().endswith(".gguf") or any(_exists(Path(source), source)):
        return None
    if source.lower() in PRESETS:
        return source.lower()
    if (meant := closest(source, PRESETS, alike=0.6)) is not None:
        raise InputError(
            f"model {source} is no file or folder here, and no preset: did you mean {meant}? A model of the Hugging"
            " Face hub is written with its owner, like Qwen/Qwen3-8B"
        )
    return None


def _exists(path: Path, source: str) -> tuple[bool, bool]:
    """Return whether a path exists, and whether it is a folder."""
    try:
        return path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long a name, a null byte, no permission
        raise InputError(f"model {source[:200]!r} cannot be looked up ({getattr(error, 'strerror', error)})") from None


def load_tokenizer(
    place: Place, options: dict[str, Any], notify: Callable[[str], None]
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer. Return None where the model brings none, so that prompts must be token ids.

    Raises:
        InputError: the model brings a broken tokenizer.
        MissingBackendError: it needs a package that is missing.
    """
    from transformers import AutoTokenizer

    if place.local and place.gguf is None and not has_tokenizer(Path(place.folder)):
        return None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place.folder, **options)
        return found
    except ImportError as error:
        raise MissingBackendError(
            f"the tokenizer of model {place.source} needs a package that is missing: {first_line(error)}"
        ) from None
    except MemoryError:
        raise  # that is no fault of the tokenizer
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if place.gguf is not None:  # transformers cannot convert every kind, and token ids need none
            notify(
                f"warning: the tokenizer of {place.source} cannot be used ({first_line(error)}): only token ids can be"
                " prompts"
            )
            return None
        if not place.local and isinstance(error, (OSError, ValueError, KeyError)):
            notify(f"warning: no tokenizer of model {place.source} could be loaded ({first_line(error)})")
            return None
        if "trust_remote_code" in str(error):
            raise InputError(_own_code(place.source)) from None
        raise InputError(
            f"the tokenizer of model {place.source} is broken ({first_line(error)}): fetch its tokenizer files again"
        ) from None


def guarded(place: Place, load: Callable[[], T]) -> T:
    """Run a loader of transformers, and turn its many errors into one sentence each.

    Raises:
        InputError: the model cannot be loaded.
        MissingBackendError: a package is missing.
        RunFailure: memory ran out.
    """
    try:
        return load()
    except AnchorScopeError:
        raise
    except ImportError as error:
        remedy = "" if "pip install" in str(error) else ": pip install 'anchorscope[hf]'"
        raise MissingBackendError(
            f"model {place.source} needs a package that is missing ({first_line(error)}){remedy}"
        ) from None
    except Exception as error:  # configs of any content reach the model's own code
        if is_out_of_memory(error):
            raise RunFailure(
                f"model {place.source} does not fit into the memory that is free: use --model-dtype bf16 or a smaller"
                " model, and see that the sizes in its config are right"
            ) from None
        if "trust_remote_code" in str(error):
            raise InputError(_own_code(place.source)) from None
        if not place.local:
            raise InputError(hub_sentence(place.source, error, place.unreached)) from None
        said = first_line(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else type_and_line(error)
        raise InputError(f"model {place.source} cannot be loaded: {said}") from None


@contextmanager
def no_conversion() -> Iterator[None]:
    """Keep transformers from asking a conversion service for safetensors that the model's revision does not have."""
    before = os.environ.get(CONVERSION)
    os.environ[CONVERSION] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CONVERSION, None)
        else:
            os.environ[CONVERSION] = before


def _no_config(path: Path, source: str) -> str:
    """Say why a folder without config.json is not a model."""
    ggufs = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if ggufs:
        return f"model folder {source} holds no config.json; give the file itself: {path / ggufs[0]}"
    if (path / "adapter_config.json").exists():
        return (
            f"model {source} is an adapter without its base model: merge it (merge_and_unload) and save that, or load"
            " both yourself and pass the model"
        )
    return f"model folder {source} holds no config.json"


def _own_code(source: str) -> str:
    return f"model {source} brings its own code: read it, then allow it with --trust-remote-code"
