"""The saved profile of one head: everything the figures and later commands need, without the dump.

A profile holds the exact curves of one (prompt, layer, query head), what each asked theta keeps, and binned maps of
attention mass and stripes. It is one safetensors file, arrays as tensors and scalars as JSON in the header, under 2 MB
at any prompt length because the heat map is capped at `MAX_ROWS` x `MAX_COLUMNS` cells. numpy only: reading one is
quick and needs neither torch nor the dump. docs/method.md defines the quantities.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from anchorscope import views
from anchorscope.errors import DumpError, InputError
from anchorscope.figure_theta import find_theta
from anchorscope.files import check_regular, parse_json, write_atomic
from anchorscope.measured import (
    ARRAYS,
    HEAT,
    MAX_COLUMNS,
    MAX_ROWS,
    MAX_STEPS,
    MAX_TOP,
    PER_THETA,
    STEPS,
    Measured,
    check_arrays,
    nothing,
)
from anchorscope.notebook import InNotebook
from anchorscope.params import AnchorParams
from anchorscope.shown import exact_theta

FORMAT = "anchorscope-profile"
VERSION = 1
MAX_BYTES = 1 << 28  # they are below 2 MB unless thousands of thetas were asked for

CurveKind = Literal["anchor", "oracle"]

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "MAX_COLUMNS",
    "MAX_ROWS",
    "MAX_STEPS",
    "MAX_TOP",
    "VERSION",
    "CurveKind",
    "HeadProfile",
    "Measured",
    "bin_edges",
    "is_whole",
    "profile_filename",
]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class HeadProfile(InNotebook, Measured):
    """Exact sparsity profile of one query head on one prompt: what was `Measured`, and on what.

    Arrays are converted to the stored dtype when a profile is made, so a saved and loaded one is equal bit for bit.

    Attributes:
        prompt: name of the prompt.
        layer, head, kv_head: indices in the model (not in the dump).
        tokens: prompt length N.
        head_dim: d.
        block, step, init, lookback: the anchor parameters, in tokens and blocks (see `AnchorParams`).
        window, softcap: sliding window of the layer in tokens, and its logit soft-cap; or None.
        scale: softmax scale of the layer.
        backend, dump_identity: what computed it ("torch", "triton"), and the hash that names the dump it came from.
        thetas: (T,) float64, nats, in the order asked; may hold +-inf.

    Raises:
        InputError: shapes, ranges or order that contradict the above.
    """

    prompt: str
    layer: int
    head: int
    kv_head: int
    tokens: int
    head_dim: int
    block: int
    step: int
    init: int
    lookback: int
    window: int | None
    softcap: float | None
    scale: float
    backend: str
    dump_identity: str
    thetas: np.ndarray
    look = views.profile

    def __post_init__(self) -> None:
        for name, (dtype, _) in ARRAYS.items():
            with np.errstate(over="ignore"):  # a margin beyond 65504 nats becomes +inf in float16
                array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            object.__setattr__(self, name, array)
        _check_scalars(self)
        check_arrays(self)

    @property
    def params(self) -> AnchorParams:
        """Block, step, init and lookback as `AnchorParams`."""
        return AnchorParams(self.block, self.step, self.init, self.lookback)

    @property
    def density(self) -> np.ndarray:
        """(T,) float64: kept pairs / visible pairs, anchor region included."""
        return self.kept_pairs / self.visible_pairs

    @property
    def sparsity(self) -> np.ndarray:
        """(T,) float64: 1 - density."""
        return 1.0 - self.density

    @property
    def stripe_density(self) -> np.ndarray:
        """(T,) float64: stripe pairs / candidate pairs; NaN where the prompt has no candidates."""
        if self.candidate_pairs == 0:
            return np.full(self.thetas.shape, math.nan)
        return self.stripe_pairs / self.candidate_pairs

    def curve(self, kind: CurveKind = "anchor") -> tuple[np.ndarray, np.ndarray]:
        """(density, recall), float64, of the margin rule at every curve theta or of the stripe oracle."""
        if kind == "anchor":
            return self.curve_pairs / self.visible_pairs, self.curve_recall
        if kind == "oracle":
            return self.oracle_pairs / self.visible_pairs, self.oracle_recall
        raise InputError(f"kind must be 'anchor' or 'oracle', not {kind!r}")

    def density_at_recall(self, target: float, kind: CurveKind = "anchor") -> float | None:
        """Least measured density whose mean recall reaches `target`; None when not reached.

        Nothing is interpolated: it is the density of a selection that exists, for "anchor" the one at
        `theta_at_recall(target)`.
        """
        density, recall = self.curve(kind)
        reached = np.flatnonzero(recall >= target)
        return float(density[reached[0]]) if reached.size else None

    def theta_at_recall(self, target: float) -> float | None:
        """Smallest measured theta whose mean recall reaches `target`, nats; None when not reached.

        Thetas are measured every 0.05 from -16 to 48 and in steps of 9% beyond (profiles of earlier versions: every
        1/16), so it lies that much above the margin that makes the difference, at most.
        """
        reached = np.flatnonzero(self.curve_recall >= target)
        return float(self.curve_theta[reached[0]]) if reached.size else None

    def without_heat(self) -> HeadProfile:
        """A copy with an empty heat map (R = C = 0): a few kB, for summaries over many heads."""
        empty: dict[str, Any] = {name: nothing(name) for name in HEAT}
        return dataclasses.replace(self, **empty)

    @property
    def drawn_at_any_theta(self) -> bool:
        """Whether the heat map can be drawn at every theta measured, or, as `calibrate` and earlier versions saved it,
        at the first alone.
        """
        return bool(self.step_count.size) or len(np.unique(self.thetas)) == 1

    def led_by(self, theta: float) -> HeadProfile:
        """The same profile with a theta first, in place of the one asked for first: figures draw the first.

        The heat map becomes that of this theta, in the cells of its steps.

        Raises:
            InputError: the theta was not measured; or `calibrate` or an earlier version saved this profile, with the
                heat map of the first theta alone.
        """
        index = find_theta(self.thetas.tolist(), theta, "theta")
        if self.thetas[index] == self.thetas[0]:
            return self
        led = self.reordered([index, *(t for t in range(len(self.thetas)) if t != index)])
        return dataclasses.replace(led, **self._heat_at(float(self.thetas[index]))) if self.heat_mass.size else led

    def reordered(self, order: Sequence[int]) -> HeadProfile:
        """The same profile with its thetas in another order, each named by its place; the heat map stays as it is."""
        changed: dict[str, Any] = {name: getattr(self, name)[list(order)] for name in PER_THETA}
        return dataclasses.replace(self, **changed)

    def _heat_at(self, theta: float) -> dict[str, Any]:
        """The heat map at a theta, in the cells of the steps."""
        if not self.step_count.size:
            raise InputError(
                f"the heat map of layer {self.layer}, head {self.head} was saved for theta"
                f" {exact_theta(float(self.thetas[0]))} alone, as calibrate and earlier versions do: run analyze"
                " again to draw it at others"
            )
        cells = np.repeat(np.arange(self.step_count.size), self.step_count.ravel())
        kept = self.step_theta <= np.searchsorted(np.unique(self.thetas), theta)

        def total(values: np.ndarray, which: np.ndarray) -> np.ndarray:
            summed = np.bincount(cells[which], weights=values[which].astype(float), minlength=self.step_count.size)
            return summed.reshape(self.step_count.shape)

        down, across = (
            np.searchsorted(fine, coarse[:-1])
            for fine, coarse in ((self.heat_rows, self.step_rows), (self.heat_columns, self.step_columns))
        )
        queries = np.diff(self.heat_rows).astype(float)[:, None]
        mass = np.add.reduceat(np.add.reduceat(self.heat_mass * queries, down, axis=0), across, axis=1)
        mass /= np.diff(self.step_rows)[:, None]
        margin = np.minimum.reduceat(np.minimum.reduceat(self.heat_margin, down, axis=0), across, axis=1)
        return {
            "heat_rows": self.step_rows,
            "heat_columns": self.step_columns,
            "heat_mass": mass,
            "heat_kept": np.maximum(mass - total(self.step_mass, ~kept), 0.0),
            "heat_margin": margin,
            "heat_stripes": np.minimum(total(self.step_stripes, kept), 1.0),
        }

    def save(self, path: Path | str) -> None:
        """Write the profile as one safetensors file, atomically; the same profile gives the same bytes.

        Raises:
            RunFailure: the file cannot be written (disk full, no permission).
        """
        scalars = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ARRAYS}
        tensors = {name: getattr(self, name) for name in ARRAYS}
        facts = {"format": FORMAT, "version": VERSION, "sha256": _digests(tensors, scalars)}
        header = json.dumps({**facts, **scalars}, sort_keys=True, allow_nan=False)
        # A single metadata key: safetensors keeps several in no fixed order, and bytes must not differ
        # between runs.
        write_atomic(path, safetensors.numpy.save(tensors, metadata={"profile": header}))

    @classmethod
    def load(cls, path: Path | str, *, heat: bool = True) -> HeadProfile:
        """Read and validate a profile; `heat=False` leaves the heat map on disk (see `without_heat`).

        Raises:
            DumpError: missing, damaged, not a profile, or of a newer format version.
        """
        path = Path(path)
        again = "delete it and run analyze again"
        if not path.exists() or path.is_dir():
            raise DumpError(f"no profile at {path}: run analyze first")
        check_regular(path, MAX_BYTES, "profile", error=DumpError)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                header, digests = _header(path, (file.metadata() or {}).get("profile"))
                found = set(file.keys())
                earlier = set() if found & set(STEPS) else set(STEPS)
                if missing := sorted(set(ARRAYS) - earlier - found):
                    raise DumpError(f"profile {path} lacks the tensor {missing[0]!r}: {again}")
                skip = earlier if heat else set(HEAT)
                arrays = {name: file.get_tensor(name) for name in ARRAYS if name not in skip}
        except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
            if isinstance(error, DumpError):
                raise
            raise DumpError(f"profile {path} cannot be read ({error}): {again}") from None
        if any(digests.get(part) != value for part, value in _digests(arrays, header).items()):
            raise DumpError(f"profile {path} is damaged (its checksum differs): {again}")
        arrays.update({name: nothing(name) for name in skip})
        for name, array in arrays.items():
            if str(array.dtype) != ARRAYS[name][0]:
                raise DumpError(f"profile {path} stores {name} as {array.dtype}: {again}")
        try:
            return cls(**header, **arrays)
        except InputError as error:
            raise DumpError(f"profile {path} is damaged ({error}): {again}") from None


def is_whole(path: Path, *, at_any_theta: bool = False) -> bool:
    """Whether a saved profile is undamaged, its heat map too, which `heat=False` leaves unread; and, if asked, whether
    it has the heat map of every theta.
    """
    try:
        found = HeadProfile.load(path)
    except DumpError:
        return False
    return not at_any_theta or found.drawn_at_any_theta


def profile_filename(prompt_index: int, layer: int, head: int) -> str:
    """File name of a head's profile; `prompt_index` is the prompt's place in the dump."""
    return f"p{prompt_index:03d}-layer{layer:03d}-head{head:03d}.safetensors"


def bin_edges(length: int, limit: int, multiple: int = 1) -> np.ndarray:
    """Edges of at most `limit` equal bins over [0, length), (bins + 1,) int64.

    Every width is a multiple of `multiple`, except that the last bin may be short.

    Raises:
        InputError: length, limit or multiple below 1.
    """
    if min(length, limit, multiple) < 1:
        raise InputError("bins need a length, a limit and a multiple of at least 1")
    units = math.ceil(length / multiple)
    width = math.ceil(units / limit) * multiple
    return np.append(np.arange(0, length, width, dtype=np.int64), np.int64(length))


def _digests(arrays: dict[str, np.ndarray], scalars: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the heat map, of its steps and of the rest, apart because they may be left unread, or not be there."""
    parts = {"curves": hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())}
    for name in ARRAYS:
        if name in arrays:
            of = "curves" if name not in HEAT else "steps" if name in STEPS else "heat"
            part = parts.setdefault(of, hashlib.sha256())
            part.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
            part.update(np.ascontiguousarray(arrays[name]).tobytes())
    return {name: part.hexdigest() for name, part in parts.items()}


