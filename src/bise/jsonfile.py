"""Strict, bounded JSON for files that strangers wrote: one reader for every model file.

Refuses what `json.loads` lets pass: duplicate keys, NaN and Infinity, numbers of absurd length, deep nesting,
lone surrogates, invalid UTF-8, and anything that is not a regular file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import NoReturn, cast

from bise.diskfile import read_bounded
from bise.errors import ModelFileError

MAX_DEPTH = 64
"""Nested objects and arrays at most; real model files use fewer than ten."""
MAX_DIGITS = 40
"""Characters of one number at most."""
MAX_BYTES = 64 << 20
"""Default size limit of a JSON file."""
MAX_VALUES = 8_000_000
"""Default limit on the values in one file; 200,000 pieces with their merges are about a million."""

_SLICE = 1 << 16
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Raises ModelFileError for a missing file, a FIFO, a device, a directory, a symlink loop or a larger file;
    never blocks and never allocates more than `max_bytes`.
    """
    return read_bounded(path, max_bytes)


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> object:
    """Return the JSON value of a file; ModelFileError when it is not clean."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), str(path))


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, object]:
    """Return the JSON object of a file; ModelFileError when the file holds another kind of value."""
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: must hold a JSON object, not {kind_of(value)}", field=str(path))
    return cast(dict[str, object], value)


def parse_json(
    data: bytes | bytearray | memoryview,
    name: str,
    *,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> object:
    """Return the JSON value of UTF-8 `data`; errors start with `name` (a path, or a path and a part of it).

    Raises ModelFileError on invalid UTF-8 or JSON, duplicate keys, NaN or Infinity, numbers of more than
    `MAX_DIGITS` characters, nesting deeper than `max_depth`, more than `max_values` values, and escapes
    that are half of a surrogate pair. Depth and count are checked before anything is built.
    """
    content = bytes(data)

    def refuse(reason: str) -> NoReturn:
        raise ModelFileError(f"{name}: {reason}", field=name)

    _check_budget(content, max_depth, max_values, refuse)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{name}: is not UTF-8 (byte {error.start})", field=name) from error
    if text.startswith("\ufeff"):
        refuse("starts with a byte order mark, which JSON forbids")
    try:
        value = cast(object, _decoder(refuse).decode(text))
    except json.JSONDecodeError as error:
        raise ModelFileError(
            f"{name}: is not JSON ({error.msg}, line {error.lineno} column {error.colno})", field=name
        ) from error
    except RecursionError as error:
        raise ModelFileError(f"{name}: is nested deeper than {max_depth} levels", field=name) from error
    if _SURROGATE_ESCAPE.search(content) and _has_lone_surrogate(value):
        refuse("has a string with half of a surrogate pair")
    return value


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """Return a value as a message may quote it: short, and containers by their kind alone."""
    if isinstance(value, dict | list):
        return kind_of(cast(object, value))
    text = repr(value) if isinstance(value, str) and len(value) <= 60 else str(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _check_budget(content: bytes, max_depth: int, max_values: int, refuse: Callable[[str], NoReturn]) -> None:
    """Count values and brackets outside strings, in linear time and without building anything."""
    if content.count(b'"') > 4 * max_values:
        refuse(f"has more than {2 * max_values} strings")
    if b"\\" in content:
        content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = _outside_strings(content)
    if sum(outside.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        refuse(f"has more than {max_values} values")
    brackets = outside.translate(None, _NOT_BRACKETS)
    # A close bracket in excess is invalid anyway; this bounds the work of the line below.
    depths = accumulate(1 if bracket in b"[{" else -1 for bracket in brackets[: 2 * max_values])
    if max(depths, default=0) > max_depth:
        refuse(f"is nested deeper than {max_depth} levels")


def _outside_strings(content: bytes) -> bytes:
    """Return JSON text without its strings; a slice at a time, for a list of all pieces would be huge."""
    parts: list[bytes] = []
    inside = 0
    for start in range(0, len(content), _SLICE):
        pieces = content[start : start + _SLICE].split(b'"')
        parts.append(b"".join(pieces[inside::2]))
        inside ^= (len(pieces) - 1) & 1
    return b"".join(parts)


def _decoder(refuse: Callable[[str], NoReturn]) -> json.JSONDecoder:
    def number(text: str) -> int:
        if len(text) > MAX_DIGITS:
            refuse(
                f"has a number of {len(text)} characters ({text[:12]}...); at most {MAX_DIGITS} make sense"
            )
        if text == "-0":
            refuse("has the number -0, which is not an integer")
        return int(text)

    def real(text: str) -> float:
        if len(text) > MAX_DIGITS:
            refuse(
                f"has a number of {len(text)} characters ({text[:12]}...); at most {MAX_DIGITS} make sense"
            )
        value = float(text)
        if not isfinite(value):
            refuse(f"has the number {text}, which is beyond float64")
        return value

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    refuse(f"has the key {key[:80]!r} twice in one object")
                seen.add(key)
        return result

    def constant(text: str) -> NoReturn:
        refuse(f"has the value {text}, which is not JSON")

    return json.JSONDecoder(
        object_pairs_hook=members, parse_int=number, parse_float=real, parse_constant=constant
    )


def _children(value: object) -> list[object]:
    """Return the values inside an object or an array, [] for anything else."""
    if isinstance(value, dict):
        return list(cast(dict[str, object], value).values())
    return cast(list[object], value) if isinstance(value, list) else []


def _has_lone_surrogate(value: object) -> bool:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if any("\ud800" <= char <= "\udfff" for char in item):
                return True
        elif isinstance(item, dict):
            stack.extend(cast(dict[str, object], item))
        stack.extend(_children(cast(object, item)))
    return False
