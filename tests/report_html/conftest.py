"""A finished analysis for the tests of the page."""

from __future__ import annotations

import pytest

from .runs import make_profiles, write_run


@pytest.fixture(scope="module")
def profiles():
    return make_profiles()


@pytest.fixture(scope="module")
def run(tmp_path_factory, profiles):
    return write_run(tmp_path_factory.mktemp("runs") / "first", profiles)
