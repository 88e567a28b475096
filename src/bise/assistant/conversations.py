"""Conversations of one owner: made, listed, searched, renamed, pinned, deleted and restored.

Every call takes the owner; what belongs to someone else does not exist. Knows nothing of models or HTTP.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, and_, bindparam, delete, or_, select, text, update
from sqlalchemy.orm import Session

from bise.assistant.storage import Storage, new_id
from bise.assistant.wording import check_storable, folded, words_of
from bise.errors import NotFoundError, RequestError, quoted
from bise.store.chat_schema import ConversationRecord, MessageRecord
from bise.store.schema import JsonObject

MAX_TITLE = 200
MAX_SYSTEM = 200_000
PAGE = 40
"""Conversations in one page of the list."""
KEEP_DELETED_S = 7 * 86400.0
"""How long a deleted conversation can be restored."""
MAX_INDEXED = 200_000
"""Characters of one text that PostgreSQL's search index takes; SQLite's has no bound."""
_REMOVED_AT_ONCE = 1000
"""Ids in one statement: databases bound how many values that may have."""
_CHANGEABLE = {"title", "pinned", "archived", "folder", "model", "system", "params", "persona_id"}
_LONGEST = {"system": MAX_SYSTEM, "persona_id": 36}
_PARAMS = {
    "temperature": (0.0, 5.0),
    "top_p": (0.0, 1.0),
    "max_tokens": (1, 1 << 24),
    "seed": (0, (1 << 53) - 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation as others see it, without its messages."""

    id: str
    title: str
    is_title_frozen: bool
    pinned: bool
    archived: bool
    folder: str | None
    persona_id: str | None
    """The persona whose instructions it was given; they may have been changed here since."""
    model: str | None
    system: str
    params: JsonObject
    leaf_id: str | None
    created_at: float
    updated_at: float
    snippet: str | None = None
    """Where a search matched."""


class Matches(NamedTuple):
    """What a search found, the best first, and where the next page begins."""

    found: tuple[Conversation, ...]
    cursor: str | None


