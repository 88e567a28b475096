"""Exports of bise, ChatGPT, open-webui, LibreChat and llama.cpp, read into one form.

A field that is missing is no fault; one that makes no sense is, and is named with its conversation. What a
model thought, called and was told by tools becomes parts of the answer that follows.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from bise.errors import RequestError, quoted

FORMAT = "bise-conversation-1"
MAX_UNPACKED = 1 << 30
"""Bytes of all conversations in an archive."""
KNOWN = "known are exports of bise, ChatGPT, open-webui, LibreChat and llama.cpp"
_ROOT = "00000000-0000-0000-0000-000000000000"
_REASONING = re.compile(
    r'<details type="reasoning"([^>]*)>\s*(?:<summary>.*?</summary>)?(.*?)</details>\s*', re.DOTALL
)
_DURATION = re.compile(r'duration="(\d+)"')
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])|\0")

Json = Mapping[str, Any]


@dataclass(slots=True)
class Turn:
    """A message on its way in; one without a text and role only links others."""

    key: str
    parent: str | None
    role: str
    text: str
    model: str | None = None
    at: float | None = None
    parts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the message, from an export of our own."""


@dataclass(slots=True)
class Imported:
    """A conversation on its way in."""

    title: str
    turns: list[Turn]
    leaf: str | None = None
    at: float | None = None
    system: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the conversation, from an export of our own."""
    documents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


class _BadError(Exception):
    """Something in a conversation makes no sense."""


def read_export(content: bytes) -> list[Imported]:
    """Return the conversations of an export. Raises RequestError, in one line, for what is not whole."""
    entries = list(_entries(content))
    found: list[Imported] = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_conversation(entry))
        except _BadError as error:
            title = quoted(_text(_object(entry).get("title")), 40)
            raise RequestError(
                f"conversation {number} ({title}): {error}; nothing was imported", field="file"
            ) from None
    if not found:
        raise RequestError(f"the file has no conversation; {KNOWN}", field="file")
    return found


def _entries(content: bytes) -> Iterator[Any]:
    """Yield what may be conversations: from a list, from lines, from one object, from an archive."""
    for part in _files(content):
        document = _json(part)
        listed = _object(document).get("conversations")
        if isinstance(listed, list):
            document = cast("list[Any]", listed)
        yield from cast("list[Any]", document) if isinstance(document, list) else [document]


def _files(content: bytes) -> Iterator[bytes]:
    if content[:4] != b"PK\x03\x04":
        yield content
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [
                name for name in archive.namelist() if re.search(r"(^|/)conversations[^/]*\.json$", name)
            ]
            if not names:
                raise RequestError(f"the archive has no conversations.json; {KNOWN}", field="file")
            if sum(archive.getinfo(name).file_size for name in names) > MAX_UNPACKED:
                raise RequestError(
                    f"its conversations are larger than {MAX_UNPACKED >> 30} GiB", field="file"
                )
            for name in sorted(names):
                yield archive.read(name)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise RequestError("the archive is damaged or asks for a password", field="file") from error


def _json(content: bytes) -> Any:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the file is no UTF-8 (byte {error.start}); {KNOWN}", field="file") from error
    try:
        value = _parsed(text)
        return _clean(value) if _SUSPECT.search(text) else value
    except RecursionError as error:
        raise RequestError("the file is nested too deeply", field="file") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as whole:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            reason = str(whole)[:100]
            raise RequestError(f"the file is no JSON ({reason}); {KNOWN}", field="file") from whole


def _clean(value: Any) -> Any:
    """Return a value with U+FFFD for what no database keeps: NUL, and halves of surrogate pairs."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(part) for part in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {_clean(name): _clean(part) for name, part in cast("dict[str, Any]", value).items()}
    return value


def _conversation(entry: Any) -> Imported:
    if not isinstance(entry, dict):
        raise _BadError("is no object")
    known = cast("dict[str, Any]", entry)
    chat = known.get("chat")
    reader: Callable[[Json], Imported] | None = None
    if known.get("format") == FORMAT:
        reader = _from_bise
    elif isinstance(known.get("mapping"), dict):
        reader = _from_chatgpt
    elif isinstance(chat, dict) and ("history" in chat or "messages" in chat):
        reader = _from_open_webui
    elif isinstance(known.get("conv"), dict) and "messages" in known:
        reader = _from_llama
    elif "messages" in known and ({"conversationId", "recursive", "endpoint", "exportAt"} & known.keys()):
        reader = _from_librechat
    if reader is None:
        raise _BadError(f"is of no known form; {KNOWN}")
    return reader(known)


