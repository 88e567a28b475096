"""The assistant's tables, as typed records; migrations and rules as in `bise.store.schema`.

A conversation is a tree of messages: `parent_id` links them, `leaf_id` names the end of the branch on screen.
Text is one row per message, so saving an answer never rewrites a conversation.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy import text as sql
from sqlalchemy.orm import Mapped, mapped_column

from bise.store.schema import JsonObject, Record

SEARCH_DDL = (
    "CREATE VIRTUAL TABLE message_search USING fts5(conversation_id UNINDEXED, message_id UNINDEXED, text, "
    "tokenize = 'unicode61 remove_diacritics 2')"
)
"""SQLite's search index, as the migration makes it; a row without message_id holds a title."""


class ConversationRecord(Record):
    """A conversation and what its next answer is asked with."""

    __tablename__ = "conversations"
    __table_args__ = (Index("ix_conversations_owner_updated_at", "owner", "updated_at"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    title: Mapped[str] = mapped_column(Text)
    is_title_frozen: Mapped[bool]
    is_pinned: Mapped[bool]
    folder: Mapped[str | None] = mapped_column(String(200))
    model: Mapped[str | None] = mapped_column(String(300))
    system: Mapped[str] = mapped_column(Text)
    params: Mapped[JsonObject] = mapped_column(JSON)
    leaf_id: Mapped[str | None] = mapped_column(String(36))
    created_at: Mapped[float] = mapped_column(Double)
    updated_at: Mapped[float] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    archived_at: Mapped[float | None] = mapped_column(Double)
    persona_id: Mapped[str | None] = mapped_column(String(36))


class MessageRecord(Record):
    """One message. `status`: queued, prefill, running, complete, stopped, interrupted or error."""

    __tablename__ = "messages"
    __table_args__ = (UniqueConstraint("conversation_id", "client_id"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), index=True
    )
    parent_id: Mapped[str | None] = mapped_column(String(36))
    client_id: Mapped[str | None] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16))
    text: Mapped[str] = mapped_column(Text)
    parts: Mapped[list[JsonObject]] = mapped_column(JSON, server_default=sql("'[]'"))
    documents: Mapped[list[str]] = mapped_column(JSON)
    sources: Mapped[list[JsonObject]] = mapped_column(JSON)
    model: Mapped[str | None] = mapped_column(String(300))
    params: Mapped[JsonObject] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(16), index=True)
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[str | None] = mapped_column(Text)
    usage: Mapped[JsonObject | None] = mapped_column(JSON)
    timings: Mapped[JsonObject | None] = mapped_column(JSON)
    feedback: Mapped[int | None] = mapped_column(Integer)
    run_id: Mapped[str | None] = mapped_column(String(36))
    seq: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[float] = mapped_column(Double)


class DocumentRecord(Record):
    """A document in a conversation, as the text that was read from it."""

    __tablename__ = "documents"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), index=True
    )
    name: Mapped[str] = mapped_column(String(300))
    kind: Mapped[str] = mapped_column(String(16))
    text: Mapped[str] = mapped_column(Text)
    tokens: Mapped[int] = mapped_column(Integer)
    pages: Mapped[list[list[int]]] = mapped_column(JSON, server_default=sql("'[]'"))
    created_at: Mapped[float] = mapped_column(Double)


class PassageRecord(Record):
    """What a passage of a document means to a model: its embedding, float32 in machine order."""

    __tablename__ = "passages"

    document_id: Mapped[str] = mapped_column(ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(String(300), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class PersonaRecord(Record):
    """A named way of answering: instructions, and the model and parameters where they are fixed."""

    __tablename__ = "personas"
    __table_args__ = (UniqueConstraint("owner", "name"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), index=True)
    name: Mapped[str] = mapped_column(String(200))
    system: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(String(300))
    params: Mapped[JsonObject] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Double)


class PreferenceRecord(Record):
    """A person's settings in the assistant."""

    __tablename__ = "preferences"

    owner: Mapped[str] = mapped_column(String(200), primary_key=True)
    value: Mapped[JsonObject] = mapped_column(JSON)


class AccountRecord(Record):
    """A person who signs in; `role` is admin or user."""

    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    password_hash: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Double)
    disabled_at: Mapped[float | None] = mapped_column(Double)


class SignInRecord(Record):
    """A browser that is signed in; only a hash of its cookie is kept."""

    __tablename__ = "sign_ins"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double)


ASSISTANT_TABLES = tuple(
    Record.metadata.tables[name]
    for name in (
        "conversations",
        "messages",
        "documents",
        "passages",
        "personas",
        "preferences",
        "accounts",
        "sign_ins",
    )
)
