"""Take the README's pictures of the assistant anew: `bise serve` with the embedded model, in Chromium.

Needs the built page (`make web`), Playwright and Chromium. Seeds are fixed; what the model writes is what it
writes. Look at every picture before it is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
}  # fmt: skip
STORY = "Tell me a short story about a cat"
TALK = (
    "Hello! Who are you?",
    "What can you do?",
    "Tell me a short story about a bird",
    "How many legs does a dog have?",
    "What is a lake?",
    "What is 23 plus 19?",
)
START_S = 60
PATIENCE_MS = 90_000
SETTLED_S = 1.0
"""How long moving parts of the page take at most."""


def main() -> None:
    """Serve the embedded model, hold the conversations and write the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium; apt-get install chromium")
    with tempfile.TemporaryDirectory() as home, served(Path(home)) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        story, talk = conversations(browser, url)
        take_ribbon(browser, talk)
        take_night(browser, url, story)
        take_phone(browser, talk)
        browser.close()


@contextlib.contextmanager
def served(home: Path) -> Generator[str]:
    """Run `bise serve` with everything of its own in `home`; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"BISE_HOME": str(home)}
    prices = ["prices", "set", "brise", "--input", "0.05", "--output", "0.2"]
    subprocess.run([sys.executable, "-m", "bise", *prices], check=True, env=environment)
    process = subprocess.Popen([sys.executable, "-m", "bise", "serve", "--port", str(port)], env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_up(url: str) -> bool:
    """Return True once the server answers."""
    try:
        urllib.request.urlopen(f"{url}/api/v1/bootstrap", timeout=5).close()
    except OSError:
        return False
    return True


def conversations(browser: Browser, url: str) -> tuple[str, str]:
    """Hold what the pictures show; return the addresses of a story and of a longer talk."""
    page = opened(browser, url, "light", DESKTOP)
    call(page, "POST", "/personas", {"name": "Short", "system": "Answer in one or two short sentences."})
    call(page, "PATCH", "/settings", {"params": {"seed": 2}})
    page.reload()
    ask(page, STORY)
    story = page.url
    filed = {"ids": [story.rsplit("/", 1)[1]], "changes": {"folder": "Stories"}}
    call(page, "POST", "/conversations/change", filed)
    call(page, "PATCH", "/settings", {"params": {"seed": 1, "temperature": 0.3}})
    page.goto(url)
    ask(page, "What is 12 plus 7?")
    page.get_by_role("button", name="New chat").click()
    for question in TALK:
        ask(page, question)
    talk = page.url
    page.context.close()
    return story, talk


def take_ribbon(browser: Browser, talk: str) -> None:
    """By day: a talk, and the table of what fills the context."""
    page = opened(browser, talk, "light", DESKTOP)
    page.get_by_role("button", name="What fills the window").click()
    page.mouse.move(640, 500)
    take(page, "assistant-light")


def take_night(browser: Browser, url: str, story: str) -> None:
    """At night: a new chat, and a story in its folder."""
    page = opened(browser, url, "dark", DESKTOP)
    take(page, "assistant-dark-start")
    page.get_by_role("button", name="Stories").click()
    page.get_by_role("list", name="Stories").get_by_role("link").click()
    page.wait_for_url(story)
    page.get_by_role("button", name="Regenerate").wait_for()
    take(page, "assistant-dark")


def take_phone(browser: Browser, talk: str) -> None:
    """On a phone."""
    page = opened(browser, talk, "light", PHONE)
    page.get_by_role("button", name="Regenerate").wait_for()
    take(page, "assistant-phone")


def opened(browser: Browser, url: str, scheme: Literal["light", "dark"], device: dict[str, Any]) -> Page:
    """Return a page of its own browser."""
    context = browser.new_context(locale="en-GB", color_scheme=scheme, **device)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    page.get_by_role("textbox", name="Message").wait_for()
    return page


def ask(page: Page, question: str) -> None:
    """Ask and wait for the whole answer."""
    asked = page.get_by_role("article", name="You").count()
    page.get_by_role("textbox", name="Message").fill(question)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("article", name="You").nth(asked).wait_for()
    page.get_by_role("button", name="Regenerate").wait_for()


def call(page: Page, method: str, path: str, body: dict[str, Any]) -> None:
    """Call the assistant's interface as the page does."""
    address = page.url.split("/c/")[0].rstrip("/") + "/api/v1" + path
    answer = page.request.fetch(address, method=method, data=body)
    if not answer.ok:
        raise SystemExit(f"{method} {path}: {answer.text()}")


def take(page: Page, name: str) -> None:
    """Write a picture once nothing moves any more; close the page's browser."""
    time.sleep(SETTLED_S)
    page.screenshot(path=IMAGES / f"{name}.png")
    print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
