"""The form that all exports are read into, and how their fields are looked at: nothing in them is trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

Json = Mapping[str, Any]

MAX_DEPTH = 64
"""Of values that are kept as they are."""
SHOWN = {"pictures": "[picture]", "recordings": "[recording]", "files": "[file]"}
"""What stands for something that could not be taken along, where a message has nothing else."""


class BadError(Exception):
    """Something in a conversation makes no sense."""


@dataclass(slots=True)
class Turn:
    """A message on its way in; one without a role links others and holds parts for the answer after it."""

    key: str
    parent: str | None = None
    role: str = ""
    text: str = ""
    model: str | None = None
    at: float | None = None
    parts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the message."""
    missing: str = ""
    """What stands for what could not be taken along."""


@dataclass(slots=True)
class Imported:
    """A conversation on its way in."""

    title: str
    turns: list[Turn] = field(default_factory=list[Turn])
    leaf: str | None = None
    at: float | None = None
    system: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the conversation."""
    documents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    left_out: Counter[str] = field(default_factory=Counter[str])
    """What has no place here, by kind."""

    def leave_out(self, kind: str, number: int, turn: Turn | None = None) -> None:
        """Count what is not taken along; with `turn` the message says so where nothing else is left of it."""
        if number > 0:
            self.left_out[kind] += number
            if turn is not None:
                turn.missing = turn.missing or SHOWN.get(kind, "")

    def words(self, content: Any, turn: Turn | None = None) -> str:
        """Return a content that is a text, or the texts among its parts; others are counted."""
        if not isinstance(content, list):
            return text_of(content)
        texts: list[str] = []
        for part in map(object_of, cast("list[Any]", content)):
            if part.get("type") == "text":
                texts.append(text_of(part.get("text")))
            else:
                self.leave_out("pictures" if "image" in text_of(part.get("type")) else "files", 1, turn)
        return "\n".join(texts)


def thought_part(text: str, seconds: Any = None) -> dict[str, Any]:
    """Return what a model thought as a part of its answer."""
    known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return {"type": "thinking", "text": text, "seconds": float(seconds) if known else None}


def call_part(name: Any, arguments: Any) -> dict[str, Any]:
    """Return what a model asked of a tool. Raises BadError for arguments without a bottom."""
    check_depth(arguments)
    return {"type": "tool_call", "name": text_of(name) or "tool", "arguments": arguments}


def result_part(name: Any, text: str) -> dict[str, Any]:
    """Return what a tool answered."""
    return {"type": "tool_result", "name": text_of(name) or "tool", "text": text}


def check_depth(value: Any) -> None:
    """Raise BadError for a value that is nested more than any export is: no database would take it."""
    waiting = [(value, 0)]
    while waiting:
        inner, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise BadError("is nested too deeply")
        if isinstance(inner, dict):
            waiting += [(part, depth + 1) for part in cast("dict[str, Any]", inner).values()]
        elif isinstance(inner, list):
            waiting += [(part, depth + 1) for part in cast("list[Any]", inner)]


def object_of(value: Any) -> dict[str, Any]:
    """Return an object; an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def list_of(entry: Json, name: str) -> list[Any]:
    """Return a list, empty where there is none. Raises BadError for anything else."""
    value = entry.get(name)
    if value is not None and not isinstance(value, list):
        raise BadError(f"{name} is no list")
    return cast("list[Any]", value or [])


def text_of(value: Any) -> str:
    """Return a text; an empty one for anything else."""
    return value if isinstance(value, str) else ""


def text_or_none(value: Any) -> str | None:
    """Return a text or a whole number as one; None for anything else and for nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(value) or None


def time_of(value: Any) -> float | None:
    """Return seconds since 1970 from seconds, milli- or nanoseconds, or a date; None for anything else."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e20:
        return None
    for limit, scale in ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3)):
        if value > limit:
            return value / scale
    return float(value)