class Conversations:
    """The conversations in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(
        self,
        owner: str,
        *,
        title: str = "",
        model: str | None = None,
        system: str = "",
        params: Mapping[str, Any] | None = None,
        folder: str | None = None,
        persona_id: str | None = None,
    ) -> Conversation:
        """Make an empty conversation. Raises RequestError for a field out of bounds."""
        now = time.time()
        checked = checked_changes(
            {
                "title": title,
                "system": system,
                "params": dict(params or {}),
                "folder": folder,
                "model": model,
                "persona_id": persona_id,
            }
        )
        record = ConversationRecord(
            id=new_id(),
            owner=owner,
            title=checked["title"],
            is_title_frozen=bool(title),
            is_pinned=False,
            folder=checked["folder"],
            model=checked["model"],
            system=checked["system"],
            params=checked["params"],
            leaf_id=None,
            created_at=now,
            updated_at=now,
            deleted_at=None,
            archived_at=None,
            persona_id=checked["persona_id"],
        )
        with self._storage.writing() as session:
            session.add(record)
            session.flush()
            if title:
                index_text(session, record.id, "", title)
        return as_conversation(record)

    def get(self, owner: str, conversation_id: str) -> Conversation:
        """Return one conversation; NotFoundError when it is deleted or someone else's."""
        with self._storage.reading() as session:
            return as_conversation(owned(session, owner, conversation_id))

    def change(self, owner: str, conversation_id: str, changes: Mapping[str, Any]) -> Conversation:
        """Set fields; a title set here is never replaced by a made one. Raises RequestError."""
        checked = checked_changes(changes)
        with self._storage.writing() as session:
            record = owned(session, owner, conversation_id)
            set_fields(session, record, checked)
            session.flush()
            return as_conversation(record)

    def name(self, owner: str, conversation_id: str, title: str) -> Conversation | None:
        """Give a made title; None when a person has chosen one meanwhile."""
        with self._storage.writing() as session:
            record = owned(session, owner, conversation_id)
            if record.is_title_frozen:
                return None
            record.title = title[:MAX_TITLE]
            index_text(session, record.id, "", record.title)
            session.flush()
            return as_conversation(record)

    def delete(self, owner: str, conversation_ids: Sequence[str]) -> None:
        """Hide conversations, all of them or none; `restore` brings them back for a week."""
        with self._storage.writing() as session:
            for conversation_id in conversation_ids:
                owned(session, owner, conversation_id).deleted_at = time.time()

    def restore(self, owner: str, conversation_id: str) -> Conversation:
        """Bring a deleted conversation back."""
        with self._storage.writing() as session:
            record = session.get(ConversationRecord, conversation_id)
            if record is None or record.owner != owner:
                raise _missing(conversation_id)
            record.deleted_at = None
            session.flush()
            return as_conversation(record)

    def purge(self, before: float | None = None) -> int:
        """Remove for good what was deleted before `before` (a week ago); returns how many."""
        limit = time.time() - KEEP_DELETED_S if before is None else before
        with self._storage.writing() as session:
            return remove_conversations(session, ConversationRecord.deleted_at < limit)

    def forget(self, owner: str) -> int:
        """Remove for good all that an owner has, deleted or not; returns how many conversations."""
        with self._storage.writing() as session:
            return remove_conversations(session, ConversationRecord.owner == owner)

    def listing(
        self,
        owner: str,
        *,
        cursor: str | None = None,
        limit: int = PAGE,
        archived: bool = False,
        folder: str | None = None,
    ) -> list[Conversation]:
        """Return pinned conversations first (without a cursor), then the rest, the newest first.

        `cursor` is `cursor_after` the last one of the page before. Archived ones are listed apart.
        """
        kept = ConversationRecord.archived_at
        mine = [*_mine(owner), kept.is_not(None) if archived else kept.is_(None)]
        if folder is not None:
            mine.append(ConversationRecord.folder == folder)
        order = (ConversationRecord.updated_at.desc(), ConversationRecord.id.desc())
        with self._storage.reading() as session:
            pinned: list[ConversationRecord] = []
            rest = select(ConversationRecord).where(*mine, ConversationRecord.is_pinned.is_(False))
            if cursor is None:
                query = select(ConversationRecord).where(*mine, ConversationRecord.is_pinned.is_(True))
                pinned = list(session.scalars(query.order_by(*order)))
            else:
                at, key = _read_cursor(cursor)
                same = and_(ConversationRecord.updated_at == at, ConversationRecord.id < key)
                rest = rest.where(or_(ConversationRecord.updated_at < at, same))
            found = [*pinned, *session.scalars(rest.order_by(*order).limit(limit))]
            return [as_conversation(record) for record in found]

    def search(self, owner: str, query: str, *, limit: int = PAGE, cursor: str | None = None) -> Matches:
        """Return conversations whose title or text has all words of `query` (the last may be unfinished).

        Case and accents do not count. Best matches first, each with a snippet of its best message; `cursor`
        is that of the page before.
        """
        words = words_of(query)
        first = 0 if cursor is None else _read_place(cursor)
        if not words:
            return Matches((), None)
        with self._storage.reading() as session:
            postgres = session.get_bind().dialect.name == "postgresql"
            statement = _SEARCH_POSTGRES if postgres else _SEARCH_SQLITE
            match = " & ".join(words) + ":*" if postgres else _match_sqlite(query)
            binds = {"match": match, "owner": owner, "most": limit + 1, "first": first}
            if postgres:
                binds["word"] = words[0]
            rows = session.execute(text(statement), binds).all()
            snippets: dict[str, str] = {row[0]: row[1] for row in rows[:limit]}
            records = session.scalars(select(ConversationRecord).where(ConversationRecord.id.in_(snippets)))
            by_id = {record.id: record for record in records}
            found = tuple(as_conversation(by_id[key], snippets[key]) for key in snippets if key in by_id)
        return Matches(found, f"{first + limit}" if len(rows) > limit else None)


