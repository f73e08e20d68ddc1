"""What a notebook shows: escaped, bounded, without anything from elsewhere; and one line in print."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from anchorscope.anchors import AnchorConfig
from anchorscope.notebook import InNotebook, View
from anchorscope.shown import exact_theta, share_text

HOSTILE = "<script>alert(1)</script><img src=http://x onerror=alert(2)>\x1b[31m\u202e"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(html):
    found = Tags()
    found.feed(html)
    return found


class Result(InNotebook):
    def __init__(self, view):
        self.view = view

    def look(self):
        return self.view


def test_foreign_text_stays_text():
    view = View(HOSTILE, [(HOSTILE, HOSTILE)], (HOSTILE,), [(HOSTILE,)], [HOSTILE])
    found = read(Result(view)._repr_html_())
    assert {tag for tag, _ in found.tags} <= {"div", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(set(attributes) <= {"style"} for _, attributes in found.tags)
    assert not any(c in found.text for c in "\x1b\u202e")
    assert "<script>" in found.text
    assert "\n" not in repr(Result(view))
    assert repr(Result(view)).isprintable()


def test_what_is_long_is_cut():
    rows = [("x" * 10_000, str(i)) for i in range(5000)]
    result = Result(View("t" * 10_000, [("f", "y" * 10_000)] * 5, ("a", "b"), rows, ["n" * 100_000]))
    assert len(result._repr_html_()) < 30_000
    assert "4,980 more rows" in result._repr_html_()
    assert len(repr(result)) < 600


def test_only_a_small_png_is_shown_and_nothing_is_fetched(tmp_path):
    (tmp_path / "large.png").write_bytes(PNG + bytes(500_000))
    (tmp_path / "text.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "small.png").write_bytes(PNG)
    pictures = [tmp_path / name for name in ("absent.png", "large.png", "text.png", "small.png")]
    found = read(Result(View("t", pictures=pictures))._repr_html_())
    (image,) = [attributes for tag, attributes in found.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == "small"
    assert "http" not in str(found.tags)


def test_colors_are_the_notebooks_own():
    """Readable on light and on dark: text has the color around it, and nothing but a picture has a ground."""
    style = " ".join(a.get("style") or "" for _, a in read(View("t", [("a", "b")], ("c",), [("d",)]).to_html()).tags)
    assert "color: inherit" in style
    assert "background: transparent" in style
    assert "#" not in style


def test_a_result_that_cannot_be_read_is_still_printed():
    class Broken(InNotebook):
        def look(self):
            raise KeyError("overall")

    assert repr(Broken()) == "<Broken>"
    assert Broken()._repr_html_() is None


def test_anchors_and_profiles_print_as_a_line():
    from synthetic import make_profile

    config = AnchorConfig.uniform(8.0, range(80), 64)
    assert repr(config) == "<AnchorConfig: layers 80, heads 5120, dense heads 0>"
    assert len(config._repr_html_()) < 30_000
    profile = make_profile()
    assert len(repr(profile)) < 300
    assert f"layer {profile.layer}, head {profile.head}" in repr(profile)
    assert read(profile._repr_html_()).text.count("\n") == 0
    assert np.asarray(profile.thetas).size == profile._repr_html_().count("<tr>") - 1


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    from anchorscope import AnchorParams, analyze, calibrate, compare_methods, line_up, open_dump

    folder = tmp_path_factory.mktemp("results")
    dump = open_dump(Path(__file__).parents[2] / "samples" / "smollm2-4k")
    how = {"params": AnchorParams(64, 4), "layers": [15], "heads": [7], "figures": False}
    found = analyze(dump, folder / "a", thetas=(6, 8), diagnose=True, **how)
    one = {"layers": [15], "heads": [7], "figures": False}
    return {
        "dump": dump,
        "analysis": found,
        "heads": found.diagnosis,
        "calibration": calibrate(folder / "a", folder / "c", holdout=0, figures=False),
        "comparison": compare_methods(dump, folder / "m", lineup=line_up("streaming"), **one),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dump", "prompts 1"),
        ("analysis", "recall"),
        ("heads", "kinds 1 streaming"),
        ("calibration", "for recall 0.95"),
        ("comparison", "least density"),
    ],
)
def test_every_result_shows_a_table_and_prints_a_line(sample, name, words):
    html, line = sample[name]._repr_html_(), repr(sample[name])
    assert words in line
    assert len(line) < 500
    found = read(html)
    assert "table" in {tag for tag, _ in found.tags}
    assert len(html) < 30_000


def test_numbers_are_those_of_the_report(sample):
    result = sample["analysis"]
    whole = result.report["overall"][0]
    text = read(result._repr_html_()).text
    assert f"theta {exact_theta(whole['theta'])}" in text
    assert share_text(whole["recall_mean"]) in text
    assert f"{len(result.report['target']['short'])} of 1 head fall" in text
    kept = sample["heads"].report["heads"][0]["stripe_tokens"]
    assert repr(kept[0]["token"]) in read(sample["heads"]._repr_html_()).text, "words, not ids"


def test_nothing_heavy_is_imported_to_show_a_result():
    code = (
        "import sys; import anchorscope.views, anchorscope.notebook;"
        "assert not {'torch', 'matplotlib', 'numpy', 'IPython'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
