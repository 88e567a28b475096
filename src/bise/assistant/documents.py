"""Documents in a conversation: kept as text, given to the model whole where they fit, else by passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from bise.assistant.conversations import owned
from bise.assistant.messages import Message
from bise.assistant.models import ChatModels, ModelFacts
from bise.assistant.storage import Storage
from bise.errors import NotFoundError
from bise.store.chat_schema import DocumentRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document as others see it."""

    id: str
    conversation_id: str
    name: str
    kind: str
    tokens: int
    text: str


class Documents:
    """The documents in one storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, owner: str, conversation_id: str, document_id: str) -> Document:
        """Return one document; NotFoundError when it is not in this conversation of `owner`."""
        with self._storage.reading() as session:
            owned(session, owner, conversation_id)
            record = session.get(DocumentRecord, document_id)
            if record is None or record.conversation_id != conversation_id:
                raise NotFoundError("there is no such document", field="document")
            return as_document(record)

    def listing(self, owner: str, conversation_id: str) -> list[Document]:
        """Return all documents of a conversation, the oldest first."""
        with self._storage.reading() as session:
            owned(session, owner, conversation_id)
            query = select(DocumentRecord).where(DocumentRecord.conversation_id == conversation_id)
            return [as_document(record) for record in session.scalars(query.order_by(DocumentRecord.id))]


async def with_documents(
    documents: Documents,
    models: ChatModels,
    owner: str,
    facts: ModelFacts,
    history: Sequence[Message],
    texts: list[str],
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the texts with their documents in them, and the passages used."""
    raise NotImplementedError


def as_document(record: DocumentRecord) -> Document:
    """Return a record as a value."""
    return Document(
        id=record.id,
        conversation_id=record.conversation_id,
        name=record.name,
        kind=record.kind,
        tokens=record.tokens,
        text=record.text,
    )
