"""What a file of conversations holds, one conversation after the other, however large the file is.

Knows lists, lines, single objects and archives, but nothing of what a conversation looks like. Only the value
that is being read is in memory.
"""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any, cast

from bise.assistant.deep_json import TooDeepError, deep_value
from bise.errors import RequestError

PIECE = 1 << 20
"""Bytes read at a time."""
MAX_VALUE = 64 << 20
"""Characters of one conversation."""
MAX_UNPACKED = 1 << 30
"""Bytes of all conversations in an archive."""
KNOWN = "known are exports of bise, ChatGPT, open-webui, LibreChat and llama.cpp"
_NEAR_END = 16
"""Characters before the end within which a value that was cut off is found at fault, its strings aside."""
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_SPACE = re.compile(r"\s*")
_CONVERSATIONS = re.compile(r"(^|/)conversations[^/]*\.json$|\.(jsonl|ndjson)$", re.IGNORECASE)


class BrokenFileError(RequestError):
    """The file ends, or is at fault, after what was read of it so far."""


def entries(file: IO[bytes]) -> Iterator[Any]:
    """Yield what may be conversations. Raises RequestError for what is no JSON and no archive."""
    start = file.read(4)
    file.seek(0)
    if start != b"PK\x03\x04":
        yield from _sessions(_values(file))
        return
    try:
        with zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if _CONVERSATIONS.search(info.filename)]
            if not found:
                raise RequestError(f"the archive has no conversations.json; {KNOWN}", field="file")
            if sum(info.file_size for info in found) > MAX_UNPACKED:
                raise RequestError(
                    f"its conversations are larger than {MAX_UNPACKED >> 30} GiB", field="file"
                )
            for info in sorted(found, key=lambda info: info.filename):
                with archive.open(info) as part:
                    yield from _sessions(_values(part))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise BrokenFileError("the archive is damaged or asks for a password", field="file") from error


def _sessions(values: Iterator[Any]) -> Iterator[Any]:
    """Yield values, and the records of llama.cpp's sessions (one, then its messages) as one object each."""
    session: dict[str, Any] | None = None
    for value in values:
        record = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if record.get("type") == "message" and session is not None:
            session["messages"].append(record.get("message"))
            continue
        if session is not None:
            yield session
            session = None
        if record.get("type") == "session":
            session = {"conv": record, "messages": []}
        else:
            yield value
    if session is not None:
        yield session


def _values(file: IO[bytes]) -> Iterator[Any]:
    """Yield the elements of lists and all other values, in order; `conversations` of an object is a list."""
    text = _Text(file)
    while sign := text.sign():
        if sign == "[":
            yield from text.elements()
            continue
        value = text.value()
        listed = cast("dict[str, Any]", value).get("conversations") if isinstance(value, dict) else None
        yield from cast("list[Any]", listed) if isinstance(listed, list) else [value]


class _Text:
    """JSON text that is read as it is needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._is_over = False
        self._bytes = 0

    def sign(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = self._at if found is None else found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_over:
                return ""
            self._read(PIECE)

    def elements(self) -> Generator[Any]:
        """Yield the elements of the list that begins here."""
        self._at += 1
        if self.sign() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            sign = self.sign()
            if sign not in (",", "]") or not sign:
                raise _broken("a list goes on without a comma" if sign else "it ends within a list")
            self._at += 1
            if sign == "]":
                return

    def value(self) -> Any:
        """Return the next value."""
        self.sign()
        while True:
            try:
                value, end = self._decoded()
                if _SUSPECT.search(self._text, self._at, end):
                    value = _clean(value)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._text) - _NEAR_END
                )
                if self._is_over or not may_go_on:
                    raise _broken(error.msg[:100]) from error
            except TooDeepError as error:
                raise BrokenFileError("the file is nested too deeply", field="file") from error
            except ValueError as error:  # a number of thousands of digits
                raise _broken("a number is too long") from error
            else:
                if end < len(self._text) or self._is_over:
                    self._at = end
                    return value
            pending = len(self._text) - self._at
            if pending > MAX_VALUE:
                raise _broken(f"a conversation is larger than {MAX_VALUE >> 20} MiB")
            self._read(max(PIECE, pending))  # twice as much each time: it is read again from its beginning

    def _decoded(self) -> tuple[Any, int]:
        try:
            return self._json.raw_decode(self._text, self._at)
        except RecursionError:
            return deep_value(self._text, self._at)

    def _read(self, size: int) -> None:
        content = self._file.read(size)
        self._is_over = not content
        try:
            fresh = self._decoder.decode(content, self._is_over)
        except UnicodeDecodeError as error:
            raise BrokenFileError(
                f"the file is no UTF-8 (byte {self._bytes + error.start}); {KNOWN}", field="file"
            ) from error
        self._bytes += len(content)
        self._text = self._text[self._at :] + fresh
        self._at = 0


def _broken(reason: str) -> BrokenFileError:
    return BrokenFileError(f"the file is no JSON ({reason}); {KNOWN}", field="file")


def _clean(value: Any) -> Any:
    """Return a value with U+FFFD for what no database keeps: NUL, and halves of surrogate pairs."""
    holder: list[Any] = [value]
    waiting: list[Any] = [holder]
    while waiting:
        inner = waiting.pop()
        places: Iterable[Any] = range(len(inner))
        if isinstance(inner, dict):
            parts = cast("dict[str, Any]", inner)
            for name in list(parts):
                parts[_clean_text(name)] = parts.pop(name)  # taken out and put back: the order stays
            places = list(parts)
        for place in places:
            part = cast("Any", inner)[place]
            if isinstance(part, str):
                inner[place] = _clean_text(part)
            elif isinstance(part, dict | list):
                waiting.append(part)
    return holder[0]


def _clean_text(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", text)
