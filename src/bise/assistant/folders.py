"""Folders of conversations: nothing but a name on each; and changes of many conversations at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update

from bise.assistant.conversations import Conversation, as_conversation, checked_changes, owned, set_fields
from bise.assistant.storage import Storage
from bise.errors import RequestError
from bise.store.chat_schema import ConversationRecord

MAX_AT_ONCE = 1000
"""Conversations in one change, and in one folder's list."""
_TOGETHER = {"folder", "pinned", "archived"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that holds something."""

    name: str
    conversations: int


def folders_of(storage: Storage, owner: str) -> list[Folder]:
    """Return the folders of `owner` by name; an empty folder does not exist."""
    count = func.count()
    query = (
        select(ConversationRecord.folder, count)
        .where(
            ConversationRecord.owner == owner,
            ConversationRecord.deleted_at.is_(None),
            ConversationRecord.folder.is_not(None),
            ConversationRecord.folder != "",
        )
        .group_by(ConversationRecord.folder)
    )
    with storage.reading() as session:
        rows = session.execute(query).all()
    found = [Folder(name=str(name), conversations=int(held)) for name, held in rows]
    return sorted(found, key=lambda folder: folder.name.casefold())


def in_folder(storage: Storage, owner: str, name: str) -> list[Conversation]:
    """Return the conversations of a folder, the newest first."""
    query = (
        select(ConversationRecord)
        .where(
            ConversationRecord.owner == owner,
            ConversationRecord.deleted_at.is_(None),
            ConversationRecord.folder == name,
        )
        .order_by(ConversationRecord.updated_at.desc())
        .limit(MAX_AT_ONCE)
    )
    with storage.reading() as session:
        return [as_conversation(record) for record in session.scalars(query)]


def rename_folder(storage: Storage, owner: str, name: str, to: str | None) -> int:
    """Give a folder another name, or with None dissolve it; returns how many conversations it held."""
    target = checked_changes({"folder": to})["folder"]
    statement = (
        update(ConversationRecord)
        .where(ConversationRecord.owner == owner, ConversationRecord.folder == name)
        .values(folder=target)
    )
    with storage.writing() as session:
        query = select(func.count()).where(
            ConversationRecord.owner == owner, ConversationRecord.folder == name
        )
        held = session.scalar(query) or 0
        session.execute(statement)
    return held


def change_many(storage: Storage, owner: str, ids: Sequence[str], changes: Mapping[str, Any]) -> int:
    """Set `folder`, `pinned` or `archived` of many conversations in one transaction: all or none of them.

    Raises RequestError for another field, NotFoundError when one of them is not there.
    """
    for name in changes:
        if name not in _TOGETHER:
            raise RequestError(f"{name} cannot be changed for several conversations at once", field=name)
    checked = checked_changes(changes)
    with storage.writing() as session:
        for conversation_id in ids:
            set_fields(session, owned(session, owner, conversation_id), checked)
    return len(ids)
