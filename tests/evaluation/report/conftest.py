"""A headless Chromium from the system."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


class Browser:
    """A page in Chromium, with its console messages and requests since it was opened."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, at: str = "rollouts") -> None:
        """Open the page at a section.

        Figures are drawn when they come near the view, so a test that is not about them need not wait for
        any.
        """
        self.driver.get("about:blank")
        self.console()
        self.requests()
        self.driver.get(f"{page.as_uri()}#{at}")
        self.wait(
            "return !document.getElementById('browser') "
            "|| /completions of/.test(document.getElementById('status').textContent)"
        )

    def draw_figures(self) -> int:
        """Scroll through all figures and return their number."""
        charts = self.driver.find_elements("css selector", ".chart")
        for number, chart in enumerate(charts):
            self.run("arguments[0].scrollIntoView()", chart)
            self.wait(f"return document.querySelectorAll('.chart')[{number}].querySelector('.main-svg')")
        return len(charts)

    def run(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def wait(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 120, poll_frequency=0.05).until(
            lambda driver: driver.execute_script(script), message=script
        )

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys: str) -> None:
        """Return the element that has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that Chromium requested, except the file itself and what the page holds."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url.partition("#")[0] for url in urls if not url.startswith(("data:", "blob:", "about:"))]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        reason = (
            "the page was NOT tried in a browser: no chromium and chromedriver here "
            "(Debian: apt-get install chromium chromium-driver)"
        )
        if os.environ.get("RPT_REQUIRE_BROWSER"):
            pytest.fail(f"RPT_REQUIRE_BROWSER is set, but {reason}")
        pytest.skip(reason)
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed; it comes with the dev extra"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield Browser(driver)
    driver.quit()
