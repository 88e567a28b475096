"""What is wrong with a request, in words: the field, the value seen, what it may be."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bise.errors import RequestError
from bise.jsonfile import kind_of, shown
from bise.server.problem import ApiError, as_api_error

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_KINDS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def fault(error: ErrorDetails) -> str:
    """Return what follows the field's name: `must be at least 1, got 0`."""
    kind, value = error["type"], error["input"]
    context: Mapping[str, Any] = error.get("ctx", {})
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {_seen(value)}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]}, got {shown(value)}"
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is not known here; leave it out"
    if kind == "literal_error":
        return f"is {_seen(value)}; known: {_json_words(context['expected'])}"
    if kind in ("too_long", "string_too_long"):
        what = "characters" if kind.startswith("string") else "entries"
        return f"has {len(value)} {what}; at most {context['max_length']} are allowed"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return f"is {shown(value)}; it must match {context['pattern']}"
    return error["msg"].removeprefix("Value error, ")


def _seen(value: object) -> str:
    """Return a short value, or the kind of one that says nothing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return kind_of(value) if value is None else shown(value)


def _json_words(expected: str) -> str:
    """Return the values of a literal as JSON has them."""
    return expected.replace("False", "false").replace("True", "true").replace(" or ", ", ")


@contextmanager
def spoken_as(names: Sequence[tuple[str, str]]) -> Generator[None]:
    """Let refusals of what a request became name the fields that the client sent.

    `names` are pairs of an expression and what stands in its place.
    """
    try:
        yield
    except (ApiError, RequestError) as error:
        refusal = as_api_error(error)
        param = None if refusal.param is None else _renamed(refusal.param, names)
        raise ApiError(
            refusal.status,
            _renamed(refusal.message, names),
            code=refusal.code,
            param=param,
            headers=refusal.headers,
        ) from error


def _renamed(text: str, names: Sequence[tuple[str, str]]) -> str:
    for expression, name in names:
        text = re.sub(expression, name, text)
    return text
