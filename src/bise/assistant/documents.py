"""Documents in a conversation: kept as text, given to the model whole where they fit, else by passages."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from bise.assistant.conversations import owned
from bise.assistant.messages import Message
from bise.assistant.models import ModelFacts
from bise.assistant.storage import Storage, new_id
from bise.errors import NotFoundError, RequestError
from bise.store.chat_schema import DocumentRecord

PASSAGE_CHARS = 1200
MAX_PASSAGES = 24
READ_S = 40.0
MAX_DOCUMENTS = 100
"""Documents in one conversation."""


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

    def add(
        self, owner: str, conversation_id: str, *, name: str, kind: str, text: str, tokens: int
    ) -> Document:
        """Keep a document's text in a conversation. Raises RequestError when it holds too many."""
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
                text=text,
                tokens=tokens,
                pages=[],
                created_at=time.time(),
            )
            session.add(record)
            session.flush()
            return as_document(record)

    def listing(self, owner: str, conversation_id: str) -> list[Document]:
        """Return all documents of a conversation, the oldest first."""
        with self._storage.reading() as session:
            owned(session, owner, conversation_id)
            query = select(DocumentRecord).where(DocumentRecord.conversation_id == conversation_id)
            return [as_document(record) for record in session.scalars(query.order_by(DocumentRecord.id))]


async def with_documents(
    documents: Documents,
    owner: str,
    facts: ModelFacts,
    history: Sequence[Message],
    texts: list[str],
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the texts with their documents in them, and the passages used where they were too long.

    All documents go in whole when together they take at most half of the window; else the last question gets
    the passages that fit it best, numbered, within the same share.
    """
    attached: list[list[Document]] = []
    for message in history:
        found = [
            await asyncio.to_thread(documents.get, owner, message.conversation_id, key)
            for key in message.documents
        ]
        attached.append(found)
    everything = [document for found in attached for document in found]
    room = (facts.context or 8192) // 2
    if sum(document.tokens for document in everything) <= room:
        whole = ["".join(_whole(document) for document in found) for found in attached]
        return [part + text for part, text in zip(whole, texts, strict=True)], []
    passages = await asyncio.to_thread(best_passages, everything, texts[-1], room)
    sources = [
        {
            "number": number,
            "document_id": passage.document.id,
            "name": passage.document.name,
            "text": passage.text,
        }
        for number, passage in enumerate(passages, 1)
    ]
    parts = [f"[{source['number']}] from {source['name']}:\n{source['text']}" for source in sources]
    lead = "Passages from documents; cite them by number, like [1]:\n\n" + "\n\n".join(parts) + "\n\n"
    return [*texts[:-1], lead + texts[-1]], sources


def _whole(document: Document) -> str:
    return f"Document {document.name}:\n\n{document.text}\n\n(end of {document.name})\n\n"


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document."""

    document: Document
    text: str
    position: int


def passages_of(document: Document) -> list[Passage]:
    """Return a document in pieces of about PASSAGE_CHARS characters, cut at paragraphs, lines or words."""
    found: list[Passage] = []
    text, start = document.text, 0
    while start < len(text):
        end = min(len(text), start + PASSAGE_CHARS)
        if end < len(text):
            for mark in ("\n\n", "\n", ". ", " "):
                cut = text.rfind(mark, start + PASSAGE_CHARS // 2, end)
                if cut > 0:
                    end = cut + len(mark)
                    break
        found.append(Passage(document, text[start:end].strip(), start))
        start = end
    return [passage for passage in found if passage.text]


def best_passages(documents: Sequence[Document], question: str, room: int) -> list[Passage]:
    """Return the passages that match a question best (BM25, k1 1.2, b 0.75), in reading order, within `room`
    tokens. Without any match, the beginnings of the documents.
    """
    passages = [passage for document in documents for passage in passages_of(document)]
    bags = [Counter(_words(passage.text)) for passage in passages]
    lengths = [sum(bag.values()) for bag in bags]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    asked = set(_words(question))
    seen = Counter(word for bag in bags for word in asked & bag.keys())

    def score(index: int) -> float:
        bag, total = bags[index], 0.0
        for word in asked & bag.keys():
            rarity = math.log(1 + (len(bags) - seen[word] + 0.5) / (seen[word] + 0.5))
            count = bag[word]
            total += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * lengths[index] / mean))
        return total

    ranked = sorted(range(len(passages)), key=lambda index: (-score(index), passages[index].position))
    chosen: list[int] = []
    for index in ranked:
        passage = passages[index]
        share = passage.document.tokens * len(passage.text) / max(1, len(passage.document.text))
        if share > room:
            continue
        room -= math.ceil(share) + 12
        chosen.append(index)
        if len(chosen) >= MAX_PASSAGES:
            break
    return [passages[index] for index in sorted(chosen)]


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.lower())
    return re.findall(r"[^\W_]+", "".join(char for char in plain if not unicodedata.combining(char)))


async def read_document(name: str, content: bytes) -> tuple[str, str]:
    """Return the kind and the text of a file. Raises RequestError saying why it cannot be read."""
    ending = name.rpartition(".")[2].lower()
    kind = {"pdf": "pdf", "docx": "docx", "html": "html", "htm": "html", "csv": "csv", "tsv": "csv"}.get(
        ending, "text"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bise.assistant.document_reader",
        kind,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(READ_S):
            output, _ = await process.communicate(content)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RequestError(f"{name[:100]} takes too long to read", field="file") from None
    try:
        answer: dict[str, str] = json.loads(output)
    except ValueError:
        answer = {"error": "its reader failed"}
    if "error" in answer:
        raise RequestError(f"{name[:100]}: {answer['error']}", field="file")
    if not answer["text"]:
        raise RequestError(f"{name[:100]} has no text", field="file")
    return kind, answer["text"]


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
