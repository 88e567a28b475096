"""JSON nested deeper than Python's own parser goes: exports that keep each answer within its question."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

MAX_DEPTH = 50_000
"""Lists and objects within each other: two for each message of the longest conversation, and some room."""
_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = json.JSONDecoder()

_Read = tuple[Any, int]
"""A value and where it ends."""


class TooDeepError(Exception):
    """A value is nested deeper than `MAX_DEPTH`."""


def deep_value(text: str, at: int) -> _Read:
    """Return the value that begins at `at` and where it ends, as `JSONDecoder.raw_decode` does, however
    deeply lists and objects lie within each other. Raises JSONDecodeError, TooDeepError.
    """
    if text[at : at + 1] not in ("[", "{"):
        return _PLAIN.raw_decode(text, at)
    readers = [_reader(text, at)]
    inner: _Read | None = None
    while True:
        try:
            start = readers[-1].send(inner)
        except StopIteration as end:
            inner = end.value
            readers.pop()
            if not readers:
                return end.value
        else:
            if len(readers) == MAX_DEPTH:
                raise TooDeepError
            readers.append(_reader(text, start))
            inner = None


def _reader(text: str, at: int) -> Generator[int, _Read | None, _Read]:
    """Read a list or an object. Hands out where one within it begins, and is sent that one."""
    is_object = text[at] == "{"
    items: list[Any] = []
    names: list[str] = []
    close = "}" if is_object else "]"
    at = _skip(text, at + 1)
    is_over = text[at : at + 1] == close
    while not is_over:
        if is_object:
            name, at = _name(text, at)
            names.append(name)
        if text[at : at + 1] in ("[", "{"):
            inner = yield at
            assert inner is not None
            value, at = inner
        else:
            value, at = _PLAIN.raw_decode(text, at)
        items.append(value)
        at = _skip(text, at)
        is_over = text[at : at + 1] == close
        if not is_over:
            at = _skip(text, _after(text, at, ","))
    return (dict(zip(names, items, strict=True)) if is_object else items), at + 1


def _name(text: str, at: int) -> tuple[str, int]:
    """Return a name of an object and where its value begins."""
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    name, at = _PLAIN.raw_decode(text, at)
    return name, _skip(text, _after(text, _skip(text, at), ":"))


def _after(text: str, at: int, sign: str) -> int:
    """Return the place after `sign`, which must stand at `at`."""
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"Expecting '{sign}' delimiter", text, at)
    return at + 1


def _skip(text: str, at: int) -> int:
    """Return the next place that is no white space."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
