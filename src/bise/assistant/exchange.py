"""Conversations in and out: Markdown and JSON out, and what `bise.assistant.imports` read into the storage.

An import is one transaction: all of a file or nothing. It keeps every branch and says what it left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy.orm import Session

from bise.assistant.conversations import MAX_SYSTEM, MAX_TITLE, Conversation, checked_changes, index_text
from bise.assistant.documents import WholeDocument
from bise.assistant.imports import FORMAT, Imported, Turn
from bise.assistant.messages import LIVE, Message, new_row
from bise.assistant.storage import Storage, new_id
from bise.errors import RequestError
from bise.store.chat_schema import ConversationRecord, DocumentRecord

MAX_IMPORTED = 20_000
"""Messages of one imported conversation."""
_KEPT = ("complete", "stopped", "interrupted", "error")


@dataclass(slots=True)
class Report:
    """What an import did."""

    conversations: int = 0
    messages: int = 0
    skipped: list[str] = field(default_factory=list[str])
    """What was left out, a line each: conversations without any text."""


def as_markdown(conversation: Conversation, branch: Sequence[Message]) -> str:
    """Return the branch on screen as Markdown."""
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.system.strip():
        parts.append(f"*Instructions:* {conversation.system.strip()}")
    for message in branch:
        model = f" ({message.model})" if message.model else ""
        who = "You" if message.role == "user" else f"Assistant{model}"
        cites = [
            f"[{source['number']}] {source['name']}"
            + (f", page {source['page']}" if source.get("page") else "")
            for source in message.sources
        ]
        sources = "\n\n" + "\n".join(f"- {cite}" for cite in cites) if cites else ""
        parts.append(f"## {who}\n\n{message.text}{sources}")
    return "\n\n".join(parts) + "\n"


def as_json(
    conversation: Conversation, messages: Sequence[Message], documents: Sequence[WholeDocument] = ()
) -> dict[str, Any]:
    """Return a conversation with all its branches and documents; an import takes it back whole."""
    names = (
        "role", "text", "model", "created_at", "parts", "documents", "sources", "status", "finish_reason",
        "error", "usage", "timings", "feedback", "params",
    )  # fmt: skip
    return {
        "format": FORMAT,
        "title": conversation.title,
        "system": conversation.system,
        "folder": conversation.folder,
        "pinned": conversation.pinned,
        "archived": conversation.archived,
        "model": conversation.model,
        "params": conversation.params,
        "created_at": conversation.created_at,
        "updated_at": conversation.updated_at,
        "leaf": conversation.leaf_id,
        "documents": [
            {
                "id": document.id,
                "name": document.name,
                "kind": document.kind,
                "tokens": document.tokens,
                "text": document.text,
                "pages": document.pages,
            }
            for document in documents
        ],
        "messages": [
            {"id": message.id, "parent": message.parent_id} | {name: getattr(message, name) for name in names}
            for message in messages
        ],
    }


def store_imported(storage: Storage, owner: str, found: Sequence[Imported]) -> Report:
    """Keep imported conversations, all of them or, when one cannot be kept, none; return what happened.

    Raises RequestError naming the conversation and what is wrong with it.
    """
    report = Report()
    with storage.writing() as session:
        for number, conversation in enumerate(found, 1):
            turns = [turn for turn in conversation.turns if turn.role and (turn.text.strip() or turn.parts)]
            if not turns:
                report.skipped.append(f"conversation {number} ('{conversation.title[:40]}') has no messages")
                continue
            try:
                _store(session, owner, conversation, turns)
            except RequestError as error:
                raise RequestError(
                    f"conversation {number} ('{conversation.title[:40]}'): {error}; nothing was imported",
                    field="file",
                ) from None
            report.conversations += 1
            report.messages += len(turns)
    return report


def _store(session: Session, owner: str, source: Imported, turns: list[Turn]) -> None:
    if len(turns) > MAX_IMPORTED:
        raise RequestError(f"has {len(turns)} messages; {MAX_IMPORTED} can be imported", field="file")
    if len(source.system) > MAX_SYSTEM:
        raise RequestError(f"its instructions are longer than {MAX_SYSTEM} characters", field="file")
    now = time.time()
    extra = source.extra
    checked = checked_changes(
        {name: extra[name] for name in ("folder", "model", "params") if extra.get(name) is not None}
    )
    record = ConversationRecord(
        id=new_id(),
        owner=owner,
        title=" ".join(source.title.split())[:MAX_TITLE],
        is_title_frozen=True,
        is_pinned=extra.get("pinned") is True,
        folder=checked.get("folder"),
        model=checked.get("model"),
        system=source.system,
        params=checked.get("params", {}),
        leaf_id=None,
        created_at=source.at or now,
        updated_at=extra.get("updated_at") or source.at or now,
        deleted_at=None,
        archived_at=now if extra.get("archived") is True else None,
        persona_id=None,
    )
    session.add(record)
    session.flush()
    index_text(session, record.id, "", record.title)
    documents = _store_documents(session, record, source.documents)
    keys = {turn.key: new_id() for turn in turns}
    if len(keys) < len(turns):
        raise RequestError("two of its messages have the same id", field="file")
    links = _Links(source.turns, keys)
    for index, turn in enumerate(turns):
        row = new_row(record.id, links.parent(turn), turn.role, turn.text, status="complete")
        row.id, row.model = keys[turn.key], turn.model
        row.created_at = turn.at or record.created_at + index * 1e-6  # branches are in order of time
        row.parts = [*links.parts_before(turn), *turn.parts]
        _fill(row, turn.extra, documents)
        session.add(row)
        index_text(session, record.id, row.id, row.text)
    record.leaf_id = links.nearest(source.leaf) or keys[turns[-1].key]


class _Links:
    """Who follows whom once the messages without a text are left out."""

    def __init__(self, turns: Sequence[Turn], keys: dict[str, str]) -> None:
        self._turns = {turn.key: turn for turn in turns}
        self._keys = keys

    def nearest(self, key: str | None) -> str | None:
        """Return the new id of a message or of the nearest before it that is kept."""
        for turn in self._upward(key):
            if turn.key in self._keys:
                return self._keys[turn.key]
        return None

    def parent(self, turn: Turn) -> str | None:
        """Return the new id of what a message follows."""
        return self.nearest(turn.parent)

    def parts_before(self, turn: Turn) -> list[dict[str, Any]]:
        """Return what was thought and called between the message before and an answer."""
        found: list[dict[str, Any]] = []
        if turn.role == "assistant":
            for above in self._upward(turn.parent):
                if above.key in self._keys:
                    break
                found = [*above.parts, *found]
        return found

    def _upward(self, key: str | None) -> Sequence[Turn]:
        path: list[Turn] = []
        seen: set[str] = set()
        while key is not None and key in self._turns and key not in seen:
            seen.add(key)
            path.append(self._turns[key])
            if key in self._keys:
                break
            key = self._turns[key].parent
        return path


def _store_documents(
    session: Session, record: ConversationRecord, documents: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Keep the documents of an export of our own; return their old ids with the new ones."""
    ids: dict[str, str] = {}
    for document in documents:
        text, name, key = document.get("text"), document.get("name"), document.get("id")
        if not isinstance(text, str) or not isinstance(name, str) or not isinstance(key, str):
            raise RequestError("a document without id, name or text", field="file")
        tokens, pages = document.get("tokens"), document.get("pages")
        ids[key] = new_id()
        session.add(
            DocumentRecord(
                id=ids[key],
                conversation_id=record.id,
                name=name[:300],
                kind=str(document.get("kind", "text"))[:16],
                text=text,
                tokens=tokens if isinstance(tokens, int) else len(text) // 3,
                pages=_pages(pages),
                created_at=record.created_at,
            )
        )
    session.flush()
    return ids


