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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from anchorscope.errors import DumpError, InputError
from anchorscope.files import check_regular, parse_json, write_atomic
from anchorscope.params import AnchorParams
from anchorscope.shown import counted

FORMAT = "anchorscope-profile"
VERSION = 1
MAX_ROWS, MAX_COLUMNS = 128, 1024  # heat map cells: rows of query groups x bins of keys
MAX_TOP = 64
MAX_BYTES = 1 << 28  # they are below 2 MB unless thousands of thetas were asked for

CurveKind = Literal["anchor", "oracle"]

# name -> (dtype as stored, shape in named sizes). Sizes: T thetas asked, M curve points, K oracle points,
# R x C heat map cells, P bins of query positions, X top columns.
_ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "thetas": ("float64", ("T",)),
    "recall": ("float64", ("T",)),
    "recall_p05": ("float64", ("T",)),
    "recall_min": ("float64", ("T",)),
    "recall_last": ("float64", ("T",)),
    "kept_pairs": ("int64", ("T",)),
    "stripe_pairs": ("int64", ("T",)),
    "output_error": ("float64", ("T",)),
    "output_close_01": ("float64", ("T",)),
    "output_close_005": ("float64", ("T",)),
    "curve_theta": ("float64", ("M",)),
    "curve_recall": ("float64", ("M",)),
    "curve_pairs": ("int64", ("M",)),
    "oracle_pairs": ("int64", ("K",)),
    "oracle_recall": ("float64", ("K",)),
    "heat_rows": ("int64", ("R+1",)),
    "heat_columns": ("int64", ("C+1",)),
    "heat_mass": ("float16", ("R", "C")),
    "heat_kept": ("float16", ("R", "C")),
    "heat_margin": ("float16", ("R", "C")),
    "heat_stripes": ("float16", ("R", "C")),
    "position_recall": ("float32", ("T", "P")),
    "position_edges": ("int64", ("P+1",)),
    "top_columns": ("int64", ("X",)),
    "top_mass": ("float32", ("X",)),
}
_MAY_BE_NAN = {"output_error", "output_close_01", "output_close_005"}
_MAY_BE_INFINITE = {"thetas", "curve_theta", "heat_margin"}
_SHARES = {name for name in _ARRAYS if "recall" in name}
_ASCENDING = {"curve_theta", "curve_pairs", "oracle_pairs", "heat_rows", "heat_columns", "position_edges"}
_CLOSE = 1e-3  # float32 sums of exponentials may exceed 1 a little


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What an engine measures on one query head, whatever its name, whoever measured it.

    T is the number of thetas asked, M of curve points, K of oracle points, R x C of heat map cells, P of position
    bins. Dtypes are those of a profile (`HeadProfile`), which converts to them.

    Attributes:
        visible_pairs, anchor_pairs, candidate_pairs: exact (query, key) counts; the last two partition the first.
        recall, recall_p05, recall_min, recall_last: (T,) float64, attention mass kept: mean over queries, 5th
            percentile and minimum of the queries, mean of the last `block` queries.
        kept_pairs, stripe_pairs: (T,) int64, exact pairs kept in all and among the candidates.
        output_error: (T,) float64, ||O_sparse - O_dense||_F / ||O_dense||_F; NaN without V.
        output_close_01, output_close_005: (T,) float64, share of output elements closer than 0.01 / 0.005; NaN without
            V.
        curve_theta: (M,) float64 ascending, -inf first and +inf last.
        curve_recall, curve_pairs: (M,) float64 and int64, mean recall and exact kept pairs at each of them.
        oracle_pairs, oracle_recall: (K,) int64 ascending and float64, breakpoints of the stripe oracle.
        heat_rows, heat_columns: (R+1,), (C+1,) int64, edges of the heat map's cells: query and key positions.
        heat_mass: (R, C) float16, attention mass of the cell's keys, mean over the row's queries, anchor region
            included.
        heat_kept: (R, C) float16, the part of it kept at thetas[0].
        heat_margin: (R, C) float16, nats, smallest margin of the cell's candidate columns; +inf where there is none.
        heat_stripes: (R, C) float16, share of the cell's candidate (group, column) pairs that are stripes at
            thetas[0].
        position_recall: (T, P) float32, mean recall of the queries in each bin of positions.
        position_edges: (P+1,) int64, edges of those bins.
        top_columns, top_mass: (X <= 64,) int64 and float32, keys with most attention mass and their share of the
            total.
    """

    visible_pairs: int
    anchor_pairs: int
    candidate_pairs: int
    recall: np.ndarray
    recall_p05: np.ndarray
    recall_min: np.ndarray
    recall_last: np.ndarray
    kept_pairs: np.ndarray
    stripe_pairs: np.ndarray
    output_error: np.ndarray
    output_close_01: np.ndarray
    output_close_005: np.ndarray
    curve_theta: np.ndarray
    curve_recall: np.ndarray
    curve_pairs: np.ndarray
    oracle_pairs: np.ndarray
    oracle_recall: np.ndarray
    heat_rows: np.ndarray
    heat_columns: np.ndarray
    heat_mass: np.ndarray
    heat_kept: np.ndarray
    heat_margin: np.ndarray
    heat_stripes: np.ndarray
    position_recall: np.ndarray
    position_edges: np.ndarray
    top_columns: np.ndarray
    top_mass: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeadProfile(Measured):
    """Exact sparsity profile of one query head on one prompt: what was `Measured`, and on what.

    Arrays are converted to the stored dtype when a profile is made, so a saved and loaded one is equal bit for bit.

    Attributes:
        prompt: name of the prompt.
        layer, head, kv_head: indices in the model (not in the dump).
        tokens: prompt length N.
        head_dim: d.
        block, step, init, lookback: the anchor parameters, in tokens and blocks (see `AnchorParams`).
        window: sliding window of the layer in tokens, or None.
        softcap: logit soft-cap of the layer, or None.
        scale: softmax scale of the layer.
        backend: what computed it ("torch", "triton").
        dump_identity: hash that names the dump it came from.
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

    def __post_init__(self) -> None:
        for name, (dtype, _) in _ARRAYS.items():
            with np.errstate(over="ignore"):  # a margin beyond 65504 nats becomes +inf in float16
                array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            object.__setattr__(self, name, array)
        _check_scalars(self)
        _check_arrays(self)

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
        empty = np.zeros((0, 0), dtype=np.float16)
        edge = np.zeros(1, dtype=np.int64)
        return dataclasses.replace(
            self,
            heat_rows=edge,
            heat_columns=edge,
            heat_mass=empty,
            heat_kept=empty,
            heat_margin=empty,
            heat_stripes=empty,
        )

    def save(self, path: Path | str) -> None:
        """Write the profile as one safetensors file, atomically; the same profile gives the same bytes.

        Raises:
            RunFailure: the file cannot be written (disk full, no permission).
        """
        scalars = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS}
        tensors = {name: getattr(self, name) for name in _ARRAYS}
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
                if missing := sorted(set(_ARRAYS) - found):
                    raise DumpError(f"profile {path} lacks the tensor {missing[0]!r}: {again}")
                skip = {n for n in _ARRAYS if n.startswith("heat_")} if not heat else set()
                arrays = {name: file.get_tensor(name) for name in _ARRAYS if name not in skip}
        except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError, KeyError) as error:
            if isinstance(error, DumpError):
                raise
            raise DumpError(f"profile {path} cannot be read ({error}): {again}") from None
        if any(digests.get(part) != value for part, value in _digests(arrays, header).items()):
            raise DumpError(f"profile {path} is damaged (its checksum differs): {again}")
        for name in skip:
            dtype, shape = _ARRAYS[name]
            arrays[name] = np.zeros((1,) if len(shape) == 1 else (0, 0), dtype=dtype)
        for name, array in arrays.items():
            if str(array.dtype) != _ARRAYS[name][0]:
                raise DumpError(f"profile {path} stores {name} as {array.dtype}: {again}")
        try:
            return cls(**header, **arrays)
        except InputError as error:
            raise DumpError(f"profile {path} is damaged ({error}): {again}") from None


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
    """SHA-256 of the heat map and of the rest, apart because the heat map may be left unread."""
    parts = {"curves": hashlib.sha256(json.dumps(scalars, sort_keys=True).encode())}
    for name in _ARRAYS:
        if name in arrays:
            part = parts.setdefault("heat" if name.startswith("heat_") else "curves", hashlib.sha256())
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
    wanted = {f.name for f in dataclasses.fields(HeadProfile)} - set(_ARRAYS)
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