_SEARCH_SQLITE = """
WITH hits AS MATERIALIZED (
    SELECT s.rowid AS place, s.conversation_id AS conversation,
        bm25(message_search) - 1e6 * (s.message_id = '') AS score
    FROM message_search s JOIN conversations c ON c.id = s.conversation_id
    WHERE message_search MATCH :match AND c.owner = :owner AND c.deleted_at IS NULL
), best AS MATERIALIZED (
    SELECT place, conversation, score FROM (
        SELECT place, conversation, score,
            row_number() OVER (PARTITION BY conversation ORDER BY score, place) AS number FROM hits
    ) WHERE number = 1 ORDER BY score, place LIMIT :most OFFSET :first
)
SELECT best.conversation, snippet(message_search, 2, '', '', '…', 12)
FROM best JOIN message_search ON message_search.rowid = best.place
WHERE message_search MATCH :match ORDER BY best.score, best.place
"""
_SEARCH_POSTGRES = """
SELECT conversation_id, snippet FROM (
    SELECT DISTINCT ON (s.conversation_id) s.conversation_id, s.message_id,
        substr(s.text, greatest(1, position(:word in s.folded) - 60), 160) AS snippet,
        (s.message_id = '') AS is_title, ts_rank(s.words, to_tsquery('simple', :match)) AS score
    FROM message_search s JOIN conversations c ON c.id = s.conversation_id
    WHERE s.words @@ to_tsquery('simple', :match) AND c.owner = :owner AND c.deleted_at IS NULL
    ORDER BY s.conversation_id, is_title DESC, score DESC, s.message_id
) AS best
ORDER BY is_title DESC, score DESC, conversation_id LIMIT :most OFFSET :first
"""


def _match_sqlite(query: str) -> str:
    """Return a query for FTS5: all words, the last one unfinished. Its index keeps `ß`, folded it is `ss`."""
    found: list[str] = []
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", query)) or words_of(query)
    for number, word in enumerate(words, 1):
        plain = folded(word)
        forms = dict.fromkeys((word, plain, plain.replace("ss", "ß")))
        end = "*" if number == len(words) else ""
        found.append("(" + " OR ".join(f'"{form}"{end}' for form in forms) + ")")
    return " AND ".join(found)


def _read_place(cursor: str) -> int:
    if not cursor.isdecimal() or len(cursor) > 9:
        raise RequestError("cursor is none that this server gave", field="cursor")
    return int(cursor)


def cursor_after(page: Sequence[Conversation], limit: int = PAGE) -> str | None:
    """Return where the page after `page` begins; None when there is none."""
    rest = [found for found in page if not found.pinned]
    return f"{rest[-1].updated_at!r}_{rest[-1].id}" if len(rest) >= limit else None


def _read_cursor(cursor: str) -> tuple[float, str]:
    """Return time and id in a cursor; a time alone stands before all conversations of that time."""
    at, _, key = cursor.partition("_")
    try:
        time_ = float(at)
    except ValueError:
        time_ = math.nan
    if not math.isfinite(time_) or len(key) > 64:
        raise RequestError("cursor is none that this server gave", field="cursor")
    return time_, key


def _mine(owner: str) -> tuple[ColumnElement[bool], ...]:
    return (ConversationRecord.owner == owner, ConversationRecord.deleted_at.is_(None))


def set_fields(session: Session, record: ConversationRecord, checked: Mapping[str, Any]) -> None:
    """Put `checked_changes` into a record."""
    for name, value in checked.items():
        if name == "archived":
            record.archived_at = time.time() if value else None
        else:
            setattr(record, "is_pinned" if name == "pinned" else name, value)
    if "title" in checked:
        record.is_title_frozen = True
        index_text(session, record.id, "", record.title)


def owned(session: Session, owner: str, conversation_id: str) -> ConversationRecord:
    """Return a living conversation of `owner`; NotFoundError otherwise."""
    record = session.get(ConversationRecord, conversation_id)
    if record is None or record.owner != owner or record.deleted_at is not None:
        raise _missing(conversation_id)
    return record


def owned_message(session: Session, owner: str, message_id: str) -> tuple[ConversationRecord, MessageRecord]:
    """Return a message of `owner` and its conversation; NotFoundError otherwise."""
    message = session.get(MessageRecord, message_id)
    if message is None:
        raise NotFoundError("there is no such message", field="message")
    return owned(session, owner, message.conversation_id), message


def index_text(session: Session, conversation_id: str, message_id: str, content: str) -> None:
    """Put a message's text, or with an empty message id the title, into the search index, once."""
    key = {"conversation": conversation_id, "message": message_id}
    session.flush()
    if session.get_bind().dialect.name == "postgresql":
        key |= {"text": content, "folded": folded(content[:MAX_INDEXED])}
        remove, add = _UNINDEX_POSTGRES, _INDEX_POSTGRES
    else:  # SQLite's index folds what it reads
        key |= {"text": content, "row": search_row(conversation_id, message_id)}
        remove, add = _UNINDEX_SQLITE, _INDEX_SQLITE
    session.execute(text(remove), key)
    session.execute(text(add), key)


