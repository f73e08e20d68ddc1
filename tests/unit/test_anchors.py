"""anchors.json: what is written is read, the schema holds, and nonsense gets one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

from anchorscope.anchors import AnchorConfig, LayerAnchors
from anchorscope.errors import InputError
from anchorscope.params import AnchorParams

ROOT = Path(__file__).parents[2]
MODEL = {"name": "m", "type": "llama", "layers": 4, "query_heads": 3, "kv_heads": 1, "head_dim": 8, "fingerprint": "a"}


def config():
    return AnchorConfig(
        (
            LayerAnchors(0, AnchorParams(64, 8), (2.5, math.inf, None)),
            LayerAnchors(3, AnchorParams(16, 4, 0, 32), (-math.inf, 0.0, 12)),
        ),
        MODEL,
        {"target_recall": 0.95},
    )


def test_written_and_read_again(tmp_path):
    path = tmp_path / "anchors.json"
    config().save(path)
    assert AnchorConfig.load(path) == config()
    assert AnchorConfig.load(path).sha256 == config().sha256
    assert config()[3].params.lookback == 32
    assert config()[1] is None
    assert config()[0].dense == (False, False, True)
    jsonschema.validate(json.loads(path.read_text()), json.loads((ROOT / "docs" / "anchors.schema.json").read_text()))


def changed(**updates):
    value = config().to_json()
    for path, new in updates.items():
        target, keys = value, path.split("__")
        for key in keys[:-1]:
            target = target[int(key)] if key.isdecimal() else target[key]
        target[int(keys[-1]) if keys[-1].isdecimal() else keys[-1]] = new
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "not an anchors.json"),
        ({"format": "anchorscope-dump"}, "not an anchors.json"),
        (changed(version=2), "upgrade anchorscope"),
        (changed(version="1"), "calibrate again"),
        (changed(version=True), "calibrate again"),
        (changed(model=[]), "model must be an object"),
        (changed(record=None), "record"),
        (changed(layers={}), "layers must be a list"),
        (changed(layers__0=3), r"layers\[0\] is not an object"),
        (changed(layers__0__layer=-1), "layer must be a whole number"),
        (changed(layers__0__layer=True), "layer must be a whole number"),
        (changed(layers__0__theta=[]), "one element per query head"),
        (changed(layers__0__theta__1="sparse"), "head 1: theta must be"),
        (changed(layers__0__theta__1=float("nan")), "NaN is not a number"),
        (changed(layers__0__theta__1=10**400), "401 digits"),
        (changed(layers__0__theta__1=True), "head 1: theta must be"),
        (changed(layers__0__theta__1=[]), "head 1: theta must be"),
        (changed(layers__1__block=0), "block must be"),
        (changed(layers__1__block=None), "block must be given"),
        (changed(layers__1__step=2**40), "step must be given"),
        (changed(layers__1__init=1.5), "init must be given"),
        (changed(layers__1__layer=0), "ascending"),
    ],
)
def test_nonsense_is_one_sentence(value, words, tmp_path):
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=words) as caught:
        AnchorConfig.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_unreadable(content, tmp_path):
    path = tmp_path / "anchors.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="calibrate"):
        AnchorConfig.load(path)


def test_another_model_is_refused():
    config().check_model(MODEL)
    config().check_model(MODEL | {"name": "renamed", "dtype": "bf16", "fingerprint": None})
    with pytest.raises(InputError, match="another model"):
        config().check_model(MODEL | {"fingerprint": "b"})
    config().check_model(MODEL | {"fingerprint": "b", "type": "qwen"}, force=True)
    for key in ("layers", "query_heads", "kv_heads", "head_dim"):
        with pytest.raises(InputError, match="calibrate on this model"):
            config().check_model(MODEL | {key: MODEL[key] + 1}, force=True)
    nameless = AnchorConfig.uniform(12.0, range(4), 3)
    nameless.check_model(MODEL)
    with pytest.raises(InputError, match="layers 0 to 2"):
        nameless.check_model(MODEL | {"layers": 3})
    with pytest.raises(InputError, match="3 heads in layer 0"):
        nameless.check_model(MODEL | {"query_heads": 9})


def test_theta_nan_and_disorder_are_refused():
    with pytest.raises(InputError, match="NaN"):
        LayerAnchors(0, AnchorParams(), (math.nan,))
    with pytest.raises(InputError, match="per query head"):
        LayerAnchors(0, AnchorParams(), ())
    with pytest.raises(InputError, match="ascending"):
        AnchorConfig((LayerAnchors(1, AnchorParams(), (1.0,)), LayerAnchors(0, AnchorParams(), (1.0,))))