def _from_bise(entry: Json) -> Imported:
    turns: list[Turn] = []
    for index, node in enumerate(_list(entry, "messages")):
        turn = _turn(node, f"messages[{index}]", key="id", parent="parent", text="text")
        turn.model, turn.at = _text_or_none(node.get("model")), _time(node.get("created_at"))
        turn.parts = [cast("dict[str, Any]", part) for part in _list(node, "parts") if isinstance(part, dict)]
        names = (
            "status", "finish_reason", "error", "usage", "timings", "feedback", "params", "sources",
            "documents",
        )  # fmt: skip
        turn.extra = {name: node[name] for name in names if node.get(name) is not None}
        turns.append(turn)
    extra = {
        name: entry[name] for name in ("pinned", "archived", "folder", "model", "params") if name in entry
    }
    return Imported(
        _text(entry.get("title")),
        turns,
        _text_or_none(entry.get("leaf")),
        _time(entry.get("created_at")),
        _text(entry.get("system")),
        extra | {"updated_at": _time(entry.get("updated_at"))},
        [cast("dict[str, Any]", found) for found in _list(entry, "documents") if isinstance(found, dict)],
    )


def _from_chatgpt(entry: Json) -> Imported:
    turns: list[Turn] = []
    system: list[str] = []
    for key, node in cast("dict[str, Any]", entry["mapping"]).items():
        if not isinstance(node, dict):
            raise _BadError(f"mapping.{key[:40]} is no object")
        shown = cast("dict[str, Any]", node)
        message = _object(shown.get("message"))
        details, content = _object(message.get("metadata")), _object(message.get("content"))
        turn = Turn(key, _text_or_none(shown.get("parent")), "", "", at=_time(message.get("create_time")))
        turn.model = _text_or_none(details.get("model_slug"))
        role = _text(_object(message.get("author")).get("role"))
        kind = _text(content.get("content_type")) or "text"
        text = _chatgpt_text(content)
        hidden = bool(details.get("is_visually_hidden_from_conversation"))
        if role == "user" and kind == "user_editable_context":
            system += [_text(content.get(name)) for name in ("user_profile", "user_instructions")]
        elif role == "user" and not hidden:
            turn.role, turn.text = "user", text
        elif role == "assistant" and kind == "thoughts":
            turn.parts = [{"type": "thinking", "text": text}] if text else []
        elif role == "assistant" and (kind == "code" or message.get("recipient") not in (None, "all")):
            name = _text(message.get("recipient")) or "code"
            turn.parts = [{"type": "tool_call", "name": name, "arguments": text}]
        elif role == "assistant" and not hidden and kind in ("text", "multimodal_text"):
            turn.role, turn.text = "assistant", text
        elif role == "tool" and text:
            name = _text(_object(message.get("author")).get("name")) or "tool"
            turn.parts = [{"type": "tool_result", "name": name, "text": text}]
        turns.append(turn)
    title, at = _text(entry.get("title")), _time(entry.get("create_time"))
    extra = {"archived": entry.get("is_archived") is True, "updated_at": _time(entry.get("update_time"))}
    instructions = "\n\n".join(part for part in system if part.strip())
    return Imported(title, turns, _text_or_none(entry.get("current_node")), at, instructions, extra)


def _chatgpt_text(content: Json) -> str:
    """Return the words of a message: its parts' texts, transcripts included; pictures are left out."""
    found = [_text(content.get(name)) for name in ("text", "result")]
    for part in [*_list(content, "parts"), *_list(content, "thoughts")]:
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, dict):
            inner = cast("dict[str, Any]", part)
            found += [_text(inner.get(name)) for name in ("summary", "text", "content")]
    return "\n".join(text for text in found if text)


def _from_open_webui(entry: Json) -> Imported:
    chat = _object(entry["chat"])
    history = _object(chat.get("history"))
    turns: list[Turn] = []
    nodes = history.get("messages")
    if isinstance(nodes, dict) and nodes:
        pairs = list(cast("dict[str, Any]", nodes).items())
    else:
        listed = _list(chat, "messages")
        pairs = [
            (str(index), {"parentId": str(index - 1), **_object(node)}) for index, node in enumerate(listed)
        ]
    system = _text(chat.get("system")) or _text(_object(chat.get("params")).get("system"))
    for key, node in pairs:
        shown = _object(node)
        if shown.get("role") == "system":
            system = system or _joined(shown.get("content"))
            turns.append(Turn(key, _text_or_none(shown.get("parentId")), "", ""))
            continue
        turn = _turn(shown | {"id": key}, f"message {key[:40]}", key="id", parent="parentId", text="content")
        turn.model, turn.at = _text_or_none(shown.get("model")), _time(shown.get("timestamp"))
        for attributes, thought in _REASONING.findall(turn.text):
            words = "\n".join(line.removeprefix("> ") for line in thought.strip().splitlines())
            duration = _DURATION.search(attributes)
            seconds = None if duration is None else float(duration[1])
            turn.parts.append({"type": "thinking", "text": words, "seconds": seconds})
        turn.text = _REASONING.sub("", turn.text)
        turns.append(turn)
    title = _text(entry.get("title")) or _text(chat.get("title"))
    extra: dict[str, Any] = {name: entry[name] is True for name in ("pinned", "archived") if name in entry}
    extra["updated_at"] = _time(entry.get("updated_at"))
    at = _time(entry.get("created_at")) or _time(chat.get("timestamp"))
    return Imported(title, turns, _text_or_none(history.get("currentId")), at, system, extra)


