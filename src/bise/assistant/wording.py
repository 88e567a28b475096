"""Texts that people and files bring: what may be stored, and how words are compared."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from bise.errors import RequestError

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""PostgreSQL stores no NUL, and half of a surrogate pair is no character."""


def folded(text: str) -> str:
    """Return a text without case and accents, as words are compared in."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in plain if not unicodedata.combining(char))


def words_of(text: str) -> list[str]:
    """Return the words of a text, folded."""
    return re.findall(r"[^\W_]+", folded(text))


def check_storable(value: str, field: str) -> str:
    """Return a text that every database can keep. Raises RequestError."""
    if (found := _UNSTORABLE.search(value)) is not None:
        raise RequestError(
            f"{field} has a character that cannot be kept (U+{ord(found[0]):04X} at {found.start()})",
            field=field,
        )
    return value


def checked_name(value: Any, field: str, most: int) -> str:
    """Return a name on one line with single spaces. Raises RequestError when it is empty or too long."""
    if not isinstance(value, str) or len(value) > most or not value.strip():
        raise RequestError(f"{field} must be text of 1 to {most} characters", field=field)
    return " ".join(check_storable(value, field).split())
