"""A real Chromium, where there is one; nothing is fetched for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
ADD_A_SCRIPT = (
    "const s = document.createElement('script'); s.textContent = 'document.title = \"hit\"';"
    "document.body.append(s)"
)

FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--in-process-gpu", "--renderer-process-limit=1", "--window-size=1100,900",
    "--disable-features=SpareRendererForSitePerProcess,IsolateOrigins,site-per-process",
)  # fmt: skip


class Browser:
    """Chromium with what its console said and what it asked the network for.

    Args:
        driver: Selenium's.
        folder: where pages are written.
    """

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self._folder = driver, folder

    def open(self, text: str, *, dark: bool = False, width: int = 1100) -> None:
        """Show a page, as a file."""
        path = self._folder / "page.html"
        path.write_text(text, encoding="utf-8")
        self.visit(path.as_uri(), dark=dark, width=width)

    def visit(
        self, address: str, *, dark: bool = False, width: int = 1100, height: int = 900
    ) -> None:
        """Show what is at an address, loaded anew."""
        self.media(dark=dark)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")  # another fragment alone would load nothing
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(address)

    def media(self, *, dark: bool = False, paper: bool = False) -> None:
        """What the system prefers, and whether it prints."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        asked = {"media": "print" if paper else "screen", "features": [scheme]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", asked)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script of the test returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, query: str) -> list[Any]:
        """Elements by a CSS query."""
        return list(self.driver.find_elements("css selector", query))

    def one(self, query: str) -> Any:
        """The first of them."""
        return self.driver.find_element("css selector", query)

    def copied(self) -> str:
        """What the clipboard holds."""
        read = "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0]('no: ' + e))"
        return str(self.driver.execute_async_script(read))

    def said(self) -> list[str]:
        """What the console has said since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked(self) -> list[str]:
        """Addresses asked for since the page was opened, itself first."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of pages."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver is installed here")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()
