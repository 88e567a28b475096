"""Strict, bounded JSON for files that strangers wrote: one reader for every model file.

Refuses what `json.loads` lets pass: duplicate keys, NaN and Infinity, numbers of absurd length, deep nesting,
lone surrogates, invalid UTF-8, and anything that is not a regular file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import NoReturn, cast

from bise.errors import ModelFileError

MAX_DEPTH = 64
"""Nested objects and arrays at most; real model files use fewer than ten."""
MAX_DIGITS = 40
"""Characters of one number at most."""
MAX_BYTES = 64 << 20
"""Default size limit of a JSON file."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Raises ModelFileError for a missing file, a FIFO, a device, a directory, a symlink loop or a larger file;
    never blocks and never allocates more than `max_bytes`.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer must not hang.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened ({_reason(error)})", field=str(path)) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: is not a regular file", field=str(path))
        if status.st_size > max_bytes:
            raise ModelFileError(
                f"{path}: {status.st_size} bytes is more than the {max_bytes} bytes such a file may have",
                field=str(path),
            )
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read ({_reason(error)})", field=str(path)) from error
    if len(data) > max_bytes:
        raise ModelFileError(f"{path}: grew past {max_bytes} bytes while it was read", field=str(path))
    return data


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> object:
    """Return the JSON value of a file; ModelFileError when it is not clean."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), str(path))


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, object]:
    """Return the JSON object of a file; ModelFileError when the file holds another kind of value."""
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: must hold a JSON object, not {kind_of(value)}", field=str(path))
    return cast(dict[str, object], value)


def parse_json(data: bytes | bytearray | memoryview, name: str, *, max_depth: int = MAX_DEPTH) -> object:
    """Return the JSON value of UTF-8 `data`; errors start with `name` (a path, or a path and a part of it).

    Raises ModelFileError on invalid UTF-8 or JSON, duplicate keys, NaN or Infinity, numbers of more than
    `MAX_DIGITS` characters, nesting deeper than `max_depth`, and escapes that are half of a surrogate pair.
    """
    content = bytes(data)

    def refuse(reason: str) -> NoReturn:
        raise ModelFileError(f"{name}: {reason}", field=name)

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
    if _is_deeper_than(value, max_depth):
        refuse(f"is nested deeper than {max_depth} levels")
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


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)


def _decoder(refuse: Callable[[str], NoReturn]) -> json.JSONDecoder:
    def number(text: str) -> int:
        if len(text) > MAX_DIGITS:
            refuse(
                f"has a number of {len(text)} characters ({text[:12]}...); at most {MAX_DIGITS} make sense"
            )
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


def _is_deeper_than(value: object, max_depth: int) -> bool:
    level: list[object] = [value]
    for _ in range(max_depth):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


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
