"""The messages of a conversation: a tree, of which one branch is on screen.

Writes are short transactions; a running answer's text is saved in single statements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from bise.assistant.conversations import index_text, owned, owned_message, touch
from bise.assistant.storage import Storage, new_id
from bise.assistant.wording import check_storable
from bise.errors import ConflictError, NotFoundError, RequestError
from bise.store.chat_schema import ConversationRecord, MessageRecord
from bise.store.schema import JsonObject

LIVE = ("queued", "prefill", "running")
"""States of an answer that a run still works on."""
MAX_TEXT = 4_000_000
PAGE = 40
"""Messages in one page of a transcript."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message as others see it."""

    id: str
    conversation_id: str
    parent_id: str | None
    role: str
    text: str
    model: str | None
    status: str
    created_at: float
    params: JsonObject = field(default_factory=dict[str, Any])
    parts: tuple[JsonObject, ...] = ()
    """What belongs to the message and is no text of it: `type` thinking (text), tool_call (name, arguments),
    tool_result (name, text), dropped (messages: ids that were left out of the prompt at the person's wish) or
    summary (conversation_id, leaf, title, messages: what it sums up; is_small: its model is a small one).
    """
    documents: tuple[str, ...] = ()
    sources: tuple[JsonObject, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    usage: JsonObject | None = None
    timings: JsonObject | None = None
    feedback: int | None = None
    run_id: str | None = None
    seq: int = 0
    """Number of the run's last event that `text` contains."""
    siblings: tuple[str, ...] = ()
    """Messages with the same parent and role, itself included, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of the branch on screen, in order."""

    messages: tuple[Message, ...]
    has_earlier: bool
    total: int
    """Messages of the whole branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is needed to start a run: the answer to fill and the messages before it."""

    conversation: ConversationRecord
    answer: Message
    history: tuple[Message, ...]


class Messages:
    """The messages in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def page(
        self,
        owner: str,
        conversation_id: str,
        *,
        leaf: str | None = None,
        before: str | None = None,
        limit: int = PAGE,
    ) -> Page:
        """Return the last `limit` messages of the branch that ends at `leaf` (None: the one on screen), or
        those before the message `before`. Raises NotFoundError for a message that is not there.
        """
        with self._storage.reading() as session:
            record = owned(session, owner, conversation_id)
            tree = _Tree(session, conversation_id)
            path = tree.path(record.leaf_id if leaf is None else leaf)
            if leaf is not None and not path:
                raise NotFoundError("leaf names no message of this conversation", field="leaf")
            end = len(path)
            if before is not None:
                if before not in path:
                    raise NotFoundError("before names no message of this branch", field="before")
                end = path.index(before)
            wanted = path[max(0, end - limit) : end]
            rows = session.scalars(select(MessageRecord).where(MessageRecord.id.in_(wanted)))
            by_id = {row.id: row for row in rows}
            return Page(
                messages=tuple(as_message(by_id[key], tree.siblings(key)) for key in wanted),
                has_earlier=end > limit,
                total=len(path),
            )

    def branch(self, owner: str, conversation_id: str) -> list[Message]:
        """Return the whole branch on screen."""
        return list(self.page(owner, conversation_id, limit=1 << 30).messages)

    def all(self, owner: str, conversation_id: str) -> list[Message]:
        """Return every message of every branch, oldest first."""
        with self._storage.reading() as session:
            owned(session, owner, conversation_id)
            rows = session.scalars(
                select(MessageRecord)
                .where(MessageRecord.conversation_id == conversation_id)
                .order_by(MessageRecord.created_at, MessageRecord.id)
            )
            return [as_message(row) for row in rows]

    def get(self, owner: str, message_id: str) -> Message:
        """Return one message with its siblings."""
        with self._storage.reading() as session:
            conversation, row = owned_message(session, owner, message_id)
            return as_message(row, _Tree(session, conversation.id).siblings(row.id))

    def ask(
        self,
        owner: str,
        conversation_id: str,
        *,
        text: str,
        parent_id: str | None,
        client_id: str | None,
        model: str,
        params: Mapping[str, Any],
        documents: Sequence[str] = (),
        with_answer: bool = True,
    ) -> tuple[Message, Message | None, bool]:
        """Add a question and the empty answer to it.

        Returns both and whether they are new: the same `client_id` again returns what is there. Raises
        RequestError for an empty text or an unknown parent.
        """
        if not text.strip() or len(text) > MAX_TEXT:
            raise RequestError(f"text must have 1 to {MAX_TEXT} characters", field="text")
        check_storable(text, "text")
        check_storable(client_id or "", "client_id")
        with self._storage.writing() as session:
            owned(session, owner, conversation_id)
            if client_id is not None:
                known = session.scalar(
                    select(MessageRecord).where(
                        MessageRecord.conversation_id == conversation_id, MessageRecord.client_id == client_id
                    )
                )
                if known is not None:
                    child = session.scalar(
                        select(MessageRecord)
                        .where(MessageRecord.parent_id == known.id)
                        .order_by(MessageRecord.id)
                    )
                    return as_message(known), None if child is None else as_message(child), False
            if parent_id is not None:
                parent = session.get(MessageRecord, parent_id)
                if parent is None or parent.conversation_id != conversation_id:
                    raise RequestError("parent_id names no message of this conversation", field="parent_id")
                if parent.status in LIVE:
                    raise ConflictError("the answer before is still being written; stop it or wait")
            question = new_row(conversation_id, parent_id, "user", text, status="complete")
            question.client_id = client_id
            question.documents = list(documents)
            session.add(question)
            index_text(session, conversation_id, question.id, text)
            answer = None
            if with_answer:
                answer = new_row(conversation_id, question.id, "assistant", "", status="queued")
                answer.model, answer.params, answer.run_id = model, dict(params), new_id()
                session.add(answer)
            touch(session, conversation_id, question.id if answer is None else answer.id)
            session.flush()
            tree = _Tree(session, conversation_id)
            return (
                as_message(question, tree.siblings(question.id)),
                None if answer is None else as_message(answer, tree.siblings(answer.id)),
                True,
            )

    def begin(
        self,
        owner: str,
        conversation_id: str,
        *,
        model: str,
        params: Mapping[str, Any],
        parts: Sequence[JsonObject],
    ) -> Message:
        """Add an empty answer that nobody asked for as a conversation's first message."""
        with self._storage.writing() as session:
            owned(session, owner, conversation_id)
            answer = new_row(conversation_id, None, "assistant", "", status="queued")
            answer.model, answer.params, answer.run_id = model, dict(params), new_id()
            answer.parts = list(parts)
            session.add(answer)
            session.flush()
            touch(session, conversation_id, answer.id)
            return as_message(answer, (answer.id,))

    def ask_again(self, owner: str, message_id: str, *, model: str, params: Mapping[str, Any]) -> Message:
        """Add another empty answer beside the answer `message_id`, written or not, and show its branch."""
        with self._storage.writing() as session:
            conversation, row = owned_message(session, owner, message_id)
            if row.role != "assistant":
                raise RequestError("only an answer can be made again", field="message")
            answer = new_row(conversation.id, row.parent_id, "assistant", "", status="queued")
            answer.model, answer.params, answer.run_id = model, dict(params), new_id()
            session.add(answer)
            session.flush()
            touch(session, conversation.id, answer.id)
            return as_message(answer, _Tree(session, conversation.id).siblings(answer.id))

    def resume(self, owner: str, message_id: str) -> Message:
        """Prepare an ended answer to be continued by a new run."""
        with self._storage.writing() as session:
            conversation, row = owned_message(session, owner, message_id)
            if row.role != "assistant" or row.status in LIVE:
                raise ConflictError("only an answer that has ended can be continued")
            row.status, row.run_id, row.seq, row.error, row.finish_reason = "queued", new_id(), 0, None, None
            session.flush()
            return as_message(row, _Tree(session, conversation.id).siblings(row.id))

    def has_run(self, owner: str, run_id: str) -> bool:
        """Return True when an answer of `owner` was written by this run."""
        query = (
            select(MessageRecord.id)
            .join(ConversationRecord, ConversationRecord.id == MessageRecord.conversation_id)
            .where(MessageRecord.run_id == run_id, ConversationRecord.owner == owner)
        )
        with self._storage.reading() as session:
            return session.scalar(query.limit(1)) is not None

    def turn(self, owner: str, message_id: str) -> Turn:
        """Return an answer with the messages that lead to it, root first."""
        with self._storage.reading() as session:
            conversation, row = owned_message(session, owner, message_id)
            path = _Tree(session, conversation.id).path(row.parent_id)
            rows = {
                found.id: found
                for found in session.scalars(select(MessageRecord).where(MessageRecord.id.in_(path)))
            }
            session.expunge_all()
            return Turn(
                conversation=conversation,
                answer=as_message(row),
                history=tuple(as_message(rows[key]) for key in path),
            )

    def show(self, owner: str, message_id: str) -> str:
        """Show the branch through a message, down to its newest end; returns the conversation's id."""
        with self._storage.writing() as session:
            conversation, row = owned_message(session, owner, message_id)
            conversation.leaf_id = _Tree(session, conversation.id).newest_end(row.id)
            return conversation.id

    def save(self, message_id: str, values: Mapping[str, Any], *, is_final: bool) -> None:
        """Save fields of an answer in one statement; with `is_final` also index its text."""
        with self._storage.writing() as session:
            session.execute(update(MessageRecord).where(MessageRecord.id == message_id).values(**values))
            if is_final:
                row = session.get(MessageRecord, message_id)
                if row is not None:
                    index_text(session, row.conversation_id, row.id, row.text)

    def rate(self, owner: str, message_id: str, feedback: int | None) -> Message:
        """Keep a person's judgement of an answer: 1 good, -1 bad, None none."""
        if feedback not in (1, -1, None):
            raise RequestError("feedback must be 1, -1 or null", field="feedback")
        with self._storage.writing() as session:
            conversation, row = owned_message(session, owner, message_id)
            row.feedback = feedback
            session.flush()
            return as_message(row, _Tree(session, conversation.id).siblings(row.id))

    def copy(
        self, owner: str, conversation_id: str, messages: Sequence[Message], documents: Mapping[str, str]
    ) -> None:
        """Put copies of ended messages, each the child of the one before, into an empty conversation.

        `documents` are the ids of their documents with those of the copies there.
        Raises ConflictError when one is still being written.
        """
        if any(message.status in LIVE for message in messages):
            raise ConflictError("the answer is still being written; stop it or wait")
        with self._storage.writing() as session:
            owned(session, owner, conversation_id)
            parent: str | None = None
            for message in messages:
                row = new_row(conversation_id, parent, message.role, message.text, status=message.status)
                row.model, row.params, row.finish_reason = (
                    message.model,
                    message.params,
                    message.finish_reason,
                )
                row.usage, row.timings, row.created_at = message.usage, message.timings, message.created_at
                row.documents = [documents[key] for key in message.documents]
                row.sources = [
                    source | {"document_id": documents.get(source["document_id"], source["document_id"])}
                    for source in message.sources
                ]
                row.parts = list(message.parts)
                session.add(row)
                index_text(session, conversation_id, row.id, row.text)
                parent = row.id
            touch(session, conversation_id, parent)

    def interrupt_all(self) -> int:
        """Mark every answer that was being written when the process died; returns how many."""
        with self._storage.writing() as session:
            found = list(session.scalars(select(MessageRecord).where(MessageRecord.status.in_(LIVE))))
            for row in found:
                row.status, row.finish_reason = "interrupted", None
                index_text(session, row.conversation_id, row.id, row.text)
            return len(found)


class _Tree:
    """Who is whose parent in one conversation; ids are in order of time."""

    def __init__(self, session: Session, conversation_id: str) -> None:
        rows = session.execute(
            select(MessageRecord.id, MessageRecord.parent_id)
            .where(MessageRecord.conversation_id == conversation_id)
            .order_by(MessageRecord.created_at, MessageRecord.id)
        ).all()
        self._parents: dict[str, str | None] = {row[0]: row[1] for row in rows}
        self._children: dict[str | None, list[str]] = {}
        for key, parent in self._parents.items():
            self._children.setdefault(parent, []).append(key)

    def path(self, leaf: str | None) -> list[str]:
        found: list[str] = []
        while leaf is not None and leaf in self._parents and len(found) <= len(self._parents):
            found.append(leaf)
            leaf = self._parents[leaf]
        return found[::-1]

    def siblings(self, key: str) -> tuple[str, ...]:
        return tuple(self._children[self._parents[key]])

    def newest_end(self, key: str) -> str:
        while self._children.get(key):
            key = self._children[key][-1]
        return key


def new_row(
    conversation_id: str, parent_id: str | None, role: str, text: str, *, status: str
) -> MessageRecord:
    """Return a message record that is not stored yet."""
    return MessageRecord(
        id=new_id(),
        conversation_id=conversation_id,
        parent_id=parent_id,
        client_id=None,
        role=role,
        text=text,
        parts=[],
        documents=[],
        sources=[],
        model=None,
        params={},
        status=status,
        finish_reason=None,
        error=None,
        usage=None,
        timings=None,
        feedback=None,
        run_id=None,
        seq=0,
        created_at=time.time(),
    )


def as_message(row: MessageRecord, siblings: tuple[str, ...] = ()) -> Message:
    """Return a record as a value."""
    return Message(
        id=row.id,
        conversation_id=row.conversation_id,
        parent_id=row.parent_id,
        role=row.role,
        text=row.text,
        model=row.model,
        status=row.status,
        created_at=row.created_at,
        params=row.params,
        parts=tuple(row.parts),
        documents=tuple(row.documents),
        sources=tuple(row.sources),
        finish_reason=row.finish_reason,
        error=row.error,
        usage=row.usage,
        timings=row.timings,
        feedback=row.feedback,
        run_id=row.run_id,
        seq=row.seq,
        siblings=siblings,
    )