def _from_librechat(entry: Json) -> Imported:
    turns: list[Turn] = []
    is_tree = entry.get("recursive") is True
    waiting = [(node, None) for node in reversed(_list(entry, "messages"))]
    while waiting:
        node, above = waiting.pop()
        shown = _object(node)
        key = _text(shown.get("messageId"))
        if not key:
            raise _BadError("a message has no messageId")
        parent = above if is_tree else _text_or_none(shown.get("parentMessageId"))
        mine = shown.get("isCreatedByUser")
        role = "user" if mine is True or (mine is None and shown.get("sender") == "User") else "assistant"
        turn = Turn(key, None if parent == _ROOT else parent, role, _text(shown.get("text")))
        turn.model, turn.at = _text_or_none(shown.get("model")), _time(shown.get("createdAt"))
        _librechat_parts(turn, _list(shown, "content"))
        turns.append(turn)
        waiting += [(child, key) for child in reversed(_list(shown, "children"))]
    options = _object(entry.get("options"))
    system = _text(options.get("promptPrefix")) or _text(options.get("system"))
    return Imported(_text(entry.get("title")), turns, None, _time(entry.get("exportAt")), system)


def _librechat_parts(turn: Turn, content: Sequence[Any]) -> None:
    texts: list[str] = []
    for part in content:
        shown = _object(part)
        if shown.get("type") == "text":
            text = shown.get("text")
            texts.append(_text(_object(text).get("value")) if isinstance(text, dict) else _text(text))
        elif shown.get("type") == "think":
            turn.parts.append({"type": "thinking", "text": _text(shown.get("think"))})
        elif shown.get("type") == "tool_call":
            call = _object(shown.get("tool_call"))
            name = _text(call.get("name")) or "tool"
            turn.parts.append({"type": "tool_call", "name": name, "arguments": call.get("args")})
            if call.get("output"):
                turn.parts.append({"type": "tool_result", "name": name, "text": _text(call["output"])})
    turn.text = turn.text or "\n".join(text for text in texts if text)


def _from_llama(entry: Json) -> Imported:
    conv = _object(entry["conv"])
    turns: list[Turn] = []
    system = ""
    for index, node in enumerate(_list(entry, "messages")):
        shown = _object(node)
        key, parent = str(shown.get("id", index)), _text_or_none(shown.get("parent"))
        if shown.get("type") == "root" or shown.get("role") == "system":
            system = system or _joined(shown.get("content"))
            turns.append(Turn(key, parent, "", ""))
            continue
        turn = _turn(shown | {"id": key}, f"messages[{index}]", key="id", parent="parent", text="content")
        turn.model, turn.at = _text_or_none(shown.get("model")), _time(shown.get("timestamp"))
        thought = _text(shown.get("reasoningContent")) or _text(shown.get("thinking"))
        turn.parts = [{"type": "thinking", "text": thought}] if thought else []
        turns.append(turn)
    at = _time(conv.get("lastModified"))
    return Imported(_text(conv.get("name")), turns, _text_or_none(conv.get("currNode")), at, system)


def _turn(node: Any, place: str, *, key: str, parent: str, text: str) -> Turn:
    shown = _object(node)
    role = shown.get("role")
    if role not in ("user", "assistant"):
        raise _BadError(f"{place}.role is {quoted(role, 30)}, not user or assistant")
    found = shown.get(key)
    if not isinstance(found, str | int):
        raise _BadError(f"{place} has no {key}")
    return Turn(str(found), _text_or_none(shown.get(parent)), role, _joined(shown.get(text)))


def _joined(content: Any) -> str:
    """Return a content that is a text, or the texts among its parts."""
    if isinstance(content, list):
        parts = [_object(part) for part in cast("list[Any]", content)]
        return "\n".join(_text(part.get("text")) for part in parts if part.get("type") == "text")
    return _text(content)


def _object(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(entry: Json, name: str) -> list[Any]:
    value = entry.get(name)
    if value is not None and not isinstance(value, list):
        raise _BadError(f"{name} is no list")
    return cast("list[Any]", value or [])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text_or_none(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value) or None


def _time(value: Any) -> float | None:
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
