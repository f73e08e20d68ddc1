"""The marker of the tests that need a browser, for runs that read no pyproject.toml of a newer checkout."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs chromium, chromedriver and selenium; `make test-browser`")