_UNINDEX_POSTGRES = (
    "DELETE FROM message_search WHERE conversation_id = :conversation AND message_id = :message"
)
_INDEX_POSTGRES = """
INSERT INTO message_search (conversation_id, message_id, text, folded)
VALUES (:conversation, :message, :text, :folded)
"""
_UNINDEX_SQLITE = "DELETE FROM message_search WHERE rowid = :row"
_INDEX_SQLITE = """
INSERT INTO message_search (rowid, conversation_id, message_id, text)
VALUES (:row, :conversation, :message, :text)
"""


def search_row(conversation_id: str, message_id: str) -> int:
    """Return where SQLite's index has a text: its rows are found by number alone, anything else is a scan."""
    digest = hashlib.blake2b(f"{conversation_id} {message_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def remove_conversations(session: Session, condition: ColumnElement[bool]) -> int:
    """Remove conversations with all that hangs on them, and from the search index; returns how many."""
    ids = list(session.scalars(select(ConversationRecord.id).where(condition)))
    unindex = text("DELETE FROM message_search WHERE conversation_id IN :ids")
    for start in range(0, len(ids), _REMOVED_AT_ONCE):
        some = ids[start : start + _REMOVED_AT_ONCE]
        session.execute(unindex.bindparams(bindparam("ids", expanding=True)), {"ids": some})
        session.execute(delete(ConversationRecord).where(ConversationRecord.id.in_(some)))
    return len(ids)


def touch(session: Session, conversation_id: str, leaf_id: str | None) -> None:
    """Note that something happened, and which branch is on screen."""
    session.execute(
        update(ConversationRecord)
        .where(ConversationRecord.id == conversation_id)
        .values(updated_at=time.time(), leaf_id=leaf_id)
    )


def checked_changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked fields of a conversation. Raises RequestError naming the field and what it may be."""
    checked: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in _CHANGEABLE:
            raise RequestError(
                f"{quoted(name)} is no field of a conversation that can be changed", field="body"
            )
        if name in ("pinned", "archived"):
            if not isinstance(value, bool):
                raise RequestError(f"{name} must be true or false, got {quoted(value)}", field=name)
        elif name == "params":
            value = checked_params(value)
        elif value is None and name in ("folder", "model", "persona_id"):
            pass
        else:
            value = _checked_text(name, value)
        checked[name] = value
    return checked


def _checked_text(name: str, value: Any) -> str | None:
    most = _LONGEST.get(name, MAX_TITLE)
    if not isinstance(value, str) or len(value) > most:
        raise RequestError(f"{name} must be text of at most {most} characters", field=name)
    check_storable(value, name)
    if name == "folder":
        return " ".join(value.split()) or None
    return " ".join(value.split()) if name == "title" else value


def checked_params(value: Any) -> JsonObject:
    """Return checked sampling parameters; a null means the model's default and is left out."""
    if not isinstance(value, dict):
        raise RequestError("params must be an object", field="params")
    checked: JsonObject = {}
    fields = cast("dict[str, Any]", value)
    for name, number in fields.items():
        if name not in _PARAMS:
            known = ", ".join(_PARAMS)
            raise RequestError(f"params.{quoted(name)} is not known; known: {known}", field="params")
        if number is None:
            continue
        low, high = _PARAMS[name]
        kinds = (int,) if name in ("max_tokens", "seed") else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds) or not low <= number <= high:
            raise RequestError(
                f"params.{name} must be a number from {low} to {high}, got {quoted(number)}",
                field=f"params.{name}",
            )
        checked[name] = number
    return checked


def as_conversation(record: ConversationRecord, snippet: str | None = None) -> Conversation:
    """Return a record as a value."""
    return Conversation(
        id=record.id,
        title=record.title,
        is_title_frozen=record.is_title_frozen,
        pinned=record.is_pinned,
        archived=record.archived_at is not None,
        folder=record.folder,
        persona_id=record.persona_id,
        model=record.model,
        system=record.system,
        params=record.params,
        leaf_id=record.leaf_id,
        created_at=record.created_at,
        updated_at=record.updated_at,
        snippet=snippet,
    )


def _missing(conversation_id: str) -> NotFoundError:
    return NotFoundError(f"there is no conversation {conversation_id[:40]}", field="conversation")
