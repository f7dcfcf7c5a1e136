"""The HTML report of a run and that of a comparison as rendered by a browser."""

import base64
import io
import itertools
import json
import shutil
import subprocess
import threading

import numpy as np
import pytest
from comparisons import COMPARISONS
from pages import RUNS
from PIL import Image

from cnn_jax.report import comparison
from cnn_jax.report.page import save_page
from cnn_jax.training.comparison import compare


class Browser:
    """A headless Chromium, controlled by the DevTools protocol.

    A context manager: leaving it closes the browser.
    """

    def __init__(self, program, profile):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # DevTools messages arrive on file descriptor 3 and leave on 4.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", program, *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.deadline = threading.Timer(300, self.process.kill)
        self.deadline.daemon = True
        self.deadline.start()
        self.numbers = itertools.count()
        self.session = {}
        self.received = b""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", flatten=True, **target)
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()  # which ends it
        self.process.wait()
        self.process.stdout.close()
        self.deadline.cancel()

    def receive(self):
        while b"\0" not in self.received:
            part = self.process.stdout.read1()
            assert part, "the browser exited"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, width, theme="light"):
        """Load a page, as a phone does if the width is small, and collect its events in ``events``."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.events = []
        self.call("Page.navigate", url=url)
        while all(event["method"] != "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self):
        with Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"]))) as image:
            return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


CUT_OFF = """
[...document.querySelectorAll("h1, h2, p, dt, dd, img, .chart text, .facts td")].filter(node => {
  const {left, right} = node.getBoundingClientRect();
  return left < 0 || right > innerWidth;
}).map(node => node.outerHTML)
"""

OVERLAPPING = """
[...document.querySelectorAll(".chart")].flatMap(chart => {
  const texts = [...chart.querySelectorAll("text")].map(node => [node.textContent, node.getBoundingClientRect()]);
  return texts.flatMap(([one, a], n) => texts.slice(n + 1).filter(([other, b]) =>
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom
  ).map(([other]) => [one, other]));
})
"""


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["validation", "one epoch", "nasty", "a hundred classes"])
def test_nothing_is_cut_off_or_loaded_in_a_browser(browser, tmp_path, name, width):
    path = tmp_path / "report.html"
    save_page(path, **RUNS[name])
    check_page(browser, path, width)


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", COMPARISONS)
def test_nothing_of_a_comparison_is_cut_off_or_loaded_in_a_browser(browser, tmp_path, name, width):
    path = tmp_path / "comparison.html"
    comparison.save_page(path, compare(COMPARISONS[name]))
    check_page(browser, path, width)


def check_page(browser, path, width):
    browser.open(path.as_uri(), width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate(OVERLAPPING) == []
    events = [(event["method"], event["params"]) for event in browser.events]
    requested = {details["request"]["url"] for method, details in events if method == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith("data:")} == {path.as_uri()}
    errors = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in events if event[0] in errors] == []


def test_light_and_dark_theme(browser, tmp_path):
    path = tmp_path / "report.html"
    save_page(path, **RUNS["ordinary"])
    for theme, *colors in (
        ("light", "#fdfcf9", "#96570a", "#14568f", "#62605a"),
        ("dark", "#151719", "#e0a64e", "#7fb9ec", "#a5a29a"),
    ):
        browser.open(path.as_uri(), 1200, theme)
        browser.evaluate("document.querySelector('.chart').scrollIntoView()")
        drawn = set(np.unique(browser.screenshot() @ np.array([65536, 256, 1])).tolist())
        assert {int(color[1:], 16) for color in colors} <= drawn  # background, curves and axes


def test_light_and_dark_theme_of_a_comparison(browser, tmp_path):
    path = tmp_path / "comparison.html"
    comparison.save_page(path, compare(COMPARISONS["ten"]))
    for theme, *colors in (
        ("light", "#fdfcf9", "#14568f", "#96570a", "#1a6840", "#7a3f9d", "#ab1f2d"),
        ("dark", "#151719", "#7fb9ec", "#e0a64e", "#6fc79a", "#cda2ee", "#f2949b"),
    ):
        browser.open(path.as_uri(), 1200, theme)
        browser.evaluate("document.querySelector('.legend').scrollIntoView()")
        drawn = set(np.unique(browser.screenshot() @ np.array([65536, 256, 1])).tolist())
        assert {int(color[1:], 16) for color in colors} <= drawn  # background and curves
