"""Reading a batch's input: where each request lies in its file, and what is wrong with the lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from bise.errors import BiseError, RequestError
from bise.jsonfile import parse_json

MAX_LINES = 50_000
MAX_LINE_BYTES = 16 << 20
MAX_ERRORS = 100
"""More faults than this are not reported."""
MAX_CUSTOM_ID = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLine:
    """One request of a batch: its place, not its content."""

    custom_id: str | None
    file_id: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFault:
    """What is wrong with a line, counted from 1."""

    line: int
    code: str
    message: str
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fault as stored."""
        return {"line": self.line, "code": self.code, "message": self.message, "param": self.param}


def scan(
    files: Iterable[tuple[str, Iterable[bytes]]], *, endpoint: str, model: str | None, needs_url: bool
) -> tuple[list[InputLine], list[LineFault]]:
    """Return the requests in a batch's files (id, content in pieces) and the faults found in them.

    `model` is the whole batch's, `needs_url` asks for OpenAI's `method` and `url` on each line.
    """
    lines: list[InputLine] = []
    faults: list[LineFault] = []
    seen: set[str] = set()
    for file_id, pieces in files:
        for number, (offset, text) in enumerate(_split(pieces), 1):
            if len(faults) >= MAX_ERRORS:
                return [], faults
            if not text.strip():
                continue
            if len(lines) >= MAX_LINES:
                faults.append(
                    _fault(number, "too_many_requests", f"a batch has at most {MAX_LINES} requests")
                )
                return [], faults
            try:
                custom_id = check_request(
                    parse_request(text), endpoint=endpoint, model=model, needs_url=needs_url
                )
                if custom_id is not None and custom_id in seen:
                    raise RequestError("custom_id occurs twice in this batch", field="custom_id")
            except BiseError as error:
                faults.append(_fault(number, "invalid_json_line", str(error), error.field))
                continue
            if custom_id is not None:
                seen.add(custom_id)
            lines.append(InputLine(custom_id=custom_id, file_id=file_id, offset=offset, size=len(text)))
    if not lines and not faults:
        faults.append(_fault(1, "empty_file", "the input has no requests"))
    return lines, faults


def parse_request(text: bytes) -> dict[str, Any]:
    """Return the object on a line; RequestError when it is no sound JSON object."""
    if len(text) > MAX_LINE_BYTES:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = parse_json(text, "the line")
    except BiseError as error:
        raise RequestError(str(error)) from error
    if not isinstance(value, dict):
        raise RequestError("the line is not a JSON object")
    return cast(dict[str, Any], value)


def check_request(
    request: dict[str, Any], *, endpoint: str, model: str | None, needs_url: bool
) -> str | None:
    """Return a request's custom_id; RequestError names the field that is wrong."""
    custom_id, body = request.get("custom_id"), request.get("body")
    if custom_id is None and needs_url:
        raise RequestError("custom_id is missing", field="custom_id")
    if custom_id is not None and not (isinstance(custom_id, str) and 0 < len(custom_id) <= MAX_CUSTOM_ID):
        raise RequestError(
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", field="custom_id"
        )
    if custom_id is not None and "\0" in custom_id:
        raise RequestError("custom_id must not contain NUL", field="custom_id")
    if not isinstance(body, dict):
        raise RequestError("body must be an object", field="body")
    fields = cast(dict[str, Any], body)
    if fields.get("stream"):
        raise RequestError("stream cannot be used in a batch", field="body.stream")
    if model is not None and fields.get("model") not in (None, model):
        raise RequestError("body.model differs from the model of the batch", field="body.model")
    if model is None and not fields.get("model"):
        raise RequestError("neither the batch nor the line names a model", field="body.model")
    if needs_url and request.get("method") != "POST":
        raise RequestError("method must be POST", field="method")
    if request.get("url", None if needs_url else endpoint) != endpoint:
        raise RequestError(f"url must be the batch's endpoint, {endpoint}", field="url")
    return custom_id


def _split(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line without its end); a line beyond the limit is yielded cut, and refused later."""
    offset, start, held = 0, 0, bytearray()
    for piece in pieces:
        position = 0
        while (end := piece.find(b"\n", position)) >= 0:
            held += piece[position:end]
            yield start, bytes(held)
            position = end + 1
            start = offset + position
            held.clear()
        if len(held) <= MAX_LINE_BYTES:
            held += piece[position:]
        offset += len(piece)
    if held:
        yield start, bytes(held)


def _fault(line: int, code: str, message: str, param: str | None = None) -> LineFault:
    return LineFault(line=line, code=code, message=message, param=param)
