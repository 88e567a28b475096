"""Conversations in and out: Markdown and JSON out, and files of exports into the storage.

An import reads one conversation after the other, each in a transaction of its own, and says what it left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

from sqlalchemy.orm import Session

from bise.assistant.conversations import MAX_SYSTEM, MAX_TITLE, Conversation, checked_changes, index_text
from bise.assistant.documents import WholeDocument
from bise.assistant.export_file import KNOWN, BrokenFileError, entries
from bise.assistant.imported import BadError, Imported, Turn, object_of, text_of
from bise.assistant.imports import FORMAT, conversation_of
from bise.assistant.messages import LIVE, Message, new_row
from bise.assistant.storage import Storage, new_id
from bise.errors import RequestError, StoreError, quoted
from bise.store.chat_schema import ConversationRecord, DocumentRecord

MAX_IMPORTED = 20_000
"""Messages of one imported conversation."""
MAX_TOLD = 100
"""Conversations that were not taken and are told of with the reason; the rest is a number."""
_KEPT = ("complete", "stopped", "interrupted", "error")


@dataclass(slots=True)
class Report:
    """What an import did."""

    conversations: int = 0
    messages: int = 0
    num_skipped: int = 0
    """Conversations that were not taken."""
    skipped: list[str] = field(default_factory=list[str])
    """The first of them, a line each: which one, and why."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """What was not taken of the conversations that were: pictures, recordings, files, hidden messages..."""

    def skip(self, line: str) -> None:
        """Note a conversation that was not taken."""
        self.num_skipped += 1
        if len(self.skipped) < MAX_TOLD:
            self.skipped.append(line)


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


def import_file(storage: Storage, owner: str, file: IO[bytes]) -> Report:
    """Keep the conversations of an export; return what was taken and what was not.

    A conversation that makes no sense is left out whole and the next one read; a file (or a database) that is
    at fault half way is told of after what came before. Raises RequestError, in one line, when nothing can be
    taken.
    """
    report = Report()
    number = faults = 0
    try:
        for number, entry in enumerate(entries(file), 1):
            try:
                _take(storage, owner, number, conversation_of(entry), report)
            except (BadError, RequestError) as error:
                faults += 1
                report.skip(f"conversation {number} ({quoted(_title_of(entry), 40)}): {error}")
    except (BrokenFileError, StoreError) as error:
        if not report.conversations:
            raise
        report.skip(f"after conversation {number}: {error}")
    if not number:
        raise RequestError(f"the file has no conversation; {KNOWN}", field="file")
    if faults and not report.conversations:
        raise RequestError(f"{report.skipped[0]}; nothing was imported", field="file")
    return report


def _title_of(entry: Any) -> str:
    """Return what a conversation is called, wherever its form has that."""
    known = object_of(entry)
    inner = [object_of(known.get("chat")).get("title"), object_of(known.get("conv")).get("name")]
    return next((text for text in map(text_of, [known.get("title"), *inner]) if text), "")


def _take(storage: Storage, owner: str, number: int, found: Imported, report: Report) -> None:
    turns: list[Turn] = []
    empty = 0
    for turn in found.turns:
        if turn.role and not turn.text.strip() and not turn.parts:
            turn.text = turn.missing
        if turn.role and (turn.text.strip() or turn.parts or turn.extra.get("error")):
            turns.append(turn)
        else:
            empty += bool(turn.role)
    if not turns:
        report.skip(f"conversation {number} ({quoted(found.title, 40)}) has no messages")
        return
    found.leave_out("empty messages", empty)
    with storage.writing() as session:
        _store(session, owner, found, turns)
    report.conversations += 1
    report.messages += len(turns)
    for kind, left in found.left_out.items():
        report.left_out[kind] = report.left_out.get(kind, 0) + left


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
    taken = 0
    for index, turn in enumerate(turns):
        row = new_row(record.id, links.parent(turn), turn.role, turn.text, status="complete")
        row.id, row.model = keys[turn.key], turn.model
        row.created_at = turn.at or record.created_at + index * 1e-6  # branches are in order of time
        before = links.parts_before(turn)
        taken += len(before)
        row.parts = [*before, *turn.parts]
        _fill(row, turn.extra, documents)
        session.add(row)
        index_text(session, record.id, row.id, row.text)
    steps = sum(len(turn.parts) for turn in source.turns if turn.key not in keys)
    source.leave_out("steps without an answer", steps - taken)
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
