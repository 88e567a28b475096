"""Conversations as bise, open-webui, LibreChat and llama.cpp export them, read into one form (ChatGPT's:
`chatgpt_export`).

A field that is missing is no fault; one that makes no sense is, and is named. What a model thought, called
and was told by tools becomes parts of the answer that follows. What has no place here is counted.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from bise.assistant.chatgpt_export import from_chatgpt
from bise.assistant.export_file import KNOWN
from bise.assistant.imported import (
    BadError,
    Imported,
    Json,
    Turn,
    call_part,
    check_depth,
    list_of,
    object_of,
    result_part,
    text_of,
    text_or_none,
    thought_part,
    time_of,
)
from bise.errors import quoted

FORMAT = "bise-conversation-1"
_ROOT = "00000000-0000-0000-0000-000000000000"
_DETAILS = re.compile(
    r'<details type="(reasoning|tool_calls)"([^>]*)>\s*(?:<summary>.*?</summary>)?(.*?)</details>\s*',
    re.DOTALL,
)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def conversation_of(entry: Any) -> Imported:
    """Return a conversation of a known form. Raises BadError saying what makes no sense in it."""
    if not isinstance(entry, dict):
        raise BadError("is no object")
    known = cast("dict[str, Any]", entry)
    chat = known.get("chat")
    reader: Callable[[Json], Imported] | None = None
    if known.get("format") == FORMAT:
        reader = _from_bise
    elif isinstance(known.get("mapping"), dict):
        reader = from_chatgpt
    elif isinstance(chat, dict) and ("history" in chat or "messages" in chat):
        reader = _from_open_webui
    elif isinstance(known.get("conv"), dict) and "messages" in known:
        reader = _from_llama
    elif {"messages", "messagesTree"} & known.keys() and (
        {"conversationId", "recursive", "endpoint", "exportAt"} & known.keys()
    ):
        reader = _from_librechat
    if reader is None:
        raise BadError(f"is of no known form; {KNOWN}")
    return reader(known)


def _from_bise(entry: Json) -> Imported:
    check_depth(entry)
    found = Imported(
        text_of(entry.get("title")),
        leaf=text_or_none(entry.get("leaf")),
        at=time_of(entry.get("created_at")),
        system=text_of(entry.get("system")),
    )
    for index, node in enumerate(list_of(entry, "messages")):
        turn = _turn(node, f"messages[{index}]", key="id", parent="parent", text="text")
        turn.model, turn.at = text_or_none(node.get("model")), time_of(node.get("created_at"))
        turn.parts = [
            cast("dict[str, Any]", part) for part in list_of(node, "parts") if isinstance(part, dict)
        ]
        names = (
            "status", "finish_reason", "error", "usage", "timings", "feedback", "params", "sources",
            "documents",
        )  # fmt: skip
        turn.extra = {name: node[name] for name in names if node.get(name) is not None}
        found.turns.append(turn)
    names = ("pinned", "archived", "folder", "model", "params")
    found.extra = {name: entry[name] for name in names if name in entry}
    found.extra["updated_at"] = time_of(entry.get("updated_at"))
    documents = list_of(entry, "documents")
    found.documents = [cast("dict[str, Any]", part) for part in documents if isinstance(part, dict)]
    return found


def _from_open_webui(entry: Json) -> Imported:
    chat = object_of(entry["chat"])
    history = object_of(chat.get("history"))
    nodes = history.get("messages")
    if isinstance(nodes, dict) and nodes:
        pairs = list(cast("dict[str, Any]", nodes).items())
    else:
        listed = list_of(chat, "messages")
        pairs = [
            (str(index), {"parentId": str(index - 1), **object_of(node)}) for index, node in enumerate(listed)
        ]
    found = Imported(
        text_of(entry.get("title")) or text_of(chat.get("title")),
        leaf=text_or_none(history.get("currentId")),
        at=time_of(entry.get("created_at")) or time_of(chat.get("timestamp")),
        system=text_of(chat.get("system")) or text_of(object_of(chat.get("params")).get("system")),
    )
    for key, node in pairs:
        shown = object_of(node)
        if shown.get("role") == "system":
            found.system = found.system or found.words(shown.get("content"))
            found.turns.append(Turn(key, text_or_none(shown.get("parentId"))))
            continue
        turn = _turn(shown | {"id": key}, f"message {key[:40]}", key="id", parent="parentId", into=found)
        turn.model, turn.at = text_or_none(shown.get("model")), time_of(shown.get("timestamp"))
        _open_webui_output(turn, shown)
        turn.text = _DETAILS.sub(lambda match, turn=turn: _detail(turn, match), turn.text)
        rating = object_of(shown.get("annotation")).get("rating")
        error = object_of(shown.get("error"))
        turn.extra = {"feedback": rating} | (
            {"status": "error", "error": text_of(error.get("content"))} if error else {}
        )
        found.leave_out("files", len(list_of(shown, "files")))
        found.leave_out("sources", len(list_of(shown, "sources")))
        found.turns.append(turn)
    found.extra = {name: entry[name] is True for name in ("pinned", "archived") if name in entry}
    found.extra["updated_at"] = time_of(entry.get("updated_at"))
    return found


def _open_webui_output(turn: Turn, node: Json) -> None:
    """Take parts and text from the steps of an answer, which newer versions write beside its content."""
    texts: list[str] = []
    names: dict[str, str] = {}
    for step in map(object_of, list_of(node, "output")):
        kind = step.get("type")
        words = "\n".join(text_of(object_of(part).get("text")) for part in list_of(step, "content"))
        if kind == "message":
            texts.append(words)
        elif kind == "reasoning":
            summary = (text_of(object_of(part).get("text")) for part in list_of(step, "summary"))
            said = words or "\n".join(summary)
            turn.parts.append(thought_part(said, step.get("duration")))
        elif kind == "function_call":
            names[text_of(step.get("call_id"))] = text_of(step.get("name"))
            turn.parts.append(call_part(step.get("name"), step.get("arguments")))
        elif kind == "function_call_output":
            is_list = isinstance(step.get("output"), list)
            given = list_of(step, "output") if is_list else [{"text": step.get("output")}]
            said = "\n".join(text_of(object_of(part).get("text")) for part in given)
            turn.parts.append(result_part(names.get(text_of(step.get("call_id"))), said))
    if any(texts):
        turn.text = "\n\n".join(text for text in texts if text)


def _detail(turn: Turn, match: re.Match[str]) -> str:
    """Take what a model thought or called out of a text; return what stays in its place: nothing."""
    given = {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(match[2])}
    inside = html.unescape(match[3].strip())
    if match[1] == "reasoning":
        words = "\n".join(line.removeprefix(">").removeprefix(" ") for line in inside.splitlines())
        duration = given.get("duration", "")
        turn.parts.append(thought_part(words, float(duration) if duration.isdecimal() else None))
    else:
        turn.parts.append(call_part(given.get("name"), given.get("arguments")))
        turn.parts.append(result_part(given.get("name"), given.get("result") or inside))
    return ""


def _from_librechat(entry: Json) -> Imported:
    options = object_of(entry.get("options"))
    found = Imported(
        text_of(entry.get("title")),
        at=time_of(entry.get("exportAt")),
        system=text_of(options.get("promptPrefix")) or text_of(options.get("system")),
    )
    nodes = list_of(entry, "messagesTree") or list_of(entry, "messages")
    is_tree = entry.get("recursive") is True or "messagesTree" in entry
    waiting = [(node, None) for node in reversed(nodes)]
    while waiting:
        node, above = waiting.pop()
        shown = object_of(node)
        key = text_of(shown.get("messageId"))
        if not key:
            raise BadError("a message has no messageId")
        parent = above if is_tree else text_or_none(shown.get("parentMessageId"))
        mine = shown.get("isCreatedByUser")
        is_mine = mine is True or (mine is None and text_of(shown.get("sender")).lower() == "user")
        turn = Turn(key, None if parent == _ROOT else parent, "user" if is_mine else "assistant")
        turn.text, turn.at = text_of(shown.get("text")), time_of(shown.get("createdAt"))
        turn.model = (
            None if is_mine else text_or_none(shown.get("model")) or text_or_none(options.get("model"))
        )
        _librechat_parts(found, turn, list_of(shown, "content"))
        _librechat_state(turn, shown)
        files = [object_of(file) for file in list_of(shown, "files")]
        pictures = sum(text_of(file.get("type")).startswith("image/") for file in files)
        found.leave_out("pictures", pictures, turn)
        found.leave_out("files", len(files) - pictures, turn)
        found.turns.append(turn)
        waiting += [(child, key) for child in reversed(list_of(shown, "children"))]
    times = [turn.at for turn in found.turns if turn.at is not None]
    found.at = found.at or min(times, default=None)  # `exportAt` has been a time of day without a date
    found.extra = {"updated_at": max(times, default=None)}
    return found


def _librechat_parts(found: Imported, turn: Turn, content: Sequence[Any]) -> None:
    texts: list[str] = []
    for part in content:
        shown = object_of(part)
        kind = text_of(shown.get("type"))
        if kind == "text":
            text = shown.get("text")
            texts.append(text_of(object_of(text).get("value")) if isinstance(text, dict) else text_of(text))
        elif kind == "think":
            turn.parts.append(thought_part(text_of(shown.get("think"))))
        elif kind == "tool_call":
            call = object_of(shown.get("tool_call"))
            turn.parts.append(call_part(call.get("name"), call.get("args")))
            if call.get("output"):
                turn.parts.append(result_part(call.get("name"), text_of(call["output"])))
        elif kind == "error":
            texts.append(text_of(shown.get("error")))
        elif kind.startswith("image"):
            found.leave_out("pictures", 1, turn)
        else:
            found.leave_out("parts of unknown kind", 1)
    turn.text = turn.text or "\n".join(text for text in texts if text)


def _librechat_state(turn: Turn, node: Json) -> None:
    rating = object_of(node.get("feedback")).get("rating")
    turn.extra = {"feedback": {"thumbsUp": 1, "thumbsDown": -1}.get(text_of(rating))}
    if node.get("error") is True:
        turn.extra |= {"status": "error", "error": turn.text}
    elif node.get("unfinished") is True:
        turn.extra |= {"status": "interrupted"}
    if node.get("finish_reason") in ("incomplete", "length"):
        turn.extra |= {"finish_reason": "length"}


def _from_llama(entry: Json) -> Imported:
    conv = object_of(entry["conv"])
    found = Imported(
        text_of(conv.get("name")),
        leaf=text_or_none(conv.get("currNode")),
        at=time_of(conv.get("lastModified")),
    )
    calls: dict[str, str] = {}
    for index, node in enumerate(list_of(entry, "messages")):
        shown = object_of(node)
        key, parent = str(shown.get("id", index)), text_or_none(shown.get("parent"))
        if shown.get("type") in ("root", "system") or shown.get("role") == "system":
            found.system = found.system or found.words(shown.get("content"))
            found.turns.append(Turn(key, parent))
            continue
        if shown.get("role") == "tool":
            name = calls.get(text_of(shown.get("toolCallId")))
            part = result_part(name, found.words(shown.get("content")))
            found.turns.append(Turn(key, parent, parts=[part]))
            continue
        turn = _turn(shown | {"id": key}, f"messages[{index}]", key="id", parent="parent", into=found)
        turn.model, turn.at = text_or_none(shown.get("model")), time_of(shown.get("timestamp"))
        thought = text_of(shown.get("reasoningContent")) or text_of(shown.get("thinking"))
        turn.parts = [thought_part(thought)] if thought else []
        for call in map(object_of, _llama_calls(shown.get("toolCalls"))):
            asked = object_of(call.get("function"))
            calls[text_of(call.get("id"))] = text_of(asked.get("name"))
            turn.parts.append(call_part(asked.get("name"), asked.get("arguments")))
        if turn.role == "assistant" and not turn.text.strip() and calls:
            turn.role = ""  # a step on the way to the answer, which gets its parts
        _llama_files(found, turn, list_of(shown, "extra"))
        found.turns.append(turn)
    found.extra = {"updated_at": found.at, "pinned": conv.get("pinned") is True}
    return found


def _llama_calls(calls: Any) -> list[Any]:
    """Return tool calls, which have been text and a list."""
    if isinstance(calls, str) and calls:
        try:
            calls = json.loads(calls)
        except ValueError:
            return []
    return cast("list[Any]", calls) if isinstance(calls, list) else []


def _llama_files(found: Imported, turn: Turn, files: Sequence[Any]) -> None:
    """Keep attached texts as documents; pictures and recordings have no place here."""
    for file in map(object_of, files):
        content, name = file.get("content"), text_of(file.get("name")) or "file"
        if isinstance(content, str) and content.strip():
            key = f"{turn.key}-{len(found.documents)}"
            found.documents.append({"id": key, "name": name, "kind": "text", "text": content})
            turn.extra.setdefault("documents", []).append(key)
        elif "base64Url" in file:
            found.leave_out("pictures", 1, turn)
        else:
            found.leave_out("recordings" if "base64Data" in file else "files", 1, turn)


def _turn(
    node: Any, place: str, *, key: str, parent: str, text: str = "content", into: Imported | None = None
) -> Turn:
    """Return a message that says who it is by and what it says; pictures in it are counted in `into`."""
    shown = object_of(node)
    role = shown.get("role")
    if role not in ("user", "assistant"):
        given = "no text" if isinstance(role, dict | list) else quoted(role, 30)
        raise BadError(f"{place}.role is {given}, not user or assistant")
    found = shown.get(key)
    if not isinstance(found, str | int):
        raise BadError(f"{place} has no {key}")
    turn = Turn(str(found), text_or_none(shown.get(parent)), role)
    content = shown.get(text)
    turn.text = text_of(content) if into is None else into.words(content, turn)
    return turn
