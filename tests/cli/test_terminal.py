"""`bise chat` in a pseudo-terminal, typed at like a person."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

FAKE = Path(__file__).parent / "fake_model.py"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C becomes a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A bise process with a terminal of its own."""

    def __init__(self, home: Path, *args: str) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {
            "BISE_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TERM": "xterm",
            "NO_COLOR": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), *args],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.screen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end inside a character

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 90, *, nudge: str = "") -> None:
        """Read until `text` appears after what was matched before; type `nudge` after five silent seconds."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} did not appear: {self.screen!r}"
            if not select.select([self.master], [], [], 5)[0]:
                self.type(nudge)
                continue
            try:
                self.screen += self.decoder.decode(os.read(self.master, 65536))
            except OSError:
                pytest.fail(f"{text!r} did not appear before the end: {self.screen!r}")
        self.screen = self.screen.partition(text)[2]

    def close(self) -> int:
        try:
            while os.read(self.master, 65536):
                continue
        except OSError:
            pass
        os.close(self.master)
        return self.process.wait(timeout=90)


@pytest.fixture
def terminal(home, model_dir):
    opened: list[Terminal] = []

    def start(*args: str) -> Terminal:
        opened.append(Terminal(home, "chat", str(model_dir), *args))
        return opened[-1]

    yield start
    for each in opened:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def test_a_person_talks_interrupts_and_leaves(terminal):
    screen = terminal()
    screen.wait_for("bise> ")
    screen.type("hello\n")
    screen.wait_for("echo: hello")
    screen.wait_for("tok/s")
    screen.wait_for("bise> ")
    screen.type("half a line")
    screen.wait_for("half a line")
    screen.type(CTRL_C)
    # CPython may notice a signal that falls between two keys only at the next key: press again, as people do.
    screen.wait_for("(Ctrl-D leaves)", nudge=CTRL_C)
    screen.wait_for("bise> ")
    screen.type("one\\\n")
    screen.wait_for("… ")
    screen.type("two\n")
    screen.wait_for("echo: one\r\ntwo")
    screen.wait_for("bise> ")
    screen.type(CTRL_D)
    assert screen.close() == 0


def test_the_arrow_up_brings_back_a_line_of_an_earlier_session(terminal, home):
    pytest.importorskip("readline")
    first = terminal()
    first.wait_for("bise> ")
    first.type("remember me\n")
    first.wait_for("echo: remember me")
    first.wait_for("bise> ")
    first.type("/exit\n")
    assert first.close() == 0
    history = (home / "chat_history").read_text()
    assert re.search(r"^remember( |\\040)me$", history, re.MULTILINE)
    second = terminal()
    second.wait_for("bise> ")
    second.type(UP + UP + "\n")
    second.wait_for("echo: remember me")
    second.wait_for("bise> ")
    second.type(CTRL_D)
    assert second.close() == 0


def test_no_history_keeps_no_history(terminal, home):
    screen = terminal("--no-history")
    screen.wait_for("bise> ")
    screen.type("secret\n")
    screen.wait_for("echo: secret")
    screen.wait_for("bise> ")
    screen.type(CTRL_D)
    assert screen.close() == 0
    assert not home.exists()
