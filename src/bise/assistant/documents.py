"""Documents in a conversation: kept as the text that was read from them, owned like the conversation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from bise.assistant.conversations import owned
from bise.assistant.reader import ReadText
from bise.assistant.storage import Storage, new_id
from bise.assistant.wording import check_storable
from bise.errors import ConflictError, NotFoundError, RequestError
from bise.store.chat_schema import DocumentRecord, MessageRecord, PassageRecord

MAX_DOCUMENTS = 100
"""Documents in one conversation."""
AROUND = 600
"""Characters shown before and after a passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document as others see it."""

    id: str
    conversation_id: str
    name: str
    kind: str
    tokens: int
    """Of the model that the conversation had when the document came."""
    chars: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeDocument(Document):
    """A document with its text."""

    text: str
    pages: tuple[tuple[int, int], ...] = ()
    """(page, character where it begins), for files that have pages."""


class Documents:
    """The documents in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, owner: str, conversation_id: str, document_id: str) -> WholeDocument:
        """Return one document; NotFoundError when it is not in this conversation of `owner`."""
        with self._storage.reading() as session:
            return _whole(_found(session, owner, conversation_id, document_id))

    def add(
        self, owner: str, conversation_id: str, *, name: str, kind: str, read: ReadText, tokens: int
    ) -> Document:
        """Keep a document's text in a conversation. Raises RequestError when it holds too many."""
        check_storable(name, "name")
        with self._storage.writing() as session:
            owned(session, owner, conversation_id)
            held = select(func.count()).where(DocumentRecord.conversation_id == conversation_id)
            if (session.scalar(held) or 0) >= MAX_DOCUMENTS:
                raise RequestError(f"a conversation holds {MAX_DOCUMENTS} documents at most", field="file")
            record = DocumentRecord(
                id=new_id(),
                conversation_id=conversation_id,
                name=" ".join(name.split())[:300] or "file",
                kind=kind,
                text=read.text,
                tokens=tokens,
                pages=[list(page) for page in read.pages],
                created_at=time.time(),
            )
            session.add(record)
            session.flush()
            return _facts(record)

    def listing(self, owner: str, conversation_id: str) -> list[Document]:
        """Return all documents of a conversation, the oldest first."""
        columns = (DocumentRecord.id, DocumentRecord.name, DocumentRecord.kind, DocumentRecord.tokens)
        query = select(*columns, func.length(DocumentRecord.text)).where(
            DocumentRecord.conversation_id == conversation_id
        )
        with self._storage.reading() as session:
            owned(session, owner, conversation_id)
            return [
                Document(
                    id=key, conversation_id=conversation_id, name=name, kind=kind, tokens=tokens, chars=chars
                )
                for key, name, kind, tokens, chars in session.execute(query.order_by(DocumentRecord.id))
            ]

    def delete(self, owner: str, conversation_id: str, document_id: str) -> None:
        """Remove a document. Raises ConflictError when a question was asked with it."""
        with self._storage.writing() as session:
            record = _found(session, owner, conversation_id, document_id)
            query = select(MessageRecord.documents).where(MessageRecord.conversation_id == conversation_id)
            if any(document_id in used for used in session.scalars(query)):
                raise ConflictError("a question was asked with this document; it stays in the conversation")
            session.execute(delete(PassageRecord).where(PassageRecord.document_id == document_id))
            session.delete(record)

    def copy(self, owner: str, source: str, target: str, document_ids: Sequence[str]) -> dict[str, str]:
        """Copy documents into another conversation; return old ids with the new ones."""
        ids = {document_id: new_id() for document_id in document_ids}
        with self._storage.writing() as session:
            owned(session, owner, target)
            for old, new in ids.items():
                record = _found(session, owner, source, old)
                session.add(
                    DocumentRecord(
                        id=new,
                        conversation_id=target,
                        name=record.name,
                        kind=record.kind,
                        text=record.text,
                        tokens=record.tokens,
                        pages=record.pages,
                        created_at=record.created_at,
                    )
                )
        return ids

    # Embeddings

    def vectors(self, document_id: str, model: str) -> dict[int, bytes]:
        """Return the embeddings of a document's passages by their numbers, as far as they were made."""
        query = select(PassageRecord.number, PassageRecord.vector).where(
            PassageRecord.document_id == document_id, PassageRecord.model == model
        )
        with self._storage.reading() as session:
            return {row.number: row.vector for row in session.execute(query)}

    def add_vectors(self, document_id: str, model: str, vectors: Mapping[int, bytes]) -> None:
        """Keep embeddings of passages; does nothing when the document is gone."""
        with self._storage.writing() as session:
            if session.get(DocumentRecord, document_id) is None:
                return
            for number, vector in vectors.items():
                session.merge(
                    PassageRecord(document_id=document_id, model=model, number=number, vector=vector)
                )


def excerpt(document: WholeDocument, start: int, end: int, around: int = AROUND) -> dict[str, object]:
    """Return characters `start` to `end` of a document and what stands around them, for a reader.

    Raises RequestError for a range outside of the text.
    """
    if not 0 <= start < end <= len(document.text):
        raise RequestError(
            f"start and end must be a range within the document's {len(document.text)} characters",
            field="start",
        )
    first, last = max(0, start - around), min(len(document.text), end + around)
    return {
        "start": start,
        "end": end,
        "page": next((page for page, place in reversed(document.pages) if place <= start), None),
        "before": document.text[first:start],
        "text": document.text[start:end],
        "after": document.text[end:last],
        "begins": first == 0,
        "ends": last == len(document.text),
    }


def _found(session: Session, owner: str, conversation_id: str, document_id: str) -> DocumentRecord:
    owned(session, owner, conversation_id)
    record = session.get(DocumentRecord, document_id)
    if record is None or record.conversation_id != conversation_id:
        raise NotFoundError("there is no such document", field="document")
    return record


def _facts(record: DocumentRecord) -> Document:
    return Document(
        id=record.id,
        conversation_id=record.conversation_id,
        name=record.name,
        kind=record.kind,
        tokens=record.tokens,
        chars=len(record.text),
    )


def _whole(record: DocumentRecord) -> WholeDocument:
    return WholeDocument(
        id=record.id,
        conversation_id=record.conversation_id,
        name=record.name,
        kind=record.kind,
        tokens=record.tokens,
        chars=len(record.text),
        text=record.text,
        pages=tuple((int(page), int(place)) for page, place in record.pages),
    )
