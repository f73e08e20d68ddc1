"""Finished folders for the tests of the page, and the browser they are shown in."""

from __future__ import annotations

import pytest

from .browser import FLAGS, find
from .results import calibrated, timed
from .runs import make_profiles, write_run


@pytest.fixture(scope="module")
def profiles():
    return make_profiles()


@pytest.fixture(scope="module")
def run(tmp_path_factory, profiles):
    return write_run(tmp_path_factory.mktemp("runs") / "first", profiles)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    browser, service = find("chromium", "chromium-browser", "google-chrome"), find("chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(service))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A finished calibration."""
    return calibrated(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A finished bench."""
    return timed(tmp_path_factory.mktemp("bench"))
