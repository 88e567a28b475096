"""Conversations in and out: Markdown and JSON out; bise, ChatGPT, open-webui and LibreChat exports in.

An import is one transaction per conversation, keeps every branch, and says what it skipped and why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from bise.assistant.conversations import MAX_TITLE, Conversation, index_text
from bise.assistant.messages import Message, new_row
from bise.assistant.storage import Storage, new_id
from bise.errors import RequestError
from bise.store.chat_schema import ConversationRecord

FORMAT = "bise-conversation-1"
MAX_IMPORTED = 20_000
"""Messages of one imported conversation."""


@dataclass(slots=True)
class Turn:
    """A message on its way in."""

    key: str
    parent: str | None
    role: str
    text: str
    model: str | None = None
    at: float | None = None


@dataclass(slots=True)
class Imported:
    """A conversation on its way in."""

    title: str
    turns: list[Turn]
    leaf: str | None = None
    at: float | None = None
    system: str = ""


@dataclass(slots=True)
class Report:
    """What an import did."""

    conversations: int = 0
    messages: int = 0
    skipped: list[str] = field(default_factory=list[str])


def as_markdown(conversation: Conversation, branch: Sequence[Message]) -> str:
    """Return the branch on screen as Markdown."""
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.system.strip():
        parts.append(f"*Instructions:* {conversation.system.strip()}")
    for message in branch:
        who = (
            "You"
            if message.role == "user"
            else f"Assistant ({message.model})"
            if message.model
            else "Assistant"
        )
        parts.append(f"## {who}\n\n{message.text}")
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation, messages: Sequence[Message]) -> dict[str, Any]:
    """Return a conversation with all its branches; `read_export` takes it back."""
    return {
        "format": FORMAT,
        "title": conversation.title,
        "system": conversation.system,
        "created_at": conversation.created_at,
        "leaf": conversation.leaf_id,
        "messages": [
            {
                "id": message.id,
                "parent": message.parent_id,
                "role": message.role,
                "text": message.text,
                "model": message.model,
                "created_at": message.created_at,
            }
            for message in messages
        ],
    }


def read_export(content: bytes) -> tuple[list[Imported], list[str]]:
    """Return the conversations of an export and what could not be read in it.

    Raises RequestError for a file of no known kind.
    """
    try:
        text = content.decode("utf-8-sig")
        document: Any = _lines(text) if text.count("\n{") else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "the file is not JSON; import a conversations.json export", field="file"
        ) from error
    entries = cast("list[Any]", document if isinstance(document, list) else [document])
    found: list[Imported] = []
    skipped: list[str] = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_conversation(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            skipped.append(f"conversation {number}: {type(error).__name__} in its form")
    if not found:
        raise RequestError(
            "no conversation found; known: exports of bise, ChatGPT, open-webui and LibreChat", field="file"
        )
    return found, skipped


def store_imported(storage: Storage, owner: str, found: Sequence[Imported], skipped: Sequence[str]) -> Report:
    """Keep imported conversations, each in one transaction, and return what happened."""
    report = Report(skipped=list(skipped))
    for number, conversation in enumerate(found, 1):
        turns = [turn for turn in conversation.turns if turn.text.strip()]
        if not turns or len(turns) > MAX_IMPORTED:
            report.skipped.append(f"conversation {number}: {len(turns)} messages")
            continue
        _store(storage, owner, conversation, turns)
        report.conversations += 1
        report.messages += len(turns)
    return report


def _store(storage: Storage, owner: str, source: Imported, turns: list[Turn]) -> None:
    now = time.time()
    record = ConversationRecord(
        id=new_id(),
        owner=owner,
        title=" ".join(source.title.split())[:MAX_TITLE],
        is_title_frozen=True,
        is_pinned=False,
        folder=None,
        model=None,
        system=source.system,
        params={},
        leaf_id=None,
        created_at=source.at or now,
        updated_at=source.at or now,
        deleted_at=None,
        archived_at=None,
        persona_id=None,
    )
    parents = {turn.key: turn.parent for turn in source.turns}
    keys = {turn.key: new_id() for turn in turns}

    def kept(key: str | None) -> str | None:
        """Return the new id of the nearest ancestor that has a text."""
        for _ in range(len(parents) + 1):
            if key is None or key in keys:
                break
            key = parents.get(key)
        return None if key is None else keys.get(key)

    with storage.writing() as session:
        session.add(record)
        session.flush()
        index_text(session, record.id, "", record.title)
        for turn in turns:
            row = new_row(record.id, kept(turn.parent), turn.role, turn.text, status="complete")
            row.id, row.model, row.created_at = keys[turn.key], turn.model, turn.at or record.created_at
            session.add(row)
            index_text(session, record.id, row.id, row.text)
        record.leaf_id = kept(source.leaf) or keys[turns[-1].key]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _conversation(entry: Any) -> Imported:
    if entry.get("format") == FORMAT:
        return _from_bise(entry)
    if "mapping" in entry:
        return _from_chatgpt(entry)
    if "chat" in entry and "history" in entry["chat"]:
        return _from_open_webui(entry)
    if "messages" in entry and ("conversationId" in entry or "recursive" in entry):
        return _from_librechat(entry)
    raise ValueError


def _from_bise(entry: Mapping[str, Any]) -> Imported:
    turns = [
        Turn(
            turn["id"],
            turn.get("parent"),
            _role(turn["role"]),
            str(turn["text"]),
            turn.get("model"),
            turn.get("created_at"),
        )
        for turn in entry["messages"]
    ]
    title, system = str(entry.get("title", "")), str(entry.get("system", ""))
    return Imported(title, turns, entry.get("leaf"), entry.get("created_at"), system)


def _from_chatgpt(entry: Mapping[str, Any]) -> Imported:
    turns: list[Turn] = []
    nodes: dict[str, Any] = entry["mapping"]
    for key, node in nodes.items():
        message: dict[str, Any] = node.get("message") or {}
        role = message["author"]["role"] if message else "none"
        content: dict[str, Any] = message.get("content") or {}
        parts: list[Any] = content.get("parts") or []
        text = "\n".join(part for part in parts if isinstance(part, str))
        details: dict[str, Any] = message.get("metadata") or {}
        turns.append(
            Turn(
                key,
                node.get("parent"),
                "user" if role == "user" else "assistant",
                text if role in ("user", "assistant") else "",
                details.get("model_slug"),
                message.get("create_time"),
            )
        )
    return Imported(entry.get("title") or "", turns, entry.get("current_node"), entry.get("create_time"))


def _from_open_webui(entry: Mapping[str, Any]) -> Imported:
    chat = entry["chat"]
    turns = [
        Turn(
            key,
            node.get("parentId"),
            _role(node["role"]),
            str(node["content"]),
            node.get("model"),
            node.get("timestamp"),
        )
        for key, node in chat["history"]["messages"].items()
    ]
    title = entry.get("title") or chat.get("title") or ""
    return Imported(title, turns, chat["history"].get("currentId"), entry.get("created_at"))


def _from_librechat(entry: Mapping[str, Any]) -> Imported:
    turns: list[Turn] = []

    def walk(messages: Sequence[Mapping[str, Any]], parent: str | None) -> None:
        for node in messages:
            key = str(node["messageId"])
            above = parent if entry.get("recursive") else node.get("parentMessageId")
            role = "user" if node.get("isCreatedByUser") else "assistant"
            parts: list[Any] = node.get("content") or []
            texts = [cast("dict[str, Any]", part) for part in parts if isinstance(part, dict)]
            text = node.get("text") or "\n".join(
                str(part.get("text", "")) for part in texts if part.get("type") == "text"
            )
            turns.append(Turn(key, above, role, text, node.get("model"), _seconds(node.get("createdAt"))))
            walk(node.get("children") or [], key)

    walk(entry["messages"], None)
    return Imported(entry.get("title") or "", turns)


def _seconds(value: Any) -> float | None:
    return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else None


def _role(role: Any) -> str:
    if role not in ("user", "assistant"):
        raise ValueError(role)
    return role
