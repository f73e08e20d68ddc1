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
from anchorscope.models.presets import PRESETS, preset_file

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


def locate(source: str, revision: str | None, notify: Callable[[str], None]) -> Place:
    """Find a model, and look at its files where they are on this machine.

    Args:
        source: a preset, a GGUF file, a local folder, or a Hugging Face id; tried in this order.
        revision: the revision of a Hugging Face id.
        notify: told about downloads.

    Raises:
        InputError: there is no such model, or its files are damaged.
    """
    path, name = Path(source), Path(source).name
    if source in PRESETS:
        path, name = preset_file(source, notify), source
    try:
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long a name, a null byte, no permission
        raise InputError(f"model {source[:200]!r} cannot be looked up ({getattr(error, 'strerror', error)})") from None
    if folder:
        if not (path / "config.json").exists():
            raise InputError(_no_config(path, source))
        check_folder(path, source)
        return Place(source, str(path), name, True, options={"local_files_only": True})
    if path.suffix.lower() == ".gguf":
        if not there:
            raise InputError(f"model {source} does not exist: give the path of a .gguf file")
        open_gguf(path)
        return Place(source, str(path.parent), name, True, path, {"gguf_file": path.name, "local_files_only": True})
    if there:
        raise InputError(f"model {source} is neither a folder nor a .gguf file")
    if HUB_ID.fullmatch(source):
        return Place(source, source, source, False, options={} if revision is None else {"revision": revision})
    raise InputError(
        f"model {source} does not exist here and is no Hugging Face id; presets are {', '.join(sorted(PRESETS))}"
    )


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
            raise InputError(_hub_sentence(place.source, error)) from None
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


def _hub_sentence(source: str, error: BaseException) -> str:
    """Say why a model of the hub cannot be loaded, judged by the errors behind transformers' own."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(c, GatedRepoError) for c in causes) or "gated" in str(error):
        return f"model {source} is gated: ask for access on its page, then log in with `hf auth login`"
    if any(isinstance(c, RepositoryNotFoundError) for c in causes) or "is not a valid model identifier" in str(error):
        return f"model {source} is neither a folder here nor on the Hugging Face hub (or it is private): check its name"
    if any(isinstance(c, (LocalEntryNotFoundError, ConnectionError, TimeoutError)) for c in causes) or any(
        words in str(error) for words in ("couldn't connect", "cached files", "offline")
    ):
        return (
            f"model {source} is not in the local cache and the Hugging Face hub cannot be reached: check the name and"
            " the network, or give a folder or a .gguf file"
        )
    if "safetensors" in str(error) and ("does not appear to have" in str(error) or "no file named" in str(error)):
        return (
            f"model {source} offers no safetensors weights, and pickle (pytorch_model.bin), which can run any code, is"
            " never read: use a revision with safetensors, or convert it where you trust it (save_pretrained)"
        )
    return f"model {source} cannot be loaded: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


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
