"""anchors.json: which groups and which theta each head of one model runs with.

Written by `anchorscope calibrate`, read by `anchorscope.sparse_attention` and `anchorscope evaluate`. The format is
specified in docs/anchors.schema.json. Whatever comes from the file is untrusted: every value is checked before use.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorscope import views
from anchorscope._version import __version__
from anchorscope.errors import InputError
from anchorscope.files import read_json, write_atomic
from anchorscope.notebook import InNotebook
from anchorscope.params import AnchorParams
from anchorscope.shown import counted

FORMAT = "anchorscope-anchors"
VERSION = 1
MAX_BYTES = 1 << 26
MAX_LAYERS, MAX_HEADS, MAX_TOKENS = 4096, 4096, 1 << 30
# What must agree for a configuration to fit a model at all, and what says that it is the same model.
SHAPE = ("layers", "query_heads", "kv_heads", "head_dim")
IDENTITY = ("type", "fingerprint")


@dataclass(frozen=True)
class LayerAnchors:
    """How one layer's heads run.

    Attributes:
        layer: index of the layer in the model.
        params: block, step, init and lookback, shared by the layer's heads.
        thetas: per query head, nats; +inf and -inf are legal; None means that the head runs dense.

    Raises:
        InputError: a negative layer, no heads, a theta that is NaN.
    """

    layer: int
    params: AnchorParams
    thetas: tuple[float | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thetas", tuple(None if t is None else float(t) for t in self.thetas))
        if self.layer < 0 or not self.thetas:
            raise InputError(f"layer {self.layer}: give one theta per query head")
        if any(t is not None and math.isnan(t) for t in self.thetas):
            raise InputError(f"layer {self.layer}: a theta is NaN; use a number of nats, inf, -inf or dense")

    @property
    def dense(self) -> tuple[bool, ...]:
        """Per query head, whether it runs dense."""
        return tuple(t is None for t in self.thetas)


@dataclass(frozen=True, repr=False)
class AnchorConfig(InNotebook):
    """The heads of one model and how they run. Layers that are not named run dense.

    Attributes:
        layers: ascending, each once.
        model: what the configuration belongs to (a dump's `model` object), or None for any model of that shape.
        record: how it was made and what it reached, as JSON; not interpreted.

    Raises:
        InputError: layers out of order or named twice.
    """

    layers: tuple[LayerAnchors, ...]
    model: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    look = views.anchors

    def __post_init__(self) -> None:
        order = [x.layer for x in self.layers]
        if order != sorted(set(order)):
            raise InputError("layers must be ascending, each named once")

    def __getitem__(self, layer: int) -> LayerAnchors | None:
        """The layer's entry, or None where it runs dense."""
        return next((x for x in self.layers if x.layer == layer), None)

    @classmethod
    def uniform(
        cls, theta: float, layers: Sequence[int], query_heads: int, params: AnchorParams | None = None
    ) -> AnchorConfig:
        """One theta and one kind of group for every head of the layers."""
        params = params or AnchorParams()
        return cls(tuple(LayerAnchors(i, params, (theta,) * query_heads) for i in sorted(set(layers))))

    def coverage(self, heads: Mapping[int, int]) -> dict[str, Any]:
        """How much of a model runs sparse, as JSON values; all that is not named runs dense.

        Args:
            heads: query heads of every attention layer of the model, by its index.

        Returns:
            `layers` and `heads` of the model, `sparse_layers` (with at least one sparse head), `sparse_heads`,
            `dense_heads`, `sparse_share` (of the heads), `unnamed` (layers that run dense for want of a word).
        """
        sparse = {x.layer: x.dense.count(False) for x in self.layers if x.layer in heads}
        total, count = sum(heads.values()), sum(sparse.values())
        return {
            "layers": len(heads),
            "heads": total,
            "sparse_layers": sum(n > 0 for n in sparse.values()),
            "sparse_heads": count,
            "dense_heads": total - count,
            "sparse_share": count / total if total else 0.0,
            "unnamed": sorted(heads.keys() - sparse.keys()),
        }

    def check_model(self, facts: Mapping[str, Any], *, force: bool = False) -> None:
        """Make sure that this configuration is for that model.

        Args:
            facts: the model at hand, as `anchorscope.models.model_facts` describes it.
            force: accept another model of the same shape.

        Raises:
            InputError: the shapes differ, the model is another one (without `force`), or a layer does not fit.
        """
        own = self.model or {}
        for key in SHAPE:
            if own.get(key) is not None and facts.get(key) is not None and own[key] != facts[key]:
                raise InputError(
                    f"these anchors are for {_called(own)} with {own[key]} {key.replace('_', ' ')}, but"
                    f" {_called(facts)} has {facts[key]}: calibrate on this model"
                )
        for key in IDENTITY:
            if not force and own.get(key) is not None and facts.get(key) is not None and own[key] != facts[key]:
                raise InputError(
                    f"these anchors are for another model ({_called(own)}, not {_called(facts)}; their {key} differs):"
                    " calibrate on this one, or force it"
                )
        depth, heads = facts.get("layers"), facts.get("query_heads")
        for x in self.layers:
            if isinstance(depth, int) and x.layer >= depth:
                raise InputError(
                    f"these anchors name layer {x.layer}, but {_called(facts)} has layers 0 to {depth - 1}"
                )
            if isinstance(heads, int) and len(x.thetas) != heads:
                raise InputError(
                    f"these anchors have {counted(len(x.thetas), 'head')} in layer {x.layer}, but"
                    f" {_called(facts)} has {heads}"
                )

    @property
    def sha256(self) -> str:
        """Hash of what runs (layers and thetas), whatever the record says."""
        return hashlib.sha256(json.dumps([_layer_json(x) for x in self.layers]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The file's content as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_by": f"anchorscope {__version__}",
            "model": None if self.model is None else dict(self.model),
            "layers": [_layer_json(x) for x in self.layers],
            "record": dict(self.record),
        }

    def save(self, path: Path | str) -> None:
        """Write the file, all or nothing.

        Raises:
            RunFailure: it cannot be written.
        """
        write_atomic(path, self.to_text().encode())

    def to_text(self) -> str:
        """The content of the file."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path | str) -> AnchorConfig:
        """Read and check a file.

        Raises:
            InputError: missing, not JSON, not such a file, of a newer version, or a value that makes no sense.
        """
        path = Path(path)
        try:
            value = read_json(path, MAX_BYTES, "anchors")
        except InputError as error:
            raise InputError(f"{error}; give the anchors.json of `anchorscope calibrate`") from None
        try:
            return cls.from_json(value)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, value: object) -> AnchorConfig:
        """Check JSON values and make a configuration of them.

        Raises:
            InputError: as `load`.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f"not an anchors.json: its format is not {FORMAT!r}")
        version = value.get("version")
        if version != VERSION or isinstance(version, bool):
            newer = isinstance(version, int) and version > VERSION
            hint = "upgrade anchorscope" if newer else "calibrate again"
            raise InputError(f"format version {repr(version)[:40]} is not {VERSION}: {hint}")
        model, record, layers = value.get("model"), value.get("record", {}), value.get("layers")
        if not isinstance(model, (dict, type(None))) or not isinstance(record, dict):
            raise InputError("model must be an object or null, and record an object")
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            raise InputError("layers must be a list")
        return cls(tuple(_layer(item, i) for i, item in enumerate(layers)), model, record)


def different_in(model: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In what two descriptions of a model differ, in words; None if they may be of the same model.

    Without fingerprints on both sides, the name is all there is to go by.
    """
    keys: tuple[str, ...] = (*SHAPE, *IDENTITY)
    if not (model.get("fingerprint") and other.get("fingerprint")):
        keys = (*keys, "name")
    for key in keys:
        if model.get(key) is not None and other.get(key) is not None and model[key] != other[key]:
            return key.replace("_", " ")
    return None


def _called(facts: Mapping[str, Any]) -> str:
    name = str(facts.get("name") or facts.get("class") or "an unnamed model")
    return "".join(c for c in name if c.isprintable())[:120]


def _layer_json(x: LayerAnchors) -> dict[str, Any]:
    p = x.params
    return {
        "layer": x.layer,
        "block": p.block,
        "step": p.step,
        "init": p.init_tokens,
        "lookback": p.lookback_tokens,
        "theta": ["dense" if t is None else t if math.isfinite(t) else "inf" if t > 0 else "-inf" for t in x.thetas],
    }


def _layer(item: object, index: int) -> LayerAnchors:
    where = f"layers[{index}]"
    if not isinstance(item, dict):
        raise InputError(f"{where} is not an object")
    layer, thetas = item.get("layer"), item.get("theta")
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < MAX_LAYERS:
        raise InputError(f"{where}: layer must be a whole number below {MAX_LAYERS}, not {str(layer)[:40]!r}")
    if not isinstance(thetas, list) or not 0 < len(thetas) <= MAX_HEADS:
        raise InputError(f"{where}: theta must be a list with one element per query head")
    sizes = {name: item.get(name) for name in ("block", "step", "init", "lookback")}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value >= MAX_TOKENS:
            raise InputError(f"{where}: {name} must be given as a whole number of tokens (step: of blocks)")
    try:
        params = AnchorParams(**sizes)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return LayerAnchors(layer, params, tuple(_theta(t, f"{where}, head {h}") for h, t in enumerate(thetas)))


def _theta(value: object, where: str) -> float | None:
    if value == "dense":
        return None
    if value in ("inf", "-inf"):
        return math.inf if value == "inf" else -math.inf
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < 1e300:  # type: ignore[arg-type]
        raise InputError(f"{where}: theta must be a number of nats, 'inf', '-inf' or 'dense', not {str(value)[:40]!r}")
    return float(value)  # type: ignore[arg-type]