def _check_arrays(profile: HeadProfile) -> None:
    sizes: dict[str, int] = {}
    for name, (_, shape) in _ARRAYS.items():
        array = getattr(profile, name)
        if array.ndim != len(shape):
            raise InputError(f"{name} must have {counted(len(shape), 'dimension')}, not {array.ndim}")
        for size, label in zip(array.shape, shape, strict=True):
            want = size - 1 if label.endswith("+1") else size
            if sizes.setdefault(label.removesuffix("+1"), want) != want:
                raise InputError(f"{name} has shape {array.shape}, which contradicts the other arrays")
        if array.dtype.kind == "f":
            if name not in _MAY_BE_NAN and np.isnan(array).any():
                raise InputError(f"{name} holds NaN")
            if name not in _MAY_BE_INFINITE and np.isinf(array).any():
                raise InputError(f"{name} holds infinity")
        if name in _SHARES and array.size and not (array.min() >= 0 and array.max() <= 1 + _CLOSE):
            raise InputError(f"{name} must lie between 0 and 1")
        # +-inf minus itself is NaN, so compare neighbors instead of taking differences
        if name in _ASCENDING and (array[1:] < array[:-1]).any():
            raise InputError(f"{name} must be ascending")
    if sizes["T"] < 1 or sizes["M"] < 2 or sizes["K"] < 1:
        raise InputError("a profile needs a theta, two curve points and an oracle point")
    if sizes["R"] > MAX_ROWS or sizes["C"] > MAX_COLUMNS or sizes["X"] > MAX_TOP:
        raise InputError(f"at most {MAX_ROWS} x {MAX_COLUMNS} heat map cells and {MAX_TOP} top columns fit")
    if profile.curve_theta[0] != -math.inf or profile.curve_theta[-1] != math.inf:
        raise InputError("curve_theta must start at -inf and end at +inf")
    if (profile.curve_pairs[[0, -1]] != (profile.anchor_pairs, profile.visible_pairs)).any():
        raise InputError("the curve must run from the anchor pairs to the visible pairs")
    if (profile.kept_pairs - profile.stripe_pairs != profile.anchor_pairs).any():
        raise InputError("kept pairs must be the anchor pairs plus the stripe pairs")
    if sizes["R"] and (profile.heat_rows[-1] != profile.tokens or profile.heat_columns[-1] != profile.tokens):
        raise InputError("the heat map must cover the whole prompt")
