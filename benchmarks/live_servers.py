"""Servers as processes of their own: `bise serve`, and llama.cpp's `llama-server` beside it.

A true llama-server is built from the source inside llama-cpp-python's sdist (llama_server/build.sh), over the
very libraries that are installed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from bise.bench.rounds import process_cpu_seconds

LLAMA_SERVER = Path.home() / ".cache" / "bise" / "llama-server" / "llama-server"
READY_S = 600.0


class LiveServer:
    """A server process on a free port of this machine."""

    def __init__(self, name: str, command: Sequence[str], port: int, model: str) -> None:
        """Start `command` and wait until it answers /health."""
        self.name = name
        self.command = list(command)
        self.url = f"http://127.0.0.1:{port}"
        self.model = model
        """What requests name."""
        with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would stop the server
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
            self._wait_until_ready(said)

    def _wait_until_ready(self, said: IO[bytes]) -> None:
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                said.seek(0)
                words = said.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{self.name} did not start: {shlex.join(self.command)}\n{words}")
            time.sleep(0.2)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        return process_cpu_seconds(self.pid)

    @property
    def resident_bytes(self) -> int:
        """Memory in use, weights that are mapped included."""
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_files(self) -> int:
        """Open files, connections included."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def close(self) -> None:
        """Stop the process."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


def bise_command(model: Path | None, port: int, *options: str) -> list[str]:
    """Return how to serve a model (None: the embedded one) with bise."""
    models = [] if model is None else [str(model)]
    return [sys.executable, "-m", "bise", "serve", *models, "--port", str(port), *options]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def bise_server(model: Path | None, *options: str) -> Iterator[LiveServer]:
    """Serve a model with `bise serve` and further options."""
    port = free_port()
    name = "brise" if model is None else model.stem if model.suffix == ".gguf" else model.name
    with tempfile.TemporaryDirectory() as directory:  # a ledger of its own, written as in real life
        command = bise_command(model, port, "--db", f"{directory}/bise.db", *options)
        server = LiveServer("bise", command, port, name)
        try:
            yield server
        finally:
            server.close()


@contextlib.contextmanager
def llama_server(program: Path, model: Path, *options: str) -> Iterator[LiveServer]:
    """Serve a GGUF file with llama-server and further options."""
    port = free_port()
    command = [str(program), "-m", str(model), "--port", str(port), *options]
    server = LiveServer("llama.cpp", command, port, model.stem)
    try:
        yield server
    finally:
        server.close()
