"""Messages as clients send them, made into what the chat formats take: ids of nine characters, safe prompt.

Content and order are checked by the formats themselves (`bise.text.messages`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, cast

from bise.errors import RequestError

logger = logging.getLogger(__name__)

SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, "
    "unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity."
)
"""Mistral's own text for `safe_prompt`."""

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NAME = re.compile(r"[^\s<>|\\/]{1,64}")
_ALPHABET = string.ascii_letters + string.digits
_UNUSED = ("annotations", "metadata", "parsed")
"""Fields of earlier answers, sent back by clients, that no model reads anywhere."""

Message = dict[str, Any]


def call_id(seed: str) -> str:
    """Return nine letters and digits that depend on `seed` alone."""
    number = int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()[:8])
    letters: list[str] = []
    for _ in range(9):
        number, index = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[index])
    return "".join(letters)


def prepared(messages: Sequence[Message], *, safe_prompt: bool = False) -> list[Message]:
    """Return messages for a chat format: unused fields left out, every call id in Mistral's form and paired.

    Ids that are not nine letters and digits are replaced, the same id always by the same one; calls and
    results without ids are paired in order. Raises RequestError for a message that is no object.
    """
    result: list[Message] = []
    unanswered: list[str] = []
    called: set[str] = set()
    for index, message in enumerate(messages):
        kept = {key: value for key, value in message.items() if key not in _UNUSED}
        if isinstance(kept.get("content"), list):
            kept["content"] = [_plain_part(part) for part in kept["content"]]
        if kept.get("name") is not None and message.get("role") != "tool":
            _say_name(kept, f"messages[{index}]")
        if kept.get("role") == "assistant" and kept.get("tool_calls"):
            kept["tool_calls"] = _with_ids(kept["tool_calls"], index)
            unanswered = [call["id"] for call in kept["tool_calls"]]
            called |= set(unanswered)
        elif kept.get("role") == "tool":
            given = kept.get("tool_call_id")
            kept["tool_call_id"] = _answered(given, unanswered)
            if called and isinstance(kept["tool_call_id"], str) and kept["tool_call_id"] not in called:
                raise RequestError(
                    f"messages[{index}].tool_call_id is {str(given)[:60]!r}, which no call before it has",
                    field=f"messages[{index}].tool_call_id",
                )
        result.append(kept)
    return _with_safe_prompt(result) if safe_prompt else result


def _say_name(message: Message, place: str) -> None:
    """Put the speaker's name before what they say, because no chat format here has a place of its own for it:
    `ann: Hello`. A message of nothing but calls says nothing.
    """
    name, content = message.pop("name"), message.get("content")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{place}.name must be 1 to 64 characters without spaces or any of < > | \\ /",
            field=f"{place}.name",
        )
    if message.get("prefix") is True:
        raise RequestError(
            f"{place}.name goes with no prefix: the answer begins with the content alone",
            field=f"{place}.name",
        )
    if isinstance(content, str):
        message["content"] = f"{name}: {content}"
    elif isinstance(content, list):
        parts = list(cast(list[object], content))
        for index, part in enumerate(parts):
            fields = cast(Message, part) if isinstance(part, dict) else {}
            if isinstance(fields.get("text"), str):
                parts[index] = {**fields, "text": f"{name}: {fields['text']}"}
                break
        message["content"] = parts


def _plain_part(part: object) -> object:
    """Return a thinking part with its text as one string, as the chat formats take it; others as they are."""
    fields = cast(Message, part) if isinstance(part, dict) else {}
    same = cast(object, part)
    thoughts = fields.get("thinking")
    if fields.get("type") != "thinking" or not isinstance(thoughts, list):
        return same
    entries = [
        cast(Message, entry) if isinstance(entry, dict) else {} for entry in cast(list[object], thoughts)
    ]
    if not all(isinstance(entry.get("text"), str) for entry in entries):
        return same
    closed = fields.get("closed")
    text = "".join(entry["text"] for entry in entries)
    return {"type": "thinking", "thinking": text, "closed": True if closed is None else closed}


def _with_ids(calls: object, index: int) -> list[Message]:
    if not isinstance(calls, list):
        raise RequestError(f"messages[{index}].tool_calls must be an array", field="messages")
    fixed: list[Message] = []
    for place, call in enumerate(cast(list[object], calls)):
        if not isinstance(call, Mapping):
            raise RequestError(f"messages[{index}].tool_calls[{place}] must be an object", field="messages")
        fields = dict(cast(Mapping[str, Any], call))
        given = fields.get("id")
        if given is not None and not isinstance(given, str):
            raise RequestError(f"messages[{index}].tool_calls[{place}].id must be a string", field="messages")
        fields["id"] = _known_id(given) if given and given != "null" else call_id(f"{index}/{place}")
        fixed.append(fields)
    return fixed


def _known_id(given: str) -> str:
    return given if _CALL_ID.fullmatch(given) else call_id(given)


def _answered(given: object, unanswered: list[str]) -> object:
    """Return the id of a tool result; the next open call's when it has none."""
    if isinstance(given, str) and given and given != "null":
        wanted = _known_id(given)
        if wanted in unanswered:
            unanswered.remove(wanted)
        return wanted
    if given is None or isinstance(given, str):
        return unanswered.pop(0) if unanswered else given
    return given


def _with_safe_prompt(messages: list[Message]) -> list[Message]:
    first = messages[0]
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [{**first, "content": f"{SAFE_PROMPT}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": SAFE_PROMPT}, *messages]


def texts_of(message: Message) -> list[str]:
    """Return what a prepared message says: its content as one text, its thoughts, its calls' arguments.

    For guardrails: a content's parts are put together as the model reads them.
    """
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    if isinstance(content, list):
        parts = [cast(Message, part) for part in cast(list[object], content) if isinstance(part, dict)]
        for field in ("text", "thinking"):
            texts.append("".join(part[field] for part in parts if isinstance(part.get(field), str)))
    for call in cast(list[Message], message.get("tool_calls") or []):
        function = call.get("function")
        arguments = cast(Message, function).get("arguments") if isinstance(function, dict) else None
        if arguments is not None:
            is_text = isinstance(arguments, str)
            texts.append(arguments if is_text else json.dumps(arguments, ensure_ascii=False))
    return texts


def prefix_of(messages: Sequence[Message]) -> str | None:
    """Return the text that the answer begins with: the last message's, when it is to be continued."""
    last = messages[-1]
    if last.get("role") != "assistant" or last.get("prefix") is not True:
        return None
    content = last.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = cast(list[Message], content)
        if all(isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
    return ""
