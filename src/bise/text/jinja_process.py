"""The parent's side of the template worker: starts it, talks to it, and kills it when it is late.

Knows the worker's protocol; knows nothing of chats.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from bise.errors import EngineError, ModelFileError, RequestError

_WALL_SECONDS = 20.0
"""Longest wait for one answer; the worker itself ends after one second of processor time."""
_MAX_REQUEST_BYTES = 64 << 20
_BUDGET = "1 s of processor time, 64 MiB of memory or 1 MiB of text"


class JinjaProcess:
    """Renders one template in a process of its own; safe to use from several threads."""

    def __init__(self, source: str, name: str) -> None:
        """Remember the template; the process starts with the first use. Errors start with `name`."""
        self._source = source
        self._name = name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Compile the template; ModelFileError when it is malformed or takes too much."""
        with self._lock:
            self._start()

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text of the template for `variables` (JSON values).

        Raises RequestError with the template's own words when it refuses, and when it exceeds its budget.
        """
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            reply = self._ask(process, {"render": variables})
        if reply is None:
            raise RequestError(
                f"{self._name}: takes more than {_BUDGET} for this conversation", field="template"
            )
        kind, message = reply.get("error"), reply.get("message", "")
        if kind in ("memory", "output"):
            self.close()
            raise RequestError(
                f"{self._name}: takes more than {_BUDGET} for this conversation", field="template"
            )
        if kind == "raised":
            raise RequestError(f"the model's chat template refuses: {message}", field="messages")
        if kind is not None:
            raise RequestError(f"{self._name}: fails on this conversation ({message})", field="template")
        return reply["text"]

    def close(self) -> None:
        """End the process; the next use starts a fresh one."""
        process, self._process = self._process, None
        if process:
            _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        spec = importlib.util.find_spec("jinja2"), importlib.util.find_spec("markupsafe")
        folders = {str(Path(found.origin).parent.parent) for found in spec if found and found.origin}
        worker = Path(__file__).with_name("jinja_worker.py")
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and file
            [sys.executable, "-I", "-X", "utf8", str(worker), *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for us, not for it
            env={},
        )
        weakref.finalize(self, _end, process)
        self._process = process
        reply = self._ask(process, {"compile": self._source})
        if reply is None and process.returncode > 0:
            raise EngineError(f"the template worker ended with status {process.returncode} while it compiled")
        if reply is None or reply.get("error") in ("memory", "output"):
            raise ModelFileError(f"{self._name}: takes more than {_BUDGET} to compile", field="template")
        if "error" in reply:
            raise ModelFileError(f"{self._name}: is malformed ({reply.get('message', '')})", field="template")
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: Mapping[str, object]) -> dict[str, str] | None:
        """Return the worker's answer, None when it died or had to be killed."""
        data = json.dumps(request).encode()
        if len(data) > _MAX_REQUEST_BYTES:
            raise RequestError(
                f"the conversation has {len(data)} bytes as JSON; at most {_MAX_REQUEST_BYTES} fit"
            )
        assert process.stdin
        assert process.stdout
        deadline = time.monotonic() + _WALL_SECONDS
        try:
            process.stdin.write(len(data).to_bytes(4, "big") + data)
            process.stdin.flush()
            header = _read(process.stdout.fileno(), 4, deadline)
            body = _read(process.stdout.fileno(), int.from_bytes(header, "big"), deadline)
        except (OSError, EOFError):
            _end(process)
            return None
        return cast(dict[str, str], json.loads(body))


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(data) < size:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            chunk = os.read(descriptor, min(size - len(data), 1 << 20)) if ready else b""
            if not chunk:
                raise EOFError
            data += chunk
    return bytes(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            try:
                pipe.close()
            except OSError:  # what was still to be written has no reader any more
                continue
