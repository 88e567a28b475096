"""Tool calls as models write them: the forms of the chat formats, and their reading.

A call is read as data by a JSON parser, whole, in time linear in the output. Nothing is ever run or
evaluated.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

from bise.errors import RequestError
from bise.text.messages import FUNCTION_NAME
from bise.text.tokenizer import Tokenizer

TRIGGER = "[TOOL_CALLS]"
MAX_CALLS = 64
"""Calls in one answer at most."""
_ID_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID = re.compile(r"[a-zA-Z0-9]{9}")
_VERSION = re.compile(r"v(\d{1,2})(-tekken)?")


class CallForm(StrEnum):
    """How a model writes its calls."""

    LIST = "list"
    """`[TOOL_CALLS] [{"name": "f", "arguments": {...}}]`: v2."""
    LIST_WITH_IDS = "list_with_ids"
    """The same, where an `"id"` may follow the arguments: v3 and v7."""
    NAMED_WITH_IDS = "named_with_ids"
    """`[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{...}`, the id optional, once per call: v11."""
    NAMED = "named"
    """`[TOOL_CALLS]f[ARGS]{...}`, once per call: v13 and v15."""
    BARE = "bare"
    """`[{"name": "f", "arguments": {...}}]` as text: models without tokens for calls, on demand only."""


def call_form(format_name: str, tokenizer: Tokenizer) -> CallForm:
    """Return how a model writes calls, by the name of its chat format (`v7-tekken`, `jinja`) and its tokens.

    Raises RequestError for v1, which knows no tools.
    """
    match = _VERSION.fullmatch(format_name)
    version = int(match[1]) if match else 0
    if version == 1:
        raise RequestError(
            "tools: chat format v1 knows no tools; use a model of a later format", field="tools"
        )
    if tokenizer.control_id(TRIGGER) is None:
        return CallForm.BARE
    if version == 2:
        return CallForm.LIST
    if version in (3, 7):
        return CallForm.LIST_WITH_IDS
    if version == 11:
        return CallForm.NAMED_WITH_IDS
    if version > 11:
        return CallForm.NAMED
    # A Jinja template over Mistral's vocabulary: the tokens tell the form.
    if tokenizer.control_id("[ARGS]") is None:
        return CallForm.LIST_WITH_IDS
    return CallForm.NAMED if tokenizer.control_id("[CALL_ID]") is None else CallForm.NAMED_WITH_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCall:
    """One call of an answer."""

    name: str
    arguments: str
    """JSON text of an object."""
    id: str
    """Nine letters or digits."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What some tokens of an answer brought."""

    text: str = ""
    """Text for the reader of the answer."""
    calls: tuple[ReadCall, ...] = ()
    """Calls that are complete now."""
    broken: str = ""
    """Text that stands where calls should be and is none: an answer that was cut off, or not constrained."""


@dataclass(slots=True)
class _Segment:
    """What follows one control token."""

    token: str
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", errors="replace").strip()


class CallReader:
    """Splits an answer, as it comes, into text and whole calls."""

    def __init__(self, form: CallForm, tokenizer: Tokenizer, *, seed: int = 0, forced: bool = False) -> None:
        """Read answers in `form`; `seed` (the request's) makes the ids of calls that bring none.

        `forced`: the answer consists of calls only, which tells a bare list from text.
        """
        self._form = form
        self._tokenizer = tokenizer
        self._seed = seed
        names = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]") if form is not CallForm.BARE else ()
        self._controls = {
            token_id: name for name in names if (token_id := tokenizer.control_id(name)) is not None
        }
        self._segments: list[_Segment] = []
        self._used: set[str] = set()
        self._num_calls = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if form is CallForm.BARE and forced:
            self._segments.append(_Segment(TRIGGER))

    def push(self, token_ids: Sequence[int], text: str) -> Reading:
        """Take the tokens and the text of one delta."""
        written = ""
        ready: list[list[_Segment]] = []
        for token_id in token_ids:
            name = self._controls.get(token_id)
            if name == TRIGGER and self._segments:
                ready.append(self._segments)
                self._segments = []
            if name == TRIGGER or (name is not None and self._segments):
                self._segments.append(_Segment(name))
            elif self._segments:
                piece = self._tokenizer.token_bytes(token_id)
                self._segments[-1].data += piece
                written += self._decoder.decode(piece)
        if self._segments and not written and not ready and self._form is CallForm.BARE:
            return Reading()
        # The text of a delta ends with what was written after the trigger: that is no text of the answer.
        shown = text[: max(0, len(text) - len(written))]
        found = [self._read(segments) for segments in ready]
        calls = tuple(call for own, _ in found for call in own)
        return Reading("" if self._is_bare else shown, calls, "".join(broken for _, broken in found))

    def finish(self, text: str = "") -> Reading:
        """End the answer; `text` is what its last delta held back."""
        segments, self._segments = self._segments, []
        if not segments:
            return Reading(text)
        return Reading("", *self._read(segments))

    @property
    def _is_bare(self) -> bool:
        return self._form is CallForm.BARE and bool(self._segments)

    def _read(self, segments: Sequence[_Segment]) -> tuple[tuple[ReadCall, ...], str]:
        """Return the calls of complete segments, and the text when they are none."""
        is_named = self._form in (CallForm.NAMED, CallForm.NAMED_WITH_IDS)
        calls = self._named(segments) if is_named else self._listed(segments[0].text)
        if calls is None:
            return (), "".join(segment.data.decode("utf-8", errors="replace") for segment in segments)
        return tuple(calls), ""

    def _named(self, segments: Sequence[_Segment]) -> list[ReadCall] | None:
        texts = {segment.token: segment.text for segment in segments}
        arguments = texts.get("[ARGS]")
        if arguments is None or not isinstance(_parsed(arguments), dict):
            return None
        call = self._call(texts[TRIGGER], arguments, texts.get("[CALL_ID]"))
        return None if call is None else [call]

    def _listed(self, text: str) -> list[ReadCall] | None:
        entries = _parsed(text)
        if not isinstance(entries, list) or not entries:
            return None
        calls: list[ReadCall] = []
        for entry in cast(list[object], entries):
            fields = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
            arguments = fields.get("arguments")
            if not isinstance(arguments, dict):
                return None
            spelled = json.dumps(cast(object, arguments), ensure_ascii=False)
            call = self._call(fields.get("name"), spelled, fields.get("id"))
            if call is None:
                return None
            calls.append(call)
        return calls

    def _call(self, name: object, arguments: str, call_id: object) -> ReadCall | None:
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name) or self._num_calls >= MAX_CALLS:
            return None
        if not isinstance(call_id, str) or not _ID.fullmatch(call_id) or call_id in self._used:
            call_id = make_call_id(self._seed, self._num_calls, name, arguments)
        self._used.add(call_id)
        self._num_calls += 1
        return ReadCall(name=name, arguments=arguments, id=call_id)


def make_call_id(seed: int, index: int, name: str, arguments: str) -> str:
    """Return nine letters and digits that depend on what is given alone."""
    source = f"{seed}\0{index}\0{name}\0{arguments}".encode("utf-8", errors="replace")
    number = int.from_bytes(hashlib.blake2b(source, digest_size=8).digest(), "little")
    letters: list[str] = []
    for _ in range(9):
        number, letter = divmod(number, len(_ID_LETTERS))
        letters.append(_ID_LETTERS[letter])
    return "".join(letters)


def _parsed(text: str) -> object:
    """Return the value of JSON text; None when it is none."""
    try:
        return cast(object, json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")
