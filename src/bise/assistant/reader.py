"""Reads files that people bring, each in a process with little memory and time; see `document_reader`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import dataclass
from typing import Any

from bise.errors import RequestError

READ_S = 40.0
"""Wall-clock time for one document, waiting excluded."""
MAX_BYTES = 64 << 20
"""Size of one file."""
READERS = 2
"""Documents that are read at the same time, each in a process of up to 1 GiB."""
_KINDS = {
    "pdf": "pdf", "docx": "docx", "html": "html", "htm": "html", "xhtml": "html", "csv": "csv", "tsv": "csv",
}  # fmt: skip
_ENDED = {
    -signal.SIGXCPU: "it takes too long to read",
    -signal.SIGKILL: "it takes too much memory or time to read",
    -signal.SIGSEGV: "it takes too much memory to read",
    -signal.SIGABRT: "it takes too much memory to read",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadText:
    """What was read from a file."""

    text: str
    pages: tuple[tuple[int, int], ...] = ()
    """(page, character where it begins), for files that have pages."""


class DocumentReader:
    """Reads a few documents at a time."""

    def __init__(self, at_once: int = READERS) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def read(self, name: str, content: bytes) -> tuple[str, ReadText]:
        """Return the kind of a file and its text. Raises RequestError saying in one line why it cannot be."""
        kind = kind_of(name, content)
        shown = " ".join(name.split())[:100] or "the file"
        if len(content) > MAX_BYTES:
            raise RequestError(f"{shown}: it is larger than {MAX_BYTES >> 20} MiB", field="file")
        async with self._places:
            answer = await _read_apart(kind, content)
        if "error" in answer:
            raise RequestError(f"{shown}: {answer['error']}", field="file")
        if not answer["text"]:
            raise RequestError(f"{shown}: it has no text", field="file")
        return kind, ReadText(
            text=answer["text"], pages=tuple((int(page), int(place)) for page, place in answer["pages"])
        )


def kind_of(name: str, content: bytes) -> str:
    """Return pdf, docx, html, csv or text, by the file's beginning and the end of its name."""
    if content[:1024].lstrip().startswith(b"%PDF-"):
        return "pdf"
    ending = name.rpartition(".")[2].lower()
    return _KINDS.get(ending, "text")


async def _read_apart(kind: str, content: bytes) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bise.assistant.document_reader",
        kind,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(READ_S):
            output, _ = await process.communicate(content)
    except TimeoutError:
        return {"error": "it takes too long to read"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return json.loads(output)
    except ValueError:
        return {"error": _ENDED.get(process.returncode or 0, "it cannot be read")}
