"""A real browser for the tests of the page, without a network."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path

import pytest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--proxy-server=127.0.0.1:9",  # whatever asks for the network fails, and is seen in the log
]


def find(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {names[0]} on this machine: apt-get install chromium chromium-driver")
    return found


class Page:
    """The loaded page; every use ends with a look at the console."""

    def __init__(self, driver, path: Path, *, ready: str = "document.querySelector('#heat .main-svg')"):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
        driver.get_log("browser")
        driver.get(path.as_uri())
        self.wait(f"document.documentElement.dataset.ready === '1' && {ready}")

    def js(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition: str, *arguments):
        done = "const done = arguments[arguments.length - 1], from = Date.now(), args = [...arguments];"
        done += f"const look = () => ({condition}) ? done(true) : Date.now() - from > 15000 ? done(false)"
        assert self.driver.execute_async_script(f"{done} : setTimeout(look, 20); look();", *arguments), condition

    def settle(self):
        """Until what was asked for is drawn: two frames, and the tasks behind them."""
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => setTimeout(done, 60), 60)));"
        )

    def click(self, selector: str):
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.driver.find_element("css selector", selector).click()
        self.settle()

    def choose(self, selector: str, value: str):
        self.js(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true}));",
            selector,
            value,
        )
        self.settle()

    def press(self, selector: str, *keys: str):
        self.driver.find_element("css selector", selector).send_keys(*keys)
        self.settle()

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def cell(self, layer: int, head: int) -> float:
        """The number that a grid cell announces."""
        label = self.js(f"return document.querySelector('[data-key=\"{layer}:{head}\"]').getAttribute('aria-label')")
        return float(label.rsplit(" ", 1)[1])

    def numbers(self, theta: str) -> dict[str, str]:
        """A row of the table of a head's numbers."""
        return self.js(
            "const row = document.querySelector(`#numbers tr[data-theta='${arguments[0]}']`);"
            "return Object.fromEntries([...row.children].map((c) => [c.dataset.column, c.textContent]));",
            theta,
        )

    def size(self, width: int, height: int, *, dark: bool):
        """Make the window that large, and the system's theme light or dark."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.wait(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
        self.settle()

    def shoot(self, name: str, width: int):
        """Leave a picture of the whole page in the folder ANCHORSCOPE_SCREENSHOTS, if that is named."""
        if folder := os.environ.get("ANCHORSCOPE_SCREENSHOTS"):
            tall = self.js("return document.documentElement.scrollHeight")
            whole = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
            shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": whole})
            (Path(folder) / name).write_bytes(base64.b64decode(shot["data"]))

    def check(self):
        """Nothing went wrong, and nothing asked for the network."""
        assert self.driver.get_log("browser") == []
        assert self.js("return document.getElementById('failure').hidden")
        others = "performance.getEntriesByType('resource').filter((r) => !/^(data|blob):/.test(r.name))"
        assert self.js(f"return {others}") == []
