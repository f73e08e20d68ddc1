"""These checks look at a model folder's files before transformers reads them, and name what is damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from anchorscope.errors import InputError
from anchorscope.shown import counted

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
JSON_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TOKENIZERS = (  # any of them means that the folder brings a tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
LARGEST_JSON = 1 << 28  # bytes; the tokenizers of the largest vocabularies take about 40 MB
POINTER = b"version https://git-lfs"
COUNTS = {  # settings that must be positive whole numbers, with a bound that no model comes near
    "num_hidden_layers": 1 << 13,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "hidden_size": 1 << 18,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 25,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "n_head": 1 << 14,
    "n_layer": 1 << 13,
    "n_embd": 1 << 18,
    "n_positions": 1 << 31,
}


def check_folder(folder: Path, source: str) -> None:
    """Read the small files of a model folder and the headers of its weights.

    Raises:
        InputError: a file is damaged, empty, unreadable, a Git LFS pointer or a pickle, or a shard is absent.
    """
    config = read_object(folder / "config.json")
    check_settings(config, str(folder / "config.json"))
    for name in JSON_FILES:
        if (folder / name).exists():
            read_object(folder / name)
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"model {source} is an adapter: merge it into its base model (merge_and_unload) and save that, or load both"
            " yourself and pass the model"
        )
    check_weights(folder, source, config.get("transformers_weights"))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder brings a tokenizer, whole or damaged."""
    return any((folder / name).exists() for name in TOKENIZERS)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; a byte-order mark is accepted.

    Raises:
        InputError: the file is unreadable, empty, too large, a Git LFS pointer, or holds no JSON object.
    """
    check_file(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise InputError(f"{path} is {path.stat().st_size >> 20} MB: that is no file of a model's settings")
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: fetch the model again") from None
    except ValueError as error:  # not UTF-8, or no JSON
        raise InputError(f"{path} is damaged, it is not valid JSON ({error}): fetch the model again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged, it holds no JSON object: fetch the model again")
    return found


def check_file(path: Path) -> None:
    """Refuse whatever is not a readable, nonempty regular file, and Git LFS pointers.

    Raises:
        InputError: the file is named, with the reason.
    """
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist: the model is incomplete, fetch it again")
        if not path.is_file():
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    if not start:
        raise InputError(f"{path} is empty: fetch the model again")
    if start == POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")


def check_weights(folder: Path, source: str, named: Any = None) -> None:
    """Open every weight file's header; no weights are read.

    Args:
        folder: the model's folder.
        source: the model, as the user named it.
        named: the file of weights that config.json names, or None.

    Raises:
        InputError: there are no safetensors (pickle is never read), or files are damaged or absent.
    """
    if named is not None:
        if not (isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))):
            raise InputError(f"{folder / 'config.json'} names {named!r} as its weights: only safetensors are read")
        files = [named] if named.endswith(".safetensors") else list(_shards(folder, named))
    elif (folder / WEIGHTS).exists():
        files = [WEIGHTS]
    elif (folder / INDEX).exists():
        files = list(_shards(folder, INDEX))
    else:
        raise InputError(_no_weights(folder, source))
    absent = [name for name in files if not (folder / name).exists()]
    if absent:
        raise InputError(
            f"model {source} is incomplete: {', '.join(absent[:4])}"
            f"{f' and {len(absent) - 4} more' if len(absent) > 4 else ''} of {len(files)} weight files"
            f" {'is' if len(absent) == 1 else 'are'} absent: fetch the model again"
        )
    for name in files:
        check_safetensors(folder / name)


def check_safetensors(path: Path) -> None:
    """Open a safetensors file's header and compare the file's size with it.

    Raises:
        InputError: the file is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): fetch the model again") from None


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that no model can have: zero heads, negative sizes, heads that do not divide.

    Args:
        config: a config.json, or what transformers made of it.
        where: what to name in the sentence.

    Raises:
        InputError: a setting is impossible; it is named.
    """
    if "model_type" not in config and "auto_map" not in config:
        raise InputError(f"{where} names no model_type, so nothing says what kind of model it is")
    if not isinstance(config.get("model_type", ""), str):
        raise InputError(f"{where}: model_type must be a name, not {config['model_type']!r}")
    for settings in (
        config,
        *(v for k, v in config.items() if k in ("text_config", "llm_config") and isinstance(v, dict)),
    ):
        for key in sorted(COUNTS.keys() & settings.keys()):
            _check_count(key, settings[key], where)
        heads, kv_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
            raise InputError(
                f"{where}: {counted(heads, 'query head')} cannot share {counted(kv_heads, 'kv head')}, they do"
                f" not divide"
            )


def _check_count(key: str, value: Any, where: str) -> None:
    if value is None or isinstance(value, list):  # unset, or one number per layer
        return
    if key in ("max_position_embeddings", "sliding_window") and value in (0, -1):  # "none" in some families
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {key} must be a whole number, not {value!r}")
    if not 0 < value <= COUNTS[key]:
        raise InputError(f"{where}: {key} is {value}, which no model has")


def _shards(folder: Path, index: str) -> Iterator[str]:
    """Yield the weight files that an index names. Each must be a safetensors file inside the folder."""
    weight_map = read_object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{folder / index} is damaged, it holds no weight_map: fetch the model again")
    for name in sorted(set(weight_map.values())):
        if not name.endswith(".safetensors"):
            raise InputError(f"{folder / index} names {name}: only safetensors are read, never pickle")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{folder / index} names {name}, which lies outside of its folder")
        yield name


def _no_weights(folder: Path, source: str) -> str:
    """Say why a folder without safetensors cannot be read."""
    try:
        pickles = sorted(p.name for p in folder.iterdir() if p.name.endswith((*PICKLES, ".bin.index.json")))
        others = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    except OSError as error:
        return f"model folder {source} cannot be read ({error.strerror or error})"
    if pickles:
        return (
            f"model {source} holds its weights as pickle ({pickles[0]}), which can run any code and is never read:"
            " convert them to safetensors (load the model with transformers where you trust it and save_pretrained)"
        )
    if others:
        return (
            f"model folder {source} holds {others[0]} but neither {WEIGHTS} nor {INDEX}:"
            f" rename the file, or fetch the model again"
        )
    return f"model folder {source} holds no weights ({WEIGHTS}): fetch the model again"
