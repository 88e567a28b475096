"""A server with scripted models as a process of its own, and Debian's Chromium driven by Playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import bise

SITE = Path(__file__).with_name("scripted_site.py")
STATIC = Path(bise.__file__).parent / "server" / "static"
CHROMIUM = shutil.which("chromium")


class Server:
    """The scripted site; it can be killed and started again over the same database."""

    def __init__(self, port: int, folder: Path, pace_s: float = 0.004, piece: int = 4) -> None:
        self.port = port
        self.database = folder / "site.db"
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(SITE), str(self.port), str(self.database), str(pace_s), str(piece)]
        self._environment = {"PYTHONPATH": str(Path(bise.__file__).parent.parent)}
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_bise(cls, port: int, folder: Path, *options: str) -> Server:
        """Return `bise serve` itself on the embedded model, with everything of its own in `folder`."""
        server = cls(port, folder)
        place = ("--port", str(server.port), "--db", str(server.database), "--context", "1024")
        server._command = ["-m", "bise", "serve", *place, "--sequences", "2", *options]
        server._environment |= {"BISE_HOME": str(folder)}
        return server

    def start(self) -> Server:
        environment = os.environ | self._environment
        self.process = subprocess.Popen([sys.executable, *self._command], env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/api/v1/bootstrap", timeout=5).close()
            except OSError:
                assert self.process.poll() is None, "the site did not start"
                time.sleep(0.05)
            else:
                return self
        raise AssertionError("the site did not start in time")

    def go(self) -> None:
        """Let an answer that was asked to `hold` write the rest."""
        urllib.request.urlopen(f"{self.url}/go", data=b"", timeout=60).close()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def chromium():
    """A browser for the tests of a file: while it is open, this thread has a running event loop, which tests
    of other files must not find.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    if not (STATIC / "index.html").is_file():
        pytest.skip("the page is not built; make web")
    with playwright.sync_playwright() as driver:
        playwright.expect.set_options(timeout=20_000)
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory, free_port):
    server = Server(free_port(), tmp_path_factory.mktemp("site")).start()
    yield server
    server.kill()


@pytest.fixture
def own_site(chromium, tmp_path, free_port):
    """Make a server that a test may kill: `own_site(pace_s=..., piece=...)`."""
    made = []

    def make(**options):
        made.append(Server(free_port(), tmp_path, **options))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def served(chromium, tmp_path, free_port):
    """Make `bise serve` on the embedded model: `served(*options)`."""
    made = []

    def make(*options):
        made.append(Server.of_bise(free_port(), tmp_path, *options))
        return made[-1].start()

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def visit(chromium):
    """Open a page; everything it complains about fails the test: `visit(url, **context options)`."""
    contexts, complaints = [], []

    def open_page(url, *, same_browser_as=None, expects=(), **options):
        if same_browser_as is None:
            options = {"viewport": {"width": 1280, "height": 800}, "locale": "en-GB"} | options
            context = chromium.new_context(**options)
            contexts.append(context)
        else:
            context = same_browser_as.context
        page = context.new_page()
        page.set_default_timeout(20_000)

        def complain(text):
            if not any(part in text for part in expects):
                complaints.append(text)

        page.on("pageerror", lambda error: complain(f"error: {error}"))
        page.on("console", lambda line: complain(line.text) if line.type in ("error", "warning") else None)
        page.goto(url)
        page.get_by_role("textbox", name="Message").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def ask():
    """Send a question: `ask(page, text)`; with `wait` until the answer is there."""
    last = "[...document.querySelectorAll('article[aria-label^=\"You\"]')].at(-1)?.dataset.id ?? null"

    def send(page, text, *, wait=True):
        before = page.evaluate(last)
        page.get_by_role("textbox", name="Message").fill(text)
        page.get_by_role("button", name="Send").click()
        page.wait_for_function(f"before => ![null, before].includes({last})", arg=before)
        if wait:
            page.get_by_role("button", name="Regenerate").wait_for()

    return send