def _header(path: Path, text: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Scalars of the profile and checksums of its arrays, from the file's JSON header."""
    header = None
    with contextlib.suppress(InputError):
        header = None if text is None else parse_json(text.encode(), f"header of {path}")
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise DumpError(f"{path} is not a profile written by analyze")
    version, digests = header.pop("version", None), header.pop("sha256", None)
    if version != VERSION:
        raise DumpError(f"profile {path} has format version {repr(version)[:40]}; this program reads {VERSION}")
    wanted = {f.name for f in dataclasses.fields(HeadProfile)} - set(ARRAYS)
    if set(header) != wanted or not isinstance(digests, dict):
        raise DumpError(f"profile {path} has a damaged header: delete it and run analyze again")
    return header, digests


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_scalars(profile: HeadProfile) -> None:
    for name in ("prompt", "backend", "dump_identity"):
        if not isinstance(getattr(profile, name), str):
            raise InputError(f"{name} must be a text")
    low = {"tokens": 1, "head_dim": 1, "visible_pairs": 1, "block": 1, "step": 1}
    for name in (*low, "layer", "head", "kv_head", "init", "lookback", "anchor_pairs", "candidate_pairs"):
        value = getattr(profile, name)
        if not _whole(value) or value < low.get(name, 0):
            raise InputError(f"{name} must be a whole number of at least {low.get(name, 0)}, not {value!r}")
    if profile.window is not None and (not _whole(profile.window) or profile.window < 1):
        raise InputError(f"window must be None or a whole number of at least 1, not {profile.window!r}")
    if not _number(profile.scale) or (profile.softcap is not None and not _number(profile.softcap)):
        raise InputError("scale must be a finite number and softcap None or one")
    if profile.anchor_pairs + profile.candidate_pairs != profile.visible_pairs:
        raise InputError("anchor and candidate pairs must add up to the visible pairs")