def _fill(row: Any, extra: dict[str, Any], documents: dict[str, str]) -> None:
    """Put the columns of an export of our own into a message, as far as they make sense."""
    status = extra.get("status")
    row.status = status if status in _KEPT else "interrupted" if status in LIVE else "complete"
    for name in ("usage", "timings", "params"):
        if isinstance(extra.get(name), dict):
            setattr(row, name, extra[name])
    if isinstance(extra.get("finish_reason"), str):
        row.finish_reason = extra["finish_reason"][:16]
    if isinstance(extra.get("error"), str):
        row.error = extra["error"]
    if extra.get("feedback") in (1, -1):
        row.feedback = extra["feedback"]
    row.documents = [
        documents[key] for key in _list(extra, "documents") if isinstance(key, str) and key in documents
    ]
    row.sources = [
        source | {"document_id": documents.get(str(source.get("document_id")), "")}
        for source in (
            cast("dict[str, Any]", part) for part in _list(extra, "sources") if isinstance(part, dict)
        )
        if {"number", "name", "text"} <= source.keys()
    ]


def _list(extra: dict[str, Any], name: str) -> list[Any]:
    """Return a list of texts or objects; anything else is none."""
    value = extra.get(name)
    found = cast("list[Any]", value) if isinstance(value, list) else []
    return [part for part in found if isinstance(part, str | dict)]


def _pages(value: Any) -> list[list[int]]:
    """Return pages as they are kept; none where they make no sense."""
    pages = cast("list[Any]", value) if isinstance(value, list) else []
    sound = all(
        isinstance(page, list)
        and len(cast("list[Any]", page)) == 2
        and all(isinstance(number, int) for number in cast("list[Any]", page))
        for page in pages
    )
    return pages if sound else []
